//! The table in a file: watched by events of its folder, looked at every few
//! seconds besides, and written so that readers never see a part. What a text is
//! worth is `acceptor`'s.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tracing::info;

use super::acceptor::{RejectedTables, TableAcceptor};
use super::{FollowError, Follower};
use crate::table::Table;

/// How often the file is looked at without an event, for file systems that
/// have none.
const RECHECK: Duration = Duration::from_secs(5);

/// Follows the table in `path`, which need not exist yet; its folder must.
///
/// # Errors
/// [`FollowError::Watch`].
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
        path: path.to_owned(),
        current,
        rejected,
        task,
        _watcher: Some(watcher),
    })
}

/// Has `changed` notified of whatever happens in `folder`. The folder, not the
/// file: writers replace the file, and a ConfigMap volume replaces the
/// `..data` link beside it. Reading is no change: our own would wake us again.
fn watch_folder(folder: &Path, changed: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            changed.notify_one();
        }
    })?;
    watcher.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

struct File {
    path: PathBuf,
    acceptor: TableAcceptor,
}

impl File {
    async fn follow(mut self, changed: Arc<Notify>) {
        loop {
            self.look();
            let _ = tokio::time::timeout(RECHECK, changed.notified()).await;
        }
    }

    fn look(&mut self) {
        match std::fs::read_to_string(&self.path) {
            Ok(text) => self.acceptor.take(text),
            // Said once, until the file is back.
            Err(error) => {
                if self.acceptor.lose() {
                    info!(path = %self.path.display(), %error, "port-relationship table cannot be read now");
                }
            }
        }
    }
}

/// Writes `table` to `path` so that readers see the old one or the new one,
/// never a part.
///
/// # Errors
/// The encoding's or the file system's.
pub fn write_table(path: &Path, table: &Table) -> io::Result<()> {
    let text = table.encode().map_err(io::Error::other)?;
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text)?;
    std::fs::rename(&draft, path)
}
