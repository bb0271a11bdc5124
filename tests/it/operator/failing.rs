//! Pods that fail, and what the pool reports of them.

use std::time::{Duration, Instant};

use crate::common::cluster::{Space, delete, patch, patch_status, quick, until, with_image};
use crate::common::faulty::Faulty;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::LimitRange;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde_json::json;

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
    // What is corrected is tried at once: the next pause would be of 40 s.
    let took = faulty.space.make_ready("games", quick(2)).await;
    assert!(took < Duration::from_secs(20), "{took:?}");
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
    // Seconds for which each failure makes the slot wait. The first pause is so short
    // that it may be over before a slow machine has deleted the pod.
    for (failures, pause) in [(2, None), (3, Some(20)), (4, Some(40))] {
        let words = format!("pod games-0 failed {failures} times in a row: NodePorts");
        faulty.space.degraded("games", &words).await;
        let (started, made) = (Instant::now(), created(&faulty));
        assert!(made >= failures, "{made} of {failures}");
        delete(&faulty.space.pods(), "games-0").await;
        until("it is created again", async || created(&faulty) > made).await;
        let (took, pause) = (started.elapsed(), pause.map(Duration::from_secs));
        assert!(pause.is_none_or(|pause| took < pause / 2), "{took:?}");
    }
}

/// As the kubelet reports a container that crashes again and again.
#[tokio::test]
async fn a_crash_loop_is_reported_steadily_with_its_cause() {
    let space = Space::new("crash-loop").await;
    let mut spec = quick(1);
    // The stand-in for the kubelet leaves it alone.
    spec["template"]["metadata"] = json!({ "annotations": { "test/hands-off": "" } });
    space.apply("games", spec).await.unwrap();
    until("there is a pod", async || {
        space.servers("games").await.contains_key("games-0")
    })
    .await;
    let ended = || {
        let now = Timestamp::now();
        json!({ "terminated": {
            "exitCode": 128, "reason": "StartError", "message": "exec: \"gamed\": not found",
            "startedAt": (now - Duration::from_secs(2)).to_string(), "finishedAt": now.to_string(),
        } })
    };
    let mut reasons = Vec::new();
    for restarts in 2..6 {
        let runs = json!({ "running": { "startedAt": Timestamp::now().to_string() } });
        let waits =
            json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 10s" } });
        for (state, is_ready) in [(waits, false), (runs, true), (ended(), false)] {
            let change = json!({ "status": {
                "phase": "Running",
                "conditions": [{ "type": "Ready", "status": if is_ready { "True" } else { "False" } }],
                "containerStatuses": [{
                    "name": "main", "image": "", "imageID": "", "restartCount": restarts,
                    "ready": is_ready, "state": state, "lastState": ended(),
                }],
            } });
            patch_status(&space.pods(), "games-0", change).await;
            let words = "container main of pod games-0: CrashLoopBackOff: it could not be started (StartError): exec: \"gamed\": not found";
            space.degraded("games", words).await;
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(200)).await;
                let (status, reason, _) = space.condition("games", "Degraded").await;
                reasons.push(format!("{status} {reason}"));
            }
        }
    }
    assert!(
        reasons.iter().all(|it| it == "True CrashLoopBackOff"),
        "{reasons:?}"
    );
}

/// The Deployment controller reports what its ReplicaSet could not do.
#[tokio::test]
async fn pods_that_a_limit_refuses_are_reported_in_the_words_of_the_api_server() {
    let space = Space::with_pool("limits", quick(1)).await;
    let ranges: Api<LimitRange> = Api::namespaced(space.client.clone(), "limits");
    let range = json!({
        "metadata": { "name": "small" },
        "spec": { "limits": [{ "type": "Container", "max": { "memory": "100Mi" } }] },
    });
    let range = serde_json::from_value(range).unwrap();
    ranges.create(&PostParams::default(), &range).await.unwrap();
    let deployments = space.objects("apps", "Deployment", "deployments");
    let deployment = deployments.get("games-connection-server").await.unwrap();
    let mut pod = json!({
        "metadata": { "name": "x" }, "spec": deployment.data["spec"]["template"]["spec"],
    });
    pod["metadata"]["labels"] = deployment.data["spec"]["template"]["metadata"]["labels"].clone();
    let pod = serde_json::from_value(pod).unwrap();
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let refused = space.pods().create(&dry, &pod).await.unwrap_err();
    let kube::Error::Api(refused) = refused else {
        panic!("{refused}");
    };
    let words = "maximum memory usage per Container is 100Mi";
    assert!(refused.message.contains(words), "{}", refused.message);
    let failure = |status: &str| {
        json!({ "status": { "conditions": [{
            "type": "ReplicaFailure", "status": status, "reason": "FailedCreate",
            "message": refused.message,
        }] } })
    };
    patch_status(&deployments, "games-connection-server", failure("True")).await;
    space.degraded("games", words).await;
    let (_, reason, message) = space.condition("games", "Degraded").await;
    assert_eq!(reason, "ConnectionServerRefused");
    let begin = "the pods of Deployment games-connection-server cannot be created: ";
    assert!(message.starts_with(&format!("{begin}{words}")), "{message}");
    patch_status(&deployments, "games-connection-server", failure("False")).await;
    space.ready("games").await;
    // The same for a processing server.
    space.apply("games", quick(2)).await.unwrap();
    space.degraded("games", words).await;
    let (_, reason, message) = space.condition("games", "Degraded").await;
    assert_eq!(reason, "Forbidden");
    assert!(
        message.starts_with("failed to create Pod limits/games-1: pods"),
        "{message}"
    );
    delete(&ranges, "small").await;
    space.ready("games").await;
}

#[tokio::test]
async fn why_a_pod_is_not_ready_is_in_the_sentence() {
    let space = Space::with_pool("why", quick(2)).await;
    let says = async |words: &str| {
        until(words, async || {
            let status = space.pool("games").await.status.unwrap();
            status.message.contains(words)
        })
        .await;
    };
    let report = async |status: serde_json::Value| {
        patch_status(&space.pods(), "games-1", json!({ "status": status })).await;
    };
    let unready = json!([{ "type": "Ready", "status": "False" }]);
    let container = |state: serde_json::Value| {
        json!([{
            "name": "main", "image": "", "imageID": "", "restartCount": 0, "ready": false,
            "state": state,
        }])
    };
    let creating = json!({ "waiting": { "reason": "ContainerCreating" } });
    report(json!({ "conditions": unready, "containerStatuses": container(creating) })).await;
    says("1 of 2 processing servers are ready; pod games-1 is not: container main waits, ContainerCreating").await;
    let started = Timestamp::now().to_string();
    let running = json!({ "running": { "startedAt": started } });
    report(json!({ "containerStatuses": container(running) })).await;
    says("pod games-1 is not: container main is not ready").await;
    // A finalizer keeps it when it is deleted.
    let kept = json!({ "metadata": { "finalizers": ["example.org/keep"] } });
    patch(&space.pods(), "games-1", kept).await;
    delete(&space.pods(), "games-1").await;
    says("pod games-1 is not: it is being deleted").await;
    says("finalizer example.org/keep keeps it").await;
    let free = json!({ "metadata": { "finalizers": null } });
    patch(&space.pods(), "games-1", free).await;
    space.ready("games").await;
}

#[tokio::test]
async fn what_a_deleted_pool_left_is_waited_for_and_not_called_a_strangers() {
    let space = Space::new("predecessor").await;
    let left = json!({
        "metadata": { "name": "games-0", "ownerReferences": [{
            "apiVersion": "portpool.dev/v1alpha1", "kind": "ProcessingPool", "name": "games",
            "uid": "6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10", "controller": true,
        }] },
        "spec": { "containers": [{ "name": "x", "image": "x" }] },
    });
    let left = serde_json::from_value(left).unwrap();
    space
        .pods()
        .create(&PostParams::default(), &left)
        .await
        .unwrap();
    space.apply("games", quick(1)).await.unwrap();
    let words = "Pod predecessor/games-0 still exists of a deleted pool of the same name";
    space.degraded("games", words).await;
    let (_, reason, _) = space.condition("games", "Degraded").await;
    assert_eq!(reason, "Failing", "it passes by itself");
    delete(&space.pods(), "games-0").await;
    space.ready("games").await;
}
