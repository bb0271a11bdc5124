//! Which servers do not listen where the entries of their pool say.

use super::Blocker;
use crate::plan::ObservedServer;
use crate::pool::{Mapping, PortProtocol};
use crate::table::{PortRange, Row, RowState, Table};

/// Most runs of ports that a sentence names.
const MOST_RUNS: usize = 3;

/// The ports of one entry that are not offered because the workload does not listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotListening {
    /// Name of the entry.
    pub entry: String,
    /// Protocols of the entry.
    pub protocol: PortProtocol,
    /// Number of connection ports.
    pub count: u32,
}

/// What keeps ports from being offered: the first server that does not listen on some
/// of its own in `table`. `None` while all of `servers` listen.
#[must_use]
pub fn not_listening(table: &Table, servers: &[ObservedServer]) -> Option<Blocker> {
    let silent = |row: &Row| {
        let server = servers.iter().find(|server| server.slot == row.slot)?;
        let ports = server.not_listening.iter();
        let ports: Vec<String> = ports.filter_map(|ports| words(row, ports)).collect();
        let is_silent = row.state == RowState::Active && !ports.is_empty();
        is_silent.then(|| format!("{} does not listen on {}", row.server, ports.join(" and ")))
    };
    let mut sentences = table.rows.iter().filter_map(silent);
    let first = sentences.next()?;
    let others = match sentences.count() {
        0 => String::new(),
        1 => ", and another server is like that".to_owned(),
        others => format!(", and {others} other servers are like that"),
    };
    let message = format!(
        "{first}{others}: compare spec.ports with what the workload opens on the address of its pod"
    );
    Some(Blocker::new("PortsNotListening", message))
}

/// The server ports of `row` that `silent` is about; `None` if it has none of them.
fn words(row: &Row, silent: &NotListening) -> Option<String> {
    let is_meant =
        |range: &&PortRange| range.name == silent.entry && range.protocol == silent.protocol;
    let ranges: Vec<&PortRange> = row.ranges.iter().filter(is_meant).collect();
    let all: u32 = ranges.iter().map(|range| u32::from(range.count)).sum();
    let mut runs: Vec<String> = ranges.iter().map(|range| run(range)).collect();
    runs.dedup();
    let more = if runs.len() > MOST_RUNS { ", …" } else { "" };
    runs.truncate(MOST_RUNS);
    let protocol = match silent.protocol {
        PortProtocol::TCPUDP => "TCP and UDP",
        protocol => protocol.name(),
    };
    let ports = format!("{}{more}/{protocol}", runs.join(", "));
    match silent.count.min(all) {
        0 => None,
        count if count == all => Some(ports),
        count => Some(format!("{count} of the {all} ports {ports}")),
    }
}

/// The server ports of `range`.
fn run(range: &PortRange) -> String {
    let first = range.server_port.get();
    match range.mapping {
        Mapping::Offset | Mapping::Identity if range.count > 1 => {
            format!("{first}-{}", first.saturating_add(range.count - 1))
        }
        _ => first.to_string(),
    }
}
