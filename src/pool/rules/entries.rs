//! The rules of port entries: of each one, and of several together.

use std::ops::RangeInclusive;

use super::{FieldProblem, FieldRule, broken, within};
use crate::pool::{
    AGENT_PORTS, ConnectionPorts, EntryAdmission, MAX_PORT, Mapping, Offer, PortEntry,
    PortProtocol, ProcessingPoolSpec, ProxyProtocol, Replies,
};

pub(in crate::pool) const NO_OVERLAP: FieldRule<ProcessingPoolSpec> = FieldRule {
    cel: || {
        // An entry without a port takes any of the connection ports.
        let range = "self.connectionServer.connectionPorts";
        let first = |entry: &str| format!("(has({entry}.port) ? {entry}.port : {range}.first)");
        let last = |entry: &str| {
            format!(
                "(has({entry}.port) ? {entry}.port + ({entry}.mapping == 'Shared' ? 0 : {entry}.count - 1) : {range}.last)"
            )
        };
        let [one_first, other_first] = ["one", "other"].map(first);
        let [one_last, other_last] = ["one", "other"].map(last);
        format!(
            "self.ports.all(one, self.ports.all(other, one.name == other.name || (one.protocol == 'TCP' && other.protocol == 'UDP') || (one.protocol == 'UDP' && other.protocol == 'TCP') || (one.mapping == 'Identity' && other.mapping == 'Identity') || {one_first} > {other_last} || {other_first} > {one_last}))"
        )
    },
    message: || {
        "server ports of two entries of ports overlap: port, port+1 and so on, count of them unless mapping is Shared, and all connectionPorts where mapping is Identity; move one of them".to_owned()
    },
    problems: |spec| {
        let all = spec.connection_server.connection_ports;
        let entries = spec.ports.iter().enumerate();
        let problems = entries.map(|(index, entry)| {
            let clashes = clashes(entry, &spec.ports[..index], all);
            within(&format!("ports[{index}]"), clashes).collect::<Vec<_>>()
        });
        problems.flatten().collect()
    },
};

/// What is wrong with the server ports of `entry` beside those of `others`, if
/// connection ports are taken from `all`. Entries of the same name are one.
pub(super) fn clashes(
    entry: &PortEntry,
    others: &[PortEntry],
    all: ConnectionPorts,
) -> Vec<FieldProblem> {
    let clashing = |other: &&PortEntry| other.name != entry.name && clash(other, entry, all);
    let problems = others.iter().filter(clashing).map(|other| {
        let ports = server_ports(entry, all);
        let message = format!(
            "ports {} to {} overlap those of entry {:?}: move one of them{}",
            ports.start(),
            ports.end(),
            other.name,
            match (entry.mapping, other.mapping) {
                (Mapping::Identity, _) | (_, Mapping::Identity) =>
                    "; with mapping Identity, an entry may have any of connectionPorts",
                _ => "",
            }
        );
        let field = if entry.port.is_some() {
            "port"
        } else {
            "mapping"
        };
        FieldProblem::new(field, message)
    });
    problems.collect()
}

pub(in crate::pool) const COMPANIONS_OF_SESSIONS: FieldRule<ProcessingPoolSpec> = FieldRule {
    cel: || {
        "size(self.ports) == 0 || self.ports.exists(entry, !has(entry.admission) || entry.admission != 'Companion')".to_owned()
    },
    message: || {
        "one entry of ports at least must have another admission than Companion: requests get no companion ports, so no client could have a session".to_owned()
    },
    problems: |spec| {
        let is_companion = |entry: &PortEntry| entry.admission == Some(EntryAdmission::Companion);
        let is_broken = !spec.ports.is_empty() && spec.ports.iter().all(is_companion);
        broken(is_broken, "ports", || {
            "has only entries with admission Companion, which no request gets, so no client could have a session: add an entry for the port that clients ask for, or remove admission from one".to_owned()
        })
    },
};

pub(in crate::pool) const IDENTITY_LEAVES_AGENT_PORTS: FieldRule<ProcessingPoolSpec> = FieldRule {
    cel: || {
        let (first, last) = (AGENT_PORTS.start(), AGENT_PORTS.end());
        format!(
            "!self.ports.exists(entry, entry.mapping == 'Identity' && entry.protocol != 'UDP') || self.connectionServer.connectionPorts.first > {last} || self.connectionServer.connectionPorts.last < {first}"
        )
    },
    message: || {
        let (first, last) = (AGENT_PORTS.start(), AGENT_PORTS.end());
        format!(
            "connectionServer.connectionPorts must not include {first} to {last} where an entry has mapping Identity: they belong to portpool's agent on every processing server"
        )
    },
    problems: |spec| {
        let ConnectionPorts { first, last } = spec.connection_server.connection_ports;
        let (agent_first, agent_last) = (AGENT_PORTS.start(), AGENT_PORTS.end());
        let is_identity =
            |entry: &PortEntry| entry.mapping == Mapping::Identity && entry.protocol.has_tcp();
        let is_broken = spec.ports.iter().any(is_identity)
            && first <= i32::from(*agent_last)
            && last >= i32::from(*agent_first);
        broken(is_broken, "connectionServer.connectionPorts", || {
            format!(
                "must not include {agent_first} to {agent_last} where an entry has mapping Identity: they belong to portpool's agent on every processing server; choose another range"
            )
        })
    },
};

pub(in crate::pool) const PORT_AS_MAPPED: FieldRule<PortEntry> = FieldRule {
    cel: || "has(self.port) == (self.mapping != 'Identity')".to_owned(),
    message: || {
        "port is required, but must be absent with mapping Identity, where the server port is the connection port".to_owned()
    },
    problems: |entry| match (entry.mapping, entry.port) {
        (Mapping::Identity, Some(port)) => {
            let message = format!(
                "must be absent with mapping Identity, where the server port is the connection port; this is {port}: remove it, or choose another mapping"
            );
            vec![FieldProblem::new("port", message)]
        }
        (Mapping::Offset | Mapping::Shared, None) => {
            let message = "is missing: give the first port that the workload listens on";
            vec![FieldProblem::new("port", message)]
        }
        _ => Vec::new(),
    },
};

pub(in crate::pool) const LAST_PORT_EXISTS: FieldRule<PortEntry> = FieldRule {
    cel: || {
        format!(
            "!has(self.port) || self.mapping == 'Shared' || self.port + self.count - 1 <= {MAX_PORT}"
        )
    },
    message: || format!("port + count - 1 must not exceed {MAX_PORT}"),
    problems: |entry| {
        let last = own_ports(entry).map_or(0, |ports| *ports.end());
        broken(last > MAX_PORT, "count", || {
            format!("port + count - 1 is {last}, above {MAX_PORT}: lower one of them")
        })
    },
};

pub(in crate::pool) const ANY_OF_SEVERAL: FieldRule<PortEntry> = FieldRule {
    cel: || "self.offer != 'WhenAnyListens' || self.protocol == 'TCPUDP'".to_owned(),
    message: || {
        "offer WhenAnyListens needs protocol TCPUDP: with one protocol it is WhenListening"
            .to_owned()
    },
    problems: |entry| {
        let is_broken =
            entry.offer == Offer::WhenAnyListens && entry.protocol != PortProtocol::TCPUDP;
        broken(is_broken, "offer", || {
            format!(
                "WhenAnyListens needs protocol TCPUDP; this is {}: set protocol: TCPUDP, or remove offer",
                entry.protocol.name()
            )
        })
    },
};

pub(in crate::pool) const COMPANION_IS_NOT_OFFERED: FieldRule<PortEntry> = FieldRule {
    cel: || {
        "self.offer == 'WhenListening' || !has(self.admission) || self.admission != 'Companion'"
            .to_owned()
    },
    message: || {
        "offer does not apply with admission Companion, because requests get no companion ports: remove offer".to_owned()
    },
    problems: |entry| {
        let is_broken = entry.offer != Offer::WhenListening
            && entry.admission == Some(EntryAdmission::Companion);
        broken(is_broken, "offer", || {
            format!(
                "does not apply with admission Companion, because requests get no companion ports; this is {:?}: remove offer",
                entry.offer
            )
        })
    },
};

pub(in crate::pool) const PROXY_PROTOCOL_OVER_TCP: FieldRule<PortEntry> = FieldRule {
    cel: || "self.proxyProtocol == 'None' || self.protocol == 'TCP'".to_owned(),
    message: || "proxyProtocol V2 needs protocol TCP".to_owned(),
    problems: |entry| {
        let is_broken =
            entry.proxy_protocol != ProxyProtocol::None && entry.protocol != PortProtocol::TCP;
        broken(is_broken, "proxyProtocol", || {
            format!(
                "V2 needs protocol TCP; this is {}: set protocol: TCP, or remove proxyProtocol",
                entry.protocol.name()
            )
        })
    },
};

pub(in crate::pool) const REPLIES_OVER_UDP: FieldRule<PortEntry> = FieldRule {
    cel: || "self.replies == 'ServerPort' || self.protocol != 'TCP'".to_owned(),
    message: || "replies AnyPort needs protocol UDP or TCPUDP".to_owned(),
    problems: |entry| {
        let is_broken = entry.replies != Replies::ServerPort && !entry.protocol.has_udp();
        broken(is_broken, "replies", || {
            "AnyPort needs protocol UDP or TCPUDP; this is TCP: set protocol: UDP, or remove replies"
                .to_owned()
        })
    },
};

pub(in crate::pool) const AGENT_PORTS_FREE: FieldRule<PortEntry> = FieldRule {
    cel: || {
        let (first, last) = (AGENT_PORTS.start(), AGENT_PORTS.end());
        format!(
            "!has(self.port) || self.protocol == 'UDP' || self.port > {last} || self.port + (self.mapping == 'Shared' ? 0 : self.count - 1) < {first}"
        )
    },
    message: || {
        let (first, last) = (AGENT_PORTS.start(), AGENT_PORTS.end());
        format!(
            "port, and port + count - 1 unless mapping is Shared, must not include {first} to {last}, which belong to portpool's agent: move the workload's ports"
        )
    },
    problems: |entry| {
        let ports = own_ports(entry).filter(|_| entry.protocol.has_tcp());
        let is_included = |port: &u16| {
            ports
                .as_ref()
                .is_some_and(|ports| ports.contains(&i32::from(*port)))
        };
        let problems = AGENT_PORTS.filter(is_included).map(|port| {
            let message = format!(
                "includes {port}, which belongs to portpool's agent: move the workload's ports"
            );
            FieldProblem::new("port", message)
        });
        problems.collect()
    },
};

/// The ports that `entry` takes on each processing server; `None` where they are
/// connection ports.
fn own_ports(entry: &PortEntry) -> Option<RangeInclusive<i32>> {
    let steps = match entry.mapping {
        Mapping::Offset | Mapping::Identity => entry.count - 1,
        Mapping::Shared => 0,
    };
    let port = entry.port?;
    Some(port..=port.saturating_add(steps))
}

/// The ports that `entry` may take on a processing server, if connection ports are
/// taken from `all`.
fn server_ports(entry: &PortEntry, all: ConnectionPorts) -> RangeInclusive<i32> {
    own_ports(entry).unwrap_or(all.first..=all.last)
}

/// Whether two entries may take the same port of the same transport protocol, if
/// connection ports are taken from `all`. None is given to two entries.
fn clash(one: &PortEntry, other: &PortEntry, all: ConnectionPorts) -> bool {
    let same_transport = (one.protocol.has_tcp() && other.protocol.has_tcp())
        || (one.protocol.has_udp() && other.protocol.has_udp());
    let are_both_identity = [one, other]
        .iter()
        .all(|entry| entry.mapping == Mapping::Identity);
    let (ports, others) = (server_ports(one, all), server_ports(other, all));
    same_transport
        && !are_both_identity
        && ports.start() <= others.end()
        && others.start() <= ports.end()
}
