//! How long sessions go on when a role stops: the table says it, and may say
//! something else meanwhile.

use std::net::IpAddr;
use std::time::Instant;

use rustix::process::Signal;

use crate::common::cluster::until;
use crate::common::{Pool, Process, SOON, connect, echo, get, is_cut};

/// Publishes another drain limit.
fn drain_for(pool: &mut Pool, seconds: u32) {
    pool.table.drain_seconds = Some(seconds);
    pool.table.generation += 1;
    pool.publish();
}

fn connection_server(pool: &mut Pool) -> &mut Process {
    &mut pool.connection_servers[0]
}

fn agent(pool: &mut Pool) -> &mut Process {
    &mut pool.agents[0]
}

fn connection_admin(pool: &Pool) -> (IpAddr, u16) {
    (pool.connection_address(0), 7701)
}

fn agent_admin(pool: &Pool) -> (IpAddr, u16) {
    (pool.server_address(0), 7071)
}

/// Checks the role that `role` gives of a pool, whose admin port `admin` gives.
async fn follows_the_limit(role: fn(&mut Pool) -> &mut Process, admin: fn(&Pool) -> (IpAddr, u16)) {
    let mut pool = Pool::new(1, |table| table.drain_seconds = Some(0));
    pool.start_workload(0);
    // The agent's copy stays as it is: connection servers bring it what is newer.
    let (table, copy) = (pool.table_file(), pool.table_file().with_extension("copy"));
    std::fs::copy(&table, &copy).unwrap();
    let arguments = pool.agent_arguments(0).into_iter();
    let own = format!("--table={}", copy.display());
    let arguments = arguments.map(|argument| match argument.starts_with("--table=") {
        true => own.clone(),
        false => argument,
    });
    let agent = Process::start(&arguments.collect::<Vec<_>>());
    pool.agents.push(agent);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports > 0).await;
    let session = pool.request().await.unwrap();
    let mut stream = connect(&session);
    echo(&mut stream, "before");
    drain_for(&mut pool, 600);
    for (address, admin) in [connection_admin(&pool), agent_admin(&pool)] {
        let follows = async || {
            let table = get(address, admin, "/v1/port-table").replace(' ', "");
            table.contains(r#""drainSeconds":600"#)
        };
        until("the table is followed", follows).await;
    }
    role(&mut pool).signal(Signal::TERM);
    let (address, admin) = admin(&pool);
    // With the limit of the start it would not answer any more.
    let drains = async || {
        let answer = get(address, admin, "/readyz");
        answer.contains("draining") || answer.contains("shutting down")
    };
    until("it drains", drains).await;
    echo(&mut stream, "a session goes on");
    let shortened = Instant::now();
    drain_for(&mut pool, 0);
    assert!(is_cut(&mut stream), "the shorter limit counts at once");
    assert!(role(&mut pool).ends());
    let took = shortened.elapsed();
    assert!(took < SOON, "ended {took:?} after the limit was shortened");
}

#[tokio::test]
async fn a_connection_server_drains_for_as_long_as_the_present_table_says() {
    follows_the_limit(connection_server, connection_admin).await;
}

#[tokio::test]
async fn an_agent_drains_for_as_long_as_the_present_table_says() {
    follows_the_limit(agent, agent_admin).await;
}
