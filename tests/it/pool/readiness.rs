//! Servers whose workload is not ready get no new sessions.

use std::time::Instant;

use portpool::client::ClientError;
use portpool::session::{PoolState, SessionRequest};

use crate::common::{Pool, connect, echo, get, until_metric};

/// Marks the servers of `slots` as not ready, and all others as ready.
fn mark(pool: &mut Pool, slots: &[usize]) {
    for (slot, row) in pool.table.rows.iter_mut().enumerate() {
        row.not_ready = slots.contains(&slot);
    }
    pool.table.generation += 1;
    pool.publish();
}

fn not_ready(state: &PoolState) -> Vec<bool> {
    state
        .servers
        .iter()
        .map(|server| server.not_ready)
        .collect()
}

#[tokio::test]
async fn a_server_that_is_not_ready_gets_no_sessions_and_keeps_those_that_it_has() {
    let mut pool = Pool::running(2, |_| {}).await;
    pool.start_connection_server(1);
    pool.until_of(1, |state| state.free_ports == 8).await;
    let sessions = [pool.request().await.unwrap(), pool.request().await.unwrap()];
    let mut live = sessions.each_ref().map(connect);
    assert_ne!(sessions[0].server, sessions[1].server);

    mark(&mut pool, &[1]);
    for index in 0..2 {
        let took = pool
            .until_of(index, |state| not_ready(state) == [false, true])
            .await;
        println!("followed after {took:?}");
    }
    let client = pool.client_of(1);
    for _ in 0..3 {
        let session = client.request(SessionRequest::default()).await.unwrap();
        assert_eq!(session.server, "test-0");
    }
    let Err(ClientError::Refused(problem)) = pool.request().await else {
        panic!("test-0 has four ports");
    };
    assert_eq!(problem.kind, "urn:portpool:problem:no-free-port");
    let words = "all 4 matching ports are in use, and 1 processing server is not ready";
    assert!(problem.detail.starts_with(words), "{problem}");
    live.iter_mut().for_each(|stream| echo(stream, "goes on"));

    mark(&mut pool, &[0, 1]);
    pool.until(|state| not_ready(state) == [true, true]).await;
    let Err(ClientError::Refused(problem)) = pool.request().await else {
        panic!("no server is ready");
    };
    assert_eq!(problem.kind, "urn:portpool:problem:not-ready");
    assert_eq!(problem.status, 503);
    let address = pool.connection_address(0);
    let page = get(address, 7701, "/v1/pool");
    assert!(page.contains(r#""notReady":true"#), "{page}");
    until_metric(address, 7701, "portpool_servers_not_ready 2");
    live.iter_mut().for_each(|stream| echo(stream, "goes on"));

    // A request that waits is served as soon as a server is ready.
    let patient = SessionRequest {
        wait_seconds: 30,
        ..SessionRequest::default()
    };
    let waiting = tokio::spawn(async move { client.request(patient).await });
    pool.until_of(1, |state| state.waiting == 1).await;
    let started = Instant::now();
    mark(&mut pool, &[0]);
    let served = waiting.await.unwrap().unwrap();
    assert_eq!(served.server, "test-1");
    println!("served after {:?}", started.elapsed());
}

#[tokio::test]
async fn a_connection_server_learns_from_the_agent_that_its_server_is_not_ready() {
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports == 4).await;
    // Only the agent reads this table: the connection server has its row from the
    // agent's counts.
    let theirs = pool.table_file();
    pool.table.rows[0].not_ready = true;
    pool.table.generation += 1;
    let text = pool.table.encode().unwrap();
    drop(std::mem::take(&mut pool.agents));
    let newer = theirs.with_file_name("newer.json");
    std::fs::write(&newer, text).unwrap();
    let mut arguments = pool.agent_arguments(0);
    arguments[1] = format!("--table={}", newer.display());
    // As if it had not run before.
    arguments.pop();
    pool.agents.push(crate::common::Process::start(&arguments));
    pool.until(|state| state.servers[0].attached && state.servers[0].not_ready)
        .await;
    let Err(ClientError::Refused(problem)) = pool.request().await else {
        panic!("the server is not ready");
    };
    assert_eq!(problem.kind, "urn:portpool:problem:not-ready");
}
