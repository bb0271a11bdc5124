//! What clients see while parts are scaled, killed or stopped, and how long it
//! takes until everything works again.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use portpool::table::RowState;
use serde_json::json;

use crate::traffic::{Live, Traffic};
use crate::world::{Away, LIMIT, RELEASE, World, crash, expect, print_time, run, until};

pub fn is_ready(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn live_sessions_survive_scaling_from_2_to_5_to_1() {
    let world = World::with_pool("e2e-scaling", 2).await;
    let mut first = Live::new(&world.asker()).await;
    world.scale("games", 5).await;
    print_time("scaled from 2 to 5: ready", world.ready("games").await);
    world.all_offered(5).await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(Live::new(&world.asker()).await);
    }
    first.check();
    sessions.push(first);
    let mut servers: Vec<_> = sessions.iter().map(|live| &live.session.server).collect();
    servers.sort_unstable();
    servers.dedup();
    assert_eq!(servers.len(), 5, "each server has a session");

    world.scale("games", 1).await;
    let (table, _) = until("four servers drain", LIMIT, async || {
        let table = world.table("games").await?;
        let drain = |table: &portpool::table::Table| {
            let rows = table.rows.iter();
            rows.filter(|row| row.state == RowState::Draining).count()
        };
        expect(table, |table| drain(table) == 4)
    })
    .await;
    for live in &mut sessions {
        live.check();
    }
    let stays = table.rows.iter().find(|row| row.state == RowState::Active);
    let stays = &stays.unwrap().server;
    let (mut staying, leaving): (Vec<_>, Vec<_>) = sessions
        .into_iter()
        .partition(|live| live.session.server == *stays);
    drop(leaving);
    print_time(
        "scaled from 5 to 1: ready after the last session of the others",
        world.ready("games").await,
    );
    assert_eq!(world.pods("processing-server").await.len(), 1);
    staying[0].check();
    drop(staying);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn a_deleted_pod_comes_back_with_its_ports_while_others_serve() {
    let world = World::with_pool("e2e-pod", 2).await;
    let before = world.table("games").await.unwrap();
    let asker = world.asker();
    let mut sessions = [Live::new(&asker).await, Live::new(&asker).await];
    sessions.sort_by_key(|live| live.session.server.clone());
    let [lost, mut kept] = sessions;
    assert_eq!(lost.session.server, "games-0");
    assert_eq!(kept.session.server, "games-1");
    let uid = world.pods("processing-server").await["games-0"]
        .metadata
        .uid
        .clone();
    let pods: Api<Pod> = world.api();
    let at_once = DeleteParams::default().grace_period(0);
    pods.delete("games-0", &at_once).await.unwrap();
    let started = Instant::now();
    until("another games-0 is ready", LIMIT, async || {
        let pod = world.pods("processing-server").await.remove("games-0");
        let found = pod.map(|pod| (is_ready(&pod), pod.metadata.uid));
        expect(found, |found| {
            found
                .as_ref()
                .is_some_and(|(ready, other)| *ready && *other != uid)
        })
    })
    .await;
    kept.check();
    world.ready("games").await;
    print_time("deleted processing server: pool ready", started.elapsed());
    let what = "seven ports are free, the eighth has its session";
    world
        .live(what, |state| state.free_ports == 7 && state.sessions == 1)
        .await;
    print_time(
        "deleted processing server: all ports offered",
        started.elapsed(),
    );
    kept.check();
    let after = world.table("games").await.unwrap();
    assert_eq!(before.rows[0].ranges, after.rows[0].ranges);
    let anew = Live::new(&asker).await;
    assert_eq!(anew.session.server, "games-0");
    drop((kept, anew));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn clients_do_not_notice_that_the_controllers_are_killed() {
    let world = World::with_pool("e2e-controller", 2).await;
    let traffic = Traffic::start(world.asker());
    let controllers: Api<Pod> = Api::namespaced(world.client.clone(), RELEASE);
    let all = ListParams::default().labels("app.kubernetes.io/component=controller");
    for pod in controllers.list(&all).await.unwrap() {
        crash(&controllers, &pod.metadata.name.unwrap(), "controller").await;
    }
    let started = Instant::now();
    world.scale("games", 3).await;
    world.ready("games").await;
    print_time(
        "both controllers killed: scaled from 2 to 3",
        started.elapsed(),
    );
    let report = traffic.end().await;
    assert!(report.sessions > 0 && report.failures.is_empty());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn a_killed_connection_server_is_replaced_while_the_other_serves() {
    let world = World::with_pool("e2e-connection-server", 2).await;
    let traffic = Traffic::start(world.asker());
    let servers = world.pods("connection-server").await;
    let victim = servers.keys().next().unwrap();
    let restarts = |pod: &Pod| {
        let status = pod.status.as_ref()?.container_statuses.as_ref()?;
        Some(status.first()?.restart_count)
    };
    let before = restarts(&servers[victim]);
    crash(&world.api(), victim, "connection-server").await;
    let started = Instant::now();
    until("two connection servers are ready", LIMIT, async || {
        let pods = world.pods("connection-server").await.into_iter();
        let is_back = |(name, pod): &(String, Pod)| {
            is_ready(pod) && (name != victim || restarts(pod) > before)
        };
        let ready: Vec<_> = pods.filter(is_back).map(|(name, _)| name).collect();
        expect(ready, |ready| ready.len() == 2)
    })
    .await;
    print_time("killed connection server: two are ready", started.elapsed());
    // Agents keep the ports that the killed server may still forward to, so that
    // no two clients get one. With so many clients, that is every port.
    traffic.goes_on(50).await;
    print_time(
        "killed connection server: 50 more clients are served",
        started.elapsed(),
    );
    let report = traffic.end().await;
    // Its own connections fail, and those that kube-proxy still sends there.
    assert!(
        report.sessions > 0 && report.longest_gap < Duration::from_secs(20),
        "{report:?}"
    );
    world
        .live("all ports are free", |state| state.free_ports == 8)
        .await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn traffic_goes_on_without_the_kubelet() {
    let world = World::with_pool("e2e-kubelet", 2).await;
    let mut live = Live::new(&world.asker()).await;
    let Some(away) = Away::new("kubelet") else {
        drop(live);
        return world.end().await;
    };
    let traffic = Traffic::start(world.asker());
    // The API has the deletion, but no kubelet ends the pod.
    let deleted = if live.session.server == "games-0" {
        "games-1"
    } else {
        "games-0"
    };
    let pods: Api<Pod> = world.api();
    pods.delete(deleted, &DeleteParams::default())
        .await
        .unwrap();
    until("the deletion waits for the kubelet", LIMIT, async || {
        let pod = pods.get(deleted).await.map_err(|error| error.to_string())?;
        expect(pod.metadata.deletion_timestamp, Option::is_some)
    })
    .await;
    traffic.goes_on(50).await;
    let report = traffic.end().await;
    live.check();
    drop(away);
    let started = Instant::now();
    assert!(report.failures.is_empty());
    until("the deleted pod is replaced", LIMIT, async || {
        let pods = world.pods("processing-server").await;
        expect(pods.into_keys().collect::<Vec<_>>(), |names| {
            names.len() == 2
        })
    })
    .await;
    world.ready("games").await;
    print_time(
        "kubelet back: the pod deleted meanwhile is replaced",
        started.elapsed(),
    );
    live.check();
    drop(live);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn traffic_goes_on_without_the_api_server() {
    let world = World::with_pool("e2e-api-server", 2).await;
    let mut live = Live::new(&world.asker()).await;
    let Some(away) = Away::new("kube-apiserver") else {
        drop(live);
        return world.end().await;
    };
    let traffic = Traffic::start(world.asker());
    // A lease lasts for some 15 s: the leading controller has to stop.
    let controllers: Api<Pod> = Api::namespaced(world.client.clone(), RELEASE);
    let gone = Instant::now();
    while gone.elapsed() < Duration::from_secs(25) {
        assert!(controllers.list(&ListParams::default()).await.is_err());
        live.check();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let report = traffic.end().await;
    drop(away);
    let started = Instant::now();
    assert!(report.sessions > 0 && report.failures.is_empty());
    until("the API server answers", LIMIT, async || {
        run("kubectl", &["get", "--raw=/readyz"], "")
    })
    .await;
    print_time("API server back: it answers", started.elapsed());
    let api: Api<portpool::pool::ProcessingPool> = world.api();
    let patch = Patch::Merge(json!({ "spec": { "replicas": 3 } }));
    until("the pool can be scaled", LIMIT, async || {
        let scaled = api
            .patch_scale("games", &PatchParams::default(), &patch)
            .await;
        scaled.map_err(|error| error.to_string())
    })
    .await;
    until("the third server's pod is made", LIMIT, async || {
        let pods = world.pods("processing-server").await;
        expect(pods.into_keys().collect::<Vec<_>>(), |names| {
            names.len() == 3
        })
    })
    .await;
    print_time(
        "API server back: the controller has scaled from 2 to 3",
        started.elapsed(),
    );
    // The scheduler and the kubelet back off to one attempt in 30 s.
    world.ready("games").await;
    print_time("API server back: pool ready", started.elapsed());
    live.check();
    drop(live);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn an_edited_or_deleted_table_is_restored() {
    let world = World::with_pool("e2e-table", 2).await;
    let mut live = Live::new(&world.asker()).await;
    let maps: Api<ConfigMap> = world.api();
    let rows = world.table("games").await.unwrap().rows;
    let is_restored = async |started: Instant, what: &str| {
        until("the table is restored", LIMIT, async || {
            let table = world.table("games").await?;
            expect(table.rows, |found| *found == rows)
        })
        .await;
        print_time(what, started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(5));
    };
    for text in ["{}", "no table at all"] {
        let patch = json!({ "data": { "table.json": text } });
        maps.patch(
            "games-port-table",
            &PatchParams::default(),
            &Patch::Merge(patch),
        )
        .await
        .unwrap();
        is_restored(Instant::now(), "edited table: restored").await;
    }
    maps.delete("games-port-table", &DeleteParams::default())
        .await
        .unwrap();
    is_restored(Instant::now(), "deleted table: restored").await;
    live.check();
    drop(live);
    Live::new(&world.asker()).await.check();
    world.end().await;
}
