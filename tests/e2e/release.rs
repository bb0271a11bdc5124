//! The release: upgraded while clients come and go, tested, and uninstalled.

use std::time::Instant;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::DeleteParams;
use portpool::pool::ProcessingPool;

use crate::traffic::{Live, Traffic};
use crate::world::{LIMIT, RELEASE, World, expect, helm, install, print_time, run, until};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn an_upgrade_replaces_everything_and_fails_no_client() {
    let world = World::with_pool("e2e-upgrade", 3).await;
    let mut live = Live::new(&world.asker()).await;
    // The traffic may give other servers as many sessions as this one has.
    world.replace_last(&live.session.server).await;
    let traffic = Traffic::start(world.asker());
    let next = format!("{}-next", env!("CARGO_PKG_VERSION"));
    let started = Instant::now();
    install(&[&format!("--set=image.tag={next}")]);
    print_time("upgrade: new controllers serve", started.elapsed());
    // The others are replaced first; the last one drains.
    let what = "all connection servers and all other servers are of the next version";
    until(what, LIMIT, async || {
        let mut pods = world.pods("processing-server").await;
        pods.remove(&live.session.server);
        pods.extend(world.pods("connection-server").await);
        let old = pods.into_iter().filter(|(_, pod)| {
            let spec = pod.spec.as_ref().unwrap();
            let agents = spec.init_containers.iter().flatten();
            let mut ours = agents.chain(&spec.containers);
            !ours.any(|container| {
                container
                    .image
                    .as_ref()
                    .is_some_and(|image| image.ends_with(&next))
            })
        });
        expect(old.map(|(name, _)| name).collect::<Vec<_>>(), Vec::is_empty)
    })
    .await;
    print_time(
        "upgrade: other servers and connection servers replaced",
        started.elapsed(),
    );
    live.check();
    drop(live);
    world.ready("games").await;
    print_time("upgrade: complete", started.elapsed());
    let report = traffic.end().await;
    assert!(
        report.sessions > 0 && report.failures.is_empty(),
        "{report:?}"
    );
    world.end().await;
}

/// Kinds and names of all objects but events. `scope` chooses those with or
/// without a namespace, and `more` selects among them.
fn names(scope: &str, more: &[&str]) -> Vec<String> {
    let kinds = ["api-resources", "--verbs=list", "--output=name", scope];
    let kinds = run("kubectl", &kinds, "").unwrap();
    let kinds = kinds.lines().filter(|kind| !kind.starts_with("events"));
    let kinds = kinds.collect::<Vec<_>>().join(",");
    let get = ["get", &kinds, "--output=name", "--ignore-not-found"];
    let found = run("kubectl", &[&get[..], more].concat(), "").unwrap();
    found.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn helm_test_passes_bytes_and_leaves_nothing() {
    let world = World::new("e2e-helm-test").await;
    let there = || names("--namespaced=true", &["--namespace", RELEASE]);
    let before = there();
    let started = Instant::now();
    let text = helm(&["test", RELEASE, "--namespace", RELEASE, "--logs"]);
    print_time("helm test: passed", started.elapsed());
    println!("{text}");
    for answer in ["hello over tcp", "hello over udp"] {
        assert!(text.lines().any(|line| line.contains(answer)), "{answer}");
    }
    until("the test's objects are gone", LIMIT, async || {
        // Pods of the former release may still be ending.
        let left = there().into_iter().filter(|name| !before.contains(name));
        expect(left.collect::<Vec<_>>(), Vec::is_empty)
    })
    .await;
    print_time("helm test: nothing is left", started.elapsed());
    world.end().await;
}

/// Objects of the release and of pools in the cluster, by kind and name.
fn left_overs() -> Vec<String> {
    let release = format!("--selector=app.kubernetes.io/instance={RELEASE}");
    let pools = "--selector=app.kubernetes.io/managed-by=portpool";
    let found = [
        names("--namespaced=false", &[&release]),
        names("--namespaced=true", &["--all-namespaces", &release]),
        names("--namespaced=true", &["--all-namespaces", pools]),
        names("--namespaced=true", &["--namespace", RELEASE]),
    ];
    // Every namespace has these.
    let usual = ["configmap/kube-root-ca.crt", "serviceaccount/default"];
    let found = found.into_iter().flatten();
    found.filter(|name| !usual.contains(&&**name)).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn uninstalling_leaves_nothing_but_kept_definitions() {
    let world = World::with_pool("e2e-uninstall", 2).await;
    let mut live = Live::new(&world.asker()).await;
    let uninstall = [
        "uninstall",
        RELEASE,
        "--namespace",
        RELEASE,
        "--wait",
        "--timeout=120s",
    ];
    helm(&uninstall);
    // The chart keeps the definition by default, and with it pools and clients.
    let pools: Api<ProcessingPool> = world.api();
    assert!(pools.get("games").await.is_ok());
    live.check();
    Live::new(&world.asker()).await.check();
    drop(live);
    let definitions: Api<CustomResourceDefinition> = Api::all(world.client.clone());
    let definition = "processingpools.portpool.dev";
    assert!(definitions.get(definition).await.is_ok());

    // The next release takes the pool over.
    install(&["--set=crds.keep=false", "--take-ownership"]);
    world.scale("games", 3).await;
    world.ready("games").await;
    pools
        .delete("games", &DeleteParams::default())
        .await
        .unwrap();
    helm(&uninstall);
    let started = Instant::now();
    until("nothing is left", LIMIT, async || {
        expect(left_overs(), Vec::is_empty)
    })
    .await;
    print_time("uninstalled: nothing is left", started.elapsed());
    assert!(definitions.get_opt(definition).await.unwrap().is_none());
    world.delete_namespace().await;
}
