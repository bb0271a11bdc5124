//! The port-relationship table: which connection port leads to which port of
//! which processing server.
//!
//! ```text
//! controller ─encode→ ConfigMap `<pool>-port-table`, key `table.json` ─decode→ connection server, agent
//! ```
//!
//! - `codec`: the only encoder and decoder, and what is no table;
//! - `index`: the row of a connection port;
//! - this file: the types.
//!
//! Which server gets which ports is in `plan::ports`; how a changing table is
//! followed is in `follow`.
//!
//! Source: US 8,544,018 B2, claim 1, the storage part.

mod codec;
mod index;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU16, ParseIntError};
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};

pub use self::codec::TableError;
pub use self::index::PortIndex;
use crate::pool::{
    DEFAULT_DRAIN_SECONDS, EntryAdmission, LoadSharing, Mapping, Offer, PortProtocol,
    ProxyProtocol, Recycle, Replies, Sessions,
};

/// The format that this code writes.
pub const FORMAT_VERSION: u32 = 2;

/// The oldest format that this code reads. Format 1 has `shared` in place of
/// `mapping`.
const OLDEST_FORMAT_VERSION: u32 = 1;

/// The drain limit of a table that has none: that of a pool that names none. A
/// controller that is rolled back leaves it out, and sessions should not end for that.
const UNTOLD_DRAIN_SECONDS: u32 = DEFAULT_DRAIN_SECONDS.unsigned_abs();

/// Key of the table in its ConfigMap.
pub const TABLE_KEY: &str = "table.json";

/// Most bytes of an encoded table: the limit of all entries of a ConfigMap
/// together.
///
/// Source: Kubernetes documentation, ConfigMap, "cannot exceed 1 MiB".
pub const MAX_ENCODED_BYTES: usize = 1024 * 1024;

/// A port of the connection server that clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ListenPort(pub NonZeroU16);

/// A port of a processing server that its workload listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TargetPort(pub NonZeroU16);

macro_rules! port_number {
    ($name:ident) => {
        impl $name {
            /// The port with this number; `None` for 0.
            #[must_use]
            pub fn new(number: u16) -> Option<Self> {
                NonZeroU16::new(number).map(Self)
            }

            /// The port's number, 1 to 65535.
            #[must_use]
            pub fn get(self) -> u16 {
                self.0.get()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(formatter)
            }
        }
    };
}
port_number!(ListenPort);
port_number!(TargetPort);

/// The number of a processing server's place in its pool, from 0. A server that
/// replaces another one in its slot keeps the slot's connection ports.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Slot(pub u32);

impl fmt::Display for Slot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl FromStr for Slot {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        text.parse().map(Self)
    }
}

/// The whole relationship between connection ports and processing servers at
/// one generation, with the settings that readers apply at run time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Table {
    /// The [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// Name of the pool, for logs and admin pages.
    pub pool: String,
    /// Uid of the pool. A table with another uid belongs to another pool.
    pub pool_uid: String,
    /// Generation of the table: starts at 1 and only grows within one uid. Readers
    /// reject older ones.
    pub generation: u64,
    /// The address that answers give clients to connect to; absent where that is the
    /// address that the client sent its request to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertised_address: Option<String>,
    /// Port on which every agent serves the selection protocol, on the address of its
    /// server.
    pub agent_port: TargetPort,
    /// How processing servers are chosen.
    pub load_sharing: LoadSharing,
    /// How long sessions last, and who may connect.
    pub sessions: Sessions,
    /// When servers are replaced.
    #[serde(default, skip_serializing_if = "Recycle::is_never")]
    pub recycle: Recycle,
    /// How many seconds live sessions may go on at most once their server, or the
    /// connection server, stops. Readers follow it while they run and while they stop.
    /// Absent in tables of older writers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_seconds: Option<u32>,
    /// One row per slot, sorted by slot, each slot once.
    pub rows: Vec<Row>,
}

/// One processing server's slot in the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// Number of the slot, from 0.
    pub slot: Slot,
    /// Name of the pod, or of the process, in the slot.
    pub server: String,
    /// Uid of the server, once it exists. It differs from that of a predecessor in
    /// the slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_uid: Option<String>,
    /// Address at which the server answers; absent until it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Whether the slot takes new sessions.
    pub state: RowState,
    /// Whether the server gets no new sessions, because its workload is not ready, or
    /// because no Service leads clients to its connection ports yet.
    /// Older readers of the same format ignore it: to them every server is ready.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_ready: bool,
    /// Time at which the row became `Draining`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining_since: Option<Timestamp>,
    /// How the servers in the slot have ended lately. Only the controller reads it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub attempts: Attempts,
    /// Connection ports of the server. No connection port occurs twice in a table.
    pub ranges: Vec<PortRange>,
}

/// How the servers in a slot have ended lately. It is in the table, so that a restart
/// of the controller does not make a slot forget that its servers fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Attempts {
    /// Number of servers that failed one after another.
    #[serde(skip_serializing_if = "is_default")]
    pub failures: u32,
    /// Time at which the last of them was seen to have failed; absent once it is
    /// removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed_at: Option<Timestamp>,
    /// Whether the present server has never been ready, and so never had a session.
    #[serde(skip_serializing_if = "is_default")]
    pub never_ready: bool,
}

/// Whether a slot takes new sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RowState {
    /// New sessions are allocated here.
    Active,
    /// Live sessions continue, but no session is added. The row is removed when the
    /// last one has ended and the server is gone.
    Draining,
}

/// A run of connection ports that lead to ports of one processing server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortRange {
    /// Name of the port entry in the pool's spec.
    pub name: String,
    /// First connection port of the run.
    pub connection_port: ListenPort,
    /// First server port of the run, or the only one with [`Mapping::Shared`].
    pub server_port: TargetPort,
    /// Number of connection ports, at least 1.
    pub count: u16,
    /// Transport protocols that are forwarded on each of them.
    pub protocol: PortProtocol,
    /// The server ports that the connection ports lead to.
    #[serde(
        default,
        alias = "shared",
        deserialize_with = "mapping_of_any_format",
        skip_serializing_if = "is_default"
    )]
    pub mapping: Mapping,
    /// When a connection port is offered.
    #[serde(default, skip_serializing_if = "is_default")]
    pub offer: Offer,
    /// Who may connect; absent where `sessions` of the table says that. A reader that
    /// does not know a value keeps the table that it has: were it to ignore the value,
    /// it would let the wrong clients in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admission: Option<EntryAdmission>,
    /// Whether the server first receives the address of the client.
    #[serde(default, skip_serializing_if = "is_default")]
    pub proxy_protocol: ProxyProtocol,
    /// Which datagrams of the server reach a client. A connection server that does
    /// not know the field forwards those of the server port, as by default.
    #[serde(default, skip_serializing_if = "is_default")]
    pub replies: Replies,
}

/// Reads a mapping, or `shared` of format 1.
fn mapping_of_any_format<'de, D: Deserializer<'de>>(value: D) -> Result<Mapping, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        IsShared(bool),
        Mapping(Mapping),
    }
    Ok(match Either::deserialize(value)? {
        Either::IsShared(true) => Mapping::Shared,
        Either::IsShared(false) => Mapping::Offset,
        Either::Mapping(mapping) => mapping,
    })
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl PortRange {
    /// The run's connection ports, ascending.
    pub fn connection_ports(&self) -> impl Iterator<Item = ListenPort> + use<> {
        let first = self.connection_port.get();
        (0..self.count).filter_map(move |offset| ListenPort::new(first.checked_add(offset)?))
    }

    /// Whether its ports are companion ports: no request gets one, and clients with a
    /// session on the server may connect.
    #[must_use]
    pub fn is_companion(&self) -> bool {
        self.admission == Some(EntryAdmission::Companion)
    }

    /// The server port that `listen` leads to; `None` outside the run.
    #[must_use]
    pub fn target(&self, listen: ListenPort) -> Option<TargetPort> {
        let offset = listen.get().checked_sub(self.connection_port.get())?;
        if offset >= self.count {
            return None;
        }
        let step = match self.mapping {
            // With identity, the run begins at the same number.
            Mapping::Offset | Mapping::Identity => offset,
            Mapping::Shared => 0,
        };
        TargetPort::new(self.server_port.get().checked_add(step)?)
    }

    /// Whether the run has 1 or more ports, none above 65535, and leads where its
    /// mapping says.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let last = u32::from(u16::MAX);
        let is_as_mapped = self.mapping != Mapping::Identity
            || self.server_port.get() == self.connection_port.get();
        is_as_mapped
            && self.count > 0
            && self.last_connection_port() <= last
            && self.last_server_port() <= last
    }

    /// The last connection port's number; above 65535 when the run is too long.
    fn last_connection_port(&self) -> u32 {
        u32::from(self.connection_port.get()) + u32::from(self.count) - 1
    }

    /// The last server port's number; above 65535 when the run is too long.
    fn last_server_port(&self) -> u32 {
        let steps = match self.mapping {
            Mapping::Offset | Mapping::Identity => u32::from(self.count) - 1,
            Mapping::Shared => 0,
        };
        u32::from(self.server_port.get()) + steps
    }
}

impl Row {
    /// The range and server port that `listen` belongs to in this row.
    #[must_use]
    pub fn find(&self, listen: ListenPort) -> Option<(&PortRange, TargetPort)> {
        self.ranges
            .iter()
            .find_map(|range| Some((range, range.target(listen)?)))
    }

    /// Whether it has companion ports.
    #[must_use]
    pub fn has_companions(&self) -> bool {
        self.ranges.iter().any(PortRange::is_companion)
    }

    /// The address of the server port `target`, once the server's is known.
    #[must_use]
    pub fn socket_address(&self, target: TargetPort) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.address?, target.get()))
    }
}

impl Table {
    /// The same table with only the row of `slot`, if there is one. An agent needs no
    /// more.
    #[must_use]
    pub fn slice(&self, slot: Slot) -> Self {
        Self {
            rows: self.row(slot).cloned().into_iter().collect(),
            pool: self.pool.clone(),
            pool_uid: self.pool_uid.clone(),
            advertised_address: self.advertised_address.clone(),
            load_sharing: self.load_sharing.clone(),
            sessions: self.sessions.clone(),
            ..*self
        }
    }

    /// How long live sessions may go on once their server, or the connection server,
    /// stops.
    #[must_use]
    pub fn drain_limit(&self) -> Duration {
        let seconds = self.drain_seconds.unwrap_or(UNTOLD_DRAIN_SECONDS);
        Duration::from_secs(seconds.into())
    }

    /// The row of `slot`.
    #[must_use]
    pub fn row(&self, slot: Slot) -> Option<&Row> {
        let index = self.rows.binary_search_by_key(&slot, |row| row.slot).ok()?;
        self.rows.get(index)
    }

    /// Whether `port` is a connection port of a row.
    #[must_use]
    pub fn has_connection_port(&self, port: u16) -> bool {
        let mut ranges = self.rows.iter().flat_map(|row| &row.ranges);
        ranges.any(|range| {
            let offset = port.checked_sub(range.connection_port.get());
            offset.is_some_and(|offset| offset < range.count)
        })
    }

    /// Number of connection ports in all rows.
    #[must_use]
    pub fn connection_port_count(&self) -> usize {
        self.rows
            .iter()
            .flat_map(|row| &row.ranges)
            .map(|range| usize::from(range.count))
            .sum()
    }
}

#[cfg(test)]
pub(crate) mod tests;
