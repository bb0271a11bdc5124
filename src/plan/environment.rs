//! What a workload learns about its place, as environment variables of its
//! containers. A program that does not ask for them works as before.
//!
//! | variable | value |
//! |---|---|
//! | `PORTPOOL_POOL` | the name of the pool |
//! | `PORTPOOL_SERVER` | the name of the server |
//! | `PORTPOOL_SLOT` | the number of its slot |
//! | `PORTPOOL_ADDRESS` | the address that clients connect to, where it is known |
//! | `PORTPOOL_API` | the URL of the agent's local API |
//! | `PORTPOOL_ENTRY_PORT` | the first connection port of the entry `entry` |
//! | `PORTPOOL_ENTRY_LAST` | its last one, where they are adjacent |
//! | `PORTPOOL_ENTRY_COUNT` | the number of them |
//!
//! They hold for the start of the server. A server whose ports change later is
//! replaced if it listens on them (mapping Identity).

use std::net::IpAddr;

use super::ValidPool;
use crate::pool::AGENT_API_PORT;
use crate::table::{PortRange, Row};

/// The variables for the workload in `row`: names and values. `address` is what
/// clients connect to, where it is known; `loopback` is the address of the local
/// API, which only the workload reaches.
#[must_use]
pub fn environment(
    pool: &ValidPool,
    row: &Row,
    address: Option<&str>,
    loopback: IpAddr,
) -> Vec<(String, String)> {
    let mut variables = vec![
        ("PORTPOOL_POOL".to_owned(), pool.name.clone()),
        ("PORTPOOL_SERVER".to_owned(), row.server.clone()),
        ("PORTPOOL_SLOT".to_owned(), row.slot.to_string()),
        (
            "PORTPOOL_API".to_owned(),
            format!("http://{loopback}:{AGENT_API_PORT}"),
        ),
    ];
    if let Some(address) = address {
        variables.push(("PORTPOOL_ADDRESS".to_owned(), address.to_owned()));
    }
    for entry in &pool.entries {
        let ranges = row.ranges.iter().filter(|range| range.name == entry.name);
        variables.extend(of_entry(&entry.name, &ranges.collect::<Vec<_>>()));
    }
    variables
}

/// The variables of the entry `name`, whose connection ports are `ranges`.
fn of_entry(name: &str, ranges: &[&PortRange]) -> Vec<(String, String)> {
    let Some(first) = ranges.first() else {
        return Vec::new();
    };
    // Names have no underscores, so no two become the same.
    let name = name.to_uppercase().replace('-', "_");
    let count: u16 = ranges.iter().map(|range| range.count).sum();
    let port = first.connection_port.get();
    let mut variables = vec![
        (format!("PORTPOOL_{name}_PORT"), port.to_string()),
        (format!("PORTPOOL_{name}_COUNT"), count.to_string()),
    ];
    if ranges.len() == 1 {
        let last = port + (count - 1);
        variables.push((format!("PORTPOOL_{name}_LAST"), last.to_string()));
    }
    variables
}
