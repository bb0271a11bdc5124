//! What uses up a claim, and what does not. Pools here have no linger time.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::common::{COUNT, Pool, SERVER_PORT, SOON, connect, echo, is_cut};
use portpool::session::{Session, SessionRequest, SessionState};

/// Whether the session is held when everything that its client did has arrived.
async fn is_held(pool: &Pool, session: &Session) -> bool {
    tokio::time::sleep(Duration::from_millis(150)).await;
    let found = pool.client().get(&session.id).await;
    found.is_ok_and(|found| found.state == SessionState::Held)
}

/// Waits until the session is over.
async fn is_over(pool: &Pool, session: &Session) {
    let deadline = Instant::now() + SOON;
    while pool.client().get(&session.id).await.is_ok() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Kills the workload just after it was seen to listen, so that clients come
/// before anybody notices.
async fn session_without_workload(protocol: &str) -> (Pool, Session) {
    let mut pool = Pool::running(1, |_| {}).await;
    let request = serde_json::json!({ "protocol": protocol });
    let request: SessionRequest = serde_json::from_value(request).unwrap();
    let session = pool.client().request(request).await.unwrap();
    pool.workloads[0].kill();
    pool.workloads.clear();
    (pool, session)
}

#[tokio::test]
async fn a_client_that_was_refused_may_come_again() {
    let (mut pool, session) = session_without_workload("TCP").await;
    for _ in 0..3 {
        let mut stream = connect(&session);
        // It may be reset by now.
        let _ = stream.write_all(b"unread");
        assert!(is_cut(&mut stream));
        assert!(is_held(&pool, &session).await);
    }
    pool.start_workload(0);
    let mut served = false;
    for _ in 0..100 {
        let mut stream = connect(&session);
        let mut byte = [0];
        served = stream.write_all(b"x").is_ok() && stream.read_exact(&mut byte).is_ok();
        if served {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(served, "the same session, when the workload is back");
    is_over(&pool, &session).await;
}

#[tokio::test]
async fn a_datagram_to_a_server_that_refuses_does_not_use_up_the_claim() {
    let (pool, session) = session_without_workload("UDP").await;
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..3 {
        client
            .send_to(b"unread", (session.address.as_str(), session.port))
            .unwrap();
        assert!(is_held(&pool, &session).await);
    }
}

#[tokio::test]
async fn a_probe_does_not_use_up_the_claim() {
    let pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    for _ in 0..5 {
        drop(connect(&session));
        assert!(is_held(&pool, &session).await);
    }
    let mut stream = connect(&session);
    echo(&mut stream, "the claim");
    drop(stream);
    is_over(&pool, &session).await;
}

/// A pool whose workload is this test: the listeners of its TCP ports.
async fn pool_with_listeners() -> (Pool, Vec<TcpListener>) {
    let mut pool = Pool::new(1, |table| {
        table.rows[0].ranges[0].protocol = portpool::pool::PortProtocol::TCP;
    });
    let listeners: Vec<TcpListener> = (SERVER_PORT..SERVER_PORT + COUNT)
        .map(|port| TcpListener::bind((pool.server_address(0), port)).unwrap())
        .collect();
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
    (pool, listeners)
}

/// A server that speaks first greets a scanner too.
#[tokio::test]
async fn a_probe_that_is_greeted_does_not_use_up_the_claim() {
    let (pool, listeners) = pool_with_listeners().await;
    let session = pool.request().await.unwrap();
    let index = usize::from(session.port - 20_000);
    let greet = |mut client: TcpStream| {
        let (mut server, _) = listeners[index].accept().unwrap();
        server.write_all(b"220 ready\r\n").unwrap();
        let mut greeting = [0; 11];
        client.read_exact(&mut greeting).unwrap();
        (client, server)
    };
    drop(greet(connect(&session)));
    assert!(is_held(&pool, &session).await);
    let (mut client, mut server) = greet(connect(&session));
    client.write_all(b"QUIT").unwrap();
    server.read_exact(&mut [0; 4]).unwrap();
    drop((client, server));
    is_over(&pool, &session).await;
}

/// Like a client of syslog or statsd over TCP.
#[tokio::test]
async fn a_client_that_only_pushes_uses_up_its_claim_and_all_arrives() {
    let (pool, listeners) = pool_with_listeners().await;
    for _ in 0..20 {
        let request = SessionRequest {
            wait_seconds: 10,
            ..SessionRequest::default()
        };
        let session = pool.client().request(request).await.unwrap();
        connect(&session).write_all(b"<14>pushed").unwrap();
        let index = usize::from(session.port - 20_000);
        let (mut server, _) = listeners[index].accept().unwrap();
        let mut arrived = Vec::new();
        server.read_to_end(&mut arrived).unwrap();
        assert_eq!(arrived, b"<14>pushed");
        drop(server);
        is_over(&pool, &session).await;
    }
}
