//! The controller when the API server, the way to it, or the controller itself
//! fails. The oracle of every case: the desired state comes in the end and
//! stays, and no more pods were made or deleted than without the fault.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::cluster::{ApiServer, KINDS, Space, quick, until};
use common::proxy::{Call, Fault, Proxy};
use futures::StreamExt;
use http::Method;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

/// A namespace whose controller goes through a proxy.
struct Faulty {
    space: Space,
    proxy: Arc<Proxy>,
}

impl Faulty {
    async fn new(name: &str) -> Self {
        let server = ApiServer::shared().await;
        let space = Space::without_controller(server, name).await;
        let proxy = Proxy::start(space.client.clone()).await;
        Self { space, proxy }
    }

    fn start(&mut self) {
        // Killed before its successor starts.
        self.space.controller.take();
        let kubeconfig = self.proxy.kubeconfig.clone();
        let more = ["--resync-seconds=2".to_owned()];
        let controller = self
            .space
            .controller_with(&kubeconfig, self.space.admin_port, &more);
        self.space.controller = Some(controller);
    }

    fn counts(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (
            count(&self.proxy.pods_created),
            count(&self.proxy.pods_deleted),
        )
    }

    /// Creates two servers, grows to three, shrinks to one.
    async fn scenario(&self) {
        for replicas in [2, 3, 1] {
            self.space.apply("games", quick(replicas)).await.unwrap();
            self.space.ready("games").await;
        }
    }

    /// The whole scenario under a fault.
    async fn survives(name: &str, rule: impl Fn(&Call) -> Fault + Send + Sync + 'static) {
        let mut faulty = Self::new(name).await;
        faulty.proxy.rule(rule);
        faulty.start();
        faulty.scenario().await;
        faulty.check().await;
    }

    /// What must hold after [`Self::scenario`], and go on to hold.
    async fn check(&self) {
        for _ in 0..2 {
            assert_eq!(self.space.servers("games").await.len(), 1);
            let table = self.space.table("games").await.unwrap();
            assert_eq!(table.rows.len(), 1);
            assert!(self.space.is_ready("games").await);
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
        assert_eq!(self.counts(), (3, 2), "pods created and deleted");
    }
}

fn is_pod(call: &Call, method: &Method) -> bool {
    call.method == *method && call.write.is_some() && call.path.contains("/pods")
}

#[tokio::test]
async fn a_crash_after_any_write_changes_nothing_in_the_end() {
    let mut clean = Faulty::new("crash-clean").await;
    clean.start();
    clean.scenario().await;
    clean.check().await;
    let writes = clean.proxy.writes.load(Ordering::Relaxed);
    assert!((15..60).contains(&writes), "{writes} writes");
    drop(clean);
    futures::stream::iter(1..=writes)
        .for_each_concurrent(4, |fatal| crash_after(fatal, writes))
        .await;
}

async fn crash_after(fatal: u64, writes: u64) {
    let mut faulty = Faulty::new(&format!("crash-{fatal}")).await;
    faulty.proxy.rule(move |call| match call.write {
        Some(write) if write == fatal => Fault::Hold,
        _ => Fault::Pass,
    });
    faulty.start();
    let has_crashed = tokio::select! {
        () = faulty.scenario() => false,
        () = faulty.proxy.held.notified() => true,
    };
    // Status writes come together now and then, so that there are fewer.
    assert!(
        has_crashed || fatal + 8 > writes,
        "write {fatal} was not reached"
    );
    if has_crashed {
        // Goes on from what was wanted last.
        faulty.start();
        let wanted = faulty.space.pool("games").await.spec.replicas;
        for replicas in [2, 3, 1]
            .into_iter()
            .skip_while(|replicas| *replicas != wanted)
        {
            faulty
                .space
                .apply("games", quick(u32::try_from(replicas).unwrap()))
                .await
                .unwrap();
            faulty.space.ready("games").await;
        }
    }
    faulty.check().await;
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

#[tokio::test]
async fn refusals_by_a_busy_api_server_are_sat_out() {
    let mut faulty = Faulty::new("busy").await;
    faulty.start();
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty.space.ready("games").await;
    faulty.proxy.rule(|call| match call.number % 2 {
        0 => Fault::Answer(429, "TooManyRequests"),
        _ => Fault::Answer(500, "InternalError"),
    });
    faulty.space.apply("games", quick(3)).await.unwrap();
    let before = faulty.proxy.requests.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let requests = faulty.proxy.requests.load(Ordering::Relaxed) - before;
    assert!(requests < 300, "{requests} requests in 10 s of refusals");
    faulty.proxy.rule(|_| Fault::Pass);
    let took = faulty.space.ready("games").await;
    assert!(took < Duration::from_secs(30), "{took:?}");
    faulty.space.apply("games", quick(1)).await.unwrap();
    faulty.space.ready("games").await;
    faulty.check().await;
}

#[tokio::test]
async fn watches_that_break_and_expire_are_taken_up_again() {
    let mut faulty = Faulty::new("watches").await;
    faulty.start();
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty.space.ready("games").await;
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
    faulty.space.apply("games", quick(1)).await.unwrap();
    faulty.space.ready("games").await;
    faulty.check().await;
}

#[tokio::test]
async fn events_that_come_late_make_nothing_twice() {
    Faulty::survives("late-events", |call| {
        match call.path.contains("/pods") || call.path.contains("/configmaps") {
            true if call.is_watch => Fault::DelayEvents(Duration::from_millis(700)),
            _ => Fault::Pass,
        }
    })
    .await;
}

#[tokio::test]
async fn a_deletion_that_no_event_tells_is_found() {
    let mut faulty = Faulty::new("lost-events").await;
    faulty
        .proxy
        .rule(|call| match call.is_watch && call.path.contains("/pods") {
            true => Fault::DropEvents("DELETED"),
            false => Fault::Pass,
        });
    faulty.start();
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty.space.ready("games").await;
    let former = faulty.space.servers("games").await;
    faulty
        .space
        .pods()
        .delete("games-0", &DeleteParams::default())
        .await
        .unwrap();
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
    let mut faulty = Faulty::new("old-lists").await;
    faulty.start();
    faulty.space.apply("games", quick(1)).await.unwrap();
    faulty.space.ready("games").await;
    // The lists that a new controller reads now are what it gets again later.
    faulty.start();
    tokio::time::sleep(Duration::from_secs(2)).await;
    faulty.space.apply("games", quick(4)).await.unwrap();
    faulty.space.ready("games").await;
    let (servers, table) = (
        faulty.space.servers("games").await,
        faulty.space.table("games").await,
    );
    let lists = AtomicU64::new(0);
    faulty.proxy.rule(move |call| {
        let is_list = call.method == Method::GET && !call.is_watch && !call.path.ends_with("games");
        match is_list && lists.fetch_add(1, Ordering::Relaxed) < 12 {
            true => Fault::Stale,
            false => Fault::Pass,
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
async fn children_of_a_former_pool_of_the_name_are_not_touched() {
    let mut faulty = Faulty::new("former").await;
    faulty.start();
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty.space.ready("games").await;
    let former = faulty.space.servers("games").await;
    // Nobody collects garbage here: the former pool's objects stay.
    faulty
        .space
        .pools()
        .delete("games", &DeleteParams::default())
        .await
        .unwrap();
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty
        .space
        .degraded("games", "belongs to somebody else")
        .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(faulty.space.servers("games").await, former);
    for (group, kind, plural) in KINDS {
        let api = faulty.space.objects(group, kind, plural);
        for object in api
            .list(&ListParams::default().labels("portpool.dev/pool=games"))
            .await
            .unwrap()
        {
            api.delete(&object.name_any(), &DeleteParams::default())
                .await
                .unwrap();
        }
    }
    faulty.space.ready("games").await;
}

#[tokio::test]
async fn a_relabelled_or_orphaned_pod_is_named_and_left_alone() {
    let mut faulty = Faulty::new("relabelled").await;
    faulty.start();
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty.space.ready("games").await;
    let before = faulty.space.servers("games").await;
    let label = |value: Value| json!({ "metadata": { "labels": { "app.kubernetes.io/managed-by": value } } });
    let merge = |patch: Value| Patch::Merge(patch);
    let parameters = PatchParams::default();
    faulty
        .space
        .pods()
        .patch("games-0", &parameters, &merge(label("me".into())))
        .await
        .unwrap();
    faulty.space.degraded("games", "has lost the labels").await;
    faulty
        .space
        .pods()
        .patch("games-0", &parameters, &merge(label("portpool".into())))
        .await
        .unwrap();
    faulty.space.ready("games").await;
    assert_eq!(faulty.space.servers("games").await, before);
    let orphan = json!({ "metadata": { "ownerReferences": null } });
    faulty
        .space
        .pods()
        .patch("games-1", &parameters, &merge(orphan))
        .await
        .unwrap();
    faulty
        .space
        .degraded(
            "games",
            "Pod relabelled/games-1 exists and belongs to somebody else",
        )
        .await;
    assert_eq!(faulty.space.servers("games").await, before);
    faulty
        .space
        .pods()
        .delete("games-1", &DeleteParams::default())
        .await
        .unwrap();
    faulty.space.ready("games").await;
}

#[tokio::test]
async fn pods_that_are_forbidden_are_told_and_come_when_they_are_allowed() {
    let mut faulty = Faulty::new("forbidden").await;
    faulty.start();
    let namespaces: kube::Api<k8s_openapi::api::core::v1::Namespace> =
        kube::Api::all(faulty.space.client.clone());
    let enforce = async |level: Value| {
        let patch =
            json!({ "metadata": { "labels": { "pod-security.kubernetes.io/enforce": level } } });
        namespaces
            .patch("forbidden", &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap();
    };
    enforce("restricted".into()).await;
    // The policy's own watch must have seen it.
    tokio::time::sleep(Duration::from_secs(1)).await;
    faulty.space.apply("games", quick(2)).await.unwrap();
    faulty.space.degraded("games", "violates PodSecurity").await;
    let before = faulty.proxy.requests.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let requests = faulty.proxy.requests.load(Ordering::Relaxed) - before;
    assert!(requests < 40, "{requests} requests in 5 s");
    enforce(Value::Null).await;
    let took = faulty.space.ready("games").await;
    assert!(took < Duration::from_secs(30), "{took:?}");
}
