//! Limits of the system that a table must fit: open files and the range of
//! ephemeral ports.

use std::io;
use std::ops::RangeInclusive;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::table::Table;

/// Descriptors kept for sessions, agents and requests beside the listeners.
const HEADROOM: usize = 512;

/// Why a table does not fit.
#[derive(Debug, thiserror::Error)]
pub enum OpenFilesError {
    /// The hard limit is too low.
    #[error(
        "the table needs {needed} open files ({listeners} connection ports and {HEADROOM} for sessions), but this process may have {limit}: raise the hard limit (ulimit -Hn, LimitNOFILE) or lower the pool's ports"
    )]
    TooFew {
        /// Listeners.
        listeners: usize,
        /// In all.
        needed: usize,
        /// The hard limit.
        limit: u64,
    },
    /// The soft limit cannot be raised.
    #[error("failed to raise the limit of open files to {limit}: {source}")]
    Raise {
        /// The hard limit.
        limit: u64,
        /// The system's answer.
        source: io::Error,
    },
}

/// Raises the limit of open files to the hard limit, which it returns, and
/// checks that `listeners` and some sessions fit.
///
/// # Errors
/// [`OpenFilesError`] gives both numbers and the remedy.
pub fn check_open_files(listeners: usize) -> Result<u64, OpenFilesError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let limit = maximum.unwrap_or(u64::MAX);
    if current != maximum {
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        )
        .map_err(|source| OpenFilesError::Raise {
            limit,
            source: source.into(),
        })?;
    }
    let needed = listeners + HEADROOM;
    if needed as u64 > limit {
        return Err(OpenFilesError::TooFew {
            listeners,
            needed,
            limit,
        });
    }
    Ok(limit)
}

/// The connection ports of `table` that lie inside the kernel's
/// `ip_local_port_range`, as `FIRST-LAST`; `None` when there are none.
///
/// Such ports can be taken by any outgoing connection, and bound ones shrink
/// what `connect()` chooses from.
///
/// Source: Linux `Documentation/networking/ip-sysctl.rst`.
#[must_use]
pub fn ephemeral_overlap(table: &Table) -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    overlap(table, &ephemeral_range(&text)?)
}

fn ephemeral_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
}

fn overlap(table: &Table, ephemeral: &RangeInclusive<u16>) -> Option<String> {
    let ports = table
        .rows
        .iter()
        .flat_map(|row| &row.ranges)
        .flat_map(crate::table::PortRange::connection_ports);
    let inside: Vec<u16> = ports
        .map(crate::table::ListenPort::get)
        .filter(|port| ephemeral.contains(port))
        .collect();
    Some(format!("{}-{}", inside.iter().min()?, inside.iter().max()?))
}
