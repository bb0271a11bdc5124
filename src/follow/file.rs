//! The table in a file. Reading: an event of the folder, or the passing of a few
//! seconds, makes the follower read the file; `acceptor` decides whether its text
//! counts. Writing: readers never see a part of a table.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tracing::info;

use super::acceptor::{RejectedTables, TableAcceptor};
use super::{FollowError, Follower, TableSource};
use crate::table::Table;

/// Longest time between two reads of the file, for file systems that report no
/// events.
const RECHECK: Duration = Duration::from_secs(5);

/// Follows the table in the file at `path`. The file need not exist yet, but its
/// folder must.
///
/// # Errors
/// [`FollowError::Watch`] when the folder cannot be watched.
pub fn follow_file(path: &Path) -> Result<Follower, FollowError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let changed = Arc::new(Notify::new());
    let watcher = watch_folder(folder, changed.clone()).map_err(|source| FollowError::Watch {
        folder: folder.to_owned(),
        source,
    })?;
    let (sender, current) = watch::channel(None);
    let rejected = RejectedTables::default();
    let file = File {
        path: path.to_owned(),
        acceptor: TableAcceptor::new(sender, rejected.clone()),
    };
    let task = tokio::spawn(file.follow(changed)).abort_handle();
    Ok(Follower {
        source: TableSource::File(path.to_owned()),
        current,
        rejected,
        task,
        _watcher: Some(watcher),
    })
}

/// Notifies `changed` of every change in `folder`. A watch of the file alone would
/// not do, because writers replace the file, and a ConfigMap volume replaces the
/// `..data` link beside it. Reading is no change: the follower's own reads would
/// wake it again.
fn watch_folder(folder: &Path, changed: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            changed.notify_one();
        }
    })?;
    watcher.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

/// A file that is followed.
struct File {
    path: PathBuf,
    acceptor: TableAcceptor,
}

impl File {
    async fn follow(mut self, changed: Arc<Notify>) {
        loop {
            self.read();
            let _ = tokio::time::timeout(RECHECK, changed.notified()).await;
        }
    }

    fn read(&mut self) {
        match std::fs::read_to_string(&self.path) {
            Ok(text) => self.acceptor.take(text),
            // This is logged once, until the file can be read again.
            Err(error) => {
                if self.acceptor.lose() {
                    info!(path = %self.path.display(), %error, "port-relationship table cannot be read now");
                }
            }
        }
    }
}

/// Writes `table` to the file at `path`. Readers see the old table or the new one,
/// never a part of it.
///
/// # Errors
/// The table cannot be encoded, or the file system refuses the write.
pub fn write_table(path: &Path, table: &Table) -> io::Result<()> {
    let text = table.encode().map_err(io::Error::other)?;
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text)?;
    std::fs::rename(&draft, path)
}
