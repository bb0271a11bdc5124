//! Rules of a pool that the schema's bounds cannot express, most of them about
//! several fields. Each stands here once, in two
//! languages: as CEL, which the API server evaluates, and as a function, which
//! names the field at fault and the remedy. `tests/it/manifest.rs` compares the
//! two over generated pools. Rules of port entries are in `entries`.
//!
//! Bounds of single fields are in the schema (`pool`); the functions expect
//! values within them.

mod entries;

use std::net::IpAddr;

use kube::core::Rule;

pub(super) use self::entries::{
    AGENT_PORTS_FREE, ANY_OF_SEVERAL, COMPANION_IS_NOT_OFFERED, COMPANIONS_OF_SESSIONS,
    IDENTITY_LEAVES_AGENT_PORTS, LAST_PORT_EXISTS, NO_OVERLAP, PORT_AS_MAPPED,
    PROXY_PROTOCOL_OVER_TCP, REPLIES_OVER_UDP,
};
use super::{
    CONNECTION_ADMIN_PORT, ConnectionPorts, ConnectionServer, Exposure, MAX_ADDRESS_LENGTH,
    MAX_NAME_LENGTH, MAX_RANGES, PortEntry, ProcessingPoolSpec, UNPRIVILEGED_PORTS,
};

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldProblem {
    /// The field, as in `spec.ports[0].count`.
    pub path: String,
    /// What is wrong, and the remedy.
    pub message: String,
}

impl FieldProblem {
    /// A problem with the field at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: message.into(),
        }
    }
}

/// A rule about several fields of `T`.
pub(super) struct FieldRule<T: ?Sized> {
    /// The rule as CEL.
    cel: fn() -> String,
    /// What the API server answers where the rule is broken.
    message: fn() -> String,
    /// What breaks the rule; paths are relative to the value.
    problems: fn(&T) -> Vec<FieldProblem>,
}

impl<T: ?Sized> FieldRule<T> {
    /// The rule for the schema.
    pub(super) fn to_schema(&self) -> Rule {
        Rule::new((self.cel)()).message((self.message)().as_str())
    }
}

/// The name of the resource.
pub(super) const NAME: FieldRule<str> = FieldRule {
    cel: || {
        format!(
            "self.metadata.name.size() <= {MAX_NAME_LENGTH} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"
        )
    },
    message: || {
        format!(
            "metadata.name must have at most {MAX_NAME_LENGTH} lower-case letters, digits and hyphens, and begin with a letter: pods and services are named after it"
        )
    },
    problems: |name| {
        let is_allowed =
            |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
        let is_good = (1..=MAX_NAME_LENGTH).contains(&name.len())
            && name.chars().all(is_allowed)
            && name.starts_with(|letter: char| letter.is_ascii_lowercase())
            && !name.ends_with('-');
        broken(!is_good, "metadata.name", || {
            format!(
                "must have 1 to {MAX_NAME_LENGTH} lower-case letters, digits and hyphens, begin with a letter and not end with a hyphen; this is {name:?}"
            )
        })
    },
};

pub(super) const ENOUGH_PORTS: FieldRule<ProcessingPoolSpec> = FieldRule {
    cel: || {
        "self.replicas * self.ports.map(entry, entry.count).sum() <= self.connectionServer.connectionPorts.last - self.connectionServer.connectionPorts.first + 1".to_owned()
    },
    message: || {
        "replicas times the sum of the ports' counts must not exceed the number of connectionServer.connectionPorts: widen the range, or lower replicas or counts".to_owned()
    },
    problems: |spec| {
        let ConnectionPorts { first, last } = spec.connection_server.connection_ports;
        let per_server: i64 = spec.ports.iter().map(|entry| i64::from(entry.count)).sum();
        let replicas = spec.replicas;
        let needed = i64::from(replicas) * per_server;
        let there = i64::from(last) - i64::from(first) + 1;
        // A range in the wrong order breaks another rule.
        broken(
            needed > there && first <= last,
            "connectionServer.connectionPorts",
            || {
                format!(
                    "{replicas} servers with {per_server} ports each need {needed} connection ports, but {first} to {last} has {there}: widen connectionPorts, or lower replicas or the ports' counts"
                )
            },
        )
    },
};

pub(super) const TABLE_FITS: FieldRule<ProcessingPoolSpec> = FieldRule {
    cel: || format!("self.replicas * size(self.ports) <= {MAX_RANGES}"),
    message: || {
        format!(
            "replicas times the number of entries of ports must not exceed {MAX_RANGES}, so that the port-relationship table fits into a ConfigMap: lower replicas or merge entries"
        )
    },
    problems: |spec| {
        let (replicas, entries) = (spec.replicas, spec.ports.len());
        let ranges = i64::from(replicas) * i64::try_from(entries).unwrap_or(i64::MAX);
        broken(ranges > i64::from(MAX_RANGES), "ports", || {
            format!(
                "{replicas} servers with {entries} entries make {ranges} ranges; {MAX_RANGES} fit into the port-relationship table: lower replicas or merge entries"
            )
        })
    },
};

pub(super) const LOAD_SHARING_PORT_OUTSIDE: FieldRule<ConnectionServer> = FieldRule {
    cel: || {
        "self.loadSharingPort < self.connectionPorts.first || self.loadSharingPort > self.connectionPorts.last".to_owned()
    },
    message: || "loadSharingPort must lie outside connectionPorts".to_owned(),
    problems: |server| {
        let (port, ConnectionPorts { first, last }) =
            (server.load_sharing_port, server.connection_ports);
        broken((first..=last).contains(&port), "loadSharingPort", || {
            format!("{port} must lie outside connectionPorts, {first} to {last}")
        })
    },
};

pub(super) const ADMIN_PORT_FREE: FieldRule<ConnectionServer> = FieldRule {
    cel: || {
        format!(
            "self.loadSharingPort != {CONNECTION_ADMIN_PORT} && (self.connectionPorts.first > {CONNECTION_ADMIN_PORT} || self.connectionPorts.last < {CONNECTION_ADMIN_PORT})"
        )
    },
    message: || {
        format!(
            "neither loadSharingPort nor connectionPorts may include {CONNECTION_ADMIN_PORT}, where connection servers have their admin pages"
        )
    },
    problems: |server| {
        let admin = i32::from(CONNECTION_ADMIN_PORT);
        let ConnectionPorts { first, last } = server.connection_ports;
        let message = || {
            format!(
                "must not include {CONNECTION_ADMIN_PORT}, where connection servers have their admin pages"
            )
        };
        let mut problems = broken(
            server.load_sharing_port == admin,
            "loadSharingPort",
            message,
        );
        let is_inside = (first..=last).contains(&admin);
        problems.extend(broken(is_inside, "connectionPorts", message));
        problems
    },
};

pub(super) const NO_LOW_PORTS_OF_HOSTS: FieldRule<ConnectionServer> = FieldRule {
    cel: || {
        format!(
            "self.exposure != 'HostNetwork' || (self.loadSharingPort >= {UNPRIVILEGED_PORTS} && self.connectionPorts.first >= {UNPRIVILEGED_PORTS})"
        )
    },
    message: || {
        format!(
            "with exposure HostNetwork, loadSharingPort and connectionPorts must not be below {UNPRIVILEGED_PORTS}, because connection servers have no privilege on a node: choose higher ports, or another exposure"
        )
    },
    problems: |server| {
        let on_host = server.exposure == Exposure::HostNetwork;
        let low = |port: i32, path| {
            broken(on_host && port < UNPRIVILEGED_PORTS, path, || {
                format!(
                    "must not be below {UNPRIVILEGED_PORTS} with exposure HostNetwork, because connection servers have no privilege on a node; this is {port}: choose higher ports, or another exposure"
                )
            })
        };
        let mut problems = low(server.load_sharing_port, "loadSharingPort");
        problems.extend(low(server.connection_ports.first, "connectionPorts.first"));
        problems
    },
};

pub(super) const ADVERTISED_ADDRESS: FieldRule<ConnectionServer> = FieldRule {
    cel: || {
        "!has(self.advertisedAddress) || (isIP(self.advertisedAddress) ? ip(self.advertisedAddress).isGlobalUnicast() || ip(self.advertisedAddress).isLoopback() || ip(self.advertisedAddress).isLinkLocalUnicast() : self.advertisedAddress.matches('^([0-9A-Za-z_]([0-9A-Za-z_-]{0,61}[0-9A-Za-z_])?([.]|$))+$') && !self.advertisedAddress.matches('(^|[.])[0-9]*$'))".to_owned()
    },
    message: || {
        "advertisedAddress must be an IP address that can be connected to, or a DNS name, without a port".to_owned()
    },
    problems: |server| {
        let address = server.advertised_address.as_deref();
        let message = address.and_then(|address| check_address(address).err());
        let problem = message.map(|message| FieldProblem::new("advertisedAddress", message));
        problem.into_iter().collect()
    },
};

pub(super) const IN_ORDER: FieldRule<ConnectionPorts> = FieldRule {
    cel: || "self.first <= self.last".to_owned(),
    message: || "first must not be above last".to_owned(),
    problems: |ports| {
        let ConnectionPorts { first, last } = ports;
        broken(first > last, "first", || {
            format!("must not be above last ({last}); this is {first}")
        })
    },
};

/// What breaks a rule in `spec`, whose fields are within their bounds. In the
/// order of the fields; paths begin with `spec`.
#[must_use]
pub fn check(spec: &ProcessingPoolSpec) -> Vec<FieldProblem> {
    let mut problems = Vec::new();
    for (index, entry) in spec.ports.iter().enumerate() {
        problems.extend(within(&format!("spec.ports[{index}]"), check_entry(entry)));
    }
    for rule in [NO_OVERLAP, COMPANIONS_OF_SESSIONS] {
        problems.extend(within("spec", (rule.problems)(spec)));
    }
    let server = &spec.connection_server;
    let ports = (IN_ORDER.problems)(&server.connection_ports);
    problems.extend(within("spec.connectionServer.connectionPorts", ports));
    for rule in [
        LOAD_SHARING_PORT_OUTSIDE,
        ADMIN_PORT_FREE,
        NO_LOW_PORTS_OF_HOSTS,
        ADVERTISED_ADDRESS,
    ] {
        problems.extend(within("spec.connectionServer", (rule.problems)(server)));
    }
    for rule in [IDENTITY_LEAVES_AGENT_PORTS, ENOUGH_PORTS, TABLE_FITS] {
        problems.extend(within("spec", (rule.problems)(spec)));
    }
    problems
}

/// What breaks a rule in `entry` alone; paths are relative to it.
fn check_entry(entry: &PortEntry) -> Vec<FieldProblem> {
    let rules = [
        PORT_AS_MAPPED,
        LAST_PORT_EXISTS,
        ANY_OF_SEVERAL,
        COMPANION_IS_NOT_OFFERED,
        PROXY_PROTOCOL_OVER_TCP,
        REPLIES_OVER_UDP,
        AGENT_PORTS_FREE,
    ];
    let problems = rules.iter().flat_map(|rule| (rule.problems)(entry));
    problems.collect()
}

/// What breaks a rule in `entry`, which has a port, alone or beside those of
/// `earlier`; paths are relative to it.
#[must_use]
pub fn check_beside(entry: &PortEntry, earlier: &[PortEntry]) -> Vec<FieldProblem> {
    let mut problems = check_entry(entry);
    // No entry is given connection ports, as all have ports.
    let all = ConnectionPorts::default();
    problems.extend(entries::clashes(entry, earlier, all));
    problems
}

/// What is wrong with `name` as the name of a pool.
#[must_use]
pub fn check_name(name: &str) -> Vec<FieldProblem> {
    (NAME.problems)(name)
}

/// Checks an address that clients are given: an IP address that can be connected
/// to, or a DNS name, of at most 253 characters.
///
/// # Errors
/// What is wrong, and the remedy.
pub fn check_address(address: &str) -> Result<(), String> {
    let is_good = match address.parse() {
        Ok(IpAddr::V4(ip)) => !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast()),
        // An IPv4 address in IPv6 form is written as IPv4.
        Ok(IpAddr::V6(ip)) => {
            !(ip.is_unspecified() || ip.is_multicast() || ip.to_ipv4_mapped().is_some())
        }
        Err(_) => is_dns_name(address),
    };
    if is_good {
        return Ok(());
    }
    Err(format!(
        "must be an IP address that can be connected to, or a DNS name, without a port; this is {address:?}"
    ))
}

/// An address that clients are given, as [`check_address`] wants it.
///
/// # Errors
/// What is wrong, and the remedy.
pub fn parse_address(text: &str) -> Result<String, String> {
    check_address(text).map(|()| text.to_owned())
}

/// Source: RFC 1123, section 2.1, with the underscores that are seen in practice.
/// A name whose last label is a number would be read as an IPv4 address.
fn is_dns_name(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(is_letter)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= MAX_ADDRESS_LENGTH
        && name.split('.').all(is_label)
        && !last.bytes().all(|byte| byte.is_ascii_digit())
}

fn broken(is_broken: bool, path: &str, message: impl FnOnce() -> String) -> Vec<FieldProblem> {
    let problem = is_broken.then(|| FieldProblem::new(path, message()));
    problem.into_iter().collect()
}

fn within(outer: &str, problems: Vec<FieldProblem>) -> impl Iterator<Item = FieldProblem> {
    let problems = problems.into_iter();
    problems.map(move |FieldProblem { path, message }| {
        FieldProblem::new(format!("{outer}.{path}"), message)
    })
}
