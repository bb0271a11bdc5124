//! What there is of a pool, read from the objects that the watches keep. No
//! client; the step that fills it in is in `observe`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;

use super::pod_problems;
use super::stores::{DELETION_COST, Stores, condition, is_owned, text};
use crate::plan::objects::{
    AGENT, COMPONENT_LABEL, CONNECTION_SERVER, HASH_ANNOTATION, Owner, PROCESSING_SERVER,
    RANGES_ANNOTATION, annotated_ranges, connection_server_name, hash, table_name,
};
use crate::plan::status::{Blocker, NotListening, ObservedDeployment};
use crate::plan::{ObservedServer, ServicePorts, ValidPool, elapsed};
use crate::pool::Exposure;
use crate::session::{PoolState, PortState, ServerState};
use crate::table::{ListenPort, TABLE_KEY, Table};

/// Reason of a Ready condition that is false because of a readiness gate.
///
/// Source: Kubernetes, pkg/kubelet/status, `GeneratePodReadyCondition`.
const UNMET_GATE: &str = "ReadinessGatesNotReady";

/// The table's ConfigMap.
#[derive(Debug, Default)]
pub(super) struct ObservedTable {
    pub(super) text: Option<String>,
    pub(super) resource_version: Option<String>,
    /// The table that portpool wrote; absent when there is no ConfigMap, or when
    /// someone else has changed it.
    pub(super) table: Option<Table>,
    /// Generation of the table that is there, no matter who wrote it.
    pub(super) generation: u64,
}

/// What there is of a pool.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) table: ObservedTable,
    pub(super) servers: Vec<ObservedServer>,
    pub(super) deployment: ObservedDeployment,
    /// What a connection server reported, if one answered.
    pub(super) live: Option<PoolState>,
    /// The address that requests go to, once known.
    pub(super) address: Option<String>,
    /// A Service that gives clients the addresses of nodes, if there is one.
    pub(super) hiding_service: Option<String>,
    /// What the Services of the pool lead to; `None` where clients need none.
    pub(super) services: Option<ServicePorts>,
    /// What keeps pods from running.
    pub(super) blockers: Vec<Blocker>,
    /// Whether what is known of workloads that do not listen may soon be otherwise.
    /// Memory says so.
    pub(super) is_any_silent: bool,
    /// The time until the next server is too old, if one will be.
    pub(super) next_too_old: Option<Duration>,
}

/// Uids and versions of pods. Versions are numbers that grow, since Kubernetes 1.35
/// by contract; one that is no number counts as the oldest.
pub(super) type Versions = HashMap<String, u64>;

pub(super) fn versions<'a, Pod: ResourceExt + 'a>(pods: impl Iterator<Item = &'a Pod>) -> Versions {
    let version = |pod: &Pod| pod.resource_version()?.parse().ok();
    pods.filter_map(|pod| Some((pod.uid()?, version(pod).unwrap_or(0))))
        .collect()
}

/// A pool's pods.
pub(super) struct Pods {
    servers: Vec<Arc<DynamicObject>>,
    connection_servers: Vec<Arc<DynamicObject>>,
}

impl Pods {
    /// The pods of the pool, including foreign ones that carry its labels.
    pub(super) fn of(stores: &Stores, owner: Owner<'_>) -> Self {
        let mut pods = stores.of_pool("Pod", owner.namespace, &owner.pool.name);
        // The same one of several problems is reported for as long as it is there.
        pods.sort_by_cached_key(|pod| pod.name_any());
        let of_component = |component: &str| {
            let is = |pod: &&Arc<DynamicObject>| {
                let label = pod.labels().get(COMPONENT_LABEL);
                label.is_some_and(|label| label == component)
            };
            pods.iter().filter(is).cloned().collect()
        };
        Self {
            servers: of_component(PROCESSING_SERVER),
            connection_servers: of_component(CONNECTION_SERVER),
        }
    }

    /// What the watch shows of the processing servers that `owner` has.
    pub(super) fn versions(&self, owner: Owner<'_>) -> Versions {
        let owned = self.servers.iter().map(AsRef::as_ref);
        versions(owned.filter(|pod| is_owned(*pod, owner.uid)))
    }

    /// Addresses of the connection servers that are ready.
    pub(super) fn connection_addresses(&self) -> impl Iterator<Item = std::net::IpAddr> {
        let ready = self.connection_servers.iter().filter(|pod| is_ready(pod));
        ready.filter_map(|pod| text(pod, "/status/podIP")?.parse().ok())
    }
}

impl Observation {
    /// What the stores show of the pool with `pods`. `live` is what a connection
    /// server reported; pods whose template does not have `template_hash`, or
    /// that are too old at `now`, are outdated.
    pub(super) fn new(
        stores: &Stores,
        owner: Owner<'_>,
        template_hash: &str,
        pods: &Pods,
        live: Option<PoolState>,
        now: Timestamp,
    ) -> Self {
        let (namespace, pool) = (owner.namespace, owner.pool);
        let mut blockers = Vec::new();
        let mut servers = Vec::new();
        let mut next_too_old = None;
        let ours = pods.servers.iter();
        for pod in ours.filter(|pod| is_owned(pod.as_ref(), owner.uid)) {
            blockers.extend(pod_problems::blocker(pod, now));
            let until = until_too_old(pod, pool, now);
            let is_too_old = until == Some(Duration::ZERO);
            let later = until.filter(|_| !is_too_old);
            next_too_old = next_too_old.into_iter().chain(later).min();
            let found = server(pod, &pool.name, template_hash, live.as_ref(), now);
            servers.extend(found.map(|server| with_age(server, is_too_old)));
        }
        let connection_servers = pods.connection_servers.iter();
        blockers.extend(connection_servers.filter_map(|pod| pod_problems::blocker(pod, now)));
        let deployment = stores.get("Deployment", namespace, &connection_server_name(&pool.name));
        blockers.extend(deployment.as_deref().and_then(pod_problems::refused));
        Self {
            table: table(stores, owner),
            servers,
            deployment: deployment
                .map(|object| observe_deployment(&object))
                .unwrap_or_default(),
            address: address(stores, namespace, pool, pods),
            hiding_service: hiding_service(stores, namespace, &pool.name),
            services: service_ports(stores, owner),
            live,
            is_any_silent: false,
            blockers,
            next_too_old,
        }
    }
}

fn number(object: &DynamicObject, path: &str) -> i64 {
    object
        .data
        .pointer(path)
        .and_then(Value::as_i64)
        .unwrap_or(0)
}

fn is_ready(pod: &DynamicObject) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition["status"] == "True")
}

/// Whether all of `pod` is Ready but, perhaps, the agent.
///
/// The condition Ready is false also when the control plane has lost the pod's
/// node, while the statuses of the containers stay as the kubelet reported them
/// last. Whether the server can be reached, connection servers see themselves.
fn is_workload_ready(pod: &DynamicObject) -> bool {
    if is_ready(pod) {
        return true;
    }
    let has_gate = condition(pod, "Ready").is_some_and(|it| it["reason"] == UNMET_GATE);
    let of = |list: &str| {
        let path = format!("/status/{list}");
        let statuses = pod.data.pointer(&path).and_then(Value::as_array);
        statuses.into_iter().flatten()
    };
    let is_ready = |status: &Value| status["ready"] == true || status["name"] == AGENT;
    !has_gate
        && of("containerStatuses").next().is_some()
        && of("containerStatuses").all(is_ready)
        && of("initContainerStatuses").all(is_ready)
}

fn server(
    pod: &DynamicObject,
    pool: &str,
    template_hash: &str,
    live: Option<&PoolState>,
    now: Timestamp,
) -> Option<ObservedServer> {
    // The slot in the name counts, not that in the label, which can be changed.
    let slot = pod.metadata.name.as_deref()?.strip_prefix(pool)?;
    let slot = slot.strip_prefix('-')?.parse().ok()?;
    let reported = live.and_then(|live| live.servers.iter().find(|server| server.slot == slot));
    let cost = pod
        .annotations()
        .get(DELETION_COST)
        .and_then(|cost| cost.parse().ok());
    let end = pod_problems::end(pod);
    Some(ObservedServer {
        slot,
        uid: pod.uid().unwrap_or_default(),
        address: text(pod, "/status/podIP").and_then(|address| address.parse().ok()),
        is_ready: is_ready(pod) && pod.metadata.deletion_timestamp.is_none() && end.is_none(),
        not_ready: !is_workload_ready(pod) || end.is_some(),
        is_running: is_running(pod),
        is_outdated: pod
            .annotations()
            .get(HASH_ANNOTATION)
            .is_none_or(|hash| hash != template_hash),
        is_spent: reported.is_some_and(|server| server.spent && server.sessions == 0),
        is_stopping: pod.metadata.deletion_timestamp.is_some(),
        not_listening: reported.map(not_listening).unwrap_or_default(),
        waits_for: pod_problems::waits_for(pod, now),
        end,
        ready_since: pod_problems::ready_since(pod),
        deletion_cost: cost.unwrap_or(0),
        sessions: reported
            .filter(|server| server.attached)
            .map(|server| server.sessions),
        ranges: annotated_ranges(pod.annotations().get(RANGES_ANNOTATION)),
    })
}

/// `server`, outdated if it `is_too_old`. What one that has failed waits for is the
/// pause of its slot: its age makes no difference, else it would come back at once.
fn with_age(server: ObservedServer, is_too_old: bool) -> ObservedServer {
    ObservedServer {
        is_outdated: server.is_outdated || (is_too_old && server.end.is_none()),
        ..server
    }
}

/// Whether a program of `pod` other than the agent runs, ready or not, as the kubelet
/// reported it last.
fn is_running(pod: &DynamicObject) -> bool {
    let is_running = |status: &Value| status["state"]["running"].is_object();
    pod_problems::containers(pod).any(|status| is_running(status) && status["name"] != AGENT)
}

/// The ports on which the workload of `server` does not listen, and should.
fn not_listening(server: &ServerState) -> Vec<NotListening> {
    let is_meant = server.attached && !server.draining;
    let ports = server
        .ports
        .iter()
        .filter(|ports| is_meant && ports.not_listening > 0);
    let entry = |ports: &PortState| NotListening {
        entry: ports.name.clone(),
        protocol: ports.protocol,
        is_partial: ports.offered() > 0,
    };
    ports.map(entry).collect()
}

/// The time until `pod` is so old that the pool replaces it: zero if it is now,
/// `None` if the pool keeps pods of any age.
fn until_too_old(pod: &DynamicObject, pool: &ValidPool, now: Timestamp) -> Option<Duration> {
    let created = pod.metadata.creation_timestamp.as_ref()?;
    // A clock that is behind the API server's makes pods younger.
    pool.recycle.until_too_old(elapsed(created.0, now))
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

fn table(stores: &Stores, owner: Owner<'_>) -> ObservedTable {
    let name = table_name(&owner.pool.name);
    let Some(object) = stores.get("ConfigMap", owner.namespace, &name) else {
        return ObservedTable::default();
    };
    let text = object.data["data"][TABLE_KEY].as_str().map(str::to_owned);
    let decoded = text.as_deref().and_then(|text| Table::decode(text).ok());
    let decoded = decoded.filter(|table| table.pool_uid == owner.uid);
    let is_ours = text.as_ref().is_some_and(|text| {
        object.annotations().get(HASH_ANNOTATION) == Some(&hash(&Value::from(text.as_str())))
    });
    ObservedTable {
        generation: decoded.as_ref().map_or(0, |table| table.generation),
        table: decoded.filter(|_| is_ours && is_owned(object.as_ref(), owner.uid)),
        resource_version: object.resource_version(),
        text,
    }
}

/// The first Service of the pool that gives clients the addresses of nodes.
///
/// Source: Kubernetes documentation, Service, "Traffic policies".
fn hiding_service(stores: &Stores, namespace: &str, pool: &str) -> Option<String> {
    let services = stores.of_pool("Service", namespace, pool).into_iter();
    let is_hiding =
        |service: &Arc<DynamicObject>| service.data["spec"]["externalTrafficPolicy"] == "Cluster";
    services.filter(is_hiding).map(|it| it.name_any()).min()
}

/// The connection ports that the pool's own Services lead to; `None` where clients
/// reach them without. What is asked for, but refused, is in no Service.
fn service_ports(stores: &Stores, owner: Owner<'_>) -> Option<ServicePorts> {
    let number = match owner.pool.exposure {
        Exposure::ClusterIP | Exposure::HostNetwork => return None,
        Exposure::NodePort => "nodePort",
        Exposure::LoadBalancer => "port",
    };
    let services = stores.of_pool("Service", owner.namespace, &owner.pool.name);
    let ours = services
        .iter()
        .filter(|it| is_owned(it.as_ref(), owner.uid));
    let ports = ours.flat_map(|service| service.data["spec"]["ports"].as_array());
    let mut led = ServicePorts::default();
    for port in ports.flatten() {
        // Behind a node port that the cluster chose is no connection port.
        let is_same = port[number] == port["port"];
        let number = port["port"].as_u64().and_then(|it| u16::try_from(it).ok());
        if let Some(number) = number.filter(|_| is_same).and_then(ListenPort::new) {
            led.add(number, port["protocol"] == "UDP");
        }
    }
    Some(led)
}

/// The address that requests go to, once known.
fn address(stores: &Stores, namespace: &str, pool: &ValidPool, pods: &Pods) -> Option<String> {
    let service = stores.get("Service", namespace, &pool.name)?;
    let port = pool.load_sharing_port;
    if let Some(address) = pool
        .advertised_address
        .as_ref()
        .filter(|_| pool.exposure != Exposure::ClusterIP)
    {
        return Some(host_port(address, port));
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
            host.map(|host| host_port(host, port))
        }
        Exposure::HostNetwork => {
            let mut ready = pods.connection_servers.iter().filter(|pod| is_ready(pod));
            let host = ready.find_map(|pod| text(pod, "/status/hostIP"));
            host.map(|host| host_port(host, port))
        }
    }
}

/// `port` of `host`, a name or an address.
fn host_port(host: &str, port: u16) -> String {
    match host.parse() {
        Ok(address) => SocketAddr::new(address, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A pod with the containers `main` and, before it, the agent.
    fn pod(condition: &Value, main: bool, agent: bool) -> DynamicObject {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "games-0" },
            "status": {
                "conditions": [condition],
                "containerStatuses": [{ "name": "main", "ready": main }],
                "initContainerStatuses": [
                    { "name": AGENT, "ready": agent },
                    { "name": "prepare", "ready": true },
                ],
            },
        });
        serde_json::from_value(pod).unwrap()
    }

    fn ready(status: &str, reason: &str) -> Value {
        json!({ "type": "Ready", "status": status, "reason": reason })
    }

    #[test]
    fn a_program_that_ends_well_is_in_no_loop_of_crashes() {
        for (exit_code, expected) in [(0, None), (1, Some("CrashLoopBackOff"))] {
            let mut pod = pod(&ready("False", "ContainersNotReady"), false, true);
            pod.data["status"]["containerStatuses"][0] = json!({
                "name": "main",
                "state": { "waiting": { "reason": "CrashLoopBackOff" } },
                "lastState": { "terminated": { "exitCode": exit_code } },
            });
            let reason =
                pod_problems::blocker(&pod, Timestamp::UNIX_EPOCH).map(|blocker| blocker.reason);
            assert_eq!(reason, expected, "exit code {exit_code}");
        }
    }

    #[test]
    fn a_workload_is_as_ready_as_its_containers_whatever_its_agent_reports() {
        let unready = ready("False", "ContainersNotReady");
        let cases = [
            ("all", pod(&ready("True", ""), true, true), true),
            ("its probe fails", pod(&unready, false, true), false),
            ("nor the agent", pod(&unready, false, false), false),
            ("the agent only", pod(&unready, true, false), true),
            // The node controller changes this condition only.
            ("lost node", pod(&ready("False", ""), true, true), true),
            (
                "a gate",
                pod(&ready("False", UNMET_GATE), true, true),
                false,
            ),
            ("not started", pod(&json!({}), false, false), false),
        ];
        for (name, pod, expected) in cases {
            assert_eq!(is_workload_ready(&pod), expected, "{name}");
        }
        let bare = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "games-0" } });
        let bare: DynamicObject = serde_json::from_value(bare).unwrap();
        assert!(!is_workload_ready(&bare), "just created");
        let mut sidecar = pod(&unready, true, true);
        sidecar.data["status"]["initContainerStatuses"][1]["ready"] = false.into();
        assert!(!is_workload_ready(&sidecar), "a sidecar's probe fails");
    }

    #[test]
    fn a_program_runs_while_one_container_does_that_is_not_the_agent() {
        let running = json!({ "running": { "startedAt": "2026-03-01T12:00:00Z" } });
        let waits = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        let cases = [
            ("the program", [&running, &running, &waits], true),
            ("a sidecar", [&waits, &running, &running], true),
            ("the agent", [&waits, &running, &waits], false),
        ];
        for (name, [main, agent, prepare], expected) in cases {
            let mut pod = pod(&json!({}), false, false);
            pod.data["status"]["containerStatuses"][0]["state"] = main.clone();
            pod.data["status"]["initContainerStatuses"][0]["state"] = agent.clone();
            pod.data["status"]["initContainerStatuses"][1]["state"] = prepare.clone();
            assert_eq!(is_running(&pod), expected, "{name}");
        }
        assert!(!is_running(&pod(&json!({}), false, false)), "not started");
    }

    #[test]
    fn age_makes_a_server_outdated_unless_it_has_failed() {
        for (phase, is_too_old, expected) in [
            ("Running", true, true),
            ("Running", false, false),
            ("Failed", true, false),
        ] {
            let mut pod = pod(&json!({}), false, false);
            pod.metadata.annotations = Some([(HASH_ANNOTATION.to_owned(), "x".to_owned())].into());
            pod.data["status"]["phase"] = phase.into();
            let server = server(&pod, "games", "x", None, Timestamp::UNIX_EPOCH).unwrap();
            let server = with_age(server, is_too_old);
            assert_eq!(server.is_outdated, expected, "{phase} {is_too_old}");
        }
    }

    #[test]
    fn the_address_of_the_status_is_one_that_clients_can_use() {
        let cases = [
            ("192.0.2.7", "192.0.2.7:7700"),
            ("2001:db8::7", "[2001:db8::7]:7700"),
            ("games.example.org", "games.example.org:7700"),
        ];
        for (host, expected) in cases {
            assert_eq!(host_port(host, 7700), expected);
        }
    }
}
