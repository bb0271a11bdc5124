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

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, future};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tracing::{debug, info, warn};

use crate::table::{TABLE_KEY, Table, TableError};

/// How often the file is looked at without an event, for file systems that
/// have none.
const RECHECK: Duration = Duration::from_secs(5);

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

/// Why a new text leaves the last table in force.
#[derive(Debug, thiserror::Error)]
pub enum Rejected {
    /// Not a table.
    #[error(transparent)]
    Invalid(#[from] TableError),
    /// Older than the one in force.
    #[error("generation {found} is older than {current}, which is in force")]
    Older {
        /// Of the new text.
        found: u64,
        /// In force.
        current: u64,
    },
    /// Of another pool.
    #[error("table belongs to pool uid {found}, not to {current}")]
    OtherPool {
        /// Of the new text.
        found: String,
        /// In force.
        current: String,
    },
}

impl Rejected {
    /// Static name, for metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Older { .. } => "older",
            Self::OtherPool { .. } => "other_pool",
        }
    }
}

/// Decides whether `text` replaces `current`: `Ok(None)` when it is the same.
///
/// # Errors
/// [`Rejected`] when `current` stays in force.
pub fn accept(current: Option<&Table>, text: &str) -> Result<Option<Table>, Rejected> {
    let table = Table::decode(text)?;
    let Some(current) = current else {
        return Ok(Some(table));
    };
    if table.pool_uid != current.pool_uid {
        let (found, current) = (table.pool_uid, current.pool_uid.clone());
        return Err(Rejected::OtherPool { found, current });
    }
    if table.generation < current.generation {
        let (found, current) = (table.generation, current.generation);
        return Err(Rejected::Older { found, current });
    }
    Ok((table.generation > current.generation).then_some(table))
}

/// Counts the tables that were turned down, by cause. Clones share the counts.
#[derive(Clone, Debug)]
pub struct RejectedTables(Family<Cause, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

impl Default for RejectedTables {
    fn default() -> Self {
        let counts = Family::<Cause, Counter>::default();
        // All from the start, so that a first one shows as a step from nought.
        for cause in ["invalid", "older", "other_pool"] {
            drop(counts.get_or_create(&Cause { cause }));
        }
        Self(counts)
    }
}

impl RejectedTables {
    /// Shows the counts in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "portpool_tables_rejected",
            "Port-relationship tables that left the last one in force, by cause",
            self.0.clone(),
        );
    }

    /// A table was turned down for `reason`.
    pub fn count(&self, reason: &Rejected) {
        let cause = reason.name();
        self.0.get_or_create(&Cause { cause }).inc();
    }
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
        judge: Judge {
            last_text: None,
            sender,
            rejected: rejected.clone(),
        },
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
    judge: Judge,
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
            Ok(text) => self.judge.take(text),
            // Said once, until the file is back.
            Err(error) => {
                if self.judge.last_text.take().is_some() || self.judge.sender.borrow().is_none() {
                    info!(path = %self.path.display(), %error, "port-relationship table cannot be read now");
                }
            }
        }
    }
}

/// Decides on texts, and publishes the tables among them.
struct Judge {
    last_text: Option<String>,
    sender: watch::Sender<Option<Arc<Table>>>,
    rejected: RejectedTables,
}

impl Judge {
    fn take(&mut self, text: String) {
        if self.last_text.as_ref() == Some(&text) {
            return;
        }
        let accepted = accept(self.sender.borrow().as_deref(), &text);
        match accepted {
            Ok(Some(table)) => {
                self.sender.send_replace(Some(Arc::new(table)));
            }
            Ok(None) => {}
            Err(reason) => {
                self.rejected.count(&reason);
                warn!(%reason, "port-relationship table not accepted");
            }
        }
        self.last_text = Some(text);
    }
}

/// The cluster that this process is in, or that the kubeconfig names.
///
/// # Errors
/// kube's, when there is neither.
pub async fn cluster() -> Result<Client, kube::Error> {
    Client::try_default().await
}

/// Pauses between tries of a watch that fails: 0.5 s, doubling up to 8 s, each
/// up to a half shorter by chance. kube's own go up to 30 s, which is long for
/// an API server that was restarted.
#[derive(Clone, Debug)]
pub struct WatchBackoff(Duration);

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

impl Default for WatchBackoff {
    fn default() -> Self {
        Self(FIRST_PAUSE)
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        // Many watches that lost one server must not come back as one.
        let chance = uuid::Uuid::new_v4().as_bytes()[0];
        Some(pause - pause * u32::from(chance) / 512)
    }
}

impl Backoff for WatchBackoff {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Follows the table in ConfigMap `name` by the API's watch. `copy`, a mounted
/// copy of it, is read once at the start, for a start without the API server.
#[must_use]
pub fn follow_config_map(client: Client, namespace: &str, name: &str, copy: &Path) -> Follower {
    let (sender, current) = watch::channel(None);
    let rejected = RejectedTables::default();
    let mut judge = Judge {
        last_text: None,
        sender,
        rejected: rejected.clone(),
    };
    match std::fs::read_to_string(copy) {
        Ok(text) => judge.take(text),
        Err(error) => {
            debug!(path = %copy.display(), %error, "no copy of the port-relationship table")
        }
    }
    let api: Api<ConfigMap> = Api::namespaced(client, namespace);
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let changes = watcher(api, only)
        .backoff(WatchBackoff::default())
        .applied_objects();
    let task = tokio::spawn(changes.for_each(move |change| {
        match change {
            Ok(ConfigMap { data: Some(mut data), .. }) => {
                if let Some(text) = data.remove(TABLE_KEY) {
                    judge.take(text);
                }
            }
            Ok(_) => warn!("the ConfigMap has no port-relationship table"),
            Err(error) => warn!(%error, "failed to watch the port-relationship table; the last one stays in force"),
        }
        future::ready(())
    }));
    Follower {
        path: PathBuf::from(format!("ConfigMap {namespace}/{name}")),
        current,
        rejected,
        task: task.abort_handle(),
        _watcher: None,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{LoadSharing, Sessions};
    use crate::table::{FORMAT_VERSION, TargetPort};

    const SOON: Duration = Duration::from_secs(5);

    fn table(generation: u64, uid: &str) -> Table {
        Table {
            format_version: FORMAT_VERSION,
            pool: "pool".to_owned(),
            pool_uid: uid.to_owned(),
            generation,
            advertised_address: None,
            agent_port: TargetPort::new(7070).unwrap(),
            load_sharing: LoadSharing::default(),
            sessions: Sessions::default(),
            rows: Vec::new(),
        }
    }

    #[test]
    fn only_a_newer_table_of_the_same_pool_is_accepted() {
        let text = |generation, uid| table(generation, uid).encode().unwrap();
        let current = table(5, "a");
        assert!(matches!(accept(None, &text(1, "b")), Ok(Some(_))));
        assert!(matches!(accept(Some(&current), &text(6, "a")), Ok(Some(_))));
        assert!(matches!(accept(Some(&current), &text(5, "a")), Ok(None)));
        let older = accept(Some(&current), &text(4, "a"));
        assert!(matches!(
            older,
            Err(Rejected::Older {
                found: 4,
                current: 5
            })
        ));
        let other = accept(Some(&current), &text(9, "b"));
        assert!(matches!(other, Err(Rejected::OtherPool { .. })));
        assert!(matches!(
            accept(Some(&current), "{"),
            Err(Rejected::Invalid(_))
        ));
    }

    async fn generation(receiver: &mut watch::Receiver<Option<Arc<Table>>>, wanted: u64) {
        let reached = receiver.wait_for(|table| {
            table
                .as_ref()
                .is_some_and(|table| table.generation == wanted)
        });
        tokio::time::timeout(SOON, reached)
            .await
            .expect("in time")
            .unwrap();
    }

    async fn counted(rejected: &RejectedTables, cause: &'static str) {
        let waiting = async {
            while rejected.0.get_or_create(&Cause { cause }).get() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(SOON, waiting).await.expect("in time");
    }

    #[tokio::test]
    async fn a_file_is_followed_through_faults() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.json");
        let follower = follow_file(&path).unwrap();
        let (mut current, rejected) = (follower.watch(), follower.rejected());
        write_table(&path, &table(1, "a")).unwrap();
        generation(&mut current, 1).await;
        std::fs::write(&path, "not a table").unwrap();
        counted(&rejected, "invalid").await;
        std::fs::remove_file(&path).unwrap();
        write_table(&path, &table(3, "a")).unwrap();
        generation(&mut current, 3).await;
        write_table(&path, &table(2, "a")).unwrap();
        counted(&rejected, "older").await;
        generation(&mut current, 3).await;
    }

    #[tokio::test]
    async fn a_mounted_config_map_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.json");
        let publish = |number: u64| {
            let data = folder.path().join(format!("..{number}"));
            std::fs::create_dir(&data).unwrap();
            write_table(&data.join("table.json"), &table(number, "a")).unwrap();
            let link = folder.path().join("..data_tmp");
            std::os::unix::fs::symlink(&data, &link).unwrap();
            std::fs::rename(&link, folder.path().join("..data")).unwrap();
        };
        publish(1);
        std::os::unix::fs::symlink("..data/table.json", &path).unwrap();
        let follower = follow_file(&path).unwrap();
        let mut current = follower.watch();
        generation(&mut current, 1).await;
        publish(2);
        generation(&mut current, 2).await;
    }
}
