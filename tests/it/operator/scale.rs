//! How long a large pool and many pools take, beside a ReplicaSet on the same
//! API server. Run in release: `make scale-operator`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::cluster::{ApiServer, Space, metric, spec};
use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use portpool::plan::ValidPool;
use portpool::plan::objects::{Owner, Settings, pod};
use portpool::table::Slot;
use serde_json::json;

const SERVERS: usize = 1000;
const POOLS: usize = 200;
const ROUNDS: usize = 5;
const LIMIT: Duration = Duration::from_secs(300);

/// Counts the pods of a namespace as they are made, by a watch of their names:
/// asking again and again would cost what is measured.
struct Pods(tokio::task::JoinHandle<Instant>);

impl Pods {
    async fn count(client: &Client, namespace: &str) -> Self {
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let events = api
            .watch_metadata(&WatchParams::default(), "0")
            .await
            .unwrap();
        Self(tokio::spawn(async move {
            futures::pin_mut!(events);
            let mut made = 0;
            while let Some(event) = events.try_next().await.unwrap() {
                made += usize::from(matches!(event, WatchEvent::Added(_)));
                if made == SERVERS {
                    return Instant::now();
                }
            }
            panic!("the watch has ended after {made} pods");
        }))
    }

    /// Time from `started` until the last was made.
    async fn all(self, started: Instant) -> Duration {
        let last = tokio::time::timeout(LIMIT, self.0).await;
        last.expect("in time").unwrap() - started
    }
}

/// What the pool's pods are made of, so that both make the same.
fn pod_spec() -> serde_json::Value {
    let pool = json!({
        "apiVersion": "portpool.dev/v1alpha1", "kind": "ProcessingPool",
        "metadata": { "name": "games" }, "spec": spec(1),
    });
    let pool = ValidPool::new(&serde_json::from_value(pool).unwrap()).unwrap();
    let owner = Owner {
        pool: &pool,
        namespace: "any",
        uid: "any",
    };
    let settings = Settings {
        image: "portpool:test".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        image_pull_secrets: Vec::new(),
    };
    pod(owner, &settings, Slot(0))["spec"].clone()
}

fn memory(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        / 1024
}

async fn replica_set(
    server: &Arc<ApiServer>,
    client: &Client,
    name: &str,
    more: &[&str],
) -> Duration {
    server.start_controller_manager(more);
    tokio::time::sleep(Duration::from_secs(8)).await;
    let space = Space::without_controller(server.clone(), name).await;
    let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), name);
    let set = serde_json::from_value(json!({
        "metadata": { "name": "set" },
        "spec": {
            "replicas": SERVERS,
            "selector": { "matchLabels": { "app": "set" } },
            "template": {
                "metadata": { "labels": { "app": "set" } },
                "spec": pod_spec(),
            },
        },
    }));
    let pods = Pods::count(client, name).await;
    let started = Instant::now();
    sets.create(&PostParams::default(), &set.unwrap())
        .await
        .unwrap();
    let took = pods.all(started).await;
    drop(space);
    server.stop_controller_manager();
    took
}

async fn large_pool(server: &Arc<ApiServer>, name: &str) -> Duration {
    let mut space = Space::without_controller(server.clone(), name).await;
    space.start_controller();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let pods = Pods::count(&space.client, name).await;
    let started = Instant::now();
    space
        .apply("games", spec(u32::try_from(SERVERS).unwrap()))
        .await
        .unwrap();
    let took = pods.all(started).await;
    while !space.is_ready("games").await {
        assert!(started.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let writes = metric(space.admin_port, "portpool_api_writes_total");
    let controller = space.controller.as_ref().unwrap().id();
    println!(
        "pool of {SERVERS}: pods after {took:.2?}, ready after {:.1?}, {writes} writes, {} MiB at most",
        started.elapsed(),
        memory(controller)
    );
    took
}

#[tokio::test]
#[ignore = "measures; make scale-operator"]
async fn a_large_pool_beside_a_replica_set() {
    let server = Arc::new(ApiServer::own().await);
    let client = server.client().await;
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let ours = large_pool(&server, &format!("pool-{round}")).await;
        let raised = ["--kube-api-qps=10000", "--kube-api-burst=10000"];
        let theirs = replica_set(&server, &client, &format!("raised-{round}"), &raised).await;
        println!("ReplicaSet of {SERVERS}, rate limit raised: pods after {theirs:.2?}");
        rounds.push((ours.as_secs_f64() / theirs.as_secs_f64(), ours, theirs));
    }
    rounds.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (least, middle, most) = (rounds[0].0, rounds[ROUNDS / 2].0, rounds[ROUNDS - 1].0);
    println!("pool over ReplicaSet, {ROUNDS} rounds: median {middle:.2} [{least:.2}, {most:.2}]");
    let took = replica_set(&server, &client, "limited", &[]).await;
    println!("ReplicaSet of {SERVERS}, default rate limit: pods after {took:.1?}");
}

#[tokio::test]
#[ignore = "measures; make scale-operator"]
async fn many_pools() {
    let server = Arc::new(ApiServer::own().await);
    let mut space = Space::without_controller(server, "many").await;
    space.start_controller();
    let started = Instant::now();
    for index in 0..POOLS {
        space
            .apply(&format!("games-{index}"), spec(2))
            .await
            .unwrap();
    }
    let applied = started.elapsed();
    loop {
        let pools = space.pools().list(&ListParams::default()).await.unwrap();
        let ready = pools.items.iter().filter(|pool| {
            let conditions = pool.status.iter().flat_map(|status| &status.conditions);
            conditions
                .into_iter()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
        });
        if ready.count() == POOLS {
            break;
        }
        assert!(started.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let writes = metric(space.admin_port, "portpool_api_writes_total");
    let memory = memory(space.controller.as_ref().unwrap().id());
    println!(
        "{POOLS} pools of 2: applied in {applied:.1?}, all ready after {:.1?}, {writes} writes, {memory} MiB at most",
        started.elapsed()
    );
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = metric(space.admin_port, "portpool_api_writes_total");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let idle = metric(space.admin_port, "portpool_api_writes_total") - before;
    println!("{POOLS} pools, idle: {idle} writes in 60 s");
    assert_eq!(idle, 0);
}
