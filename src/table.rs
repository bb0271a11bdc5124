//! The port-relationship table: which connection port leads to which port of
//! which processing server.
//!
//! This module has the table's types and its only encoder and decoder. Laying
//! ports out (who gets which) is `plan::ports`; following a changing table is
//! `follow`.
//!
//! ```text
//! controller ─encode→ ConfigMap `<pool>-port-table`, key `table.json` ─decode→ connection server, agent
//! ```
//!
//! Source: US 8,544,018 B2, claim 1, the storage part.

mod index;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU16, ParseIntError};
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::index::PortIndex;
use crate::pool::{LoadSharing, PortProtocol, ProxyProtocol, Sessions};

/// The format this code writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Key of the table in its ConfigMap.
pub const TABLE_KEY: &str = "table.json";

/// Most bytes of an encoded table: what a ConfigMap may hold in all.
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
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// The pool's name, for logs and pages.
    pub pool: String,
    /// The pool's uid: tables of another uid are another pool's.
    pub pool_uid: String,
    /// Starts at 1 and only grows within one uid; readers refuse older ones.
    pub generation: u64,
    /// The address clients are told; absent means the one they reached us by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertised_address: Option<String>,
    /// Port of every agent's selection protocol, on its server's address.
    pub agent_port: TargetPort,
    /// How processing servers are chosen.
    pub load_sharing: LoadSharing,
    /// How long sessions may take, and who may connect.
    pub sessions: Sessions,
    /// One row per slot, sorted by slot, each slot once.
    pub rows: Vec<Row>,
}

/// One processing server's slot in the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// The slot's number, from 0. A replaced server keeps its slot's ports.
    pub slot: Slot,
    /// Name of the pod (or process) in the slot.
    pub server: String,
    /// Its uid, once it exists: tells a replacement from its predecessor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_uid: Option<String>,
    /// Where it answers; absent until known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Whether it gets new sessions.
    pub state: RowState,
    /// Since when it is `Draining`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining_since: Option<Timestamp>,
    /// Its connection ports. No connection port occurs twice in a table.
    pub ranges: Vec<PortRange>,
}

/// Whether a slot takes new sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RowState {
    /// New sessions are allocated here.
    Active,
    /// Live sessions go on; nothing new comes. The row goes when it is empty.
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
    /// First server port of the run, or the only one when `shared`.
    pub server_port: TargetPort,
    /// Number of connection ports, at least 1.
    pub count: u16,
    /// What is forwarded on each of them.
    pub protocol: PortProtocol,
    /// All connection ports lead to the one server port.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// Whether the server is told the client's address first.
    #[serde(default, skip_serializing_if = "is_default")]
    pub proxy_protocol: ProxyProtocol,
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

    /// The server port that `listen` leads to; `None` outside the run.
    #[must_use]
    pub fn target(&self, listen: ListenPort) -> Option<TargetPort> {
        let offset = listen.get().checked_sub(self.connection_port.get())?;
        if offset >= self.count {
            return None;
        }
        let step = if self.shared { 0 } else { offset };
        TargetPort::new(self.server_port.get().checked_add(step)?)
    }

    /// Whether the run has 1 or more ports, none above 65535.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let last = u32::from(u16::MAX);
        self.count > 0 && self.last_connection_port() <= last && self.last_server_port() <= last
    }

    /// The last connection port's number; above 65535 when the run is too long.
    fn last_connection_port(&self) -> u32 {
        u32::from(self.connection_port.get()) + u32::from(self.count) - 1
    }

    /// The last server port's number; above 65535 when the run is too long.
    fn last_server_port(&self) -> u32 {
        let steps = if self.shared {
            1
        } else {
            u32::from(self.count)
        };
        u32::from(self.server_port.get()) + steps - 1
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

    /// Where `target` is reached, once the server's address is known.
    #[must_use]
    pub fn socket_address(&self, target: TargetPort) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.address?, target.get()))
    }
}

/// Why a text is not a table, or not one to follow.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Not JSON of the table's shape.
    #[error("port-relationship table is not valid: {0}")]
    Syntax(#[from] serde_json::Error),
    /// Written by a newer portpool.
    #[error(
        "port-relationship table has format version {found}; this portpool reads {FORMAT_VERSION}: upgrade it"
    )]
    Format {
        /// The text's format version.
        found: u32,
    },
    /// Larger than a ConfigMap can be.
    #[error(
        "port-relationship table is {bytes} bytes; at most {MAX_ENCODED_BYTES} fit into a ConfigMap: lower spec.replicas or merge port entries"
    )]
    TooLarge {
        /// Encoded size.
        bytes: usize,
    },
    /// Generation 0.
    #[error("port-relationship table has generation 0; generations start at 1")]
    Generation,
    /// Rows out of order or a slot twice.
    #[error("slot {slot} is out of order or occurs twice in the port-relationship table")]
    Slot {
        /// The offending slot.
        slot: Slot,
    },
    /// A run with no ports, or past 65535.
    #[error("slot {slot}, port {name:?}: a run must have 1 or more ports, none above 65535")]
    Range {
        /// The offending row.
        slot: Slot,
        /// The offending port entry.
        name: String,
    },
    /// One connection port for two destinations.
    #[error("connection port {port} is given to slot {first} and to slot {second}")]
    DuplicatePort {
        /// The connection port.
        port: u32,
        /// Row that has it first.
        first: Slot,
        /// Row that has it again.
        second: Slot,
    },
}

impl Table {
    /// The table as compact JSON, the value of `table.json` in the ConfigMap.
    ///
    /// # Errors
    /// [`TableError::TooLarge`] above [`MAX_ENCODED_BYTES`], and everything
    /// that [`Table::decode`] would refuse.
    pub fn encode(&self) -> Result<String, TableError> {
        self.check()?;
        let text = serde_json::to_string(self)?;
        if text.len() > MAX_ENCODED_BYTES {
            return Err(TableError::TooLarge { bytes: text.len() });
        }
        Ok(text)
    }

    /// Decodes `text`, the `table.json` entry of a pool's ConfigMap.
    ///
    /// Unknown fields are ignored, so that an older reader follows a newer
    /// writer of the same format version. In the result, rows are sorted by
    /// slot and every connection port occurs once.
    ///
    /// # Errors
    /// The [`TableError`] that names the row or port at fault.
    pub fn decode(text: &str) -> Result<Self, TableError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Format {
            format_version: u32,
        }
        if text.len() > MAX_ENCODED_BYTES {
            return Err(TableError::TooLarge { bytes: text.len() });
        }
        // The version first: a newer shape should not be called a syntax error.
        let Format { format_version } = serde_json::from_str(text)?;
        if format_version != FORMAT_VERSION {
            return Err(TableError::Format {
                found: format_version,
            });
        }
        let table: Self = serde_json::from_str(text)?;
        table.check()?;
        Ok(table)
    }

    /// The same table with only `slot`'s row (or none): what an agent needs.
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

    /// The row of `slot`.
    #[must_use]
    pub fn row(&self, slot: Slot) -> Option<&Row> {
        let index = self.rows.binary_search_by_key(&slot, |row| row.slot).ok()?;
        self.rows.get(index)
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

    fn check(&self) -> Result<(), TableError> {
        if self.generation == 0 {
            return Err(TableError::Generation);
        }
        for pair in self.rows.windows(2) {
            if pair[0].slot >= pair[1].slot {
                return Err(TableError::Slot { slot: pair[1].slot });
            }
        }
        let mut runs: Vec<(&PortRange, Slot)> = Vec::new();
        for row in &self.rows {
            for range in &row.ranges {
                if !range.is_valid() {
                    let name = range.name.clone();
                    return Err(TableError::Range {
                        slot: row.slot,
                        name,
                    });
                }
                runs.push((range, row.slot));
            }
        }
        runs.sort_by_key(|(range, slot)| (range.connection_port, *slot));
        for pair in runs.windows(2) {
            let [(before, first), (after, second)] = [pair[0], pair[1]];
            let port = u32::from(after.connection_port.get());
            if port <= before.last_connection_port() {
                return Err(TableError::DuplicatePort {
                    port,
                    first: first.min(second),
                    second: first.max(second),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(super) fn range(first: u16, count: u16) -> PortRange {
        PortRange {
            name: "main".to_owned(),
            connection_port: ListenPort::new(first).unwrap(),
            server_port: TargetPort::new(7000).unwrap(),
            count,
            protocol: PortProtocol::TCP,
            shared: false,
            proxy_protocol: ProxyProtocol::None,
        }
    }

    pub(super) fn row(slot: Slot, ranges: Vec<PortRange>) -> Row {
        Row {
            slot,
            server: format!("a-pool-with-a-long-name-{slot}"),
            server_uid: Some("6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10".to_owned()),
            address: Some("2001:db8:1234:5678:9abc:def0:1234:5678".parse().unwrap()),
            state: RowState::Active,
            draining_since: None,
            ranges,
        }
    }

    pub(super) fn table(rows: Vec<Row>) -> Table {
        Table {
            format_version: FORMAT_VERSION,
            pool: "pool".to_owned(),
            pool_uid: "uid".to_owned(),
            generation: 3,
            advertised_address: Some("games.example.org".to_owned()),
            agent_port: TargetPort::new(7070).unwrap(),
            load_sharing: LoadSharing::default(),
            sessions: Sessions::default(),
            rows,
        }
    }

    #[test]
    fn sixty_four_thousand_ports_stay_far_below_a_config_map() {
        let rows = (0..1000).map(|slot| {
            row(
                Slot(slot),
                vec![range(1024 + 64 * u16::try_from(slot).unwrap(), 64)],
            )
        });
        let table = table(rows.collect());
        assert_eq!(table.connection_port_count(), 64_000);
        let text = table.encode().unwrap();
        assert!(text.len() < MAX_ENCODED_BYTES / 2, "{} bytes", text.len());
        assert_eq!(Table::decode(&text).unwrap(), table);
    }

    #[test]
    fn the_encoding_is_as_committed() {
        let golden = r#"{"formatVersion":1,"pool":"pool","poolUid":"uid","generation":3,"advertisedAddress":"games.example.org","agentPort":7070,"loadSharing":{"policy":"LeastSessions"},"sessions":{"claimSeconds":30,"idleTimeoutSeconds":3600,"udpIdleTimeoutSeconds":60,"maxDurationSeconds":0,"lingerSeconds":5,"admission":"Reserved","clientBinding":"Any"},"rows":[{"slot":0,"server":"a-pool-with-a-long-name-0","serverUid":"6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10","address":"2001:db8:1234:5678:9abc:def0:1234:5678","state":"Active","ranges":[{"name":"main","connectionPort":20000,"serverPort":7000,"count":4,"protocol":"TCP"}]}]}"#;
        assert_eq!(
            table(vec![row(Slot(0), vec![range(20_000, 4)])])
                .encode()
                .unwrap(),
            golden
        );
    }

    #[test]
    fn what_is_no_table_is_named() {
        let good = table(vec![
            row(Slot(0), vec![range(20_000, 4)]),
            row(Slot(1), vec![range(20_010, 4)]),
        ]);
        type Change = fn(&mut Table);
        let cases: [(Change, &str); 6] = [
            (|table| table.format_version = 2, "format version 2"),
            (|table| table.generation = 0, "generation 0"),
            (|table| table.rows.swap(0, 1), "slot 0 is out of order"),
            (
                |table| table.rows[1].ranges[0].connection_port = ListenPort::new(20_003).unwrap(),
                "20003 is given to slot 0 and to slot 1",
            ),
            (|table| table.rows[1].ranges[0].count = 0, "1 or more ports"),
            (
                |table| table.rows[1].ranges[0].server_port = TargetPort::new(65_534).unwrap(),
                "none above 65535",
            ),
        ];
        for (change, words) in cases {
            let mut table = good.clone();
            change(&mut table);
            let text = serde_json::to_string(&table).unwrap();
            let error = Table::decode(&text).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
        assert!(
            Table::decode(&" ".repeat(MAX_ENCODED_BYTES + 1))
                .unwrap_err()
                .to_string()
                .contains("1048577 bytes")
        );
    }

    #[test]
    fn ports_go_in_step_or_are_shared() {
        let port = |number| ListenPort::new(number).unwrap();
        let in_step = range(20_000, 4);
        assert_eq!(in_step.target(port(20_003)), TargetPort::new(7003));
        assert_eq!(in_step.target(port(20_004)), None);
        assert_eq!(in_step.target(port(19_999)), None);
        let shared = PortRange {
            shared: true,
            ..in_step
        };
        assert_eq!(shared.target(port(20_003)), TargetPort::new(7000));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,200}") {
            let _ = Table::decode(&text);
        }

        #[test]
        fn decoding_is_the_inverse_of_encoding(
            rows in proptest::collection::btree_map(0u32..500, (1u16..60, any::<bool>()), 0..40), generation in 1u64..,
        ) {
            let mut next = 1024;
            let rows = rows.into_iter().map(|(slot, (count, shared))| {
                next += count;
                row(Slot(slot), vec![PortRange { shared, ..range(next - count, count) }])
            });
            let table = Table { generation, ..table(rows.collect()) };
            prop_assert_eq!(Table::decode(&table.encode().unwrap()).unwrap(), table);
        }
    }
}
