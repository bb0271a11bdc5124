//! What each fault ends, what continues, and how soon capacity returns.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::{COUNT, Pool, connect, echo, is_cut};
use portpool::session::SessionRequest;
use portpool::table::RowState;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

const ALL: u32 = 2 * COUNT as u32;

#[tokio::test]
async fn a_killed_workload_ends_only_its_own_sessions() {
    let mut pool = Pool::running(2, |_| {}).await;
    let (first, second) = (pool.request().await.unwrap(), pool.request().await.unwrap());
    let (dying, living) = if first.server == "test-0" {
        (first, second)
    } else {
        (second, first)
    };
    let (mut dying, mut living) = (connect(&dying), connect(&living));
    echo(&mut dying, "before");
    echo(&mut living, "before");
    pool.workloads[0].kill();
    assert!(is_cut(&mut dying));
    drop(dying);
    echo(&mut living, "after");
    pool.start_workload(0);
    let back = pool.until(|state| state.free_ports == ALL - 1).await;
    assert!(
        back < Duration::from_secs(2),
        "capacity is back after {back:?}"
    );
}

#[tokio::test]
async fn a_killed_agent_ends_no_session_and_learns_them_again() {
    let mut pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let mut stream = connect(&session);
    echo(&mut stream, "before");
    let held = pool.request().await.unwrap();
    pool.agents[0].kill();
    pool.until(|state| !state.servers[0].attached).await;
    echo(&mut stream, "meanwhile");
    let mut late = connect(&held);
    echo(&mut late, "a client that had its port before");
    pool.start_agent(0);
    pool.until(|state| state.servers[0].attached).await;
    echo(&mut stream, "after");
    echo(&mut late, "after");
    assert_eq!(
        pool.client().get(&session.id).await.unwrap().port,
        session.port
    );
    // After a restart the agent waits 15 s for sessions to be reported.
    let back = pool
        .until(|state| state.free_ports == u32::from(COUNT) - 2)
        .await;
    assert!(
        back < Duration::from_secs(17),
        "capacity is back after {back:?}"
    );
}

#[tokio::test]
async fn a_stopped_agent_loses_its_sessions_before_it_gives_their_ports_to_others() {
    let pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let mut stream = connect(&session);
    echo(&mut stream, "before");
    // A stopped process accepts connections and answers nothing: this takes
    // longest to notice.
    pool.agents[0].signal(rustix::process::Signal::STOP);
    let stopped = Instant::now();
    assert!(is_cut(&mut stream));
    let after = stopped.elapsed();
    pool.agents[0].signal(rustix::process::Signal::CONT);
    assert!(
        after > portpool::selection::CUT_AFTER && after < portpool::selection::GONE_AFTER,
        "cut after {after:?}"
    );
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
}

#[tokio::test]
async fn a_killed_connection_server_gives_its_sessions_back() {
    let mut pool = Pool::running(1, |_| {}).await;
    pool.start_connection_server(1);
    pool.until_of(1, |state| state.free_ports == u32::from(COUNT))
        .await;
    let (theirs, ours) = (
        pool.request().await.unwrap(),
        pool.client_of(1)
            .request(SessionRequest::default())
            .await
            .unwrap(),
    );
    let (mut theirs, mut ours) = (connect(&theirs), connect(&ours));
    echo(&mut theirs, "before");
    echo(&mut ours, "before");
    pool.connection_servers[0].kill();
    assert!(is_cut(&mut theirs));
    echo(&mut ours, "after");
    // The agent counts a connection server as gone after 15 s.
    let back = pool
        .until_of(1, |state| state.free_ports == u32::from(COUNT) - 1)
        .await;
    assert!(
        back < Duration::from_secs(17),
        "capacity is back after {back:?}"
    );
    echo(&mut ours, "and on");
}

#[tokio::test]
async fn a_connection_server_that_stops_keeps_no_port_from_others() {
    let mut pool = Pool::running(1, |_| {}).await;
    pool.start_connection_server(1);
    let all = u32::from(COUNT);
    pool.until_of(1, |state| state.free_ports == all).await;
    // The one that stops made the session; its client claims it through the other.
    let made = pool.request().await.unwrap();
    pool.connection_servers[0].terminate();
    let started = Instant::now();
    pool.connection_servers[0].wait();
    let address = (pool.connection_address(1), made.port);
    let mut stream = TcpStream::connect(address).unwrap();
    echo(&mut stream, "through the other");
    drop(stream);
    for _ in 0..2 * COUNT {
        let ours = pool.client_of(1).request(SessionRequest::default()).await;
        echo(&mut connect(&ours.unwrap()), "at once");
        pool.until_of(1, |state| state.free_ports == all).await;
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(5), "ports wait {took:?}");
}

#[tokio::test]
async fn a_session_made_through_one_connection_server_works_through_all() {
    let mut pool = Pool::running(1, |_| {}).await;
    pool.start_connection_server(1);
    pool.until_of(1, |state| state.servers[0].attached).await;
    let session = pool.request().await.unwrap();
    let mut stream = TcpStream::connect((pool.connection_address(1), session.port)).unwrap();
    echo(&mut stream, "through the other one");
}

#[tokio::test]
async fn a_port_without_a_session_is_reset() {
    let pool = Pool::running(1, |_| {}).await;
    let mut stream = TcpStream::connect((pool.connection_address(0), 20_000)).unwrap();
    assert!(is_cut(&mut stream));
}

#[tokio::test]
async fn exhaustion_is_reported_and_a_waiting_request_is_served_next() {
    let pool = Pool::running(1, |_| {}).await;
    let mut sessions = Vec::new();
    for _ in 0..COUNT {
        sessions.push(pool.request().await.unwrap());
    }
    assert!(pool.request().await.unwrap_err().is_exhausted());
    let client = pool.client();
    let waiting = tokio::spawn(async move {
        client
            .request(SessionRequest {
                wait_seconds: 10,
                ..SessionRequest::default()
            })
            .await
    });
    pool.until(|state| state.waiting == 1).await;
    pool.client().release(&sessions[0].id).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().port, sessions[0].port);
}

#[tokio::test]
async fn the_same_idempotency_key_gives_the_same_session() {
    let pool = Pool::running(2, |_| {}).await;
    let keyed = |name: Option<&str>| SessionRequest {
        idempotency_key: Some("key".to_owned()),
        port_name: name.map(str::to_owned),
        client_binding: name.map(|_| portpool::pool::ClientBinding::Requester),
        ..SessionRequest::default()
    };
    let client = pool.client();
    let (one, other) = tokio::join!(client.request(keyed(None)), client.request(keyed(None)));
    assert_eq!(one.unwrap(), other.unwrap());
    let reused = client.request(keyed(Some("main"))).await.unwrap_err();
    assert!(reused.to_string().contains("idempotencyKey"), "{reused}");
    pool.until(|state| state.sessions == 1).await;
}

#[tokio::test]
async fn an_unclaimed_port_returns() {
    let pool = Pool::running(1, |table| table.sessions.claim_seconds = 1).await;
    let session = pool.request().await.unwrap();
    let back = pool
        .until(|state| state.free_ports == u32::from(COUNT))
        .await;
    assert!(back < Duration::from_secs(3), "free again after {back:?}");
    assert!(pool.client().get(&session.id).await.is_err());
}

#[tokio::test]
async fn a_session_ends_after_its_longest_duration() {
    let pool = Pool::running(1, |table| table.sessions.max_duration_seconds = 1).await;
    let mut stream = connect(&pool.request().await.unwrap());
    echo(&mut stream, "in time");
    assert!(is_cut(&mut stream));
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
}

#[tokio::test]
async fn table_changes_at_run_time_cut_no_session() {
    let mut pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let mut stream = connect(&session);
    echo(&mut stream, "before");
    for _ in 0..20 {
        let row = pool.row(1);
        match pool.table.rows.len() {
            1 => pool.table.rows.push(row),
            _ => pool.table.rows.truncate(1),
        }
        pool.table.generation += 1;
        pool.publish();
        let generation = pool.table.generation;
        pool.until(|state| state.generation == generation).await;
        echo(&mut stream, "during");
    }
    pool.table.rows[0].state = RowState::Draining;
    pool.table.generation += 1;
    pool.publish();
    pool.until(|state| state.servers[0].draining).await;
    echo(&mut stream, "while draining");
    assert!(
        pool.request().await.is_err(),
        "nothing new goes to a draining server"
    );
}

#[tokio::test]
async fn a_bound_session_admits_its_requester_only() {
    let pool = Pool::running(1, |table| {
        table.sessions.client_binding = portpool::pool::ClientBinding::Requester
    })
    .await;
    let session = pool.request().await.unwrap();
    let address: SocketAddr = format!("{}:{}", session.address, session.port)
        .parse()
        .unwrap();
    let other = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    other
        .bind(&SocketAddr::from(([127, 0, 0, 99], 0)).into())
        .unwrap();
    other.connect(&address.into()).unwrap();
    assert!(is_cut(&mut other.into()));
    echo(&mut connect(&session), "the requester");
}

fn open_files(process: u32) -> u64 {
    let folder = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    folder.count() as u64
}

/// Processor time of `process` so far; the kernel counts in 10 ms.
fn processor_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks = |index: usize| fields[index].parse::<u64>().unwrap();
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

#[tokio::test]
async fn an_idle_pool_uses_hardly_any_processor_time() {
    let pool = Pool::running(2, |_| {}).await;
    let processes = || {
        [
            &pool.connection_servers[0],
            &pool.agents[0],
            &pool.workloads[0],
        ]
        .map(|process| processor_time(process.id()))
    };
    let before = processes();
    tokio::time::sleep(Duration::from_secs(2)).await;
    for (before, after) in before.into_iter().zip(processes()) {
        let used = after - before;
        assert!(used <= Duration::from_millis(100), "{used:?} in 2 s");
    }
}

#[tokio::test]
async fn without_descriptors_nothing_spins_and_all_is_served_again() {
    let pool = Pool::running(2, |_| {}).await;
    let process = pool.connection_servers[0].id();
    let pid = Pid::from_raw(i32::try_from(process).unwrap());
    let session = pool.request().await.unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = |current| {
        prlimit(pid, Resource::Nofile, Rlimit { current, maximum }).unwrap();
    };
    limit(Some(3));
    let started = (Instant::now(), processor_time(process));
    // The kernel accepts for the listener; the forwarder cannot take it over.
    let mut stream = connect(&session);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = processor_time(process) - started.1;
    assert!(
        used < Duration::from_millis(200),
        "{used:?} of processor time in {:?}",
        started.0.elapsed()
    );
    limit(maximum);
    echo(&mut stream, "served after all");
}

#[tokio::test]
async fn faults_leave_no_descriptor_behind() {
    let mut pool = Pool::running(2, |_| {}).await;
    let process = pool.connection_servers[0].id();
    // Streams to agents, kept client connections and the like come first.
    pool.request().await.map(drop).unwrap();
    let round = async |pool: &Pool| {
        let session = pool.request().await.unwrap();
        let mut stream = connect(&session);
        echo(&mut stream, "bytes");
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket
            .send_to(b"datagram", (session.address.as_str(), session.port))
            .unwrap();
        session
    };
    let session = round(&pool).await;
    pool.client().release(&session.id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = open_files(process);
    for _ in 0..20 {
        let session = round(&pool).await;
        let _ = pool.client().release(&session.id).await;
        // Reset by the client, and a port without a session.
        let session = round(&pool).await;
        if let Ok(stream) = TcpStream::connect((session.address.as_str(), session.port)) {
            socket2::SockRef::from(&stream)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
        }
        // The session may have ended by itself already.
        let _ = pool.client().release(&session.id).await;
        let _ = TcpStream::connect((session.address.as_str(), session.port));
    }
    let server = pool.request().await.unwrap();
    let mut stream = connect(&server);
    pool.workloads
        .iter_mut()
        .for_each(crate::common::Process::kill);
    assert!(is_cut(&mut stream));
    drop(stream);
    let deadline = Instant::now() + crate::common::SOON;
    while open_files(process) > before {
        assert!(
            Instant::now() < deadline,
            "{before} descriptors before, {} after",
            open_files(process)
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
