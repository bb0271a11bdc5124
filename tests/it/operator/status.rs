//! What a pool reports, what a cluster's users see of it, and that the controller
//! writes nothing while nothing changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::cluster::{Space, metric, patch, patch_status, quick, until, with_image};
use crate::common::faulty::Faulty;
use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Client, ResourceExt};
use portpool::pool::ProcessingPool;
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

/// A restricted workload, as the strictest pod security asks for.
fn restricted(replicas: u32) -> Value {
    let mut spec = quick(replicas);
    spec["template"]["spec"]["containers"][0]["securityContext"] = json!({
        "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] },
        "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" },
    });
    spec
}

#[tokio::test]
async fn an_idle_pool_causes_no_writes_also_after_a_restart() {
    let mut faulty = Faulty::new("idle").await;
    let lease = ["--lease=idle/portpool", "--resync-seconds=2"].map(str::to_owned);
    let start = |faulty: &mut Faulty| {
        faulty.space.controller.take();
        let kubeconfig = faulty.proxy.kubeconfig.clone();
        let port = faulty.space.admin_port;
        faulty.space.controller = Some(faulty.space.controller_with(&kubeconfig, port, &lease));
    };
    start(&mut faulty);
    faulty.space.make_ready("games", quick(3)).await;
    // Other programs may add annotations.
    let theirs = json!({ "metadata": { "annotations": { "test/theirs": "yes" } } });
    let services = faulty.space.objects("", "Service", "services");
    patch(&services, "games", theirs.clone()).await;
    patch(&faulty.space.pods(), "games-0", theirs).await;
    // A successor, which learns everything from lists.
    faulty.space.controller.as_ref().unwrap().terminate();
    tokio::time::sleep(Duration::from_secs(1)).await;
    start(&mut faulty);
    let port = faulty.space.admin_port;
    let leads = async || metric(port, "portpool_reconciles_total") > 0;
    until("it leads", leads).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    faulty.proxy.log.lock().unwrap().clear();
    tokio::time::sleep(MINUTE).await;
    let log = std::mem::take(&mut *faulty.proxy.log.lock().unwrap());
    let is_lease = |entry: &String| entry.contains("/leases/");
    let (leases, others): (Vec<_>, Vec<_>) = log.into_iter().partition(is_lease);
    assert_eq!(others, Vec::<String>::new(), "writes of an idle pool");
    assert!((4..=13).contains(&leases.len()), "renewals: {leases:?}");
    let service = services.get("games").await.unwrap();
    assert_eq!(service.annotations()["test/theirs"], "yes");
}

/// Whenever the pool's status claims that it is ready, asserts that it is, and
/// counts the claim.
async fn check_claims(client: Client, namespace: String, claims: Arc<AtomicU64>) {
    let pools: Api<ProcessingPool> = Api::namespaced(client.clone(), &namespace);
    let events = pools.watch(&WatchParams::default(), "0").await.unwrap();
    futures::pin_mut!(events);
    while let Some(event) = events.try_next().await.unwrap() {
        let (WatchEvent::Added(pool) | WatchEvent::Modified(pool)) = event else {
            continue;
        };
        let generation = pool.metadata.generation;
        let conditions = pool.status.iter().flat_map(|status| &status.conditions);
        let is_claimed = conditions.into_iter().any(|condition| {
            condition.type_ == "Ready"
                && condition.status == "True"
                && condition.observed_generation == generation
        });
        if !is_claimed {
            continue;
        }
        let difference = difference(&client, &namespace, &pool).await;
        // The next change may have come meanwhile.
        let now = pools.get(&pool.name_any()).await.unwrap();
        if now.metadata.generation == generation {
            assert_eq!(difference, None, "{generation:?}: {:?}", pool.status);
            claims.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The first difference between the pool's spec and its objects.
async fn difference(client: &Client, namespace: &str, pool: &ProcessingPool) -> Option<String> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let servers = ListParams::default().labels("portpool.dev/component=processing-server");
    let pods = pods.list(&servers).await.unwrap().items;
    let wanted = &pool.spec.template.0["spec"]["containers"][0]["image"];
    let is_good = |pod: &Pod| {
        let status = pod.status.iter();
        let mut conditions = status.flat_map(|status| status.conditions.iter().flatten());
        let is_ready = conditions.any(|found| found.type_ == "Ready" && found.status == "True");
        let image = pod.spec.as_ref().unwrap().containers[0].image.as_deref();
        is_ready && pod.metadata.deletion_timestamp.is_none() && image == wanted.as_str()
    };
    let good = pods.iter().filter(|pod| is_good(pod)).count();
    let replicas = usize::try_from(pool.spec.replicas).unwrap();
    if (good, pods.len()) != (replicas, replicas) {
        let all = pods.len();
        return Some(format!("{good} good pods of {all}, wanted {replicas}"));
    }
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let deployment = deployments.get("games-connection-server").await.unwrap();
    let status = deployment.status.unwrap_or_default();
    if status.observed_generation != deployment.metadata.generation {
        return Some("the Deployment is not rolled out".to_owned());
    }
    let pod = deployment.spec.template.spec.unwrap();
    let wanted = &pool.spec.connection_server;
    let argument = format!("--load-sharing-port={}", wanted.load_sharing_port);
    let mut arguments = pod.containers[0].args.iter().flatten();
    let is_good = arguments.any(|found| *found == argument)
        && status.available_replicas == Some(wanted.replicas)
        && deployment.spec.replicas.unwrap_or(1) == wanted.replicas;
    (!is_good).then(|| "the Deployment is not as the spec says".to_owned())
}

#[tokio::test]
async fn a_pool_never_claims_to_be_ready_before_it_is() {
    let space = Space::new("truth").await;
    let claims = Arc::new(AtomicU64::new(0));
    let checking = check_claims(space.client.clone(), space.name.clone(), claims.clone());
    let checking = tokio::spawn(checking);
    let with = |replicas: u32, image: &str, server: Value| {
        let mut spec = with_image(quick(replicas), image);
        spec["connectionServer"] = server;
        spec
    };
    let steps = [
        with(2, "a:1", json!({})),
        with(4, "a:1", json!({})),
        with(4, "a:2", json!({})),
        with(4, "a:2", json!({ "loadSharingPort": 7800 })),
        with(4, "a:2", json!({ "loadSharingPort": 7800, "replicas": 2 })),
        with(1, "a:3", json!({ "loadSharingPort": 7801, "replicas": 1 })),
        with(3, "a:3", json!({ "loadSharingPort": 7802 })),
        with(0, "a:3", json!({})),
        with(2, "a:4", json!({})),
    ];
    let count = u64::try_from(steps.len()).unwrap();
    for step in steps {
        space.make_ready("games", step).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // A pod fails.
    let failed = json!({ "status": { "phase": "Failed" } });
    patch_status(&space.pods(), "games-0", failed).await;
    let is_unready = async || !space.is_ready("games").await;
    until("the condition is not true", is_unready).await;
    space.ready("games").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!checking.is_finished(), "{:?}", checking.await);
    checking.abort();
    let claims = claims.load(Ordering::Relaxed);
    assert!(claims >= count, "{claims} claims were checked");
}

#[tokio::test]
async fn each_transition_emits_one_event() {
    let space = Space::new("events").await;
    let events: Api<Event> = Api::namespaced(space.client.clone(), "events");
    let reported = async || {
        let events = events.list(&ListParams::default()).await.unwrap().items;
        let mut reported = Vec::new();
        for event in events {
            let again = event.series.map_or(0, |series| series.count - 1);
            reported.push((event.type_.unwrap(), event.reason.unwrap(), again));
        }
        reported.sort();
        reported
    };
    let normal = |reason: &str| ("Normal".to_owned(), reason.to_owned(), 0);
    let warning = |reason: &str| ("Warning".to_owned(), reason.to_owned(), 0);
    space.make_ready("games", quick(2)).await;
    until("both are reported", async || {
        let reported = reported().await;
        reported.contains(&normal("ServersNotReady")) && reported.contains(&normal("Complete"))
    })
    .await;
    let mut bad = quick(2);
    bad["template"]["spec"]["comand"] = "x".into();
    space.apply("games", bad).await.unwrap();
    space.degraded("games", "unknown field").await;
    let is_warned = async || reported().await.contains(&warning("Refused"));
    until("a warning", is_warned).await;
    // The controller retries blocked pools without further events.
    let before = reported().await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(reported().await, before);
    let is_expected = |(kind, reason, _): &(String, String, i32)| match reason.as_str() {
        "ServersNotReady" | "Complete" | "ConnectionServersNotReady" => kind == "Normal",
        // The condition Ready has the same reason.
        reason => (kind.as_str(), reason) == ("Warning", "Refused"),
    };
    assert!(before.iter().all(is_expected), "{before:?}");
    assert!(before.len() <= 5, "{before:?}");
}

#[tokio::test]
async fn kubectl_finds_scales_and_shows_pools() {
    let space = Space::with_pool("kubectl", quick(2)).await;
    let get = async |path: &str, accept: &str| -> Value {
        let request = http::Request::get(path).header(http::header::ACCEPT, accept);
        let request = request.body(Vec::new()).unwrap();
        space.client.request(request).await.unwrap()
    };
    let kinds = get("/apis/portpool.dev/v1alpha1", "application/json").await;
    let kinds = kinds["resources"].as_array().unwrap().iter();
    let find = |name: &str| kinds.clone().find(|kind| kind["name"] == name).expect(name);
    let pools = find("processingpools");
    assert_eq!(pools["shortNames"], json!(["pp"]));
    assert_eq!(pools["categories"], json!(["portpool"]));
    find("processingpools/status");
    find("processingpools/scale");
    let path = "/apis/portpool.dev/v1alpha1/namespaces/kubectl/processingpools";
    let table = get(path, "application/json;as=Table;v=v1;g=meta.k8s.io").await;
    let columns = table["columnDefinitions"].as_array().unwrap();
    let shown = |priority: i64| -> Vec<&str> {
        let shown = columns
            .iter()
            .filter(|column| column["priority"] == priority);
        shown
            .map(|column| column["name"].as_str().unwrap())
            .collect()
    };
    let usual = shown(0).join(" ");
    assert_eq!(usual, "Name Desired Ready Ports Sessions Free Status Age");
    assert_eq!(shown(1), ["Address", "Policy"]);
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    assert_eq!(cells[..4], [json!("games"), json!(2), json!(2), json!(8)]);
    assert_eq!(cells[8..], ["games.kubectl.svc:7700", "LeastSessions"]);
    // As an autoscaler does.
    let scale = space.pools().get_scale("games").await.unwrap();
    let status = scale.status.unwrap();
    assert_eq!(status.replicas, 2);
    let selected = ListParams::default().labels(&status.selector.unwrap());
    assert_eq!(space.pods().list(&selected).await.unwrap().items.len(), 2);
    space.scale("games", 3).await.unwrap();
    until("three", async || space.servers("games").await.len() == 3).await;
}

#[tokio::test]
async fn everything_runs_under_restricted_pod_security() {
    let mut space = Space::new("restricted").await;
    space.controller.take();
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(space.client.clone());
    let labels = json!({ "pod-security.kubernetes.io/enforce": "restricted" });
    let enforce = json!({ "metadata": { "labels": labels } });
    patch(&namespaces, "restricted", enforce).await;
    let admits = async |pod: Value| {
        let dry = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let pod = serde_json::from_value(pod).unwrap();
        space.pods().create(&dry, &pod).await.map(|_| ())
    };
    until("it is enforced", async || {
        let pod = json!({ "metadata": { "name": "x" }, "spec": { "containers": [{ "name": "x", "image": "x" }] } });
        admits(pod).await.is_err()
    })
    .await;
    let kubeconfig = space.server.kubeconfig().to_owned();
    let controller = space.controller_with(&kubeconfig, space.admin_port, &[]);
    // The agent is admitted beside a restricted workload.
    space.make_ready("games", restricted(2)).await;
    // So is the connection server.
    let deployments = space.objects("apps", "Deployment", "deployments");
    let deployment = deployments.get("games-connection-server").await.unwrap();
    let template = &deployment.data["spec"]["template"];
    let labels = &template["metadata"]["labels"];
    admits(json!({ "metadata": { "name": "x", "labels": labels }, "spec": template["spec"] }))
        .await
        .unwrap();
    // Workloads get no service account token.
    let pod = space.pods().get("games-0").await.unwrap().spec.unwrap();
    assert_eq!(pod.automount_service_account_token, Some(false));
    drop(controller);
}

#[tokio::test]
async fn every_exposure_has_its_services_in_the_api_server() {
    let space = Space::new("exposures").await;
    let with = |exposure: &str, first: u16| {
        let mut spec = quick(2);
        spec["ports"][0]["protocol"] = "TCPUDP".into();
        spec["connectionServer"] = json!({
            "exposure": exposure, "connectionPorts": { "first": first, "last": first + 19 },
        });
        spec
    };
    let services = space.objects("", "Service", "services");
    let ports = async |name: &str| -> Vec<(u64, String, Option<u64>)> {
        let service = services.get(name).await.unwrap();
        let ports = service.data["spec"]["ports"].as_array().unwrap().clone();
        let port = |port: &Value| {
            let number = port["port"].as_u64().unwrap();
            let protocol = port["protocol"].as_str().unwrap().to_owned();
            (number, protocol, port["nodePort"].as_u64())
        };
        ports.iter().map(port).collect()
    };
    let inside = vec![(7700, "TCP".to_owned(), None)];
    for (name, exposure) in [("inside", "ClusterIP"), ("host", "HostNetwork")] {
        space.make_ready(name, with(exposure, 20_000)).await;
        assert_eq!(ports(name).await, inside, "{exposure}");
    }
    // Node ports outside the valid range are reported in the API server's words.
    let invalid = with("NodePort", 20_000);
    space.apply("nodes", invalid).await.unwrap();
    space.degraded("nodes", "not in the valid range").await;
    space.make_ready("nodes", with("NodePort", 31_400)).await;
    let on_nodes = ports("nodes-ports-0").await;
    assert_eq!(on_nodes.len(), 16);
    let is_same = |(port, _, node): &(u64, _, Option<u64>)| *node == Some(*port);
    assert!(on_nodes.iter().all(is_same));
    let status = space.pool("nodes").await.status.unwrap();
    assert!(status.address.unwrap().starts_with("NODE:"));
    // A load balancer without an address is not ready.
    let balanced = with("LoadBalancer", 20_000);
    space.apply("balanced", balanced).await.unwrap();
    until("the pods are ready", async || {
        let (_, reason, _) = space.condition("balanced", "Ready").await;
        reason == "AddressPending"
    })
    .await;
    // It takes no node ports, of which a cluster has 2,768 by default. So a pool
    // may have more ports.
    let mut large = quick(2);
    large["ports"][0]["port"] = 8000.into();
    large["ports"][0]["count"] = 1500.into();
    large["connectionServer"] = json!({ "exposure": "LoadBalancer" });
    space.apply("large", large).await.unwrap();
    until("the Service is there", async || {
        services.get_opt("large").await.unwrap().is_some()
    })
    .await;
    for (name, count) in [("balanced", 17), ("large", 3001)] {
        let ports = ports(name).await;
        assert_eq!(ports.len(), count, "{name}");
        assert!(ports.iter().all(|(.., node)| node.is_none()), "{name}");
    }
    let given = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": "192.0.2.7" }] } } });
    patch_status(&services, "balanced", given).await;
    space.ready("balanced").await;
    let status = space.pool("balanced").await.status.unwrap();
    assert_eq!(status.address.as_deref(), Some("192.0.2.7:7700"));
    // A policy cannot name pods on a host's network.
    let policies = space.objects("networking.k8s.io", "NetworkPolicy", "networkpolicies");
    let names = policies.list(&ListParams::default()).await.unwrap();
    let names: Vec<String> = names.iter().map(ResourceExt::name_any).collect();
    assert_eq!(names.len(), 4);
    assert!(names.iter().all(|name| name != "host-processing-servers"));
}
