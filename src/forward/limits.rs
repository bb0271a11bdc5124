//! Limits of the system that a table must fit (open files, the range of
//! ephemeral ports), and limits of clients.

use std::io;
use std::ops::RangeInclusive;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::quota::Bounds;
use crate::table::Table;

/// Descriptors kept for agents, files and pipes beside the listeners, and for a
/// few clients and requests where there are no more.
const HEADROOM: usize = 512;

/// The part of the open files that listeners leave which is kept for other
/// clients of the process, at most.
const SHARE_OF_OTHERS: u64 = 8;

/// Most connections by default, where open files set no lower bound: they take
/// about 1 GB of the kernel.
const CONNECTIONS_MAX: u64 = 100_000;

/// Most UDP flows by default.
const FLOWS_MAX: u64 = 65_536;

/// The number of clients at a time. A client above it is reset (TCP) or gets no
/// answer (UDP), and is counted in `portpool_refused`.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Limits {
    /// Most TCP connections; default: as many as the open files allow, at most 100,000
    #[arg(long, value_name = "N")]
    pub max_connections: Option<u32>,

    /// Most TCP connections of one client address, or IPv6 /64; default: nine tenths of all
    #[arg(long, value_name = "N")]
    pub max_connections_per_source: Option<u32>,

    /// Most TCP connections on one connection port
    #[arg(long, value_name = "N", default_value_t = Self::CONNECTIONS_PER_PORT)]
    pub max_connections_per_port: u32,

    /// Most UDP clients; when full, the one idle for longest is evicted. Default: as many as the open files allow, at most 65,536
    #[arg(long, value_name = "N")]
    pub max_udp_flows: Option<u32>,

    /// Most UDP clients of one client address, or IPv6 /64; default: nine tenths of all
    #[arg(long, value_name = "N")]
    pub max_udp_flows_per_source: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: None,
            max_connections_per_source: None,
            max_connections_per_port: Self::CONNECTIONS_PER_PORT,
            max_udp_flows: None,
            max_udp_flows_per_source: None,
        }
    }
}

/// The bounds of both transports.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransportBounds {
    pub(super) connections: Bounds,
    pub(super) flows: Bounds,
}

impl Limits {
    /// A port is one session's: browsers and database pools open tens.
    const CONNECTIONS_PER_PORT: u32 = 1000;

    /// The bounds of TCP connections and of UDP flows, with the open files
    /// that `tcp` and `udp` listeners leave, and `others`: what the rest of the
    /// process may open for clients. A connection takes two, a flow one; where
    /// there are both, connections get four fifths.
    pub(super) fn bounds(
        self,
        open_files: u64,
        others: u64,
        tcp: usize,
        udp: usize,
    ) -> TransportBounds {
        let left = open_files.saturating_sub((tcp + udp + HEADROOM) as u64);
        let left = (left - others.min(left / SHARE_OF_OTHERS)).max(2);
        let (connections, flows) = match (tcp, udp) {
            (_, 0) => (left / 2, 0),
            (0, _) => (0, left),
            _ => (left / 5 * 2, left / 5),
        };
        let number = |number: u64| u32::try_from(number).expect("capped far below 2^32");
        let connections = self
            .max_connections
            .unwrap_or(number(connections.min(CONNECTIONS_MAX)));
        let flows = self.max_udp_flows.unwrap_or(number(flows.min(FLOWS_MAX)));
        // One source, which may be a whole site's, must not lock out the others.
        let most = |all: u32| all - all / 10;
        TransportBounds {
            connections: Bounds {
                total: connections,
                per_source: self.max_connections_per_source.unwrap_or(most(connections)),
                per_port: self.max_connections_per_port,
            },
            flows: Bounds {
                total: flows,
                per_source: self.max_udp_flows_per_source.unwrap_or(most(flows)),
                per_port: u32::MAX,
            },
        }
    }
}

/// The number of open files that this process may have now.
pub(super) fn open_files() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The error of a table that does not fit the open files.
#[derive(Debug, thiserror::Error)]
pub enum OpenFilesError {
    /// The hard limit is too low.
    #[error(
        "the table needs {needed} open files ({listeners} connection ports and {HEADROOM} for sessions), but this process may have {limit}: raise the hard limit (ulimit -Hn, LimitNOFILE) or lower the pool's ports"
    )]
    TooFew {
        /// The listeners of the table.
        listeners: usize,
        /// The open files for listeners and sessions together.
        needed: usize,
        /// The hard limit.
        limit: u64,
    },
    /// The soft limit cannot be raised.
    #[error("failed to raise the limit of open files to {limit}: {source}")]
    Raise {
        /// The hard limit.
        limit: u64,
        /// The system's error.
        source: io::Error,
    },
}

/// Open files that [`reserve_file_table`] makes room for: every port, or half as
/// many sessions. They take half a MiB of the kernel's memory.
const RESERVED_FILES: u64 = 65_536;

/// Makes room for many open files in the kernel's table. Call it while the
/// process has one thread only.
///
/// By itself the table doubles again and again. In a process with threads the
/// `open` that doubles it waits some ten milliseconds for every processor. When
/// the system refuses the room, the table grows like that.
///
/// Source: Linux, `fs/file.c`, `expand_fdtable`.
pub fn reserve_file_table() {
    let Ok(limit) = raise_limit() else {
        return;
    };
    let last = i32::try_from(limit.min(RESERVED_FILES).saturating_sub(1)).expect("far fewer");
    drop(rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), last));
}

/// Raises the limit of open files to the hard limit, which it returns.
fn raise_limit() -> Result<u64, OpenFilesError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let limit = maximum.unwrap_or(u64::MAX);
    if current != maximum {
        let raised = Rlimit {
            current: maximum,
            maximum,
        };
        setrlimit(Resource::Nofile, raised).map_err(|source| OpenFilesError::Raise {
            limit,
            source: source.into(),
        })?;
    }
    Ok(limit)
}

/// Raises the limit of open files to the hard limit, which it returns, and
/// checks that `listeners` and some sessions fit.
///
/// # Errors
/// [`OpenFilesError`] gives both numbers and the remedy.
pub fn check_open_files(listeners: usize) -> Result<u64, OpenFilesError> {
    let limit = raise_limit()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_shared_out_by_what_listens() {
        let bounds = |limits: Limits, open_files, others, tcp, udp| {
            let bounds = limits.bounds(open_files, others, tcp, udp);
            let TransportBounds { connections, flows } = bounds;
            (
                (connections.total, connections.per_source),
                (flows.total, flows.per_source),
            )
        };
        let default = Limits::default();
        let explicit = Limits {
            max_connections: Some(7),
            max_udp_flows: Some(5),
            max_udp_flows_per_source: Some(1),
            ..default
        };
        let cases = [
            (default, 20_000, 0, (1000, 0), ((9244, 8320), (0, 0))),
            (default, 20_000, 0, (0, 1000), ((0, 0), (18_488, 16_640))),
            (default, 20_000, 0, (500, 500), ((7394, 6655), (3697, 3328))),
            (default, 20_000, 2000, (1000, 0), ((8244, 7420), (0, 0))),
            // Never more than an eighth of what listeners leave.
            (default, 20_000, 8192, (1000, 0), ((8088, 7280), (0, 0))),
            (
                default,
                u64::MAX,
                8192,
                (1, 1),
                ((100_000, 90_000), (65_536, 58_983)),
            ),
            (default, 100, 8192, (1000, 0), ((1, 1), (0, 0))),
            (explicit, 20_000, 8192, (1, 1), ((7, 7), (5, 1))),
        ];
        for (limits, open_files, others, (tcp, udp), expected) in cases {
            assert_eq!(
                bounds(limits, open_files, others, tcp, udp),
                expected,
                "{limits:?} {others} {tcp} {udp}"
            );
        }
    }
}
