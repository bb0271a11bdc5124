//! Clients that give up while a workload is asked, and servers that stop meanwhile.

use std::time::{Duration, Instant};

use portpool::client::ClientError;
use portpool::session::{Session, SessionRequest};
use tokio::task::JoinHandle;

use super::confirm::{asking, offered, path, request};
use super::workload_api::{call, slot_of};
use crate::common::{COUNT, Pool, SOON, connect, echo};

/// A request under way under one key, by the connection server of this index.
fn keyed(pool: &Pool, index: u32, wait_seconds: u32) -> JoinHandle<Result<Session, ClientError>> {
    let client = pool.client_of(index);
    let request = SessionRequest {
        idempotency_key: Some("key".to_owned()),
        wait_seconds,
        ..SessionRequest::default()
    };
    tokio::spawn(async move { client.request(request).await })
}

/// Waits until so many selections were answered so by the agent of the first server.
fn until_selections(pool: &Pool, outcome: &str, count: u32) {
    let line = format!("portpool_selections_total{{outcome=\"{outcome}\"}} {count}");
    crate::common::until_metric(pool.server_address(0), 7071, &line);
}

async fn two_connection_servers() -> Pool {
    let mut pool = asking(1, 10).await;
    pool.start_connection_server(1);
    let is_free = |state: &portpool::session::PoolState| state.free_ports == u32::from(COUNT);
    pool.until_of(1, is_free).await;
    pool
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_gives_port_and_workload_free_at_once() {
    let pool = asking(1, 10).await;
    let answer = request(&pool);
    let (slot, session) = offered(&pool).await;
    let left = Instant::now();
    answer.abort();
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
    assert!(left.elapsed() < Duration::from_secs(5), "before its time");
    let (status, problem) = call(&pool, slot, "POST", &path(&session, "confirm"), "");
    assert_eq!(status, 404);
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("its client has left"), "{detail}");
    until_selections(&pool, "WITHDRAWN", 1);
}

/// A client hangs up and asks another connection server under its key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gave_up_takes_no_session_from_who_asked_under_the_same_key() {
    let pool = two_connection_servers().await;
    let first = keyed(&pool, 0, 60);
    let (_, session) = offered(&pool).await;
    let second = keyed(&pool, 1, 60);
    // The agent has seen it before a later request of the same connection server.
    let client = pool.client_of(1);
    let later = tokio::spawn(async move { client.request(SessionRequest::default()).await });
    pool.until_of(1, |state| state.free_ports == u32::from(COUNT) - 2)
        .await;
    first.abort();
    until_selections(&pool, "WITHDRAWN", 1);
    let (status, _) = call(&pool, 0, "POST", &path(&session, "confirm"), "");
    assert_eq!(status, 200, "the second one still waits for it");
    let got = second.await.unwrap().unwrap();
    assert_eq!(session["id"], got.id.as_str());
    later.abort();
    // The first connection server knows it by now, and has not given it back.
    let again = keyed(&pool, 0, 0).await.unwrap().unwrap();
    assert_eq!(again.id, got.id);
    echo(&mut connect(&got), "served");
}

/// One does not wait, the other does: the workload takes longer than the first may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_client_waits_as_long_as_it_said_for_the_same_confirmation() {
    let pool = two_connection_servers().await;
    let patient = keyed(&pool, 0, 60);
    let (_, session) = offered(&pool).await;
    let refusal = keyed(&pool, 1, 0).await.unwrap().unwrap_err();
    let text = refusal.to_string();
    assert!(text.contains("1 did not confirm it in time"), "{text}");
    until_selections(&pool, "WITHDRAWN", 1);
    let (status, _) = call(&pool, 0, "POST", &path(&session, "confirm"), "");
    assert_eq!(status, 200);
    let got = patient.await.unwrap().unwrap();
    echo(&mut connect(&got), "served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_server_that_stops_does_not_wait_for_a_workload() {
    let mut pool = asking(1, 10).await;
    let answer = request(&pool);
    let (slot, session) = offered(&pool).await;
    pool.connection_servers[0].terminate();
    let refusal = tokio::time::timeout(SOON, answer).await.unwrap();
    let refusal = refusal.unwrap().unwrap_err();
    assert!(refusal.to_string().contains("shutting down"), "{refusal}");
    pool.connection_servers[0].ends();
    let (status, _) = call(&pool, slot, "POST", &path(&session, "confirm"), "");
    assert_eq!(status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_server_is_asked_at_once_when_one_stops() {
    let mut pool = asking(2, 10).await;
    let answer = request(&pool);
    let (first, _) = offered(&pool).await;
    let stopped = Instant::now();
    pool.agents[first as usize].terminate();
    pool.agents[first as usize].wait();
    let row = pool.table.rows.remove(first as usize);
    let (second, session) = offered(&pool).await;
    assert_ne!(second, first);
    assert!(
        stopped.elapsed() < Duration::from_secs(5),
        "before its time"
    );
    let (status, _) = call(&pool, second, "POST", &path(&session, "confirm"), "");
    assert_eq!(status, 200);
    let got = answer.await.unwrap().unwrap();
    assert_ne!(got.server, row.server);
    assert_eq!(slot_of(&pool, &got.server), second);
}
