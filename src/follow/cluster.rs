//! The table in a ConfigMap, watched through the API server, and how watches come
//! back after a fault. Beside the operator the only user of kube's client.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{StreamExt, future};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::Follower;
use super::acceptor::{RejectedTables, TableAcceptor};
use crate::table::TABLE_KEY;

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
    let mut acceptor = TableAcceptor::new(sender, rejected.clone());
    match std::fs::read_to_string(copy) {
        Ok(text) => acceptor.take(text),
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
                    acceptor.take(text);
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
