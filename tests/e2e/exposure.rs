//! Pools reached from outside of the pod network.

use portpool::pool::ProcessingPool;
use serde_json::json;

use crate::traffic::{Live, echo_udp};
use crate::world::{LIMIT, LOAD_SHARING_PORT, World, echo_pool, expect, print_time, until};

/// Uses every server over TCP and UDP.
async fn is_used(world: &World, pool: &str) {
    print_time("pool of 2: ready", world.ready(pool).await);
    let took = world.live("all ports are free", |state| state.free_ports == 8);
    print_time("and all ports offered after", took.await);
    let asker = world.asker();
    let (first, second) = (Live::new(&asker).await, Live::new(&asker).await);
    assert_ne!(first.session.server, second.session.server);
    for mut live in [first, second] {
        assert_eq!(live.session.address, world.address);
        live.check();
        echo_udp(&live.session);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn node_ports_lead_to_processing_servers() {
    let world = World::new("e2e-node-port").await;
    world.apply("games", &echo_pool(2)).await;
    is_used(&world, "games").await;
    let pool: ProcessingPool = world.pool("games").await;
    let address = pool.status.unwrap().address;
    assert_eq!(address, Some(format!("NODE:{LOAD_SHARING_PORT}")));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn the_host_network_leads_to_processing_servers() {
    let world = World::new("e2e-host-network").await;
    let mut spec = echo_pool(2);
    spec["connectionServer"]["exposure"] = "HostNetwork".into();
    spec["connectionServer"]["replicas"] = 1.into();
    if std::env::var_os("PORTPOOL_E2E_ADDRESS").is_some() {
        // The node's own address may be unreachable from here.
        spec["connectionServer"]["advertisedAddress"] = json!(world.address);
    }
    world.apply("games", &spec).await;
    is_used(&world, "games").await;
    let what = "the status has the node's address";
    until(what, LIMIT, async || {
        let address = world.pool("games").await.status.unwrap().address;
        let wanted = Some(format!("{}:{LOAD_SHARING_PORT}", world.address));
        expect(address, |address| *address == wanted)
    })
    .await;
    world.end().await;
}
