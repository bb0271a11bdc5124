//! The controller when the API server, the way to it, or the controller itself
//! fails. Every case asserts that the pool reaches the desired state and keeps
//! it, and that the controller creates and deletes no more pods than without
//! the fault.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::cluster::{KINDS, delete, patch, patch_status, quick, until, with_image};
use crate::common::faulty::Faulty;
use crate::common::proxy::{Call, Fault};
use futures::StreamExt;
use http::Method;
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

fn is_pod(call: &Call, method: &Method) -> bool {
    call.method == *method && call.write.is_some() && call.path.contains("/pods")
}

/// The writes of the scenario when nothing fails.
async fn clean_writes(name: &str) -> u64 {
    let mut clean = Faulty::new(name).await;
    clean.start();
    clean.scenario().await;
    clean.check().await;
    let writes = clean.proxy.writes.load(Ordering::Relaxed);
    assert!((15..60).contains(&writes), "{writes} writes");
    writes
}

#[tokio::test]
async fn a_crash_after_any_write_changes_nothing_in_the_end() {
    let writes = clean_writes("crash-clean").await;
    futures::stream::iter(1..=writes)
        .for_each_concurrent(4, async |fatal| {
            let name = format!("crash-{fatal}");
            crash_at(&name, fatal, writes, Fault::Hold)
                .await
                .check()
                .await;
        })
        .await;
}

/// A frozen leader or the network may still deliver a write after another
/// controller has taken over. Here, each write arrives when all is done.
#[tokio::test]
async fn a_write_that_comes_late_changes_nothing_in_the_end() {
    let writes = clean_writes("late-clean").await;
    futures::stream::iter(1..=writes)
        .for_each_concurrent(4, async |fatal| {
            let name = format!("late-{fatal}");
            let faulty = crash_at(&name, fatal, writes, Fault::Late).await;
            let before = faulty.space.table("games").await.unwrap();
            let (created, _) = faulty.counts();
            if faulty.proxy.is_holding() {
                faulty.proxy.release().await;
            }
            // The controller deletes a server too many.
            let settled = async || {
                let is_one = faulty.space.servers("games").await.len() == 1;
                is_one && faulty.space.is_ready("games").await
            };
            until("all is as it was", settled).await;
            tokio::time::sleep(Duration::from_millis(700)).await;
            until("all stays as it was", settled).await;
            let after = faulty.space.table("games").await.unwrap();
            assert_eq!(after.rows, before.rows, "write {fatal}");
            assert!(after.generation >= before.generation, "write {fatal}");
            let (now, deleted) = faulty.counts();
            assert!(now <= created + 1, "write {fatal}: {now} pods created");
            assert_eq!(now - deleted, 1, "write {fatal}");
        })
        .await;
}

/// The scenario with a controller that is killed when its write `fatal` has
/// the fault, and with its successor.
async fn crash_at(name: &str, fatal: u64, writes: u64, fault: Fault) -> Faulty {
    let mut faulty = Faulty::new(name).await;
    faulty.proxy.rule(move |call| match call.write {
        Some(write) if write == fatal => fault.clone(),
        _ => Fault::Pass,
    });
    faulty.start();
    let has_crashed = tokio::select! {
        () = faulty.scenario() => false,
        () = faulty.proxy.held.notified() => true,
    };
    // Some status writes are merged now and then, so that there are fewer.
    assert!(
        has_crashed || fatal + 8 > writes,
        "write {fatal} was not reached"
    );
    if has_crashed {
        // The successor continues from the replicas that were set last.
        faulty.start();
        let wanted = faulty.space.pool("games").await.spec.replicas;
        let steps = [2, 3, 1].into_iter();
        for replicas in steps.skip_while(|replicas| *replicas != wanted) {
            let spec = quick(u32::try_from(replicas).unwrap());
            faulty.space.make_ready("games", spec).await;
        }
    }
    faulty
}

#[tokio::test]
async fn a_lost_answer_makes_no_second_pod() {
    let lost = AtomicU64::new(0);
    Faulty::survives("lost-answers", move |call| {
        match is_pod(call, &Method::POST) || is_pod(call, &Method::DELETE) {
            true if lost.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) => Fault::LoseReply,
            _ => Fault::Pass,
        }
    })
    .await;
}

#[tokio::test]
async fn conflicts_on_every_second_write_are_worked_through() {
    Faulty::survives("conflicts", |call| match call.write {
        Some(write) if write % 2 == 0 => Fault::Answer(409, "Conflict"),
        _ => Fault::Pass,
    })
    .await;
}

/// Long enough for every backoff to reach its maximum several times.
const BUSY: Duration = Duration::from_secs(45);

#[tokio::test]
async fn the_controller_waits_out_refusals_by_a_busy_api_server() {
    let faulty = Faulty::with_pool("busy", quick(2)).await;
    faulty.proxy.rule(|call| match call.number % 2 {
        0 => Fault::Answer(429, "TooManyRequests"),
        _ => Fault::Answer(500, "InternalError"),
    });
    faulty.space.apply("games", quick(3)).await.unwrap();
    let requests = faulty.proxy.requests_within(BUSY).await;
    assert!(
        requests < 300,
        "{requests} requests in {BUSY:?} of refusals"
    );
    faulty.proxy.rule(|_| Fault::Pass);
    let took = faulty.space.ready("games").await;
    assert!(took < Duration::from_secs(30), "{took:?}");
    faulty.space.make_ready("games", quick(1)).await;
    faulty.check().await;
}

#[tokio::test]
async fn a_lasting_error_is_reported_and_retried_less_and_less_often() {
    let faulty = Faulty::with_pool("lasting", quick(2)).await;
    // As with a webhook that does not answer.
    faulty.proxy.rule(|call| match is_pod(call, &Method::POST) {
        true => Fault::Answer(500, "InternalError"),
        false => Fault::Pass,
    });
    faulty.space.apply("games", quick(60)).await.unwrap();
    let words = "failed to create Pod lasting/games-2: InternalError";
    faulty.space.degraded("games", words).await;
    assert!(!faulty.space.is_ready("games").await);
    let requests = faulty.proxy.requests_within(Duration::from_secs(10)).await;
    assert!(requests < 60, "{requests} requests in 10 s");
    faulty.proxy.rule(|_| Fault::Pass);
    faulty.space.ready("games").await;
    faulty.space.make_ready("games", quick(1)).await;
    assert_eq!(faulty.counts(), (60, 59));
}

#[tokio::test]
async fn broken_and_expired_watches_are_resumed() {
    let mut faulty = Faulty::with_pool("watches", quick(2)).await;
    // Another controller, all of whose watches break from the start.
    faulty
        .proxy
        .rule(|call| match (call.is_watch, call.number % 3) {
            (true, 0) => Fault::Answer(410, "Expired"),
            (true, _) => Fault::CutWatch(1),
            _ => Fault::Pass,
        });
    faulty.start();
    let before = faulty.proxy.requests.load(Ordering::Relaxed);
    faulty.space.apply("games", quick(3)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(8)).await;
    let requests = faulty.proxy.requests.load(Ordering::Relaxed) - before;
    assert!(
        requests < 400,
        "{requests} requests in 8 s of broken watches"
    );
    faulty.proxy.rule(|_| Fault::Pass);
    faulty.space.ready("games").await;
    faulty.space.make_ready("games", quick(1)).await;
    faulty.check().await;
}

#[tokio::test]
async fn late_events_create_nothing_twice() {
    Faulty::survives("late-events", |call| {
        match call.path.contains("/pods") || call.path.contains("/configmaps") {
            true if call.is_watch => Fault::DelayEvents(Duration::from_millis(700)),
            _ => Fault::Pass,
        }
    })
    .await;
}

#[tokio::test]
async fn a_deletion_without_an_event_is_found() {
    let mut faulty = Faulty::new("lost-events").await;
    faulty
        .proxy
        .rule(|call| match call.is_watch && call.path.contains("/pods") {
            true => Fault::DropEvents("DELETED"),
            false => Fault::Pass,
        });
    faulty.start();
    faulty.space.make_ready("games", quick(2)).await;
    let former = faulty.space.servers("games").await;
    delete(&faulty.space.pods(), "games-0").await;
    until("the pod is replaced", async || {
        let now = faulty.space.servers("games").await;
        now.get("games-0")
            .is_some_and(|uid| *uid != former["games-0"])
    })
    .await;
    faulty.space.ready("games").await;
    assert_eq!(faulty.counts(), (3, 0));
}

#[tokio::test]
async fn old_lists_after_a_restart_delete_nothing() {
    let mut faulty = Faulty::with_pool("old-lists", quick(1)).await;
    // The proxy repeats the lists that this controller reads to a later one.
    faulty.start();
    tokio::time::sleep(Duration::from_secs(2)).await;
    faulty.space.make_ready("games", quick(4)).await;
    let (servers, table) = (
        faulty.space.servers("games").await,
        faulty.space.table("games").await,
    );
    // Its caches begin with these lists: pools and the objects that pools own.
    // Live reads come from a quorum, which is never stale.
    let lists = AtomicU64::new(0);
    let caches = u64::try_from(KINDS.len()).unwrap() + 1;
    faulty.proxy.rule(move |call| {
        let is_list = call.method == Method::GET && !call.is_watch && !call.path.ends_with("games");
        if is_list && lists.fetch_add(1, Ordering::Relaxed) < caches {
            Fault::Stale
        } else if call.is_watch && call.path.ends_with("/pods") {
            // What has happened since is shown slowly, one event after another.
            Fault::DelayEvents(Duration::from_millis(200))
        } else {
            Fault::Pass
        }
    });
    let counts = faulty.counts();
    faulty.start();
    tokio::time::sleep(Duration::from_secs(4)).await;
    faulty.space.ready("games").await;
    assert_eq!(faulty.space.servers("games").await, servers);
    assert_eq!(faulty.space.table("games").await, table);
    assert_eq!(faulty.counts(), counts);
}

#[tokio::test]
async fn a_stale_deletion_of_a_former_pool_touches_nothing_of_its_successor() {
    let mut faulty = Faulty::new("stale-deletion").await;
    faulty.space.apply("games", quick(2)).await.unwrap();
    let finalizers = |names: Value| json!({ "metadata": { "finalizers": names } });
    let pools = faulty.space.pools();
    patch(&pools, "games", finalizers(json!(["test/hold"]))).await;
    delete(&pools, "games").await;
    // This controller's list has the pool being deleted. The proxy repeats it
    // later.
    faulty.start();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(faulty.space.servers("games").await.is_empty());
    patch(&pools, "games", finalizers(Value::Null)).await;
    faulty.space.make_ready("games", quick(2)).await;
    let (servers, table, counts) = (
        faulty.space.servers("games").await,
        faulty.space.table("games").await,
        faulty.counts(),
    );
    let lists = AtomicU64::new(0);
    faulty.proxy.rule(move |call| {
        let is_list = call.path.ends_with("/processingpools") && !call.is_watch;
        match is_list && lists.fetch_add(1, Ordering::Relaxed) == 0 {
            true => Fault::Stale,
            false => Fault::Pass,
        }
    });
    faulty.start();
    tokio::time::sleep(Duration::from_secs(3)).await;
    faulty.space.ready("games").await;
    assert_eq!(faulty.space.servers("games").await, servers);
    assert_eq!(faulty.space.table("games").await, table);
    assert_eq!(faulty.counts(), counts);
    faulty.space.make_ready("games", quick(3)).await;
}

#[tokio::test]
async fn children_of_a_former_pool_of_the_name_are_not_touched() {
    let faulty = Faulty::with_pool("former", quick(2)).await;
    let former = faulty.space.servers("games").await;
    // No garbage collector runs here: the former pool's objects stay.
    delete(&faulty.space.pools(), "games").await;
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty
        .space
        .degraded("games", "still exists of a deleted pool of the same name")
        .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(faulty.space.servers("games").await, former);
    for (group, kind, plural) in KINDS {
        let api = faulty.space.objects(group, kind, plural);
        let of_pool = ListParams::default().labels("portpool.dev/pool=games");
        for object in api.list(&of_pool).await.unwrap() {
            delete(&api, &object.name_any()).await;
        }
    }
    faulty.space.ready("games").await;
}

#[tokio::test]
async fn a_relabelled_or_orphaned_pod_is_named_and_left_alone() {
    let faulty = Faulty::with_pool("relabelled", quick(2)).await;
    let before = faulty.space.servers("games").await;
    let pods = faulty.space.pods();
    let label = async |name: &str, value: &str| {
        let change = json!({ "metadata": { "labels": { name: value } } });
        patch(&pods, "games-0", change).await;
    };
    // The controller finds pods by these labels; the slot's is only for readers.
    for (name, right) in [
        ("app.kubernetes.io/managed-by", "portpool"),
        ("portpool.dev/pool", "games"),
        ("portpool.dev/component", "processing-server"),
    ] {
        label(name, "other").await;
        faulty.space.degraded("games", "has lost the labels").await;
        label(name, right).await;
        faulty.space.ready("games").await;
        assert_eq!(faulty.space.servers("games").await, before);
    }
    label("portpool.dev/slot", "1").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(faulty.space.is_ready("games").await);
    assert_eq!(faulty.space.servers("games").await, before);
    let table = faulty.space.table("games").await.unwrap();
    assert!(
        table
            .rows
            .iter()
            .all(|row| row.server_uid.as_ref() == before.get(&row.server))
    );
    let orphan = json!({ "metadata": { "ownerReferences": null } });
    patch(&pods, "games-1", orphan).await;
    let words = "Pod relabelled/games-1 exists and belongs to someone else";
    faulty.space.degraded("games", words).await;
    assert_eq!(faulty.space.servers("games").await, before);
    delete(&pods, "games-1").await;
    faulty.space.ready("games").await;
}

#[tokio::test]
async fn forbidden_pods_are_reported_and_created_once_allowed() {
    let mut faulty = Faulty::new("forbidden").await;
    faulty.start();
    let namespaces: kube::Api<k8s_openapi::api::core::v1::Namespace> =
        kube::Api::all(faulty.space.client.clone());
    let enforce = async |level: Value| {
        let labels = json!({ "pod-security.kubernetes.io/enforce": level });
        let change = json!({ "metadata": { "labels": labels } });
        patch(&namespaces, "forbidden", change).await;
    };
    enforce("restricted".into()).await;
    // The admission plugin must see the label first.
    tokio::time::sleep(Duration::from_secs(1)).await;
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty.space.degraded("games", "violates PodSecurity").await;
    let requests = faulty.proxy.requests_within(Duration::from_secs(5)).await;
    assert!(requests < 40, "{requests} requests in 5 s");
    enforce(Value::Null).await;
    let took = faulty.space.ready("games").await;
    assert!(took < Duration::from_secs(30), "{took:?}");
}

/// Writes a quota and its usage, as the quota controller would.
async fn quota(faulty: &Faulty, pods: u32) {
    let used = faulty.space.servers("games").await.len();
    let quotas = faulty.space.objects("", "ResourceQuota", "resourcequotas");
    let object = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "few" },
        "spec": { "hard": { "pods": pods.to_string() } },
    });
    let parameters = PatchParams::apply("test").force();
    quotas
        .patch("few", &parameters, &Patch::Apply(&object))
        .await
        .unwrap();
    let amounts = json!({ "status": {
        "hard": { "pods": pods.to_string() }, "used": { "pods": used.to_string() },
    } });
    patch_status(&quotas, "few", amounts).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_quota_is_reported_without_a_hot_loop_and_used_when_it_grows() {
    let mut faulty = Faulty::new("quota").await;
    faulty.start();
    quota(&faulty, 3).await;
    faulty.space.apply("games", quick(100)).await.unwrap();
    faulty.space.degraded("games", "exceeded quota: few").await;
    until("three servers fit in the quota", async || {
        faulty.space.servers("games").await.len() == 3
    })
    .await;
    let creations = || {
        let log = faulty.proxy.log.lock().unwrap();
        log.iter()
            .filter(|entry| entry.starts_with("POST") && entry.contains("/pods?"))
            .count()
    };
    let before = creations();
    let requests = faulty.proxy.requests_within(Duration::from_secs(12)).await;
    let tries = creations() - before;
    // The faulty proxy's controllers list afresh every 2 s.
    assert!(tries < 12, "{tries} tries in 12 s");
    assert!(requests < 60, "{requests} requests in 12 s");
    faulty.space.make_ready("games", quick(3)).await;
    // A full quota does not keep a new template out: an old pod goes first.
    let other = with_image(quick(3), "other:1");
    faulty.space.apply("games", other).await.unwrap();
    until("the first is gone", async || faulty.counts().1 == 1).await;
    while !faulty.space.is_ready("games").await {
        quota(&faulty, 3).await;
    }
    assert_eq!(faulty.counts(), (6, 3));
}
