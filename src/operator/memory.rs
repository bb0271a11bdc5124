//! What the controller remembers of pools: it saves work and covers the time
//! until a watch tells of a write. Nothing depends on it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use kube::runtime::reflector::Store;
use parking_lot::Mutex;

use super::observe::Observation;
use crate::pool::ProcessingPool;
use crate::table::Table;

/// How often in a row a watch that does not show all pods yet is waited for.
const MOST_WAITS: u32 = 10;

/// What is remembered of a pool.
#[derive(Clone, Debug, Default)]
pub(super) struct OfPool {
    /// The table as last written, to restore it when somebody changes it, and
    /// to go on before the watch has told of the write.
    pub(super) table: Option<Table>,
    /// Version of the ConfigMap with it.
    pub(super) table_version: u64,
    /// Uids of pods that the watch still shows, but the last listing did not.
    ghosts: HashSet<String>,
    /// The template that the API server has accepted.
    pub(super) checked_template: Option<String>,
    /// Errors in a row.
    pub(super) failures: u32,
    /// When its pods were last listed afresh.
    listed: Option<Instant>,
    /// How often in a row the watch was waited for.
    waits: u32,
}

/// What is remembered, by the pools' uid.
#[derive(Debug)]
pub(super) struct Memory {
    of_pools: Mutex<HashMap<String, OfPool>>,
    /// How often a pool's pods are listed afresh.
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

    pub(super) fn forget(&self, uid: &str) {
        self.of_pools.lock().remove(uid);
    }

    /// Looks at or changes what is remembered of the pool with `uid`.
    pub(super) fn with<T>(&self, uid: &str, change: impl FnOnce(&mut OfPool) -> T) -> T {
        change(self.of_pools.lock().entry(uid.to_owned()).or_default())
    }

    /// Puts right what the watches do not know yet, or will never.
    pub(super) fn correct(&self, uid: &str, observation: &mut Observation) {
        self.with(uid, |memory| {
            observation
                .servers
                .retain(|server| !memory.ghosts.contains(&server.uid));
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

    /// Whether the pool's pods are to be listed afresh now: at first, and then
    /// every now and then.
    pub(super) fn is_due_for_listing(&self, uid: &str) -> bool {
        let listed = self.with(uid, |memory| memory.listed);
        listed.is_none_or(|listed| listed.elapsed() >= self.resync)
    }

    /// Forgets pools that are gone; a deletion triggers no reconcile.
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

    /// Compares what the watch shows with `pods`, the uids just listed. Whether
    /// the watch is behind, so that it should be waited for.
    pub(super) fn is_behind(
        &self,
        uid: &str,
        observation: &Observation,
        pods: &HashSet<String>,
    ) -> bool {
        let servers = observation.servers.iter();
        let shown: HashSet<&String> = servers.map(|server| &server.uid).collect();
        self.with(uid, |memory| {
            let is_missing = pods.iter().any(|pod| !shown.contains(pod));
            if is_missing && memory.waits < MOST_WAITS {
                memory.waits += 1;
                return true;
            }
            memory.waits = 0;
            memory.listed = Some(Instant::now());
            let gone = shown.into_iter().filter(|pod| !pods.contains(*pod));
            memory.ghosts = gone.cloned().collect();
            false
        })
    }
}
