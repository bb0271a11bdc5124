//! The time limits of sessions, while processes are restarted.

use std::time::{Duration, Instant};

use crate::common::{COUNT, Pool, connect, echo, turn};
use portpool::session::PoolState;

/// In a session the agent is killed and started again, and the connection server
/// hands over to a new process.
#[tokio::test]
async fn the_longest_duration_counts_from_the_selection_through_restarts() {
    const MOST: Duration = Duration::from_secs(8);
    let _turn = turn().await;
    let mut pool = Pool::new(1, |table| table.sessions.max_duration_seconds = 8);
    pool.start_workload(0);
    pool.start_agent(0);
    let first = pool.start_successor(0);
    pool.connection_servers.push(first);
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
    let selected = Instant::now();
    let session = pool.request().await.unwrap();
    let mut stream = connect(&session);
    echo(&mut stream, "before");
    tokio::time::sleep(Duration::from_secs(1)).await;
    pool.agents[0].kill();
    pool.agents.clear();
    pool.start_agent(0);
    let is_known = |state: &PoolState| state.servers[0].attached && state.sessions == 1;
    pool.until(is_known).await;
    echo(&mut stream, "after the restart");
    let successor = pool.start_successor(0);
    assert!(pool.connection_servers[0].ends());
    pool.connection_servers[0] = successor;
    pool.until(is_known).await;
    echo(&mut stream, "after the hand-over");
    let after = pool.client().get(&session.id).await.unwrap();
    assert_eq!(after.created, session.created);
    let is_cut = tokio::task::spawn_blocking(move || crate::common::is_cut(&mut stream));
    assert!(is_cut.await.unwrap());
    let lasted = selected.elapsed();
    let longest = MOST + Duration::from_secs(2);
    assert!((MOST..longest).contains(&lasted), "{lasted:?}");
}
