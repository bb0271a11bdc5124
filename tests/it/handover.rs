//! A connection server's successor takes over: nothing is cut, refused or
//! changed.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use crate::common::{Pool, SERVER_PORT, SOON, connect, echo};
use portpool::pool::PortProtocol;
use portpool::session::{Session, SessionRequest};
use rustix::process::{Signal, getpid, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinHandle;

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

/// Bytes that are quick to make and to check: a long random block, repeated,
/// from an offset that depends on the seed.
struct Pattern(usize);

impl Pattern {
    fn new(seed: u64) -> Self {
        Self((seed % 65_521) as usize)
    }

    /// The next `length` bytes, in pieces.
    fn next(&mut self, length: usize) -> Vec<u8> {
        static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let mut random = Random(1);
            (0..65_521).map(|_| random.below(256) as u8).collect()
        });
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let piece = &BLOCK[self.0..];
            let piece = &piece[..piece.len().min(length - bytes.len())];
            bytes.extend_from_slice(piece);
            self.0 = (self.0 + piece.len()) % BLOCK.len();
        }
        bytes
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % below
    }
}

/// How one end of a stream behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    /// Sends chunks of random lengths with pauses until `stop` is set.
    Chunks,
    /// Sends as much as the peer takes until `stop` is set.
    Flood,
    /// Ends at once.
    HalfClose,
}

/// Sends the pattern of `seed`; returns how many bytes.
async fn send(mut to: OwnedWriteHalf, seed: u64, habit: Habit, stop: Arc<AtomicBool>) -> u64 {
    let (mut pattern, mut random, mut sent) = (Pattern::new(seed), Random(seed), 0);
    while habit != Habit::HalfClose && !stop.load(Ordering::Relaxed) {
        let length = match habit {
            Habit::Chunks => random.below(6000) as usize + 1,
            _ => 65_536,
        };
        to.write_all(&pattern.next(length)).await.unwrap();
        sent += length as u64;
        if habit == Habit::Chunks {
            tokio::time::sleep(Duration::from_millis(random.below(40) + 1)).await;
        }
    }
    to.shutdown().await.unwrap();
    sent
}

/// Reads the pattern of `seed` to its end; returns how many bytes. With `slow`,
/// it reads little at a time until that is set.
async fn receive(mut from: OwnedReadHalf, seed: u64, slow: Option<Arc<AtomicBool>>) -> u64 {
    let (mut pattern, mut space, mut received) = (Pattern::new(seed), vec![0; 65_536], 0);
    loop {
        let is_slow = slow
            .as_ref()
            .is_some_and(|stop| !stop.load(Ordering::Relaxed));
        let most = if is_slow { 2000 } else { space.len() };
        let length = from.read(&mut space[..most]).await.unwrap();
        if length == 0 {
            return received;
        }
        let is_same = space[..length] == pattern.next(length);
        assert!(is_same, "bytes differ after {received}");
        received += length as u64;
        if is_slow {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// How many bytes the workload has sent and received on each stream, by seed.
type Counts = Arc<Mutex<HashMap<u64, (u64, u64)>>>;

/// A workload on all of the pool's ports. A stream begins with its seed and
/// the workload's habit; the habit `e` means echo. Datagrams are echoed.
fn serve(address: IpAddr, stop: &Arc<AtomicBool>) -> Counts {
    let counts = Counts::default();
    for port in SERVER_PORT..SERVER_PORT + PORTS {
        let (counts, stop) = (counts.clone(), stop.clone());
        tokio::spawn(async move {
            let listener = TcpListener::bind((address, port)).await.unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve_stream(stream, counts.clone(), stop.clone()));
            }
        });
        tokio::spawn(async move {
            let socket = UdpSocket::bind((address, port)).await.unwrap();
            let (mut space, mut first) = (vec![0; 65_536], None);
            while let Ok((length, peer)) = socket.recv_from(&mut space).await {
                let known = *first.get_or_insert(peer);
                assert_eq!(known, peer, "the flow goes on from the same socket");
                socket.send_to(&space[..length], peer).await.unwrap();
            }
        });
    }
    counts
}

async fn serve_stream(mut stream: TcpStream, counts: Counts, stop: Arc<AtomicBool>) {
    let mut head = [0; 9];
    if stream.read_exact(&mut head).await.is_err() {
        return;
    }
    let seed = u64::from_be_bytes(head[..8].try_into().unwrap());
    let (mut from, mut to) = stream.into_split();
    let habit = match head[8] {
        b'c' => Habit::Chunks,
        b'f' => Habit::Flood,
        _ => {
            let _ = tokio::io::copy(&mut from, &mut to).await;
            return;
        }
    };
    let (sent, received) = tokio::join!(send(to, !seed, habit, stop), receive(from, seed, None));
    counts.lock().unwrap().insert(seed, (sent, received));
}

/// Drives a client's end of a stream; returns the seed, and how many bytes were
/// sent and received.
async fn drive(session: Session, seed: u64, stop: Arc<AtomicBool>) -> (u64, (u64, u64)) {
    let mut stream = TcpStream::connect((session.address.as_str(), session.port))
        .await
        .unwrap();
    let (ours, theirs) = match seed % 20 {
        0..3 => (Habit::HalfClose, Habit::Chunks),
        3 => (Habit::Chunks, Habit::Flood),
        _ => (Habit::Chunks, Habit::Chunks),
    };
    let mut head = seed.to_be_bytes().to_vec();
    head.push(if theirs == Habit::Flood { b'f' } else { b'c' });
    stream.write_all(&head).await.unwrap();
    let slow = (theirs == Habit::Flood).then(|| stop.clone());
    let (from, to) = stream.into_split();
    let (sent, received) = tokio::join!(send(to, seed, ours, stop), receive(from, !seed, slow));
    (seed, (sent, received))
}

/// A running [`drive`].
type Driven = JoinHandle<(u64, (u64, u64))>;

/// Drives `count` streams, spread over `sessions`, until `stop`.
fn drive_all(sessions: &[Session], count: u64, stop: &Arc<AtomicBool>) -> Vec<Driven> {
    let streams = (0..count).map(|seed| {
        let session = sessions[seed as usize % sessions.len()].clone();
        tokio::spawn(drive(session, seed, stop.clone()))
    });
    streams.collect()
}

/// Expects all that was sent on `streams` to have arrived, both ways; returns
/// how many bytes.
async fn all_arrived(streams: Vec<Driven>, counts: &Counts) -> u64 {
    let mut total = 0;
    for stream in streams {
        let (seed, (sent, received)) = stream.await.unwrap();
        let ends = || counts.lock().unwrap().get(&seed).copied();
        let deadline = Instant::now() + SOON;
        while ends().is_none() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(
            ends(),
            Some((received, sent)),
            "stream {seed}: all arrives, both ways"
        );
        total += sent + received;
    }
    total
}

/// Expects every datagram of `flows` to have come back; returns how many.
async fn all_came_back(flows: Vec<JoinHandle<(u64, u64)>>) -> u64 {
    let mut datagrams = 0;
    for flow in flows {
        let (sent, received) = flow.await.unwrap();
        assert_eq!(sent, received);
        datagrams += sent;
    }
    datagrams
}

/// Sends small messages there and back on one stream; returns the longest time
/// that one took.
fn ping(session: &Session, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<Duration> {
    let (mut stream, stop) = (connect(session), stop.clone());
    stream.set_nodelay(true).unwrap();
    stream.write_all(&[b'e'; 9]).unwrap();
    std::thread::spawn(move || {
        let mut longest = Duration::ZERO;
        while !stop.load(Ordering::Relaxed) {
            let started = Instant::now();
            echo(&mut stream, "ping");
            longest = longest.max(started.elapsed());
            std::thread::sleep(Duration::from_millis(1));
        }
        longest
    })
}

/// Sends datagrams of one client; returns how many were sent and came back.
fn datagrams(session: &Session, stop: &Arc<AtomicBool>) -> JoinHandle<(u64, u64)> {
    let (address, stop) = ((session.address.clone(), session.port), stop.clone());
    tokio::spawn(async move {
        let socket = UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
        socket
            .connect((address.0.as_str(), address.1))
            .await
            .unwrap();
        let (mut sent, mut received, mut space) = (0u64, 0, [0; 2000]);
        while !stop.load(Ordering::Relaxed) {
            let message = vec![sent as u8; 1 + (sent % 1200) as usize];
            socket.send(&message).await.unwrap();
            sent += 1;
            let answer = tokio::time::timeout(SOON, socket.recv(&mut space)).await;
            let length = answer.expect("a datagram is lost").unwrap();
            assert_eq!(&space[..length], message);
            received += 1;
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        (sent, received)
    })
}

/// Has the server echo a first message.
async fn greet(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"eeeeeeeeehello").await?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"hello");
    Ok(())
}

/// Requests, uses and releases sessions, one after another; returns how many.
fn churn(pool: &Pool, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let (client, stop) = (pool.client(), stop.clone());
    tokio::spawn(async move {
        let mut made = 0;
        while !stop.load(Ordering::Relaxed) {
            // On a busy machine an agent may answer late, which a client that does
            // not wait is told.
            let request = SessionRequest {
                wait_seconds: 10,
                ..SessionRequest::default()
            };
            let session = match client.request(request).await {
                // It waited during a hand-over, and has to ask again.
                Err(error) if error.is_shutting_down() => continue,
                answer => answer.unwrap(),
            };
            let mut stream = client.connect(&session).await.unwrap();
            greet(&mut stream).await.unwrap();
            drop(stream);
            // After a lost answer the client asks again; the session may be over by then.
            if let Err(error) = client.release(&session.id).await {
                assert!(!error.to_string().contains("status"), "{error}");
            }
            made += 1;
        }
        made
    })
}

/// Opens connections of one session, one after another; returns how many.
fn knock(session: &Session, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let (session, stop) = (session.clone(), stop.clone());
    tokio::spawn(async move {
        let mut made = 0;
        while !stop.load(Ordering::Relaxed) {
            let address = (session.address.as_str(), session.port);
            let mut stream = TcpStream::connect(address).await.expect("none is refused");
            greet(&mut stream).await.expect("none is reset");
            made += 1;
        }
        made
    })
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

/// A process of its own that asks for a hand-over and kills itself at the point
/// `DIES_AT`. Does nothing without the environment variables.
#[test]
#[ignore = "run by other tests"]
fn dying_successor() {
    let Ok(path) = std::env::var("HANDOVER_PATH") else {
        return;
    };
    let point = std::env::var("DIES_AT").unwrap();
    let die = || {
        kill_process(getpid(), Signal::KILL).unwrap();
        unreachable!("killed");
    };
    let mut stream = UnixStream::connect(path).unwrap();
    if point == "connected" {
        die();
    }
    stream.write_all(&frame(&ASK)).unwrap();
    let mut frames = 0;
    loop {
        if point == "asked" || (point == "receiving" && frames == 1) {
            die();
        }
        // The kernel closes descriptors that are not received.
        let content = read_frame(&mut stream);
        frames += 1;
        if content == DONE {
            break;
        }
    }
    if point == "received" {
        die();
    }
    stream.write_all(&frame(&READY)).unwrap();
    if point == "ready" {
        die();
    }
    assert_eq!(read_frame(&mut stream), GO);
    die();
}

/// Contents of frames, as protobuf has them.
const ASK: [u8; 4] = [0x0a, 2, 0x08, 1];
const ASK_OTHERWISE: [u8; 4] = [0x0a, 2, 0x08, 99];
const DONE: [u8; 2] = [9 << 3 | 2, 0];
const READY: [u8; 2] = [10 << 3 | 2, 0];
const GO: [u8; 2] = [11 << 3 | 2, 0];

fn frame(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap();
    [&length.to_be_bytes(), &[0; 4], content].concat()
}

fn read_frame(stream: &mut UnixStream) -> Vec<u8> {
    let mut head = [0; 8];
    stream.read_exact(&mut head).unwrap();
    let length = u32::from_be_bytes(head[..4].try_into().unwrap());
    let mut content = vec![0; length as usize];
    stream.read_exact(&mut content).unwrap();
    content
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_is_killed_during_a_hand_over_changes_nothing() {
    let mut pool = pool(|_| {}).await;
    let stop = Arc::new(AtomicBool::new(false));
    let counts = start_workload(&pool, &stop).await;
    let sessions = sessions(&pool, 10).await;
    let streams = drive_all(&sessions[..5], 40, &stop);
    let flows: Vec<_> = sessions[5..8].iter().map(|s| datagrams(s, &stop)).collect();
    let knocking = knock(&sessions[8], &stop);
    let churning = churn(&pool, &stop);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let descriptors = pool.connection_servers[0].descriptors();
    for point in ["connected", "asked", "receiving", "received", "ready", "go"] {
        for _ in 0..2 {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "handover::dying_successor", "--ignored"])
                .env("HANDOVER_PATH", pool.handover_socket(0))
                .env("DIES_AT", point)
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            assert_eq!(
                std::os::unix::process::ExitStatusExt::signal(&status),
                Some(9),
                "at {point}: {status}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(pool.connection_servers[0].is_running());
        }
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let now = pool.connection_servers[0].descriptors();
    assert!(
        now < descriptors + 10,
        "descriptors leak: {descriptors}, {now}"
    );
    // A successor that lives takes over.
    replace(&mut pool);
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.store(true, Ordering::Relaxed);
    assert!(churning.await.unwrap() > 0 && knocking.await.unwrap() > 0);
    all_arrived(streams, &counts).await;
    all_came_back(flows).await;
}

#[tokio::test]
async fn a_successor_of_another_version_is_refused() {
    let mut pool = pool(|_| {}).await;
    pool.until(|_| true).await;
    let mut stream = UnixStream::connect(pool.handover_socket(0)).unwrap();
    stream.write_all(&frame(&ASK_OTHERWISE)).unwrap();
    let answer = String::from_utf8_lossy(&read_frame(&mut stream)).into_owned();
    assert!(
        answer.contains("version 99 is not spoken here, only 1"),
        "{answer}"
    );
    assert!(pool.connection_servers[0].is_running());
    replace(&mut pool);
}

/// Asks for a hand-over as another user and prints the answer.
#[test]
#[ignore = "run by other tests"]
fn successor_of_another_user() {
    let Ok(path) = std::env::var("HANDOVER_PATH") else {
        return;
    };
    let mut stream = UnixStream::connect(path).unwrap();
    // The refusal does not wait for the request, so that sending may fail.
    let _ = stream.write_all(&frame(&ASK));
    let answer = read_frame(&mut stream);
    println!("answer: {}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn another_user_is_refused() {
    const NOBODY: u32 = 65_534;
    let mut pool = pool(|_| {}).await;
    pool.until(|_| true).await;
    let socket = pool.handover_socket(0);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600, "no other user can connect");
    if !rustix::process::geteuid().is_root() {
        return println!("not root: cannot be another user; only the file's mode was checked");
    }
    // Even when the file's mode would allow it.
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777));
    open(&socket).unwrap();
    open(socket.parent().unwrap()).unwrap();
    // Not by its path: other users may not be allowed to see the checkout.
    let output = Command::new("/proc/self/exe")
        .args(["--exact", "handover::successor_of_another_user"])
        .args(["--ignored", "--nocapture"])
        .env("HANDOVER_PATH", &socket)
        .current_dir("/")
        .uid(NOBODY)
        .output()
        .unwrap();
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(answer.contains("runs as uid 65534, not as 0"), "{output:?}");
    assert!(pool.connection_servers[0].is_running());
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
