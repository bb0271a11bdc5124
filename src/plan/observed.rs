//! What a plan is made from: a pool and its servers as they were observed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use jiff::Timestamp;

use super::status::NotListening;
use crate::table::{ListenPort, PortRange, Row, Slot, Table};

/// What was observed of a pool.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The uid of the pool's resource. Tables of another uid are ignored.
    pub uid: &'a str,
    /// The table that is published; `None` when there is none, or when what is
    /// published was not written by portpool.
    pub published: Option<&'a Table>,
    /// The table that the planner's caller wrote last, if it knows. It is newer
    /// than `published` when someone has removed, changed or set that back.
    pub last_written: Option<&'a Table>,
    /// The highest generation that readers may have seen, whichever table had
    /// it; 0 when no table was ever published.
    pub seen_generation: u64,
    /// Whether new servers can be created. While they cannot, no server is
    /// started, and none is replaced by one of a newer template.
    pub may_start: bool,
    /// Whether a row may get another `not_ready` than it has. Otherwise only that of
    /// a server that is new in its slot is set: the caller bounds how often many
    /// servers that come and go change the table.
    pub may_mark: bool,
    /// The processing servers, in any order, at most one for each slot.
    pub servers: &'a [ObservedServer],
    /// What the Services of the pool lead to; `None` where clients reach connection
    /// ports without Services.
    pub services: Option<&'a ServicePorts>,
}

/// The connection ports that the Services of a pool lead to, each once for TCP and
/// for UDP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePorts(BTreeSet<(ListenPort, bool)>);

impl ServicePorts {
    /// Adds a port of a Service for TCP, or for UDP.
    pub fn add(&mut self, port: ListenPort, is_udp: bool) {
        self.0.insert((port, is_udp));
    }

    /// Whether clients reach every connection port of `row`.
    pub(super) fn lead_to(&self, row: &Row) -> bool {
        row.ranges.iter().all(|range| {
            let has = |port, is_udp| self.0.contains(&(port, is_udp));
            let (tcp, udp) = (range.protocol.has_tcp(), range.protocol.has_udp());
            let mut ports = range.connection_ports();
            ports.all(|port| (!tcp || has(port, false)) && (!udp || has(port, true)))
        })
    }
}

impl<'a> Observed<'a> {
    /// What is observed of a pool with `uid` that was just created.
    #[must_use]
    pub fn nothing(uid: &'a str) -> Self {
        Self {
            uid,
            published: None,
            last_written: None,
            seen_generation: 0,
            may_start: true,
            may_mark: true,
            servers: &[],
            services: None,
        }
    }
}

/// A processing server as observed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedServer {
    /// The slot of the server.
    pub slot: Slot,
    /// The uid, which differs from that of a predecessor in the slot.
    pub uid: String,
    /// The address at which the server answers, once known.
    pub address: Option<IpAddr>,
    /// Whether the server is up as a whole, its agent included.
    pub is_ready: bool,
    /// Whether the workload is not ready, so that the server gets no new sessions.
    /// The agent does not count: it reports by itself what it can give, and what is
    /// given must not depend on what it reports.
    pub not_ready: bool,
    /// Whether a program of the workload runs, ready or not, as far as known.
    pub is_running: bool,
    /// Whether the server was created from a former template, or is too old and has
    /// not failed.
    pub is_outdated: bool,
    /// Whether the server has had all the sessions that it takes.
    pub is_spent: bool,
    /// Whether the server is being stopped already.
    pub is_stopping: bool,
    /// What the server waits for while it is not ready, when known.
    pub waits_for: Option<String>,
    /// How the server has ended for good, if it has.
    pub end: Option<End>,
    /// Time since which the server is ready, if it is and when known.
    pub ready_since: Option<Timestamp>,
    /// Servers of lower cost are removed or replaced first.
    pub deletion_cost: i32,
    /// Number of live sessions, when known.
    pub sessions: Option<u32>,
    /// The ports that are not offered because the workload does not listen, when that
    /// has lasted.
    pub not_listening: Vec<NotListening>,
    /// The ports that the slot had when the server was created, when known.
    /// They matter when the table is lost, and to workloads that were told them.
    pub ranges: Vec<PortRange>,
}

/// How a server has ended for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Whether all of its programs ended by themselves, with exit code 0.
    pub is_success: bool,
    /// Why it ended, as words that complete "it failed: …".
    pub cause: String,
}
