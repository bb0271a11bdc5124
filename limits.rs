//! The kernel's limits that thousands of connection ports run into.

use std::fs;
use std::io;
use std::ops::RangeInclusive;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::table::{ListenPort, Table};

/// Descriptors wanted besides one per listener: 448 TCP sessions of two, and
/// what the rest of the process has open. A pool that small is alive, if not
/// comfortable; fewer would make it look up and refuse everybody.
pub const OPEN_FILES_HEADROOM: u64 = 1024;

/// Why connection ports do not fit into the limit of open files.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the table needs {needed} open files ({listeners} listening sockets and {OPEN_FILES_HEADROOM} for sessions), but the hard limit is {limit}: raise it (`ulimit -Hn`, `LimitNOFILE=` of the service, or the container runtime's limit), or lower spec.replicas or the port counts"
)]
pub struct OpenFilesError {
    /// Listening sockets of the table.
    pub listeners: u64,
    /// Open files wanted in all.
    pub needed: u64,
    /// The hard limit of the process.
    pub limit: u64,
}

/// Raises the limit of open files to the hard limit, and returns it, checked
/// against `listeners`, the table's number of listening sockets (a TCPUDP
/// port has two).
///
/// # Errors
/// [`OpenFilesError`] when the hard limit is too low for the listeners and
/// [`OPEN_FILES_HEADROOM`].
pub fn check_open_files(listeners: usize) -> Result<u64, OpenFilesError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    // Raising up to the hard limit needs no right, but a sandbox may forbid
    // it; the old limit then counts.
    let limit = if current == maximum || setrlimit(Resource::Nofile, raised).is_ok() {
        maximum
    } else {
        current
    };
    fits(listeners, limit.unwrap_or(u64::MAX))
}

fn fits(listeners: usize, limit: u64) -> Result<u64, OpenFilesError> {
    let listeners = u64::try_from(listeners).unwrap_or(u64::MAX);
    let needed = listeners.saturating_add(OPEN_FILES_HEADROOM);
    if needed > limit {
        return Err(OpenFilesError {
            listeners,
            needed,
            limit,
        });
    }
    Ok(limit)
}

/// Connection ports of `table` inside the kernel's `ip_local_port_range`, as
/// the first and last of them; `None` when there are none.
///
/// Such ports are worth a warning: an outgoing connection of any program may
/// occupy one, and Linux skips all bound ports when it looks for a free one.
///
/// # Errors
/// The kernel's range cannot be read.
///
/// Source: Linux documentation, ip-sysctl, `ip_local_port_range`.
pub fn local_port_overlap(table: &Table) -> io::Result<Option<RangeInclusive<ListenPort>>> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let local = parse_range(&text)
        .ok_or_else(|| io::Error::other(format!("ip_local_port_range is not a range: {text:?}")))?;
    Ok(overlap(table, &local))
}

/// Two numbers, separated by white space.
fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(str::parse);
    let first = numbers.next()?.ok()?;
    let last = numbers.next()?.ok()?;
    Some(first..=last)
}

fn overlap(table: &Table, local: &RangeInclusive<u16>) -> Option<RangeInclusive<ListenPort>> {
    let inside = || {
        table
            .rows
            .iter()
            .flat_map(|row| &row.ranges)
            .flat_map(crate::table::PortRange::connection_ports)
            .filter(|port| local.contains(&port.get()))
    };
    Some(inside().min()?..=inside().max()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_too_large_is_refused_with_both_numbers_and_a_remedy() {
        assert_eq!(fits(10_000, 11_024), Ok(11_024));
        let error = fits(10_000, 11_023).unwrap_err().to_string();
        for part in ["10000", "11024", "11023", "ulimit -Hn"] {
            assert!(error.contains(part), "{error} lacks {part}");
        }
    }

    #[test]
    fn the_limit_of_this_process_is_raised_to_its_hard_limit() {
        let limit = check_open_files(0).unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), limit);
        assert!(check_open_files(usize::MAX).is_err());
    }

    #[test]
    fn the_kernels_range_is_read() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32768..=60999));
        assert_eq!(parse_range("32768"), None);
        assert_eq!(parse_range("low high"), None);
    }

    #[test]
    fn ports_inside_the_local_range_are_found() {
        let table = |first: u16| {
            Table::decode(&format!(
                r#"{{"formatVersion":1,"pool":"p","poolUid":"u","generation":1,"agentPort":1,
                "loadSharing":{{}},"sessions":{{}},"rows":[{{"slot":0,"server":"p-0","state":"Active","ranges":
                [{{"name":"x","connectionPort":{first},"serverPort":1,"count":10,"protocol":"TCP"}}]}}]}}"#
            ))
            .unwrap()
        };
        let port = |number| ListenPort::new(number).unwrap();
        assert_eq!(
            overlap(&table(32760), &(32768..=60999)),
            Some(port(32768)..=port(32769))
        );
        assert_eq!(overlap(&table(20000), &(32768..=60999)), None);
        assert!(local_port_overlap(&table(20000)).is_ok());
    }
}
