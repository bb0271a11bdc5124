//! Requests to the API server about a pool: writes, and reads that the watches
//! cannot answer. Each is safe to repeat, also when its reply was lost.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::{Request, header};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions};
use kube::{Api, ResourceExt};
use serde_json::Value;

use super::context::Reconcile;
use super::observation::{Versions, versions};
use super::stores::{is_of_namesake, is_owned, resource};
use crate::plan::objects::{
    COMPONENT_LABEL, MANAGED_BY, MANAGER, POOL_LABEL, PROCESSING_SERVER, covers,
};
use crate::plan::status::Blocker;
use crate::pool::ProcessingPool;

/// Pods that are created or deleted at the same time.
const PODS_AT_ONCE: usize = 48;

/// Words of the API server's answer to a node port that is not free.
///
/// Source: kubernetes/kubernetes, `pkg/registry/core/service/portallocator`,
/// `ErrAllocated`.
const ALLOCATED: &str = "provided port is already allocated";

/// Media type of an answer that has only the metadata of the written object.
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";

/// Why a request has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The API server's answer.
    #[error("failed to {action} {object}: {}", words(.source))]
    Api {
        action: &'static str,
        object: String,
        source: kube::Error,
    },
    /// The name belongs to someone else.
    #[error("{0} exists and belongs to someone else: remove it, or give the pool another name")]
    NameTaken(String),
    /// The name belongs to a deleted pool. This passes by itself.
    #[error("{0} still exists of a deleted pool of the same name; Kubernetes removes it")]
    NotRemovedYet(String),
    /// Node ports belong to other Services.
    #[error(
        "{0}: no client is given a port that the Services of the pool do not have; remove the other Service, or choose other connectionServer.connectionPorts"
    )]
    NodePortsTaken(String),
    /// A pod of the pool that the watches do not show.
    #[error("{0} has lost the labels that portpool put on it: put them back, or delete it")]
    LabelsLost(String),
    /// No pod can be created of the template.
    #[error("{}: {}", .0.path, .0.message)]
    Template(crate::plan::FieldProblem),
    /// The table does not encode.
    #[error(transparent)]
    Table(#[from] crate::table::TableError),
}

impl Error {
    /// The error as something that the user must act upon; `None` when it may
    /// pass by itself.
    pub(super) fn blocker(&self) -> Option<Blocker> {
        let reason = match self {
            Self::NameTaken(_) => "NameTaken",
            Self::NodePortsTaken(_) => "NodePortsTaken",
            Self::LabelsLost(_) => "LabelsLost",
            Self::Template(_) => "InvalidSpec",
            Self::Table(_) => "InvalidTable",
            Self::Api {
                source: kube::Error::Api(status),
                ..
            } => match status.code {
                403 => "Forbidden",
                400 | 404 | 413 | 422 => "Refused",
                _ => return None,
            },
            Self::NotRemovedYet(_) | Self::Api { .. } => return None,
        };
        Some(Blocker::new(reason, self.to_string()))
    }
}

/// The API server's own words, where it has answered.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        error => error.to_string(),
    }
}

/// A pod to delete. Another pod of the same name stays.
pub(super) struct PodToDelete {
    pub(super) name: String,
    pub(super) uid: String,
}

impl Reconcile<'_> {
    fn api(&self, kind: &str) -> Api<DynamicObject> {
        Api::namespaced_with(
            self.context.client.clone(),
            self.owner.namespace,
            &resource(kind),
        )
    }

    /// The object in messages.
    fn describe(&self, kind: &str, name: &str) -> String {
        format!("{kind} {}/{name}", self.owner.namespace)
    }

    fn failed(
        &self,
        action: &'static str,
        kind: &str,
        name: &str,
    ) -> impl FnOnce(kube::Error) -> Error {
        let object = self.describe(kind, name);
        move |source| Error::Api {
            action,
            object,
            source,
        }
    }

    /// Why the pool cannot have the name of `known`, which it does not own.
    fn taken(&self, known: &DynamicObject, kind: &str, name: &str) -> Error {
        let object = self.describe(kind, name);
        if is_of_namesake(known, &self.owner.pool.name) {
            Error::NotRemovedYet(object)
        } else {
            Error::NameTaken(object)
        }
    }

    /// Applies `desired` unless it is there already. Returns the version that was
    /// written, if any.
    pub(super) async fn apply_object(&self, desired: &Value) -> Result<Option<String>, Error> {
        let (kind, name) = (of(desired, "/kind"), of(desired, "/metadata/name"));
        let api = self.api(kind);
        let known = match self.context.stores.get(kind, self.owner.namespace, name) {
            Some(known) => Some(known),
            // It is absent, or it has no label of portpool: it may belong to someone else.
            None => api
                .get_opt(name)
                .await
                .map_err(self.failed("read", kind, name))?
                .map(Arc::new),
        };
        if let Some(known) = known.as_deref() {
            if !is_owned(known, self.owner.uid) {
                return Err(self.taken(known, kind, name));
            }
            // The caller has compared what must replace a certain version.
            let is_decided = desired.pointer("/metadata/resourceVersion").is_some();
            let is_there = || covers(&serde_json::to_value(known).unwrap_or_default(), desired);
            if !is_decided && is_there() {
                return Ok(None);
            }
        }
        let parameters = PatchParams::apply(MANAGER).force().validation_strict();
        self.context.metrics.wrote("apply");
        let applied = api.patch(name, &parameters, &Patch::Apply(desired)).await;
        match applied {
            Ok(applied) => Ok(applied.resource_version()),
            Err(error) => Err(match self.holders(desired, &error).await {
                Some(holders) => Error::NodePortsTaken(holders),
                None => self.failed("apply", kind, name)(error),
            }),
        }
    }

    /// Which node ports of the Service `desired` other Services hold, in words; `None`
    /// when `error` is not about that, or when it is not to be found out.
    async fn holders(&self, desired: &Value, error: &kube::Error) -> Option<String> {
        match error {
            kube::Error::Api(status) if status.message.contains(ALLOCATED) => {}
            _ => return None,
        }
        let services = resource("Service");
        let all: Api<DynamicObject> = Api::all_with(self.context.client.clone(), &services);
        // A controller that is limited to namespaces sees no others.
        let listed = match all.list(&ListParams::default()).await {
            Ok(listed) => listed,
            Err(_) => self
                .api("Service")
                .list(&ListParams::default())
                .await
                .ok()?,
        };
        let others = listed.items.iter();
        let others = others.filter(|service| !is_owned(*service, self.owner.uid));
        let held = others.flat_map(|service| {
            let ports = service.data["spec"]["ports"].as_array();
            let name = format!(
                "{}/{}",
                service.namespace().unwrap_or_default(),
                service.name_any()
            );
            ports
                .into_iter()
                .flatten()
                .map(move |port| (port, name.clone()))
        });
        let held: Vec<(&Value, String)> = held.collect();
        let wanted = desired["spec"]["ports"].as_array()?.iter();
        let mut taken = wanted.filter_map(|port| {
            let is_it = |(other, _): &&(&Value, String)| {
                let field = |name| port[name] == other[name];
                !port["nodePort"].is_null() && field("nodePort") && field("protocol")
            };
            let (_, holder) = held.iter().find(is_it)?;
            let protocol = port["protocol"].as_str().unwrap_or("TCP");
            Some(format!(
                "node port {}/{protocol} belongs to service {holder}",
                port["nodePort"]
            ))
        });
        let first = taken.next()?;
        let more = taken.count();
        Some(match more {
            0 => first,
            more => format!("{first}, and {more} more are taken"),
        })
    }

    /// Creates pods. One that exists already must be the pool's own.
    pub(super) async fn create_pods(&self, pods: impl Iterator<Item = Value>) -> Vec<Error> {
        each(pods.map(|pod| self.create_pod(pod))).await
    }

    async fn create_pod(&self, pod: Value) -> Result<(), Error> {
        let name = of(&pod, "/metadata/name");
        let failed = || self.failed("create", "Pod", name);
        self.context.metrics.wrote("create");
        let parameters = format!("fieldManager={MANAGER}");
        match self.post_pod(&pod, &parameters).await {
            Ok(()) => Ok(()),
            // It is the pool's own when an earlier reply was lost, or when the
            // watch is behind.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                let is_labelled = |found: &DynamicObject| {
                    let wanted = &pod["metadata"]["labels"];
                    let mut ours = [MANAGED_BY, POOL_LABEL, COMPONENT_LABEL].into_iter();
                    ours.all(|label| {
                        found.labels().get(label).map(String::as_str) == wanted[label].as_str()
                    })
                };
                match self.api("Pod").get_opt(name).await.map_err(failed())? {
                    Some(found) if !is_owned(&found, self.owner.uid) => {
                        Err(self.taken(&found, "Pod", name))
                    }
                    Some(found) if !is_labelled(&found) => {
                        Err(Error::LabelsLost(self.describe("Pod", name)))
                    }
                    _ => Ok(()),
                }
            }
            Err(error) => Err(failed()(error)),
        }
    }

    /// Posts `pod`. The answer has the metadata only: to encode the whole pod
    /// again would be a good part of the API server's work.
    async fn post_pod(&self, pod: &Value, parameters: &str) -> kube::Result<()> {
        let path = format!("{}?{parameters}", self.api("Pod").resource_url());
        let request = Request::post(path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, METADATA_ONLY)
            .body(pod.to_string().into_bytes())
            .map_err(kube::Error::HttpError)?;
        self.context.client.request_text(request).await.map(|_| ())
    }

    /// Deletes `pods`.
    pub(super) async fn delete_pods(&self, pods: &[PodToDelete]) -> Vec<Error> {
        let pods = pods.iter();
        each(pods.map(|pod| self.delete("Pod", &pod.name, &pod.uid))).await
    }

    /// Deletes the object of `kind` with that name and uid.
    async fn delete(&self, kind: &str, name: &str, uid: &str) -> Result<(), Error> {
        let parameters = DeleteParams::default().preconditions(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        });
        self.context.metrics.wrote("delete");
        match self.api(kind).delete(name, &parameters).await {
            Ok(_) => Ok(()),
            // It is gone, or another one has its name.
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {
                Ok(())
            }
            Err(error) => Err(self.failed("delete", kind, name)(error)),
        }
    }

    /// The processing servers' pods, from the API server itself.
    pub(super) async fn list_pods(&self) -> Result<Versions, Error> {
        let pool = &self.owner.pool.name;
        let servers = format!(
            "{MANAGED_BY}={MANAGER},{POOL_LABEL}={pool},{COMPONENT_LABEL}={PROCESSING_SERVER}"
        );
        let ours = ListParams::default().labels(&servers);
        let listed = self.api("Pod").list_metadata(&ours).await;
        let listed = listed.map_err(self.failed("list", "Pods of", pool))?;
        let pods = listed.items.iter();
        Ok(versions(pods.filter(|pod| is_owned(*pod, self.owner.uid))))
    }

    /// Lets the API server check a pod, unknown fields included, without creating
    /// it.
    pub(super) async fn check_pod(&self, mut pod: Value) -> Result<(), Error> {
        let name = format!("{}-check", of(&pod, "/metadata/name"));
        pod["metadata"]["name"] = name.clone().into();
        let parameters = format!("dryRun=All&fieldValidation=Strict&fieldManager={MANAGER}");
        match self.post_pod(&pod, &parameters).await {
            Ok(()) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            // This is not about the template: where old pods fill the quota, one
            // of them goes first. Only the message says so.
            Err(kube::Error::Api(status)) if status.message.contains("exceeded quota") => Ok(()),
            Err(error) => Err(self.failed("create", "Pod", &name)(error)),
        }
    }

    /// Deletes the Services that the pool owns and that `desired` no longer has,
    /// and that of the load-sharing port when it is in the way. Objects of other
    /// kinds are always desired: the exposure of a pool cannot change.
    pub(super) async fn prune(&self, desired: &[Value]) -> Result<(), Error> {
        let (kind, pool) = ("Service", &self.owner.pool.name);
        for object in self
            .context
            .stores
            .of_pool(kind, self.owner.namespace, pool)
        {
            let name = object.name_any();
            let is_desired = desired.iter().any(|desired| {
                of(desired, "/kind") == kind && of(desired, "/metadata/name") == name
            });
            if (!is_desired || (name == *pool && is_in_the_way(&object, desired)))
                && is_owned(object.as_ref(), self.owner.uid)
                && object.metadata.deletion_timestamp.is_none()
            {
                self.delete(kind, &name, &object.uid().unwrap_or_default())
                    .await?;
            }
        }
        Ok(())
    }

    /// Whether the API server has the resource as the watch shows it.
    pub(super) async fn is_current(&self) -> Result<bool, Error> {
        let (namespace, name) = (self.owner.namespace, &self.owner.pool.name);
        let api: Api<ProcessingPool> = Api::namespaced(self.context.client.clone(), namespace);
        let live = api.get_metadata_opt(name).await;
        let live = live.map_err(self.failed("read", "ProcessingPool", name))?;
        let shown = &self.resource.metadata;
        Ok(live.is_some_and(|live| {
            live.metadata.uid == shown.uid
                && live.metadata.generation == shown.generation
                && live.metadata.deletion_timestamp.is_none()
        }))
    }
}

/// Whether the cluster has given `service` a node port that another Service in
/// `desired` asks for by number. When `service` is created again after that one,
/// it gets another node port. Only for a Service whose node port the cluster
/// chooses: what is observed of others may be old.
fn is_in_the_way(service: &DynamicObject, desired: &[Value]) -> bool {
    let node_ports = |service: &Value| -> Vec<u64> {
        let ports = service.pointer("/spec/ports").and_then(Value::as_array);
        let ports = ports.into_iter().flatten();
        ports.filter_map(|port| port["nodePort"].as_u64()).collect()
    };
    let given = node_ports(&service.data);
    let others = desired.iter().filter(|desired| {
        of(desired, "/kind") == "Service" && of(desired, "/metadata/name") != service.name_any()
    });
    others
        .flat_map(node_ports)
        .any(|asked| given.contains(&asked))
}

/// Carries out `writes`, [`PODS_AT_ONCE`] at a time. The first one goes alone, and
/// none begins after the API server has refused one: what it refuses for a quota,
/// or because it is busy, it refuses for all.
async fn each(
    mut writes: impl Iterator<Item = impl Future<Output = Result<(), Error>>>,
) -> Vec<Error> {
    let mut errors = Vec::new();
    let mut is_refused = false;
    let mut under_way = FuturesUnordered::new();
    under_way.extend(writes.next());
    while let Some(result) = under_way.next().await {
        is_refused |= matches!(result, Err(Error::Api { .. }));
        errors.extend(result.err());
        while !is_refused
            && under_way.len() < PODS_AT_ONCE
            && let Some(write) = writes.next()
        {
            under_way.push(write);
        }
    }
    errors
}

fn of<'a>(object: &'a Value, path: &str) -> &'a str {
    object
        .pointer(path)
        .and_then(Value::as_str)
        .unwrap_or_default()
}
