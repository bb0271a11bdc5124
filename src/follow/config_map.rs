//! The table in a ConfigMap, watched through the API server. A mounted copy of it
//! is read once, at the start.

use std::convert::Infallible;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use futures::{StreamExt, future};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::acceptor::{RejectedTables, TableAcceptor};
use super::{Follower, TableSource};
use crate::cluster;
use crate::table::TABLE_KEY;

/// A ConfigMap, written `NAMESPACE/NAME`; `NAME` alone is one in the namespace
/// `default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigMapName {
    /// Namespace of the ConfigMap.
    pub namespace: String,
    /// Name of the ConfigMap in its namespace.
    pub name: String,
}

impl FromStr for ConfigMapName {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for ConfigMapName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.namespace, self.name)
    }
}

/// Follows the table in `config_map` by the API's watch. `copy`, a mounted copy of
/// it, is read once at the start, for a start without the API server.
#[must_use]
pub fn follow_config_map(client: Client, config_map: ConfigMapName, copy: &Path) -> Follower {
    let (sender, current) = watch::channel(None);
    let rejected = RejectedTables::default();
    let mut acceptor = TableAcceptor::new(sender, rejected.clone());
    match std::fs::read_to_string(copy) {
        Ok(text) => acceptor.take(text),
        Err(error) => {
            debug!(path = %copy.display(), %error, "no copy of the port-relationship table")
        }
    }
    let api: Api<ConfigMap> = Api::namespaced(client, &config_map.namespace);
    let only = watcher::Config::default().fields(&format!("metadata.name={}", config_map.name));
    let changes = watcher(api, only)
        .backoff(cluster::watch_backoff())
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
        source: TableSource::ConfigMap(config_map),
        current,
        rejected,
        task: task.abort_handle(),
        _watcher: None,
    }
}
