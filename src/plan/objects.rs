//! The Kubernetes objects of a pool, as values. The operator applies them; nothing
//! here does.
//!
//! - `pod`: a processing server: the template with the agent beside it;
//! - `connection_server`: the Deployment of the connection servers, with its
//!   ServiceAccount, Role and RoleBinding;
//! - `network`: Services, NetworkPolicy and PodDisruptionBudgets;
//! - this file: names, labels, ownership, and when an object must be applied.

mod connection_server;
mod network;
mod pod;

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64;

pub use self::pod::{AGENT, annotated_ranges, pod, pods, template_hash};
use super::ValidPool;
use crate::table::{TABLE_KEY, Table};

/// The manager of every field that the operator applies, and the value of
/// [`MANAGED_BY`] on its objects.
pub const MANAGER: &str = "portpool";

/// Label of all objects of the operator; its watches select by it.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Label with the pool's name.
pub const POOL_LABEL: &str = "portpool.dev/pool";

/// Label with the role of a pod: [`PROCESSING_SERVER`] or [`CONNECTION_SERVER`].
pub const COMPONENT_LABEL: &str = "portpool.dev/component";

/// Label with the slot of a processing server's pod.
pub const SLOT_LABEL: &str = "portpool.dev/slot";

/// Annotation with the hash of what an object was created from.
pub const HASH_ANNOTATION: &str = "portpool.dev/hash";

/// Annotation of a processing server's pod with the ports that its slot had when
/// it was created: JSON, as in the table. The table is derived from it when the
/// ConfigMap is lost.
pub const RANGES_ANNOTATION: &str = "portpool.dev/ranges";

/// Value of [`COMPONENT_LABEL`].
pub const PROCESSING_SERVER: &str = "processing-server";

/// Value of [`COMPONENT_LABEL`].
pub const CONNECTION_SERVER: &str = "connection-server";

/// Folder that the table is mounted at.
const TABLE_FOLDER: &str = "/etc/portpool/table";

/// What determines the objects beside the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Image that contains this program, for agents and connection servers.
    pub image: String,
    /// When the image is pulled: Always, IfNotPresent or Never.
    pub image_pull_policy: String,
    /// Names of Secrets for pulling the image, in the pool's namespace.
    pub image_pull_secrets: Vec<String>,
}

/// A pool with what identifies it in a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// The pool.
    pub pool: &'a ValidPool,
    /// Namespace of the pool.
    pub namespace: &'a str,
    /// Uid of the pool's resource.
    pub uid: &'a str,
}

/// Name of the ConfigMap that has the pool's table.
#[must_use]
pub fn table_name(pool: &str) -> String {
    format!("{pool}-port-table")
}

/// Name of the connection server's objects.
#[must_use]
pub fn connection_server_name(pool: &str) -> String {
    format!("{pool}-connection-server")
}

/// Selector of the pods of a pool with the role `component`.
#[must_use]
pub fn selector(pool: &str, component: &str) -> Value {
    json!({ POOL_LABEL: pool, COMPONENT_LABEL: component })
}

/// All objects of a pool except its table and its pods, in the order in which they
/// are applied. `unready_may_go` is what [`unready_may_go`](super::unready_may_go) says
/// of the pool's servers.
#[must_use]
pub fn objects(
    owner: Owner<'_>,
    table: &Table,
    settings: &Settings,
    unready_may_go: bool,
) -> Vec<Value> {
    let mut objects = connection_server::access(owner);
    objects.push(connection_server::deployment(owner, settings));
    objects.extend(network::services(owner, table));
    objects.extend(network::policies(owner));
    objects.extend(network::budgets(owner, unready_may_go));
    objects.into_iter().map(with_hash).collect()
}

/// The ConfigMap with `text`, the encoded table. `resource_version` is the version
/// that it replaces, so that a write of someone else is not overwritten.
#[must_use]
pub fn config_map(owner: Owner<'_>, text: &str, resource_version: Option<&str>) -> Value {
    let mut metadata = metadata(owner, &table_name(&owner.pool.name), "port-table");
    metadata["annotations"] = json!({ HASH_ANNOTATION: hash(&Value::from(text)) });
    if let Some(version) = resource_version {
        metadata["resourceVersion"] = version.into();
    }
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": { TABLE_KEY: text },
    })
}

/// A short digest of `value`, for annotations. Not for secrets.
#[must_use]
pub fn hash(value: &Value) -> String {
    format!("{:016x}", xxh3_64(value.to_string().as_bytes()))
}

/// Whether `observed` has everything that `desired` has. Other fields of `observed`
/// do not count, because the API server adds defaults. A field that was removed from
/// `desired` changes the hash, which is a part of it.
#[must_use]
pub fn covers(observed: &Value, desired: &Value) -> bool {
    match (observed, desired) {
        (Value::Object(observed), Value::Object(desired)) => {
            desired.iter().all(|(field, desired)| {
                let observed = observed.get(field).unwrap_or(&Value::Null);
                covers(observed, desired)
            })
        }
        (Value::Array(observed), Value::Array(desired)) => {
            observed.len() == desired.len()
                && observed
                    .iter()
                    .zip(desired)
                    .all(|(observed, desired)| covers(observed, desired))
        }
        // The API server omits empty values.
        (Value::Null, Value::Object(desired)) => desired.is_empty(),
        (Value::Null, Value::Array(desired)) => desired.is_empty(),
        (observed, desired) => observed == desired,
    }
}

fn with_hash(mut object: Value) -> Value {
    let hash = hash(&object);
    object["metadata"]["annotations"] = json!({ HASH_ANNOTATION: hash });
    object
}

fn labels(pool: &str, component: &str) -> Map<String, Value> {
    let labels = [
        ("app.kubernetes.io/name", "portpool"),
        ("app.kubernetes.io/instance", pool),
        ("app.kubernetes.io/component", component),
        ("app.kubernetes.io/part-of", "portpool"),
        (MANAGED_BY, MANAGER),
        (POOL_LABEL, pool),
        (COMPONENT_LABEL, component),
    ];
    let labels = labels.into_iter();
    labels
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect()
}

fn metadata(owner: Owner<'_>, name: &str, component: &str) -> Value {
    json!({
        "name": name,
        "namespace": owner.namespace,
        "labels": labels(&owner.pool.name, component),
        "ownerReferences": [owner_reference(owner)],
    })
}

fn owner_reference(owner: Owner<'_>) -> Value {
    json!({
        "apiVersion": "portpool.dev/v1alpha1",
        "kind": "ProcessingPool",
        "name": owner.pool.name,
        "uid": owner.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

/// What `restricted` pod security requires of a container, with a file system that
/// cannot be written.
fn restricted() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "capabilities": { "drop": ["ALL"] },
        "readOnlyRootFilesystem": true,
        "runAsNonRoot": true,
        "runAsUser": 65532,
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// References to the Secrets for pulling the image.
fn pull_secrets(settings: &Settings) -> impl Iterator<Item = Value> {
    let names = settings.image_pull_secrets.iter();
    names.map(|name| json!({ "name": name }))
}

fn field_env(name: &str, field: &str) -> Value {
    json!({ "name": name, "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": field } } })
}

fn probe(path: &str, port: u16, period_seconds: u32) -> Value {
    json!({ "httpGet": { "path": path, "port": port, "scheme": "HTTP" }, "periodSeconds": period_seconds })
}

#[cfg(test)]
mod tests;
