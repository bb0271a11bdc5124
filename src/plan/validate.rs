//! From a spec to a pool that can be planned: numbers become their types, and
//! what no schema can say is checked.

use std::ops::RangeInclusive;
use std::time::Duration;

use k8s_openapi::api::core::v1::PodTemplateSpec;
use kube::ResourceExt;

use crate::pool::{
    AGENT_ADMIN_PORT, AGENT_PORT, CONNECTION_ADMIN_PORT, Exposure, LoadSharing, MAX_PORT_ENTRIES,
    MAX_RANGES, MAX_REPLICAS, PodTemplate, PortProtocol, ProcessingPool, ProxyProtocol, Sessions,
};
use crate::table::TargetPort;

/// What is wrong with a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field, as in `spec.ports[0].count`.
    pub path: String,
    /// What is wrong, and the remedy.
    pub message: String,
}

impl Problem {
    /// A problem with the field at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: message.into(),
        }
    }
}

/// A pool that can be planned: whatever its numbers, planning cannot fail.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidPool {
    /// The resource's name.
    pub name: String,
    /// Processing servers.
    pub replicas: u32,
    /// What each listens on.
    pub entries: Vec<Entry>,
    /// Where connection ports are taken from.
    pub connection_ports: RangeInclusive<u16>,
    /// Connection servers.
    pub connection_servers: u32,
    /// Port that requests go to.
    pub load_sharing_port: u16,
    /// Address that clients are told.
    pub advertised_address: Option<String>,
    /// How processing servers are chosen.
    pub load_sharing: LoadSharing,
    /// Times and admission.
    pub sessions: Sessions,
    /// How long live sessions may keep a server that is to go.
    pub drain_limit: Duration,
    /// How clients outside the pod network reach the connection server.
    pub exposure: Exposure,
    /// The processing server's pod as far as this program knows pods, or why no
    /// pod can be created of the template. Running servers are planned without
    /// it, so that a pool with a wrong template is still looked after.
    pub template: Result<PodTemplateSpec, Problem>,
    /// The template as it was written.
    pub raw_template: PodTemplate,
}

/// A port entry with checked numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// First server port.
    pub port: TargetPort,
    /// Connection ports per processing server, at least 1.
    pub count: u16,
    /// What is forwarded.
    pub protocol: PortProtocol,
    /// All connection ports lead to `port`.
    pub shared: bool,
    /// Whether the server is told the client's address.
    pub proxy_protocol: ProxyProtocol,
}

impl Entry {
    fn server_ports(&self) -> RangeInclusive<u32> {
        let first = u32::from(self.port.get());
        let steps = if self.shared {
            1
        } else {
            u32::from(self.count)
        };
        first..=first + steps - 1
    }

    fn clashes(&self, other: &Self) -> bool {
        let same_transport = (self.protocol.has_tcp() && other.protocol.has_tcp())
            || (self.protocol.has_udp() && other.protocol.has_udp());
        let (one, another) = (self.server_ports(), other.server_ports());
        same_transport && one.start() <= another.end() && another.start() <= one.end()
    }
}

impl ValidPool {
    /// Checks `pool`.
    ///
    /// # Errors
    /// Every [`Problem`], in the order of the fields.
    pub fn new(pool: &ProcessingPool) -> Result<Self, Vec<Problem>> {
        let spec = &pool.spec;
        let mut problems = Vec::new();
        let replicas = number(
            spec.replicas,
            0,
            MAX_REPLICAS,
            "spec.replicas",
            &mut problems,
        );
        let entries = entries(pool, &mut problems);
        let server = &spec.connection_server;
        let port = |value, path: &str, problems: &mut Vec<Problem>| {
            u16::try_from(number(value, 1, 65_535, path, problems)).unwrap_or(1)
        };
        let load_sharing_port = port(
            server.load_sharing_port,
            "spec.connectionServer.loadSharingPort",
            &mut problems,
        );
        let range = server.connection_ports;
        let first = port(
            range.first,
            "spec.connectionServer.connectionPorts.first",
            &mut problems,
        );
        let last = port(
            range.last,
            "spec.connectionServer.connectionPorts.last",
            &mut problems,
        );
        let connection_servers = number(
            server.replicas,
            1,
            10,
            "spec.connectionServer.replicas",
            &mut problems,
        );
        if first > last {
            let message = format!("must not be above last ({last}); this is {first}");
            problems.push(Problem::new(
                "spec.connectionServer.connectionPorts.first",
                message,
            ));
        } else if (first..=last).contains(&load_sharing_port) {
            let message =
                format!("{load_sharing_port} must lie outside connectionPorts, {first} to {last}");
            problems.push(Problem::new(
                "spec.connectionServer.loadSharingPort",
                message,
            ));
        }
        for (is_taken, path) in [
            (
                load_sharing_port == CONNECTION_ADMIN_PORT,
                "loadSharingPort",
            ),
            (
                (first..=last).contains(&CONNECTION_ADMIN_PORT),
                "connectionPorts",
            ),
        ] {
            if is_taken {
                let message = format!(
                    "must not include {CONNECTION_ADMIN_PORT}, where connection servers have their admin pages"
                );
                problems.push(Problem::new(
                    format!("spec.connectionServer.{path}"),
                    message,
                ));
            }
        }
        let per_server: u32 = entries.iter().map(|entry| u32::from(entry.count)).sum();
        let (needed, there) = (
            per_server * replicas,
            (u32::from(last) + 1).saturating_sub(first.into()),
        );
        if needed > there && first <= last {
            problems.push(Problem::new("spec.connectionServer.connectionPorts", format!(
                "{replicas} servers with {per_server} ports each need {needed} connection ports, but {first} to {last} has {there}: widen connectionPorts, or lower replicas or the ports' counts"
            )));
        }
        let ranges = replicas.saturating_mul(u32::try_from(entries.len()).unwrap_or(u32::MAX));
        if ranges > MAX_RANGES {
            problems.push(Problem::new("spec.ports", format!(
                "{replicas} servers with {} entries make {ranges} ranges; {MAX_RANGES} fit into the port-relationship table: lower replicas or merge entries", entries.len()
            )));
        }
        let drain_seconds = number(
            spec.drain_seconds,
            0,
            604_800,
            "spec.drainSeconds",
            &mut problems,
        );
        if !problems.is_empty() {
            return Err(problems);
        }
        let template = serde_json::from_value(spec.template.0.clone())
            .map_err(|error| Problem::new("spec.template", error.to_string()));
        Ok(Self {
            name: pool.name_any(),
            replicas,
            entries,
            connection_ports: first..=last,
            connection_servers,
            load_sharing_port,
            advertised_address: server.advertised_address.clone(),
            load_sharing: spec.load_sharing.clone(),
            sessions: spec.sessions.clone(),
            drain_limit: Duration::from_secs(drain_seconds.into()),
            exposure: server.exposure,
            template,
            raw_template: spec.template.clone(),
        })
    }
}

fn entries(pool: &ProcessingPool, problems: &mut Vec<Problem>) -> Vec<Entry> {
    let listed = &pool.spec.ports;
    if listed.is_empty() || listed.len() > MAX_PORT_ENTRIES {
        let message = format!(
            "must have 1 to {MAX_PORT_ENTRIES} entries; this has {}",
            listed.len()
        );
        problems.push(Problem::new("spec.ports", message));
    }
    let mut entries: Vec<Entry> = Vec::new();
    for (index, entry) in listed.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let port = number(entry.port, 1, 65_535, &format!("{path}.port"), problems);
        let count = number(entry.count, 1, 10_000, &format!("{path}.count"), problems);
        let entry = Entry {
            name: entry.name.clone(),
            port: u16::try_from(port)
                .ok()
                .and_then(TargetPort::new)
                .expect("1 to 65535 was checked"),
            count: u16::try_from(count).expect("1 to 10000 was checked"),
            protocol: entry.protocol,
            shared: entry.shared,
            proxy_protocol: entry.proxy_protocol,
        };
        let last = *entry.server_ports().end();
        if last > 65_535 {
            let message = format!("port + count - 1 is {last}, above 65535: lower one of them");
            problems.push(Problem::new(format!("{path}.count"), message));
        }
        for reserved in [AGENT_PORT, AGENT_ADMIN_PORT] {
            if entry.protocol.has_tcp() && entry.server_ports().contains(&u32::from(reserved)) {
                let message = format!(
                    "includes {reserved}, where portpool's agent listens: move the workload's ports"
                );
                problems.push(Problem::new(format!("{path}.port"), message));
            }
        }
        for other in &entries {
            if other.name == entry.name {
                let message = format!(
                    "{:?} is the name of an earlier entry: names are unique",
                    entry.name
                );
                problems.push(Problem::new(format!("{path}.name"), message));
            } else if other.clashes(&entry) {
                let message = format!(
                    "ports {} to {last} overlap those of entry {:?}",
                    entry.port, other.name
                );
                problems.push(Problem::new(format!("{path}.port"), message));
            }
        }
        entries.push(entry);
    }
    entries
}

/// `value` if it is in bounds; else a problem and the nearest bound.
fn number(value: i32, least: i32, most: i32, path: &str, problems: &mut Vec<Problem>) -> u32 {
    if !(least..=most).contains(&value) {
        let message = format!("must be {least} to {most}; this is {value}");
        problems.push(Problem::new(path, message));
    }
    u32::try_from(value.clamp(least, most)).expect("bounds are not negative")
}
