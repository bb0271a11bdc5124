//! The only encoder and decoder of the table, and what a text must be to count as
//! one.

use serde::Deserialize;

use super::{
    FORMAT_VERSION, MAX_ENCODED_BYTES, OLDEST_FORMAT_VERSION, PortRange, Row, Slot, Table,
};
use crate::pool::rules::{self, FieldProblem};
use crate::pool::{Mapping, PortEntry};

/// Why a text is no table, or a table cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The text is not JSON of the table's shape.
    #[error("port-relationship table is not valid: {0}")]
    Syntax(#[from] serde_json::Error),
    /// The table was written by a newer portpool.
    #[error(
        "port-relationship table has format version {found}; this portpool reads {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}: upgrade it"
    )]
    Format {
        /// Format version of the text.
        found: u32,
    },
    /// The table is larger than a ConfigMap can be.
    #[error(
        "port-relationship table is {bytes} bytes; at most {MAX_ENCODED_BYTES} fit into a ConfigMap: lower spec.replicas or merge port entries"
    )]
    TooLarge {
        /// Size of the encoded table.
        bytes: usize,
    },
    /// The table has generation 0.
    #[error("port-relationship table has generation 0; generations start at 1")]
    Generation,
    /// Rows are out of order, or a slot occurs twice.
    #[error("slot {slot} is out of order or occurs twice in the port-relationship table")]
    Slot {
        /// Slot of the later one of the two rows.
        slot: Slot,
    },
    /// A run has no ports, or ports above 65535, or other server ports than its
    /// mapping says.
    #[error(
        "slot {slot}, port {name:?}: a run must have 1 or more ports, none above 65535, and with mapping Identity the same ones on the server"
    )]
    Range {
        /// Slot with the run.
        slot: Slot,
        /// Name of the run's port entry.
        name: String,
    },
    /// A run is of no entry that a pool can have.
    #[error("slot {slot}, port {name:?}: {problem}")]
    Entry {
        /// Slot with the run.
        slot: Slot,
        /// Name of the run's port entry.
        name: String,
        /// The field at fault and the remedy.
        problem: String,
    },
    /// A connection port leads to two destinations.
    #[error("connection port {port} is given to slot {first} and to slot {second}")]
    DuplicatePort {
        /// The connection port.
        port: u32,
        /// Lower one of the two slots.
        first: Slot,
        /// Higher one of the two slots.
        second: Slot,
    },
}

impl Table {
    /// The table as compact JSON, the value of `table.json` in the ConfigMap.
    ///
    /// # Errors
    /// [`TableError::TooLarge`] above [`MAX_ENCODED_BYTES`], and everything
    /// that [`Table::decode`] would reject.
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
    /// writer of the same format version. A table of an older format becomes one
    /// of [`FORMAT_VERSION`]. In the result, rows are sorted by slot and every
    /// connection port occurs once.
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
        // The version comes first, because a newer shape is no syntax error.
        let Format { format_version } = serde_json::from_str(text)?;
        if !(OLDEST_FORMAT_VERSION..=FORMAT_VERSION).contains(&format_version) {
            return Err(TableError::Format {
                found: format_version,
            });
        }
        let mut table: Self = serde_json::from_str(text)?;
        // Who sends it on writes it in the new shape.
        table.format_version = FORMAT_VERSION;
        table.check()?;
        Ok(table)
    }

    /// Checks what the types do not say: generation, order of rows, ports and their
    /// entries.
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
            check_entries(row)?;
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

/// Checks the runs of `row` by the rules of a pool's port entries.
fn check_entries(row: &Row) -> Result<(), TableError> {
    let entries: Vec<PortEntry> = row.ranges.iter().map(PortEntry::from).collect();
    for (index, entry) in entries.iter().enumerate() {
        let problems = rules::check_beside(entry, &entries[..index]);
        if let Some(FieldProblem { path, message }) = problems.into_iter().next() {
            return Err(TableError::Entry {
                slot: row.slot,
                name: entry.name.clone(),
                problem: format!("{path}: {message}"),
            });
        }
    }
    Ok(())
}

/// The entry of which `range` is all. Server ports that are the connection ports
/// (Identity) are known here, so that they are as any others.
impl From<&PortRange> for PortEntry {
    fn from(range: &PortRange) -> Self {
        Self {
            name: range.name.clone(),
            port: Some(range.server_port.get().into()),
            count: range.count.into(),
            protocol: range.protocol,
            mapping: match range.mapping {
                Mapping::Offset | Mapping::Identity => Mapping::Offset,
                Mapping::Shared => Mapping::Shared,
            },
            offer: range.offer,
            admission: range.admission,
            replies: range.replies,
            proxy_protocol: range.proxy_protocol,
        }
    }
}
