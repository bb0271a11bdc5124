//! Follows a changing port-relationship table: a file or a ConfigMap becomes a
//! watch of the last valid table.
//!
//! ```text
//! file, ConfigMap ─change, decode, accept?→ watch<Arc<Table>> → connection server, agent
//! ```
//!
//! A reader never goes back: an older generation of the same pool, a table of
//! another pool and a text that is no table leave the last one in force, are
//! logged once and counted.
//!
//! - `file`, `cluster`: where texts come from;
//! - `acceptor`: which of them count;
//! - this file: what a reader holds.

mod acceptor;
mod cluster;
mod file;

use std::path::PathBuf;
use std::sync::Arc;

use notify::RecommendedWatcher;
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub use self::acceptor::{Rejected, RejectedTables, accept};
pub use self::cluster::{WatchBackoff, cluster, follow_config_map};
pub use self::file::{follow_file, write_table};
use crate::table::Table;

/// Why a file cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The folder cannot be watched.
    #[error("failed to watch folder {folder} of the port-relationship table: {source}")]
    Watch {
        /// The table's folder.
        folder: PathBuf,
        /// The system's answer.
        source: notify::Error,
    },
    /// The follower ended before a first table came.
    #[error("no valid port-relationship table came from {0}")]
    Ended(PathBuf),
}

/// A followed file. Stops following when dropped.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    current: watch::Receiver<Option<Arc<Table>>>,
    rejected: RejectedTables,
    task: AbortHandle,
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
        found.ok_or_else(|| FollowError::Ended(self.path.clone()))
    }

    /// The last valid table, `None` before the first.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Table>>> {
        self.current.clone()
    }

    /// What was turned down so far.
    #[must_use]
    pub fn rejected(&self) -> RejectedTables {
        self.rejected.clone()
    }
}

#[cfg(test)]
mod tests;
