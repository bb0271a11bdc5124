//! Pods that fail, and what the pool reports of them.

use std::time::{Duration, Instant};

use crate::common::cluster::{delete, quick, until, with_image};
use crate::common::faulty::Faulty;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::ListParams;

/// The second pod of a slot comes at once, the third after 10 s, the fourth after
/// 20 s more.
const MINUTE_OF_FAILURES: Duration = Duration::from_secs(60);

fn created(faulty: &Faulty) -> u64 {
    faulty.counts().0
}

#[tokio::test]
async fn pods_that_fail_at_once_are_created_less_and_less_often_and_the_pool_says_why() {
    let mut faulty = Faulty::with_pool("failing", quick(2)).await;
    let before = created(&faulty);
    let rejected = with_image(quick(2), "rejected:1");
    faulty.space.apply("games", rejected).await.unwrap();
    let started = Instant::now();
    let words = "times in a row: NodePorts: Pod was rejected: node(s) didn't have free ports; it is created again at";
    faulty.space.degraded("games", words).await;
    let (_, reason, _) = faulty.space.condition("games", "Degraded").await;
    assert_eq!(reason, "PodsFailing");
    // Another controller knows of the failures.
    faulty.start();
    let mut samples = 0;
    while started.elapsed() < MINUTE_OF_FAILURES {
        let (status, reason, message) = faulty.space.condition("games", "Degraded").await;
        assert_eq!(status, "True", "{samples}: {message}");
        assert_eq!(reason, "PodsFailing", "{samples}: {message}");
        samples += 1;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    // Half of the pool is replaced: one slot.
    let made = created(&faulty) - before;
    assert!((3..=4).contains(&made), "{made} pods in a minute");
    let events: Api<Event> = Api::namespaced(faulty.space.client.clone(), "failing");
    let events = events.list(&ListParams::default()).await.unwrap().items;
    let failing = events.iter().filter(|event| {
        let reason = event.reason.as_deref();
        reason == Some("PodsFailing")
    });
    assert_eq!(failing.count(), 1, "one event for all of them");
    // What is corrected is tried at once.
    let took = faulty.space.make_ready("games", quick(2)).await;
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[tokio::test]
async fn a_failed_pod_that_someone_deletes_is_tried_again_at_once() {
    let mut faulty = Faulty::new("failing-retry").await;
    faulty.start();
    faulty
        .space
        .apply("games", with_image(quick(1), "rejected:1"))
        .await
        .unwrap();
    for failures in [2, 3, 4] {
        let words = format!("pod games-0 failed {failures} times in a row: NodePorts");
        faulty.space.degraded("games", &words).await;
        let (started, made) = (Instant::now(), created(&faulty));
        assert_eq!(made, failures);
        delete(&faulty.space.pods(), "games-0").await;
        until("it is created again", async || created(&faulty) > made).await;
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}
