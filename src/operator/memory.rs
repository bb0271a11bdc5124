//! What the controller remembers of pools. It saves work, and it covers the time
//! until a watch shows a write. No decision needs it to be right or complete.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use kube::runtime::reflector::Store;
use parking_lot::Mutex;

use super::observation::{Observation, Versions};
use super::silence::Silences;
use crate::pool::ProcessingPool;
use crate::table::Table;

/// Longest run of waits for a watch that does not show all pods yet.
const MOST_WAITS: u32 = 10;

/// Shortest time between two tables that mark other servers as not ready. However
/// many servers come and go, readiness costs one write a second; what has changed
/// meanwhile is in the next one.
const MARK_INTERVAL: Duration = Duration::from_secs(1);

/// What is remembered of a pool.
#[derive(Clone, Debug, Default)]
pub(super) struct OfPool {
    /// The table that was written last: to restore it when someone changes it, and
    /// to continue it before the watch shows the write.
    pub(super) table: Option<Table>,
    /// Version of the ConfigMap with that table.
    pub(super) table_version: u64,
    /// Uids of pods that the watch still showed when a listing did not.
    deleted_pods: HashSet<String>,
    /// The template that the API server has accepted.
    pub(super) checked_template: Option<String>,
    /// Time of the last table that marked other servers as not ready.
    pub(super) marked: Option<Instant>,
    /// The workloads that do not listen on all of their ports.
    pub(super) silences: Silences,
    /// Number of errors in a row.
    pub(super) failures: u32,
    /// Time of the last listing of the pool's pods.
    listed: Option<Instant>,
    /// Number of waits for the watch in a row.
    waits: u32,
}

/// What is remembered of all pools, by their uid.
#[derive(Debug)]
pub(super) struct Memory {
    of_pools: Mutex<HashMap<String, OfPool>>,
    /// Interval at which a pool's pods are listed, whatever the watches show.
    resync: Duration,
}

impl Memory {
    pub(super) fn new(resync: Duration) -> Self {
        Self {
            of_pools: Mutex::default(),
            resync,
        }
    }

    pub(super) fn resync(&self) -> Duration {
        self.resync
    }

    /// The time until servers may be marked as ready or not ready; zero if they may
    /// be now.
    pub(super) fn until_marks(&self, uid: &str) -> Duration {
        let marked = self.with(uid, |memory| memory.marked);
        marked.map_or(Duration::ZERO, |marked| {
            MARK_INTERVAL.saturating_sub(marked.elapsed())
        })
    }

    pub(super) fn forget(&self, uid: &str) {
        self.of_pools.lock().remove(uid);
    }

    /// Reads or changes what is remembered of the pool with `uid`.
    pub(super) fn with<T>(&self, uid: &str, change: impl FnOnce(&mut OfPool) -> T) -> T {
        change(self.of_pools.lock().entry(uid.to_owned()).or_default())
    }

    /// Corrects what the watches do not show yet, or will never show.
    pub(super) fn correct(&self, uid: &str, observation: &mut Observation) {
        self.with(uid, |memory| {
            observation
                .servers
                .retain(|server| !memory.deleted_pods.contains(&server.uid));
            let table = &mut observation.table;
            // Versions are numbers that grow, since Kubernetes 1.35 by contract.
            let version = table
                .resource_version
                .as_ref()
                .and_then(|version| version.parse().ok());
            if version.is_some_and(|version: u64| version < memory.table_version)
                && let Some(written) = &memory.table
            {
                table.text = written.encode().ok();
                table.resource_version = Some(memory.table_version.to_string());
                table.generation = written.generation;
                table.table = Some(written.clone());
            }
        });
    }

    /// Whether the pool's pods must be listed now: at first, and then at every
    /// resync.
    pub(super) fn is_due_for_listing(&self, uid: &str) -> bool {
        let listed = self.with(uid, |memory| memory.listed);
        listed.is_none_or(|listed| listed.elapsed() >= self.resync)
    }

    /// Forgets deleted pools, because a deletion triggers no reconcile.
    pub(super) fn forget_deleted(&self, pools: &Store<ProcessingPool>) {
        let pools = pools.state();
        let uids: HashSet<&str> = pools
            .iter()
            .filter_map(|pool| pool.metadata.uid.as_deref())
            .collect();
        self.of_pools
            .lock()
            .retain(|uid, _| uids.contains(uid.as_str()));
    }

    /// Compares the pods that the watch has `shown` with those that were `listed`
    /// just now. Returns whether the watch is behind, so that the caller should wait
    /// for it.
    ///
    /// At first no pod may be shown as it was before: a watch that begins with the
    /// past would have servers that are ready written as not ready, or without
    /// their address. Later, a pod that has just changed is no reason to wait.
    pub(super) fn compare_listing(&self, uid: &str, shown: &Versions, listed: &Versions) -> bool {
        self.with(uid, |memory| {
            let is_first = memory.listed.is_none();
            let is_behind = |(pod, version): (&String, &u64)| {
                let shown = shown.get(pod);
                shown.is_none_or(|shown| is_first && shown < version)
            };
            if listed.iter().any(is_behind) && memory.waits < MOST_WAITS {
                memory.waits += 1;
                return true;
            }
            memory.waits = 0;
            memory.listed = Some(Instant::now());
            let gone = shown.keys().filter(|pod| !listed.contains_key(*pod));
            memory.deleted_pods = gone.cloned().collect();
            false
        })
    }
}
