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

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

use crate::pool::{LoadSharing, PortProtocol, ProxyProtocol, Sessions};

/// The format this code writes and reads.
pub const FORMAT_VERSION: u32 = 1;

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
    pub slot: u32,
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
        slot: u32,
    },
    /// A run with no ports, or past 65535.
    #[error("slot {slot}, port {name:?}: a run must have 1 or more ports, none above 65535")]
    Range {
        /// The offending row.
        slot: u32,
        /// The offending port entry.
        name: String,
    },
    /// One connection port for two destinations.
    #[error("connection port {port} is given to slot {first} and to slot {second}")]
    DuplicatePort {
        /// The connection port.
        port: u32,
        /// Row that has it first.
        first: u32,
        /// Row that has it again.
        second: u32,
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
    pub fn slice(&self, slot: u32) -> Self {
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
    pub fn row(&self, slot: u32) -> Option<&Row> {
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
        let mut owners: HashMap<u32, u32> = HashMap::new();
        for row in &self.rows {
            for range in &row.ranges {
                if range.count == 0
                    || range.last_connection_port() > u32::from(u16::MAX)
                    || range.last_server_port() > u32::from(u16::MAX)
                {
                    let name = range.name.clone();
                    return Err(TableError::Range {
                        slot: row.slot,
                        name,
                    });
                }
                let first = u32::from(range.connection_port.get());
                for port in first..=range.last_connection_port() {
                    if let Some(first) = owners.insert(port, row.slot) {
                        let second = row.slot;
                        return Err(TableError::DuplicatePort {
                            port,
                            first,
                            second,
                        });
                    }
                }
            }
        }
        Ok(())
    }
}
