//! The pool's condition and an event report a mistake, running servers continue,
//! and the pool recovers by itself when the cause is gone.

use std::time::Instant;

use k8s_openapi::api::core::v1::ResourceQuota;
use k8s_openapi::api::rbac::v1::ClusterRole;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use portpool::table::RowState;
use serde_json::json;

use crate::traffic::Live;
use crate::world::{LIMIT, RELEASE, World, echo_pool, expect, print_time, until};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn an_image_that_cannot_be_pulled_is_reported_and_can_be_corrected() {
    let world = World::with_pool("e2e-image", 2).await;
    let mut spec = echo_pool(2);
    let mut sessions = [
        Live::new(&world.asker()).await,
        Live::new(&world.asker()).await,
    ];
    let good = spec["template"]["spec"]["containers"][0]["image"].take();
    spec["template"]["spec"]["containers"][0]["image"] = "registry.invalid/nothing:1".into();
    world.apply("games", &spec).await;
    // Both servers have a session: the one that is replaced first drains.
    let (draining, _) = until("a server drains", LIMIT, async || {
        let rows = world.table("games").await?.rows;
        let draining = rows.into_iter().find(|row| row.state == RowState::Draining);
        draining.map(|row| row.server).ok_or("none".to_owned())
    })
    .await;
    for live in &mut sessions {
        live.check();
    }
    sessions.sort_by_key(|live| live.session.server != draining);
    let [ends, mut stays] = sessions;
    drop(ends);
    print_time(
        "bad image: reported",
        world.degraded("games", "registry.invalid/nothing:1").await,
    );
    stays.check();
    spec["template"]["spec"]["containers"][0]["image"] = good;
    world.apply("games", &spec).await;
    let started = Instant::now();
    world.ready("games").await;
    print_time("image corrected: ready", started.elapsed());
    stays.check();
    drop(stays);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn a_quota_is_reported_and_running_servers_continue() {
    let world = World::with_pool("e2e-quota", 2).await;
    let mut live = Live::new(&world.asker()).await;
    let quotas: Api<ResourceQuota> = world.api();
    let quota = json!({ "metadata": { "name": "few" }, "spec": { "hard": { "pods": "4" } } });
    let quota = serde_json::from_value(quota).unwrap();
    quotas.create(&PostParams::default(), &quota).await.unwrap();
    until("the quota counts", LIMIT, async || {
        let quota = quotas.get("few").await.map_err(|error| error.to_string())?;
        let used = quota.status.and_then(|status| status.used);
        expect(used, |used| {
            used.as_ref().is_some_and(|used| used.contains_key("pods"))
        })
    })
    .await;
    world.scale("games", 3).await;
    print_time(
        "quota: reported",
        world.degraded("games", "exceeded quota: few").await,
    );
    live.check();
    quotas
        .delete("few", &DeleteParams::default())
        .await
        .unwrap();
    let started = Instant::now();
    world.ready("games").await;
    print_time("quota gone: ready", started.elapsed());
    live.check();
    drop(live);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn missing_rights_are_reported() {
    let world = World::with_pool("e2e-rights", 2).await;
    let mut live = Live::new(&world.asker()).await;
    let roles: Api<ClusterRole> = Api::all(world.client.clone());
    let name = format!("{RELEASE}-controller");
    let mut role = roles.get(&name).await.unwrap();
    let rules = role.rules.clone();
    for rule in role.rules.iter_mut().flatten() {
        if rule
            .resources
            .as_ref()
            .is_some_and(|resources| resources.contains(&"pods".to_owned()))
        {
            rule.verbs.retain(|verb| verb != "create");
        }
    }
    let patch = Patch::Merge(json!({ "rules": role.rules }));
    roles
        .patch(&name, &PatchParams::default(), &patch)
        .await
        .unwrap();
    world.scale("games", 3).await;
    print_time(
        "missing right: reported",
        world.degraded("games", "is forbidden").await,
    );
    live.check();
    let patch = Patch::Merge(json!({ "rules": rules }));
    roles
        .patch(&name, &PatchParams::default(), &patch)
        .await
        .unwrap();
    let started = Instant::now();
    world.ready("games").await;
    print_time("right given: ready", started.elapsed());
    live.check();
    drop(live);
    world.end().await;
}
