//! What there is of a pool, from the stores that watches keep and from what a
//! connection server tells.

use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;

use super::stores::{DELETION_COST, Stores, is_owned};
use crate::client;
use crate::plan::objects::{
    COMPONENT_LABEL, CONNECTION_SERVER, HASH_ANNOTATION, PROCESSING_SERVER, RANGES_ANNOTATION,
    annotated_ranges, connection_server_name, hash, table_name,
};
use crate::plan::status::{Blocker, ObservedDeployment};
use crate::plan::{ObservedServer, ValidPool};
use crate::pool::Exposure;
use crate::session::PoolState;
use crate::table::{TABLE_KEY, Table};

/// How long a connection server may take to tell its numbers.
const ASK_DEADLINE: Duration = Duration::from_secs(1);

/// Reasons of a waiting container that time alone does not mend.
const STUCK: [&str; 6] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
];

/// The table's ConfigMap.
#[derive(Debug, Default)]
pub(super) struct ObservedTable {
    pub(super) text: Option<String>,
    pub(super) resource_version: Option<String>,
    /// What we wrote; absent when the ConfigMap is, or somebody has changed it.
    pub(super) table: Option<Table>,
    /// Generation of what is there, whoever wrote it.
    pub(super) generation: u64,
}

/// What there is of a pool.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) table: ObservedTable,
    pub(super) servers: Vec<ObservedServer>,
    pub(super) deployment: ObservedDeployment,
    pub(super) live: Option<PoolState>,
    pub(super) address: Option<String>,
    pub(super) blockers: Vec<Blocker>,
}

/// Observes the pool `name` with `uid`. `template_hash`: what its pods should
/// be made from.
pub(super) async fn observe(
    stores: &Stores,
    namespace: &str,
    uid: &str,
    pool: &ValidPool,
    template_hash: &str,
) -> Observation {
    stores.ready().await;
    let (servers, connection_pods) = pods(stores, namespace, &pool.name);
    let live = ask(&connection_pods, pool.load_sharing_port).await;
    let mut blockers = Vec::new();
    let mut observed = Vec::new();
    for pod in servers.iter().filter(|pod| is_owned(pod.as_ref(), uid)) {
        blockers.extend(pod_blocker(pod));
        observed.extend(server(pod, &pool.name, template_hash, live.as_ref()));
    }
    blockers.extend(connection_pods.iter().filter_map(|pod| pod_blocker(pod)));
    let deployment = stores.get("Deployment", namespace, &connection_server_name(&pool.name));
    Observation {
        table: table(stores, namespace, uid, &pool.name),
        servers: observed,
        deployment: deployment
            .map(|object| observe_deployment(&object))
            .unwrap_or_default(),
        address: address(stores, namespace, pool, &connection_pods),
        live,
        blockers,
    }
}

type Pods = Vec<Arc<DynamicObject>>;

/// Processing servers' pods, and connection servers'.
fn pods(stores: &Stores, namespace: &str, pool: &str) -> (Pods, Pods) {
    let is = |pod: &DynamicObject, component: &str| {
        pod.labels()
            .get(COMPONENT_LABEL)
            .is_some_and(|label| label == component)
    };
    let ours = stores.of_pool("Pod", namespace, pool).into_iter();
    let (servers, others): (Pods, Pods) = ours.partition(|pod| is(pod, PROCESSING_SERVER));
    (
        servers,
        others
            .into_iter()
            .filter(|pod| is(pod, CONNECTION_SERVER))
            .collect(),
    )
}

fn text<'a>(object: &'a DynamicObject, path: &str) -> Option<&'a str> {
    object.data.pointer(path).and_then(Value::as_str)
}

fn number(object: &DynamicObject, path: &str) -> i64 {
    object
        .data
        .pointer(path)
        .and_then(Value::as_i64)
        .unwrap_or(0)
}

fn condition<'a>(object: &'a DynamicObject, kind: &str) -> Option<&'a Value> {
    let conditions = object
        .data
        .pointer("/status/conditions")
        .and_then(Value::as_array)?;
    conditions
        .iter()
        .find(|condition| condition["type"] == kind)
}

fn is_ready(pod: &DynamicObject) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition["status"] == "True")
}

fn server(
    pod: &DynamicObject,
    pool: &str,
    template_hash: &str,
    live: Option<&PoolState>,
) -> Option<ObservedServer> {
    // The name, which nobody can change, not the label.
    let slot = pod.metadata.name.as_deref()?.strip_prefix(pool)?;
    let slot = slot.strip_prefix('-')?.parse().ok()?;
    let reported = live.and_then(|live| live.servers.iter().find(|server| server.slot == slot));
    let phase = text(pod, "/status/phase").unwrap_or_default();
    let cost = pod
        .annotations()
        .get(DELETION_COST)
        .and_then(|cost| cost.parse().ok());
    Some(ObservedServer {
        slot,
        uid: pod.uid().unwrap_or_default(),
        address: text(pod, "/status/podIP").and_then(|address| address.parse().ok()),
        is_ready: is_ready(pod) && pod.metadata.deletion_timestamp.is_none(),
        is_outdated: pod
            .annotations()
            .get(HASH_ANNOTATION)
            .is_none_or(|hash| hash != template_hash),
        is_stopping: pod.metadata.deletion_timestamp.is_some(),
        has_failed: phase == "Failed" || phase == "Succeeded",
        deletion_cost: cost.unwrap_or(0),
        sessions: reported
            .filter(|server| server.attached)
            .map(|server| server.sessions),
        ranges: annotated_ranges(pod.annotations().get(RANGES_ANNOTATION)),
    })
}

/// What keeps a pod from running and does not pass by itself.
fn pod_blocker(pod: &DynamicObject) -> Option<Blocker> {
    let name = pod.name_any();
    if let Some(condition) =
        condition(pod, "PodScheduled").filter(|condition| condition["reason"] == "Unschedulable")
    {
        let message = condition["message"].as_str().unwrap_or_default();
        return Some(Blocker::new(
            "Unschedulable",
            format!("pod {name} cannot be scheduled: {message}"),
        ));
    }
    for list in ["initContainerStatuses", "containerStatuses"] {
        let statuses = pod
            .data
            .pointer(&format!("/status/{list}"))
            .and_then(Value::as_array);
        for status in statuses.into_iter().flatten() {
            let waiting = &status["state"]["waiting"];
            let reason = waiting["reason"].as_str().unwrap_or_default();
            if let Some(reason) = STUCK.into_iter().find(|stuck| *stuck == reason) {
                let container = status["name"].as_str().unwrap_or_default();
                let message = waiting["message"].as_str().unwrap_or_default();
                return Some(Blocker::new(
                    reason,
                    format!("container {container} of pod {name}: {reason}: {message}"),
                ));
            }
        }
    }
    None
}

fn observe_deployment(deployment: &DynamicObject) -> ObservedDeployment {
    let replicas = number(deployment, "/spec/replicas");
    let is_seen = number(deployment, "/status/observedGeneration")
        >= deployment.metadata.generation.unwrap_or(0);
    let updated = number(deployment, "/status/updatedReplicas");
    ObservedDeployment {
        available: i32::try_from(number(deployment, "/status/availableReplicas")).unwrap_or(0),
        is_current: is_seen
            && updated == replicas
            && number(deployment, "/status/replicas") == replicas,
    }
}

fn table(stores: &Stores, namespace: &str, uid: &str, pool: &str) -> ObservedTable {
    let Some(object) = stores.get("ConfigMap", namespace, &table_name(pool)) else {
        return ObservedTable::default();
    };
    let text = object.data["data"][TABLE_KEY].as_str().map(str::to_owned);
    let decoded = text.as_deref().and_then(|text| Table::decode(text).ok());
    let decoded = decoded.filter(|table| table.pool_uid == uid);
    let is_ours = text.as_ref().is_some_and(|text| {
        object.annotations().get(HASH_ANNOTATION) == Some(&hash(&Value::from(text.as_str())))
    });
    ObservedTable {
        generation: decoded.as_ref().map_or(0, |table| table.generation),
        table: decoded.filter(|_| is_ours && is_owned(object.as_ref(), uid)),
        resource_version: object.resource_version(),
        text,
    }
}

/// Asks the connection servers, one after another, until one tells.
async fn ask(pods: &Pods, port: u16) -> Option<PoolState> {
    for pod in pods.iter().filter(|pod| is_ready(pod)) {
        let address = text(pod, "/status/podIP").and_then(|address| address.parse().ok());
        let Some(address) = address else { continue };
        let address = std::net::SocketAddr::new(address, port).to_string();
        let Ok(client) = client::Client::new(&address) else {
            continue;
        };
        if let Ok(Ok(state)) = tokio::time::timeout(ASK_DEADLINE, client.pool()).await {
            return Some(state);
        }
    }
    None
}

/// Where requests go.
fn address(stores: &Stores, namespace: &str, pool: &ValidPool, pods: &Pods) -> Option<String> {
    let service = stores.get("Service", namespace, &pool.name)?;
    let port = pool.load_sharing_port;
    if let Some(address) = pool
        .advertised_address
        .as_ref()
        .filter(|_| pool.exposure != Exposure::ClusterIP)
    {
        return Some(format!("{address}:{port}"));
    }
    match pool.exposure {
        Exposure::ClusterIP => Some(format!("{}.{namespace}.svc:{port}", pool.name)),
        Exposure::NodePort => {
            let port = number(&service, "/spec/ports/0/nodePort");
            (port > 0).then(|| format!("NODE:{port}"))
        }
        Exposure::LoadBalancer => {
            let ingress = "/status/loadBalancer/ingress/0";
            let host = text(&service, &format!("{ingress}/ip"))
                .or_else(|| text(&service, &format!("{ingress}/hostname")));
            host.map(|host| format!("{host}:{port}"))
        }
        Exposure::HostNetwork => {
            let host = pods
                .iter()
                .filter(|pod| is_ready(pod))
                .find_map(|pod| text(pod, "/status/hostIP"));
            host.map(|host| format!("{host}:{port}"))
        }
    }
}
