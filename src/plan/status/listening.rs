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
    /// Whether the workload listens on other ports of the entry.
    pub is_partial: bool,
}

/// Reason of a pool of which a workload listens on no port of an entry.
pub const NOT_LISTENING: &str = "PortsNotListening";

/// Reason of a pool that is complete, and of which a workload listens on some ports of
/// an entry only: it may open the others when it needs them.
pub const PARTLY_LISTENING: &str = "PartlyListening";

/// What keeps entries from being offered: the first server that listens on none of its
/// ports in `table` for one of them. `None` while all of `servers` listen.
#[must_use]
pub fn not_listening(table: &Table, servers: &[ObservedServer]) -> Option<Blocker> {
    let sentence = sentence(table, servers, false)?;
    let message = format!(
        "{sentence}: compare spec.ports with what the workload opens on the address of its pod"
    );
    Some(Blocker::new(NOT_LISTENING, message))
}

/// The first server that listens on some ports of an entry only, as a sentence.
pub(super) fn partly_listening(table: &Table, servers: &[ObservedServer]) -> Option<String> {
    sentence(table, servers, true)
}

/// The first server of `table` of which the workload listens on some ports of an entry
/// (`is_partial`), or on none. The words change with the servers that are like that, and
/// not with the number of their ports.
fn sentence(table: &Table, servers: &[ObservedServer], is_partial: bool) -> Option<String> {
    let silent = |row: &Row| {
        let server = servers.iter().find(|server| server.slot == row.slot)?;
        let ports = server.not_listening.iter();
        let ports = ports.filter(|ports| ports.is_partial == is_partial);
        let ports: Vec<String> = ports.filter_map(|ports| words(row, ports)).collect();
        let is_silent = row.state == RowState::Active && !ports.is_empty();
        is_silent.then(|| format!("{} does not listen on {}", row.server, ports.join(" and ")))
    };
    let mut sentences = table.rows.iter().filter_map(silent);
    let first = sentences.next()?;
    Some(match sentences.next() {
        None => first,
        Some(_) => format!("{first}, and other servers are like that"),
    })
}

/// The server ports of `row` that `silent` is about; `None` if it has none of them.
fn words(row: &Row, silent: &NotListening) -> Option<String> {
    let is_meant =
        |range: &&PortRange| range.name == silent.entry && range.protocol == silent.protocol;
    let ranges = row.ranges.iter().filter(is_meant);
    let mut runs: Vec<String> = ranges.map(run).collect();
    runs.dedup();
    if runs.is_empty() {
        return None;
    }
    let more = if runs.len() > MOST_RUNS { ", …" } else { "" };
    runs.truncate(MOST_RUNS);
    let protocol = match silent.protocol {
        PortProtocol::TCPUDP => "TCP and UDP",
        protocol => protocol.name(),
    };
    let some = if silent.is_partial {
        "some of the ports "
    } else {
        ""
    };
    Some(format!("{some}{}{more}/{protocol}", runs.join(", ")))
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
