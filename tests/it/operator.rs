//! The controller against a real API server.

mod examples;
mod exposure;
mod failing;
mod faults;
mod fields;
mod lease;
mod readiness;
mod scale;
mod status;
mod whole_path;

use std::time::Duration;

use crate::common::cluster::{
    KINDS, Space, delete, patch, patch_status, quick, spec, until, with_image,
};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use portpool::table::{Row, Table};
use serde_json::{Value, json};

const QUIET: Duration = Duration::from_secs(8);

#[tokio::test]
async fn a_pool_becomes_ready_owns_everything_and_is_then_left_alone() {
    let space = Space::with_pool("becomes-ready", spec(2)).await;
    let pool = space.pool("games").await;
    let status = pool.status.clone().unwrap();
    assert_eq!(
        (status.replicas, status.ready_replicas, status.ports),
        (2, 2, 8)
    );
    assert_eq!(status.message, "all 2 processing servers are ready");
    assert_eq!(
        status.address.as_deref(),
        Some("games.becomes-ready.svc:7700")
    );
    let owned = [
        ("ConfigMap", "games-port-table"),
        ("Service", "games"),
        ("ServiceAccount", "games-connection-server"),
        ("Deployment", "games-connection-server"),
        ("Role", "games-connection-server"),
        ("RoleBinding", "games-connection-server"),
        ("NetworkPolicy", "games-processing-servers"),
        ("PodDisruptionBudget", "games-processing-servers"),
        ("PodDisruptionBudget", "games-connection-servers"),
        ("Pod", "games-0"),
        ("Pod", "games-1"),
    ];
    for (kind, name) in owned {
        let mut kinds = KINDS.into_iter();
        let (group, _, plural) = kinds.find(|(_, of, _)| *of == kind).unwrap();
        let object = space.objects(group, kind, plural).get(name).await.unwrap();
        let owners = object.owner_references();
        assert_eq!(owners.len(), 1, "{kind} {name}");
        assert_eq!(
            Some(&owners[0].uid),
            pool.metadata.uid.as_ref(),
            "{kind} {name}"
        );
    }
    let table = space.table("games").await.unwrap();
    assert!(table.rows.iter().all(|row| row.address.is_some()));
    let writes = async || space.metric("portpool_api_writes_total").await;
    let before = writes().await;
    assert!(before > 0);
    tokio::time::sleep(QUIET).await;
    assert_eq!(writes().await, before, "writes of an idle pool");
}

#[tokio::test]
async fn scaling_keeps_ports_and_removes_the_cheapest_first() {
    let space = Space::with_pool("scaling", quick(2)).await;
    let before = space.table("games").await.unwrap();
    space.make_ready("games", quick(5)).await;
    let grown = space.table("games").await.unwrap();
    for row in &before.rows {
        assert_eq!(grown.row(row.slot).unwrap().ranges, row.ranges);
    }
    let cost = json!({ "controller.kubernetes.io/pod-deletion-cost": "-7" });
    let cost = json!({ "metadata": { "annotations": cost } });
    patch(&space.pods(), "games-2", cost).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // The deletion cost comes before the number.
    space.scale("games", 4).await.unwrap();
    let servers = async || space.servers("games").await;
    until("four servers", async || servers().await.len() == 4).await;
    assert!(!servers().await.contains_key("games-2"));
    space.make_ready("games", quick(1)).await;
    let left: Vec<String> = servers().await.into_keys().collect();
    assert_eq!(left, ["games-0"]);
    let shrunk = space.table("games").await.unwrap();
    assert_eq!(shrunk.rows, before.rows[..1]);
    space.make_ready("games", quick(0)).await;
    assert!(servers().await.is_empty());
}

#[tokio::test]
async fn a_failed_or_deleted_pod_is_replaced_in_its_slot() {
    let space = Space::with_pool("replaced", spec(2)).await;
    let ranges = async || {
        let rows = space.table("games").await.unwrap().rows;
        rows.into_iter().map(|row| row.ranges).collect::<Vec<_>>()
    };
    let (ports, pods) = (ranges().await, space.servers("games").await);
    let failed = json!({ "status": { "phase": "Failed", "reason": "Evicted" } });
    patch_status(&space.pods(), "games-0", failed).await;
    delete(&space.pods(), "games-1").await;
    until("two other pods", async || {
        let now = space.servers("games").await;
        let is_new = |uid: &String| pods.values().all(|former| former != uid);
        now.len() == 2 && now.values().all(is_new)
    })
    .await;
    space.ready("games").await;
    assert_eq!(ranges().await, ports);
}

#[tokio::test]
async fn a_server_that_is_too_old_is_replaced_in_its_slot() {
    let mut spec = quick(2);
    spec["recycle"] = json!({ "afterSeconds": 4 });
    let space = Space::with_pool("old", spec).await;
    let (before, rows) = (space.servers("games").await, space.table("games").await);
    until("both servers are others", async || {
        let now = space.servers("games").await;
        now.len() == 2 && now.iter().all(|(name, uid)| before.get(name) != Some(uid))
    })
    .await;
    let ranges = |table: Option<Table>| -> Vec<_> {
        let rows = table.unwrap().rows.into_iter();
        rows.map(|row| row.ranges).collect()
    };
    assert_eq!(ranges(space.table("games").await), ranges(rows));
}

/// Waits until the pool's table has `rows` and a generation above `above`;
/// returns how long that took.
async fn table_is_back(space: &Space, rows: &[Row], above: u64) -> Duration {
    until("the table is back", async || {
        let table = space.table("games").await;
        table.is_some_and(|table| table.rows == rows && table.generation > above)
    })
    .await
}

#[tokio::test]
async fn a_table_that_is_changed_or_deleted_is_restored() {
    let space = Space::with_pool("restored", spec(2)).await;
    let good = space.table("games").await.unwrap();
    let maps = space.objects("", "ConfigMap", "configmaps");
    let mut forged = good.clone();
    forged.generation += 50;
    forged.rows.pop();
    let tampers = [
        Value::from("no table"),
        Value::Null,
        forged.encode().unwrap().into(),
    ];
    for text in tampers {
        let change = json!({ "data": { "table.json": text } });
        patch(&maps, "games-port-table", change).await;
        let took = table_is_back(&space, &good.rows, 0).await;
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
    let generation = space.table("games").await.unwrap().generation;
    assert!(
        generation > forged.generation,
        "readers never go back: {generation}"
    );
    delete(&maps, "games-port-table").await;
    let took = table_is_back(&space, &good.rows, generation).await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    // A controller that restarts still increases the generation.
    let mut space = space;
    let generation = space.table("games").await.unwrap().generation;
    until("the status has the generation", async || {
        let status = space.pool("games").await.status.unwrap();
        status.table_generation.cast_unsigned() == generation
    })
    .await;
    space.controller.take();
    delete(&maps, "games-port-table").await;
    space.start_controller();
    table_is_back(&space, &good.rows, generation).await;
}

#[tokio::test]
async fn an_invalid_template_is_reported_in_the_api_servers_words_and_stops_no_server() {
    let space = Space::with_pool("invalid-template", spec(2)).await;
    let before = space.servers("games").await;
    let broken: [(&str, Value, &str); 3] = [
        (
            "/template/spec/containers/0/comand",
            json!(["x"]),
            "unknown field \"spec.containers[0].comand\"",
        ),
        (
            "/template/spec/containers/0/ports",
            json!([{ "containerPort": 99999 }]),
            "must be between 1 and 65535",
        ),
        (
            "/template/spec/restartPolicy",
            json!("Sometimes"),
            "Unsupported value: \"Sometimes\"",
        ),
    ];
    for (path, value, words) in broken {
        let mut wrong = spec(2);
        let (parent, field) = path.rsplit_once('/').unwrap();
        wrong.pointer_mut(parent).unwrap()[field] = value;
        space.apply("games", wrong).await.unwrap();
        space.degraded("games", words).await;
        assert!(!space.is_ready("games").await);
        assert_eq!(space.servers("games").await, before);
        space.make_ready("games", spec(2)).await;
        assert_eq!(space.servers("games").await, before);
    }
    // While the template is wrong, running servers are still managed.
    let mut wrong = spec(2);
    wrong["template"]["spec"]["comand"] = json!(["x"]);
    space.apply("games", wrong).await.unwrap();
    space.degraded("games", "unknown field").await;
    let rows = space.table("games").await.unwrap().rows;
    let maps = space.objects("", "ConfigMap", "configmaps");
    delete(&maps, "games-port-table").await;
    table_is_back(&space, &rows, 0).await;
    // A template that portpool cannot parse.
    let mut wrong = spec(2);
    wrong["template"]["spec"]["containers"] = "none".into();
    space.apply("games", wrong).await.unwrap();
    space.degraded("games", "spec.template: invalid type").await;
    assert_eq!(space.servers("games").await, before);
    space.make_ready("games", spec(2)).await;
}

#[tokio::test]
async fn a_quantity_may_be_a_number_wherever_the_api_server_takes_one() {
    let mut spec = spec(1);
    let template = &mut spec["template"]["spec"];
    let divided = json!({ "resource": "limits.cpu", "divisor": 1 });
    let container = &mut template["containers"][0];
    container["resources"] =
        json!({ "limits": { "cpu": 1, "memory": 64_000_000 }, "requests": { "cpu": 0.5 } });
    container["env"] = json!([{ "name": "CPUS", "valueFrom": { "resourceFieldRef": divided } }]);
    let claim = json!({ "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": 1000 } } } });
    template["volumes"] = json!([
        { "name": "scratch", "emptyDir": { "sizeLimit": 1000 } },
        { "name": "claimed", "ephemeral": { "volumeClaimTemplate": claim } },
    ]);
    let space = Space::with_pool("number-quantities", spec).await;
    let pod = space.pods().get("games-0").await.unwrap();
    let limits = pod.spec.unwrap().containers[0].resources.clone().unwrap();
    assert_eq!(limits.limits.unwrap()["cpu"].0, "1");
}

#[tokio::test]
async fn a_bad_image_stops_a_quarter_is_reported_and_can_be_corrected() {
    let space = Space::new("bad-image").await;
    let with = |image: &str| with_image(quick(4), image);
    let images = async || -> Vec<String> {
        let pods = space.pods().list(&ListParams::default()).await.unwrap();
        let image = |pod: Pod| pod.spec.unwrap().containers[0].image.clone().unwrap();
        pods.into_iter().map(image).collect()
    };
    space.make_ready("games", with("good:1")).await;
    space.apply("games", with("bad:2")).await.unwrap();
    let words = "ImagePullBackOff: no such image";
    space.degraded("games", words).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let now = images().await;
    let bad = now.iter().filter(|image| *image == "bad:2");
    assert_eq!(bad.count(), 1, "the other servers keep their image");
    space.make_ready("games", with("good:3")).await;
    assert!(images().await.iter().all(|image| image == "good:3"));
}

#[tokio::test]
async fn an_unschedulable_pod_is_reported_and_can_be_corrected() {
    let space = Space::new("no-node").await;
    let with = |image: &str| with_image(spec(1), image);
    space.apply("games", with("nowhere:1")).await.unwrap();
    let words = "pod games-0 cannot be scheduled: 0/1 nodes are available";
    space.degraded("games", words).await;
    space.make_ready("games", with("good:1")).await;
}

/// An object of the same kind and shape as `ours`, which portpool does not own.
fn foreign_object(ours: &DynamicObject, kind: &str, name: &str) -> DynamicObject {
    let mut object = ours.clone();
    object.metadata = ObjectMeta {
        name: Some(name.to_owned()),
        annotations: Some([("test/hands-off".to_owned(), String::new())].into()),
        ..ObjectMeta::default()
    };
    object.data.as_object_mut().unwrap().remove("status");
    match kind {
        "Pod" => object.data["spec"] = json!({ "containers": [{ "name": "x", "image": "x" }] }),
        "Service" => object.data["spec"] = json!({ "ports": [{ "port": 80 }] }),
        _ => {}
    }
    object
}

#[tokio::test]
async fn a_foreign_object_of_any_kind_is_reported_and_left_alone() {
    let space = Space::with_pool("foreign-objects", quick(1)).await;
    let of_pool = ListParams::default().labels("portpool.dev/pool=games");
    let mut cases = Vec::new();
    for (group, kind, plural) in KINDS {
        let api = space.objects(group, kind, plural);
        for ours in api.list(&of_pool).await.unwrap() {
            cases.push((api.clone(), kind, ours));
        }
    }
    assert_eq!(cases.len(), 10);
    let run =
        async |(index, (api, kind, ours)): (usize, (Api<DynamicObject>, &str, DynamicObject))| {
            let pool = format!("taken-{index}");
            let name = ours.name_any().replacen("games", &pool, 1);
            let object = foreign_object(&ours, kind, &name);
            let parameters = PostParams::default();
            let before = api.create(&parameters, &object).await.unwrap();
            space.apply(&pool, quick(2)).await.unwrap();
            let words = format!("{kind} foreign-objects/{name} exists and belongs to someone else");
            space.degraded(&pool, &words).await;
            // Only a foreign table holds up the pool: pods need it.
            if kind != "ConfigMap" {
                let other = format!("{pool}-1");
                until("the other slot works", async || {
                    space.servers(&pool).await.contains_key(&other)
                })
                .await;
            }
            let after = api.get(&name).await.unwrap();
            assert_eq!(after.uid(), before.uid(), "{words}");
            assert_eq!(after.labels(), before.labels(), "{words}");
            assert_eq!(
                after.owner_references(),
                before.owner_references(),
                "{words}"
            );
            assert_eq!(after.data["spec"], before.data["spec"], "{words}");
            assert_eq!(after.data["data"], before.data["data"], "{words}");
            delete(&api, &name).await;
            space.ready(&pool).await;
        };
    futures::stream::iter(cases.into_iter().enumerate())
        .for_each_concurrent(None, run)
        .await;
}

#[tokio::test]
async fn manual_changes_of_owned_objects_are_undone() {
    let space = Space::with_pool("edited", spec(1)).await;
    let deployments = space.objects("apps", "Deployment", "deployments");
    let services = space.objects("", "Service", "services");
    let roles = space.objects("rbac.authorization.k8s.io", "Role", "roles");
    let name = "games-connection-server";
    let replicas = json!({ "spec": { "replicas": 3 } });
    patch(&deployments, name, replicas).await;
    patch(&roles, name, json!({ "rules": [] })).await;
    delete(&services, "games").await;
    until("all is back", async || {
        let deployment = deployments.get(name).await.unwrap();
        let role = roles.get(name).await.unwrap();
        let rules = role.data["rules"].as_array().map(Vec::len);
        deployment.data["spec"]["replicas"] == 1
            && rules == Some(1)
            && services.get_opt("games").await.unwrap().is_some()
    })
    .await;
    // A field that the spec no longer sets is reset.
    let mut with = spec(1);
    with["connectionServer"] = json!({ "replicas": 2 });
    space.apply("games", with).await.unwrap();
    let has =
        async |replicas| deployments.get(name).await.unwrap().data["spec"]["replicas"] == replicas;
    until("the deployment has two", async || has(2).await).await;
    space.apply("games", spec(1)).await.unwrap();
    until("the deployment has one", async || has(1).await).await;
    space.ready("games").await;
}

#[tokio::test]
async fn connection_ports_come_before_the_load_sharing_ports_node_port() {
    let space = Space::new("node-ports").await;
    let exposed = |replicas: u32| {
        let mut spec = quick(replicas);
        spec["connectionServer"] =
            json!({ "exposure": "NodePort", "connectionPorts": { "first": 32000, "last": 32099 } });
        spec
    };
    space.make_ready("games", exposed(1)).await;
    let services = space.objects("", "Service", "services");
    let node_port = async |service: &str| {
        let service = services.get_opt(service).await.unwrap();
        service.and_then(|service| service.data["spec"]["ports"][0]["nodePort"].as_u64())
    };
    // The cluster might have chosen this node port, which the next server needs.
    let port = json!({ "name": "load-sharing", "port": 7700, "nodePort": 32005 });
    let chosen = Patch::Strategic(json!({ "spec": { "ports": [port] } }));
    let parameters = PatchParams::default();
    services.patch("games", &parameters, &chosen).await.unwrap();
    space.make_ready("games", exposed(2)).await;
    until("both have ports of their own", async || {
        let load_sharing = node_port("games").await;
        load_sharing.is_some_and(|port| !(32_000..32_008).contains(&port))
    })
    .await;
    let ports = services.get("games-ports-0").await.unwrap();
    let ports = ports.data["spec"]["ports"].as_array().unwrap().iter();
    let ports: Vec<u64> = ports.filter_map(|port| port["nodePort"].as_u64()).collect();
    assert_eq!(ports, (32_000..32_008).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_controller_of_two_namespaces_leaves_the_pools_of_a_third_alone() {
    let mut other = Space::new("third").await;
    other.make_ready("games", quick(2)).await;
    other.controller = None;
    // The third namespace has work to do.
    let maps = other.objects("", "ConfigMap", "configmaps");
    delete(&maps, "games-port-table").await;
    other.apply("games", quick(3)).await.unwrap();
    other.apply("unseen", quick(1)).await.unwrap();
    let versions = async || {
        let mut versions = Vec::new();
        for (group, kind, plural) in KINDS {
            let api = other.objects(group, kind, plural);
            let found = api.list(&ListParams::default()).await.unwrap();
            versions.extend(found.iter().map(|object| {
                let version = object.resource_version().unwrap();
                (kind, object.name_any(), version)
            }));
        }
        let pools = other.pools().list(&ListParams::default()).await.unwrap();
        versions.extend(pools.iter().map(|pool| {
            let version = pool.resource_version().unwrap();
            ("ProcessingPool", pool.name_any(), version)
        }));
        versions
    };
    let before = versions().await;

    let server = other.server.clone();
    let mut first = Space::without_controller(server.clone(), "first").await;
    let second = Space::without_controller(server.clone(), "second").await;
    let more = ["--namespace=second".to_owned()];
    let controller = first.controller_with(server.kubeconfig(), first.admin_port, &more);
    first.controller = Some(controller);
    for replicas in [2, 3] {
        for space in [&first, &second] {
            space.make_ready("games", quick(replicas)).await;
        }
    }
    assert_eq!(versions().await, before);

    // A controller of that namespace does the work.
    other.start_controller();
    other.ready("games").await;
    other.ready("unseen").await;
}
