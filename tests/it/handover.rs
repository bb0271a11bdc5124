//! A connection server's successor takes over: nothing is cut, refused or
//! changed.

mod successors;
mod traffic;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use portpool::pool::PortProtocol;
use portpool::session::Session;
use rustix::process::Signal;

use self::traffic::{
    Counts, all_arrived, all_came_back, churn, datagrams, drive_all, knock, ping, serve,
};
use crate::common::{Pool, SERVER_PORT, SOON, connect, echo};

/// Ports of the one server.
const PORTS: u16 = 64;

/// A pool of one server with [`PORTS`] ports and a connection server that can
/// hand over. The workload is the test's.
async fn pool(change: impl FnOnce(&mut portpool::table::Table)) -> Pool {
    let mut pool = Pool::new(1, |table| {
        table.rows[0].ranges[0].count = PORTS;
        // Sessions outlast the moment between two connections.
        table.sessions.linger_seconds = 5;
        change(table);
    });
    pool.start_agent(0);
    let first = pool.start_successor(0);
    pool.connection_servers.push(first);
    pool
}

/// Has the pool's workload serve until `stop`, and waits until all is free.
async fn start_workload(pool: &Pool, stop: &Arc<AtomicBool>) -> Counts {
    let counts = serve(pool.server_address(0), stop);
    pool.until(|state| state.free_ports == u32::from(PORTS))
        .await;
    counts
}

async fn sessions(pool: &Pool, count: usize) -> Vec<Session> {
    let mut sessions = Vec::new();
    for _ in 0..count {
        sessions.push(pool.request().await.unwrap());
    }
    sessions
}

/// Starts a successor and waits until the former process has ended.
fn replace(pool: &mut Pool) {
    replace_with(pool, &[]);
}

/// The same with further arguments.
fn replace_with(pool: &mut Pool, further: &[&str]) {
    let successor = pool.start_successor_with(0, further);
    let mut former = std::mem::replace(&mut pool.connection_servers[0], successor);
    assert!(former.ends(), "the former process has failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_hand_overs_under_load_cut_nothing_and_change_no_byte() {
    let mut pool = pool(|_| {}).await;
    let stop = Arc::new(AtomicBool::new(false));
    let counts = start_workload(&pool, &stop).await;
    let sessions = sessions(&pool, 30).await;
    let streams = drive_all(&sessions[..20], 200, &stop);
    let flows: Vec<_> = sessions[20..28]
        .iter()
        .map(|s| datagrams(s, &stop))
        .collect();
    let knocking = knock(&sessions[29], &stop);
    let churning = churn(&pool, &stop);
    let held = pool.request().await.unwrap();
    let before = Arc::new(AtomicBool::new(false));
    let pinging = ping(&sessions[28], &before);
    tokio::time::sleep(Duration::from_secs(3)).await;
    before.store(true, Ordering::Relaxed);
    let longest_before = pinging.join().unwrap();
    let pinging = ping(&sessions[28], &stop);
    let mut descriptors = Vec::new();
    for _ in 0..10 {
        replace(&mut pool);
        tokio::time::sleep(Duration::from_millis(300)).await;
        descriptors.push(pool.connection_servers[0].descriptors());
    }
    let held = pool.client().get(&held.id).await.unwrap();
    let state = pool.client().pool().await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let longest = pinging.join().unwrap();
    // The first process made this session, and no client has used it.
    assert_eq!(held.state, portpool::session::SessionState::Held);
    assert!(state.sessions >= 31, "sessions are known: {state:?}");
    let made = churning.await.unwrap();
    let knocks = knocking.await.unwrap();
    let total = all_arrived(streams, &counts).await;
    let datagrams = all_came_back(flows).await;
    println!(
        "10 hand-overs: {total} bytes on 200 streams, {datagrams} datagrams on 8 flows, {made} sessions made, {knocks} new connections; longest round trip {longest:?}, without hand-overs {longest_before:?}; descriptors {descriptors:?}"
    );
    assert!(made > 10 && knocks > 10 && total > 1 << 20);
    // Churn opens and closes a few.
    let (first, last) = (descriptors[0], descriptors[9]);
    assert!(last < first + 10, "descriptors leak: {descriptors:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_attempt_completes_at_the_successor() {
    let mut pool = pool(|table| table.rows[0].ranges[0].protocol = PortProtocol::TCP).await;
    // One server, which accepts nothing and whose queue is full.
    let address: SocketAddr = (pool.server_address(0), SERVER_PORT).into();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(0).unwrap();
    let listener: std::net::TcpListener = socket.into();
    pool.until(|state| state.free_ports == 1).await;
    let session = pool.request().await.unwrap();
    let filler = std::net::TcpStream::connect(address).unwrap();
    let mut client = connect(&session);
    client.write_all(b"first").unwrap();
    replace(&mut pool);
    client.write_all(b" second").unwrap();
    drop((listener.accept().unwrap(), filler));
    // The kernel tries again after 1 s.
    let (mut server, _) = listener.accept().unwrap();
    let mut received = [0; 12];
    server.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"first second");
    server.write_all(b"answer").unwrap();
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_replaces_the_process_under_the_same_id() {
    let mut pool = pool(|_| {}).await;
    let stop = Arc::new(AtomicBool::new(false));
    start_workload(&pool, &stop).await;
    let session = pool.request().await.unwrap();
    let mut stream = connect(&session);
    stream.write_all(&[b'e'; 9]).unwrap();
    echo(&mut stream, "before");
    let first = pool.connection_servers[0].id();
    let mut seen = vec![first];
    for _ in 0..3 {
        pool.connection_servers[0].signal(Signal::USR2);
        let deadline = Instant::now() + SOON;
        let serving = loop {
            assert!(Instant::now() < deadline, "no new process");
            echo(&mut stream, "meanwhile");
            if let [child] = children(first)[..]
                && !seen.contains(&child)
                && sockets(first) == 0
            {
                break child;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        seen.push(serving);
        echo(&mut stream, "after");
        assert!(pool.connection_servers[0].is_running());
    }
    assert!(pool.request().await.is_ok());
    // The signal is passed on to the successor, and both end.
    pool.connection_servers[0].terminate();
    drop(stream);
    assert!(pool.connection_servers[0].ends());
    let last = seen.last().unwrap();
    assert!(
        !Path::new(&format!("/proc/{last}")).exists(),
        "no process is left"
    );
}

/// Children of `parent`, including dead ones that it has not waited for yet.
fn children(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let stats = processes.map(|process| std::fs::read_to_string(process.path().join("stat")));
    let children = stats.flatten().filter_map(|stat| {
        let (pid, rest) = stat.split_once(" (")?;
        let of = rest.rsplit_once(") ")?.1.split(' ').nth(1)?;
        (of.parse() == Ok(parent)).then(|| pid.parse().ok())?
    });
    children.collect()
}

/// TCP and UDP sockets that `process` has open.
fn sockets(process: u32) -> usize {
    let read = |file: String| std::fs::read_to_string(file).unwrap();
    let tables =
        read(format!("/proc/{process}/net/tcp")) + &read(format!("/proc/{process}/net/udp"));
    let inodes: Vec<&str> = tables
        .lines()
        .filter_map(|line| line.split_whitespace().nth(9))
        .collect();
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd"))
        .unwrap()
        .flatten();
    let targets = descriptors.flat_map(|descriptor| std::fs::read_link(descriptor.path()));
    let is_open = |target: &std::path::PathBuf| {
        let inode = target.to_str().unwrap_or_default().strip_prefix("socket:[");
        inode.is_some_and(|inode| inodes.contains(&inode.trim_end_matches(']')))
    };
    targets.filter(is_open).count()
}

#[tokio::test]
async fn a_stale_socket_does_not_prevent_a_start() {
    let mut pool = pool(|_| {}).await;
    pool.until(|_| true).await;
    pool.connection_servers[0].kill();
    assert!(pool.handover_socket(0).exists());
    pool.connection_servers[0] = pool.start_successor(0);
    pool.until(|_| true).await;
    assert!(UnixStream::connect(pool.handover_socket(0)).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_knows_what_clients_have_said() {
    let mut pool = pool(|_| {}).await;
    let stop = Arc::new(AtomicBool::new(false));
    start_workload(&pool, &stop).await;
    let request = portpool::session::SessionRequest {
        metadata: portpool::session::Metadata::new([("map", "harbor")]).unwrap(),
        ..Default::default()
    };
    let session = pool.client().request(request).await.unwrap();
    // Only the predecessor can have told it.
    pool.agents[0].kill();
    pool.until(|state| !state.servers[0].attached).await;
    replace(&mut pool);
    pool.until(|_| true).await;
    let listed = crate::common::get(pool.connection_address(0), 7701, "/v1/sessions");
    assert!(
        listed.contains(&session.id) && listed.contains(r#""metadata":{"map":"harbor"}"#),
        "{listed}"
    );
    stop.store(true, Ordering::Relaxed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_still_counts_towards_the_limit() {
    const LIMIT: &str = "--max-connections=1";
    let mut pool = pool(|_| {}).await;
    // The pool's first connection server has no limit.
    pool.connection_servers[0] = {
        pool.connection_servers[0].kill();
        pool.start_successor_with(0, &[LIMIT])
    };
    let stop = Arc::new(AtomicBool::new(false));
    start_workload(&pool, &stop).await;
    let session = pool.request().await.unwrap();
    let mut stream = connect(&session);
    stream.write_all(&[b'e'; 9]).unwrap();
    echo(&mut stream, "before");
    for _ in 0..2 {
        assert!(!is_served(&session), "the only place is taken");
        replace_with(&mut pool, &[LIMIT]);
        echo(&mut stream, "after");
    }
    assert!(!is_served(&session), "the only place is taken");
    drop(stream);
    let deadline = Instant::now() + SOON;
    while !is_served(&session) {
        assert!(Instant::now() < deadline, "its place does not come back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.store(true, Ordering::Relaxed);
}

/// Whether a new client of the session gets an answer.
fn is_served(session: &Session) -> bool {
    let mut stream = connect(session);
    // The reset of a refused client may come before or after this.
    let _ = stream.write_all(b"eeeeeeeee?");
    matches!(stream.read(&mut [0]), Ok(1))
}

#[tokio::test]
async fn a_waiting_request_is_refused_with_the_remedy_to_ask_again() {
    let mut pool = pool(|_| {}).await;
    pool.until(|_| true).await;
    let client = pool.client();
    // Nothing is free: there is no workload.
    let waiting = tokio::spawn(async move {
        let request = portpool::session::SessionRequest {
            wait_seconds: 60,
            ..Default::default()
        };
        client.request(request).await
    });
    pool.until(|state| state.waiting == 1).await;
    replace(&mut pool);
    let refusal = waiting.await.unwrap().unwrap_err();
    assert!(refusal.is_exhausted(), "{refusal}");
    assert!(refusal.to_string().contains("ask again"), "{refusal}");
}
