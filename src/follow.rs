//! Follows a changing port-relationship table: a file or a ConfigMap becomes a
//! watch of the last valid table.
//!
//! ```text
//! file, ConfigMap ─change, decode, accept?→ watch<Arc<Table>> → connection server, agent
//! ```
//!
//! A reader never goes back. An older generation of the same pool, a table of
//! another pool and a text that is no table are logged once and counted; the last
//! table stays in force.
//!
//! - `file`, `config_map`: where texts come from;
//! - `acceptor`: which of them replace the table in force;
//! - this file: what a reader holds.

mod acceptor;
mod config_map;
mod file;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use notify::RecommendedWatcher;
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub use self::acceptor::{Rejected, RejectedTables, is_newer};
pub use self::config_map::{ConfigMapName, follow_config_map};
pub use self::file::{follow_file, write_table};
use crate::table::Table;

/// Where a table comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableSource {
    /// The file with this path.
    File(PathBuf),
    /// The entry [`TABLE_KEY`](crate::table::TABLE_KEY) of this ConfigMap.
    ConfigMap(ConfigMapName),
}

impl fmt::Display for TableSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(formatter),
            Self::ConfigMap(name) => write!(formatter, "ConfigMap {name}"),
        }
    }
}

/// Why a table cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The folder of a table's file cannot be watched.
    #[error("failed to watch folder {folder} of the port-relationship table: {source}")]
    Watch {
        /// Folder of the table's file.
        folder: PathBuf,
        /// Error of the operating system.
        source: notify::Error,
    },
    /// The follower ended before there was a valid table.
    #[error("no valid port-relationship table came from {0}")]
    Ended(TableSource),
}

/// A table that is followed. Following stops when this is dropped.
#[derive(Debug)]
pub struct Follower {
    source: TableSource,
    current: watch::Receiver<Option<Arc<Table>>>,
    rejected: RejectedTables,
    task: AbortHandle,
    /// Watches the folder of a file for as long as it is kept.
    _watcher: Option<RecommendedWatcher>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Follower {
    /// Waits for the first valid table.
    ///
    /// # Errors
    /// [`FollowError::Ended`] when the follower's runtime stops.
    pub async fn first(&mut self) -> Result<Arc<Table>, FollowError> {
        let found = self.current.wait_for(Option::is_some).await;
        let found = found.ok().and_then(|table| table.clone());
        found.ok_or_else(|| FollowError::Ended(self.source.clone()))
    }

    /// A watch of the last valid table, which is `None` before the first.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Table>>> {
        self.current.clone()
    }

    /// The counts of the tables that were rejected so far.
    #[must_use]
    pub fn rejected(&self) -> RejectedTables {
        self.rejected.clone()
    }
}

#[cfg(test)]
mod tests;
