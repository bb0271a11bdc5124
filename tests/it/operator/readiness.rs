//! Servers that become ready and not ready, and many changes at a time.

use std::time::{Duration, Instant};

use crate::common::SOON;
use crate::common::cluster::{Space, patch, patch_status, quick, until};
use kube::ResourceExt;
use portpool::table::Slot;
use serde_json::json;

/// How long pods flap: several tables are written meanwhile.
const FLAPPING: Duration = Duration::from_secs(6);

/// Reports that the workload of `pod` is ready, or not, as its kubelet does.
async fn report(space: &Space, pod: &str, is_ready: bool) {
    let status = if is_ready { "True" } else { "False" };
    let change = json!({ "status": {
        "conditions": [{ "type": "Ready", "status": status }],
        "containerStatuses": [{
            "name": "main", "image": "", "imageID": "", "restartCount": 0, "ready": is_ready,
        }],
    } });
    patch_status(&space.pods(), pod, change).await;
}

/// Waits until the table marks the server of `slot` as not ready, or does not;
/// returns how long that took.
async fn is_marked(space: &Space, slot: u32, not_ready: bool) -> Duration {
    until("the table says so", async || {
        let table = space.table("games").await.unwrap();
        table.row(Slot(slot)).unwrap().not_ready == not_ready
    })
    .await
}

#[tokio::test]
async fn the_table_follows_the_readiness_of_a_pod_at_once() {
    let space = Space::with_pool("readiness", quick(2)).await;
    let before = space.table("games").await.unwrap();
    assert!(before.rows.iter().all(|row| !row.not_ready));
    for is_ready in [false, true, false, true] {
        report(&space, "games-1", is_ready).await;
        let took = is_marked(&space, 1, !is_ready).await;
        println!("ready: {is_ready}: in the table after {took:?}");
        until("the status says so", async || {
            let status = space.pool("games").await.status.unwrap();
            status.ready_replicas == 1 + i32::from(is_ready)
        })
        .await;
    }
    let after = space.table("games").await.unwrap();
    assert_eq!(after.rows, before.rows, "its ports and pod are the same");
}

#[tokio::test]
async fn a_pod_that_was_never_ready_is_marked_until_it_is() {
    let space = Space::new("never-ready").await;
    let mut spec = quick(1);
    // The stand-in for the kubelet leaves it alone.
    spec["template"]["metadata"] = json!({ "annotations": { "test/hands-off": "" } });
    space.apply("games", spec).await.unwrap();
    until("there is a pod", async || {
        let table = space.table("games").await;
        table.is_some_and(|table| table.rows[0].server_uid.is_some())
    })
    .await;
    let row = space.table("games").await.unwrap().rows.remove(0);
    assert!(row.not_ready, "{row:?}");
    report(&space, "games-0", true).await;
    is_marked(&space, 0, false).await;
}

#[tokio::test]
async fn many_pods_that_flap_cost_a_table_a_second_and_delay_no_other() {
    let space = Space::with_pool("flapping", quick(6)).await;
    let before = space.table("games").await.unwrap().generation;
    let started = Instant::now();
    let mut generation = before;
    let mut other = None;
    for round in 0u32.. {
        for pod in ["games-0", "games-1", "games-2", "games-3"] {
            report(&space, pod, round % 2 == 1).await;
        }
        if round == 4 {
            report(&space, "games-5", false).await;
            other = Some(Instant::now());
        }
        let table = space.table("games").await.unwrap();
        generation = table.generation;
        let Some(reported) = other else {
            continue;
        };
        let is_marked = table.row(Slot(5)).unwrap().not_ready;
        assert!(
            is_marked || reported.elapsed() < 2 * SOON,
            "delayed by the others for {round} rounds"
        );
        if is_marked && started.elapsed() > FLAPPING {
            println!("{round} rounds");
            break;
        }
    }
    let seconds = started.elapsed().as_secs();
    let tables = generation - before;
    println!("{tables} tables in {seconds} s");
    assert!(tables <= seconds + 2, "{tables} in {seconds} s");
    for pod in 0..6 {
        report(&space, &format!("games-{pod}"), true).await;
    }
    until("all are ready", async || {
        let table = space.table("games").await.unwrap();
        table.rows.iter().all(|row| !row.not_ready)
    })
    .await;
}

#[tokio::test]
async fn changes_that_never_pause_do_not_keep_a_pool_from_being_reconciled() {
    let space = Space::with_pool("no-pause", quick(2)).await;
    let pods = space.pods();
    let changing = tokio::spawn(async move {
        for number in 0u64.. {
            let change = json!({ "metadata": { "labels": { "test/number": number.to_string() } } });
            patch(&pods, "games-0", change).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    until("a few changes", async || {
        let pod = space.pods().get("games-0").await.unwrap();
        let number = pod.labels().get("test/number");
        number.is_some_and(|number| number.parse::<u64>().unwrap() > 10)
    })
    .await;
    space.scale("games", 3).await.unwrap();
    let took = until("three", async || space.servers("games").await.len() == 3).await;
    println!("three after {took:?}");
    assert!(!changing.is_finished(), "{:?}", changing.await);
    changing.abort();
}
