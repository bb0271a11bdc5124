//! The table in a file. Reading: a change of the file, or of a link that leads to
//! it, makes the follower read the file; `acceptor` decides whether its text
//! counts. Writing: readers never see a part of a table.
//!
//! What happens beside the file makes no one read it. A pool may have a hundred
//! readers of one file, and each read is an event for all of them, so the file is
//! not opened either to find out whether it has changed.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tracing::info;

use super::acceptor::{RejectedTables, TableAcceptor};
use super::{FollowError, Follower, TableSource};
use crate::table::Table;

/// Longest time between two checks whether the file is another one, for file
/// systems that report no events.
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
    let names = Arc::new(Mutex::new(names(path)));
    let watcher = watch_folder(folder, names.clone(), changed.clone()).map_err(|source| {
        FollowError::Watch {
            folder: folder.to_owned(),
            source,
        }
    })?;
    let (sender, current) = watch::channel(None);
    let rejected = RejectedTables::default();
    let file = File {
        path: path.to_owned(),
        names,
        read: None,
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

/// Notifies `changed` of every change of an entry of `folder` that has one of
/// `names`. A watch of the file alone would not do, because writers replace the
/// file, and a ConfigMap volume replaces the `..data` link beside it. Reading is no
/// change: the follower's own reads would wake it again.
fn watch_folder(
    folder: &Path,
    names: Arc<Mutex<Vec<OsString>>>,
    changed: Arc<Notify>,
) -> notify::Result<RecommendedWatcher> {
    let concerns = move |event: &notify::Event| {
        let names = names.lock();
        let is_named = |path: &PathBuf| {
            let name = path.file_name();
            name.is_some_and(|name| names.iter().any(|named| named == name))
        };
        let is_change = !event.kind.is_access();
        // Lost events may have been about anything.
        event.need_rescan() || is_change && event.paths.iter().any(is_named)
    };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.as_ref().map_or(true, &concerns) {
            changed.notify_one();
        }
    })?;
    watcher.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

/// The entries of its folder that lead to the file at `path`: its own name, and
/// the first one that it leads to if it is a link, as in a ConfigMap volume.
fn names(path: &Path) -> Vec<OsString> {
    let own = path.file_name().map(ToOwned::to_owned);
    let link = std::fs::read_link(path).ok();
    let next = link.and_then(|link| match link.components().next() {
        Some(Component::Normal(name)) => Some(name.to_owned()),
        _ => None,
    });
    own.into_iter().chain(next).collect()
}

/// What tells one version of a file from another one without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Version {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// A file that is followed.
struct File {
    path: PathBuf,
    /// What [`names`] returned last.
    names: Arc<Mutex<Vec<OsString>>>,
    /// The version that was read last; `None` when the file could not be read.
    read: Option<Version>,
    acceptor: TableAcceptor,
}

impl File {
    async fn follow(mut self, changed: Arc<Notify>) {
        loop {
            self.read();
            while tokio::time::timeout(RECHECK, changed.notified())
                .await
                .is_err()
            {
                let version = Version::of(&self.path).ok();
                if version.is_none() || version != self.read {
                    break;
                }
            }
        }
    }

    fn read(&mut self) {
        // Both come before the text: what changes later is an event, or shows at
        // the next check.
        *self.names.lock() = names(&self.path);
        let version = Version::of(&self.path);
        match std::fs::read_to_string(&self.path) {
            Ok(text) => {
                self.read = version.ok();
                self.acceptor.take(text);
            }
            // This is logged once, until the file can be read again.
            Err(error) => {
                self.read = None;
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
