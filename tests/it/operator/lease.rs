//! Controllers that share a Lease: only one writes, whatever befalls it.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::Process;
use crate::common::cluster::{ApiServer, Space, free_port, metric, quick, until};
use crate::common::faulty::Faulty;
use crate::common::proxy::{Call, Fault};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use rustix::process::Signal;

/// Longest time until a standby leads after its leader has stopped renewing.
const TAKEOVER: Duration = Duration::from_secs(20);

fn controller(space: &Space, kubeconfig: &Path, port: u16) -> Process {
    let lease = [format!("--lease={}/portpool", space.name)];
    space.controller_with(kubeconfig, port, &lease)
}

fn leads(port: u16) -> bool {
    metric(port, "portpool_leader") == 1
}

async fn holder(space: &Space) -> Option<String> {
    let leases: Api<Lease> = Api::namespaced(space.client.clone(), &space.name);
    let lease = leases.get("portpool").await.unwrap();
    lease.spec?.holder_identity
}

fn is_lease(call: &Call) -> bool {
    call.path.contains("/leases")
}

/// Waits until the process has ended. The proxy must go on meanwhile.
async fn ended(leader: Process) {
    let leader = std::sync::Mutex::new(leader);
    until("it ends", async || !leader.lock().unwrap().is_running()).await;
}

/// A leader behind the proxy, with a ready pool, and the port of a standby.
async fn leader_behind_the_proxy(name: &str) -> (Faulty, Process, u16) {
    let faulty = Faulty::new(name).await;
    let first = faulty.space.admin_port;
    let leader = controller(&faulty.space, &faulty.proxy.kubeconfig, first);
    until("the first leads", async || leads(first)).await;
    faulty.space.make_ready("games", quick(1)).await;
    (faulty, leader, free_port())
}

/// Makes the standby lead, and changes pools under it, which the former leader
/// sees as soon as it can.
async fn take_over(faulty: &Faulty, port: u16) -> Process {
    let kubeconfig = faulty.space.server.kubeconfig().to_owned();
    let standby = controller(&faulty.space, &kubeconfig, port);
    let took = until("the standby leads", async || leads(port)).await;
    assert!(took < TAKEOVER, "{took:?}");
    faulty.space.make_ready("games", quick(2)).await;
    faulty.space.make_ready("more", quick(1)).await;
    standby
}

#[tokio::test]
async fn of_two_controllers_one_leads_and_the_other_takes_over() {
    let space = Space::without_controller(ApiServer::shared().await, "lease-two").await;
    let kubeconfig = space.server.kubeconfig().to_owned();
    let ports = [free_port(), free_port(), free_port()];
    let start = |port: u16| controller(&space, &kubeconfig, port);
    let mut first = start(ports[0]);
    until("the first leads", async || leads(ports[0])).await;
    let second = start(ports[1]);
    space.make_ready("games", quick(2)).await;
    assert!(!leads(ports[1]), "one at a time");
    // Killed: the lease must run out.
    first.kill();
    let took = until("the second leads", async || leads(ports[1])).await;
    assert!(took < TAKEOVER, "{took:?}");
    space.make_ready("games", quick(3)).await;
    // On SIGTERM it gives the lease back.
    let _third = start(ports[2]);
    until("the third waits", async || {
        metric(ports[2], "portpool_build_info") == 1
    })
    .await;
    second.terminate();
    let took = until("the third leads", async || leads(ports[2])).await;
    assert!(took < Duration::from_secs(8), "{took:?}");
    space.make_ready("games", quick(1)).await;
}

/// The leader wakes up, sees what has changed, and cannot ask for the lease.
#[tokio::test]
async fn a_leader_that_was_frozen_beyond_its_lease_writes_nothing_when_it_wakes_up() {
    let (faulty, leader, port) = leader_behind_the_proxy("lease-frozen").await;
    leader.signal(Signal::STOP);
    let _standby = take_over(&faulty, port).await;
    let table = faulty.space.table("games").await;
    faulty.proxy.rule(|call| match is_lease(call) {
        true => Fault::Hold,
        false => Fault::Pass,
    });
    let writes = faulty.proxy.writes.load(Ordering::Relaxed);
    leader.signal(Signal::CONT);
    faulty.space.make_ready("games", quick(3)).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let now = faulty.proxy.writes.load(Ordering::Relaxed);
    assert_eq!(now, writes, "{:?}", faulty.proxy.log.lock().unwrap());
    assert_ne!(faulty.space.table("games").await, table);
    assert!(leads(port));
    // It ends when it sees the lease again.
    faulty.proxy.rule(|_| Fault::Pass);
    ended(leader).await;
    assert!(leads(port));
}

/// Its watches and writes still work, and only the lease cannot be renewed.
#[tokio::test]
async fn a_leader_that_cannot_renew_its_lease_stops_writing_before_another_leads() {
    let (faulty, leader, port) = leader_behind_the_proxy("lease-lost").await;
    faulty.proxy.rule(|call| match is_lease(call) {
        true => Fault::Answer(500, "InternalError"),
        false => Fault::Pass,
    });
    let _standby = take_over(&faulty, port).await;
    let writes = faulty.proxy.writes.load(Ordering::Relaxed);
    faulty.space.make_ready("games", quick(3)).await;
    faulty.space.make_ready("more", quick(2)).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let now = faulty.proxy.writes.load(Ordering::Relaxed);
    assert_eq!(now, writes, "{:?}", faulty.proxy.log.lock().unwrap());
    faulty.proxy.rule(|_| Fault::Pass);
    ended(leader).await;
    assert!(leads(port));
}

/// No other controller has taken the lease meanwhile.
#[tokio::test]
async fn a_leader_goes_on_after_an_outage_in_which_no_one_took_its_lease() {
    let (faulty, mut leader, _) = leader_behind_the_proxy("lease-outage").await;
    let before = holder(&faulty.space).await;
    faulty
        .proxy
        .rule(|_| Fault::Answer(503, "ServiceUnavailable"));
    tokio::time::sleep(Duration::from_secs(17)).await;
    let writes = faulty.proxy.writes.load(Ordering::Relaxed);
    faulty.space.apply("games", quick(2)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let now = faulty.proxy.writes.load(Ordering::Relaxed);
    assert_eq!(now, writes, "no write is tried without a valid lease");
    faulty.proxy.rule(|_| Fault::Pass);
    faulty.space.ready("games").await;
    assert!(leader.is_running());
    assert_eq!(holder(&faulty.space).await, before);
}

/// All see at the same moment that the lease has run out.
#[tokio::test]
async fn of_many_controllers_one_leads_after_each_crash() {
    let space = Space::without_controller(ApiServer::shared().await, "lease-many").await;
    let kubeconfig = space.server.kubeconfig().to_owned();
    let mut ports: Vec<u16> = (0..6).map(|_| free_port()).collect();
    ports.sort_unstable();
    ports.dedup();
    let start = |port: &u16| (*port, controller(&space, &kubeconfig, *port));
    let mut running: Vec<(u16, Process)> = ports.iter().map(start).collect();
    let leading = |running: &[(u16, Process)]| {
        let ports = running.iter().map(|(port, _)| *port);
        ports.filter(|port| leads(*port)).collect::<Vec<u16>>()
    };
    for _ in 0..2 {
        until("one leads", async || leading(&running).len() == 1).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let leaders = leading(&running);
        assert_eq!(leaders.len(), 1, "{leaders:?}");
        running.retain(|(port, _)| *port != leaders[0]);
    }
    until("one leads", async || leading(&running).len() == 1).await;
}
