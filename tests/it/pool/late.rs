//! Ports that a workload opens late.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use portpool::pool::PortProtocol;
use portpool::session::SessionRequest;

use crate::common::{COUNT, Pool, SERVER_PORT};

/// How long the ports are closed before they are opened one after another: agents
/// look at them less and less meanwhile.
const CLOSED: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_request_gets_a_port_that_was_opened_a_moment_ago() {
    let mut pool = Pool::new(2, |table| {
        for row in &mut table.rows {
            row.ranges[0].protocol = PortProtocol::TCP;
        }
    });
    pool.start_agent(0);
    pool.start_agent(1);
    pool.start_connection_server(0);
    let closed = 2 * u32::from(COUNT);
    pool.until(|state| {
        let ports = state.servers.iter().flat_map(|server| &server.ports);
        ports.map(|ports| ports.not_listening).sum::<u32>() == closed
    })
    .await;
    tokio::time::sleep(CLOSED).await;
    let client = pool.client();
    let mut listeners = Vec::new();
    for port in 0..COUNT {
        for slot in [1, 0] {
            // Another request may have had the agents look just now.
            tokio::time::sleep(Duration::from_millis(25)).await;
            let address = (pool.server_address(slot), SERVER_PORT + port);
            listeners.push(TcpListener::bind(address).unwrap());
            let session = client.request(SessionRequest::default()).await.unwrap();
            assert_eq!(session.server, format!("test-{slot}"));
        }
    }
    let started = Instant::now();
    let refused = client.request(SessionRequest::default()).await;
    assert!(refused.is_err(), "all are in use");
    println!("refused after {:?}", started.elapsed());
}
