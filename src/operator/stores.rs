//! What the controller's watches keep: a store of each kind that pools own. It has
//! the objects with portpool's label, without the fields that are never read. Only
//! this module knows the kinds; what objects mean is in `observation`.

use std::collections::HashMap;
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt, Shared};
use futures::stream::{BoxStream, StreamExt};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta};
use kube::runtime::reflector::{ObjectRef, Store, store::Writer};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::Value;

use crate::cluster;
use crate::plan::objects::{HASH_ANNOTATION, MANAGED_BY, MANAGER, POOL_LABEL, RANGES_ANNOTATION};
use crate::pool::ProcessingPool;

/// Annotation with the rank of a pod when its pool shrinks.
///
/// Source: Kubernetes documentation, ReplicaSet, pod deletion cost.
pub(super) const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Annotations of pods that are read.
const KEPT_ANNOTATIONS: [&str; 3] = [HASH_ANNOTATION, RANGES_ANNOTATION, DELETION_COST];

/// Group, version, kind and plural of everything that pools own.
const KINDS: [(&str, &str, &str, &str); 9] = [
    ("", "v1", "Pod", "pods"),
    ("", "v1", "ConfigMap", "configmaps"),
    ("", "v1", "Service", "services"),
    ("", "v1", "ServiceAccount", "serviceaccounts"),
    ("apps", "v1", "Deployment", "deployments"),
    ("rbac.authorization.k8s.io", "v1", "Role", "roles"),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "RoleBinding",
        "rolebindings",
    ),
    (
        "networking.k8s.io",
        "v1",
        "NetworkPolicy",
        "networkpolicies",
    ),
    (
        "policy",
        "v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
    ),
];

/// The resource of `kind`, one of those that pools own.
pub(super) fn resource(kind: &str) -> ApiResource {
    let (group, version, kind, plural) = KINDS
        .into_iter()
        .find(|(_, _, known, _)| *known == kind)
        .expect("objects are made of these kinds only");
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

type Changes = BoxStream<'static, Result<DynamicObject, watcher::Error>>;

/// The objects that the watches show.
pub(super) struct Stores {
    of_kinds: HashMap<&'static str, Store<DynamicObject>>,
    /// Completes when every first list is complete. All reconciles share this wait,
    /// because a store wakes only the last of several that wait for it.
    ready: Shared<BoxFuture<'static, ()>>,
}

impl Stores {
    /// Watches every kind; the streams drive the stores.
    pub(super) fn watch(
        client: &Client,
        scope: Option<&str>,
    ) -> (Self, Vec<(ApiResource, Changes)>) {
        let mut stores = HashMap::new();
        let mut streams = Vec::new();
        for (_, _, kind, _) in KINDS {
            let resource = resource(kind);
            let api: Api<DynamicObject> = match scope {
                Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
                None => Api::all_with(client.clone(), &resource),
            };
            let writer = Writer::new(resource.clone());
            stores.insert(kind, writer.as_reader());
            let ours = watcher::Config::default().labels(&format!("{MANAGED_BY}={MANAGER}"));
            let types = TypeMeta {
                api_version: resource.api_version.clone(),
                kind: resource.kind.clone(),
            };
            let changes =
                watcher(api, ours)
                    .backoff(cluster::watch_backoff())
                    .modify(move |object| {
                        // The items of a list have no types, and would differ from
                        // what is desired for ever.
                        object.types = Some(types.clone());
                        trim(kind, object);
                    });
            streams.push((
                resource,
                reflector(writer, changes).touched_objects().boxed(),
            ));
        }
        (Self::of(stores), streams)
    }

    fn of(of_kinds: HashMap<&'static str, Store<DynamicObject>>) -> Self {
        let stores: Vec<_> = of_kinds.values().cloned().collect();
        let ready = async move {
            for store in stores {
                // This fails when the watch has ended, as at shutdown.
                let _ = store.wait_until_ready().await;
            }
        };
        Self {
            of_kinds,
            ready: ready.boxed().shared(),
        }
    }

    /// Waits until every first list is complete. An object that is missing before
    /// that may exist.
    pub(super) async fn ready(&self) {
        self.ready.clone().await;
    }

    pub(super) fn get(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
    ) -> Option<Arc<DynamicObject>> {
        let reference = ObjectRef::new_with(name, resource(kind)).within(namespace);
        self.of_kinds.get(kind)?.get(&reference)
    }

    /// Objects of `kind` with the label of the pool.
    pub(super) fn of_pool(
        &self,
        kind: &str,
        namespace: &str,
        pool: &str,
    ) -> Vec<Arc<DynamicObject>> {
        let store = self
            .of_kinds
            .get(kind)
            .map(Store::state)
            .unwrap_or_default();
        let is_of_pool = |object: &Arc<DynamicObject>| {
            object.namespace().as_deref() == Some(namespace)
                && object
                    .labels()
                    .get(POOL_LABEL)
                    .is_some_and(|label| label == pool)
        };
        store.into_iter().filter(is_of_pool).collect()
    }
}

/// Drops the fields that are never read, so that a pool of 1000 pods takes only a
/// few megabytes.
fn trim(kind: &str, object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
    if kind == "Pod"
        && let Value::Object(fields) = &mut object.data
    {
        fields.remove("spec");
        object
            .metadata
            .annotations
            .get_or_insert_default()
            .retain(|name, _| KEPT_ANNOTATIONS.contains(&name.as_str()));
    }
}

/// The text at the JSON pointer `path` of `object`.
pub(super) fn text<'a>(object: &'a DynamicObject, path: &str) -> Option<&'a str> {
    object.data.pointer(path).and_then(Value::as_str)
}

/// The condition of `object` of that kind.
pub(super) fn condition<'a>(object: &'a DynamicObject, kind: &str) -> Option<&'a Value> {
    let conditions = object
        .data
        .pointer("/status/conditions")
        .and_then(Value::as_array)?;
    conditions
        .iter()
        .find(|condition| condition["type"] == kind)
}

/// The pool that a changed object belongs to.
pub(super) fn pool_of(object: &DynamicObject) -> Option<ObjectRef<ProcessingPool>> {
    let name = object.labels().get(POOL_LABEL)?;
    Some(ObjectRef::new(name).within(&object.namespace()?))
}

/// Whether `object` belongs to the pool with `uid`.
pub(super) fn is_owned(object: &impl ResourceExt, uid: &str) -> bool {
    object
        .owner_references()
        .iter()
        .any(|owner| owner.uid == uid && owner.controller == Some(true))
}

/// Whether the owner of `object` is called as the pool `name`. Where that is not the
/// pool itself, it is one that was deleted.
pub(super) fn is_of_namesake(object: &impl ResourceExt, name: &str) -> bool {
    let kind = ProcessingPool::kind(&());
    let mut owners = object.owner_references().iter();
    owners.any(|owner| owner.kind == kind && owner.name == name && owner.controller == Some(true))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn all_reconciles_go_on_when_the_first_lists_are_complete() {
        let mut writer = Writer::new(resource("Pod"));
        let stores = Arc::new(Stores::of(HashMap::from([("Pod", writer.as_reader())])));
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let stores = stores.clone();
                tokio::spawn(async move { stores.ready().await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(waiting.iter().all(|reconcile| !reconcile.is_finished()));
        writer.apply_watcher_event(&watcher::Event::Init);
        writer.apply_watcher_event(&watcher::Event::InitDone);
        let all = futures::future::join_all(waiting);
        let ended = tokio::time::timeout(Duration::from_secs(5), all).await;
        assert!(ended.is_ok(), "some wait for ever");
    }
}
