//! Connection ports that a connection server cannot listen on.

use std::collections::BTreeSet;
use std::net::TcpListener;

use portpool::client::ClientError;
use portpool::pool::PortProtocol;
use portpool::session::{PoolState, SessionRequest};

use crate::common::{COUNT, Pool, connect, echo, until_metric};

fn unavailable(state: &PoolState) -> Vec<(u16, PortProtocol)> {
    let ports = state.unavailable_ports.iter();
    ports.map(|port| (port.port.get(), port.protocol)).collect()
}

#[tokio::test]
async fn a_port_that_another_program_holds_is_offered_by_no_one_until_it_is_freed() {
    let mut pool = Pool::new(2, |_| {});
    let taken = 20_002;
    let other = TcpListener::bind((pool.connection_address(0), taken)).unwrap();
    for slot in 0..2 {
        pool.start_workload(slot);
        pool.start_agent(slot);
    }
    // The second one has an address of its own, where the port is free. Clients may
    // come through any.
    pool.start_connection_server(0);
    pool.start_connection_server(1);
    let all = 2 * u32::from(COUNT);
    for index in 0..2 {
        pool.until_of(index, |state| state.free_ports == all - 1)
            .await;
    }
    let state = pool.client().pool().await.unwrap();
    assert_eq!(unavailable(&state), [(taken, PortProtocol::TCP)]);
    let reason = &state.unavailable_ports[0].reason;
    assert!(reason.contains("another program uses it"), "{reason}");
    let metric = "portpool_connection_ports_unavailable";
    until_metric(pool.connection_address(0), 7701, &format!("{metric} 1"));
    until_metric(pool.connection_address(1), 7701, &format!("{metric} 0"));

    let mut ports = BTreeSet::new();
    let mut live = Vec::new();
    for _ in 1..all {
        let session = pool.request().await.unwrap();
        let mut stream = connect(&session);
        echo(&mut stream, "every other port works");
        ports.insert(session.port);
        live.push(stream);
    }
    assert!(!ports.contains(&taken), "{ports:?}");
    let refused = pool.client_of(1).request(SessionRequest::default()).await;
    let Err(ClientError::Refused(problem)) = refused else {
        panic!("every port that can be used is in use");
    };
    let words = "all 7 matching ports are in use";
    assert!(problem.detail.starts_with(words), "{problem}");

    drop(other);
    let took = pool.until(|state| state.free_ports == 1).await;
    println!("offered {took:?} after it was freed");
    let session = pool.request().await.unwrap();
    assert_eq!(session.port, taken);
    echo(&mut connect(&session), "healed");
    let state = pool.client().pool().await.unwrap();
    assert_eq!(unavailable(&state), []);
    live.iter_mut().for_each(|stream| echo(stream, "goes on"));
}

#[tokio::test]
async fn a_pool_grows_although_one_of_the_new_ports_is_taken() {
    let mut pool = Pool::running(1, |_| {}).await;
    let taken = 20_000 + COUNT;
    let _other = TcpListener::bind((pool.connection_address(0), taken)).unwrap();
    pool.table.rows.push(pool.row(1));
    pool.table.generation += 1;
    pool.publish();
    pool.start_workload(1);
    pool.start_agent(1);
    let generation = pool.table.generation;
    let all = 2 * u32::from(COUNT) - 1;
    pool.until(|state| state.generation == generation && state.free_ports == all)
        .await;
    for _ in 0..all {
        let session = pool.request().await.unwrap();
        assert_ne!(session.port, taken);
        echo(&mut connect(&session), "served");
    }
}
