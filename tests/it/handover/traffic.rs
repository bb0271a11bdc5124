//! Load during hand-overs: streams, datagrams and new clients whose every byte is
//! checked.

use std::collections::HashMap;
use std::io::Write;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use portpool::session::{Session, SessionRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinHandle;

use super::PORTS;
use crate::common::{Pool, SERVER_PORT, SOON, connect, echo};

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
pub(super) type Counts = Arc<Mutex<HashMap<u64, (u64, u64)>>>;

/// A workload on all of the pool's ports. A stream begins with its seed and
/// the workload's habit; the habit `e` means echo. Datagrams are echoed.
pub(super) fn serve(address: IpAddr, stop: &Arc<AtomicBool>) -> Counts {
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
pub(super) type Driven = JoinHandle<(u64, (u64, u64))>;

/// Drives `count` streams, spread over `sessions`, until `stop`.
pub(super) fn drive_all(sessions: &[Session], count: u64, stop: &Arc<AtomicBool>) -> Vec<Driven> {
    let streams = (0..count).map(|seed| {
        let session = sessions[seed as usize % sessions.len()].clone();
        tokio::spawn(drive(session, seed, stop.clone()))
    });
    streams.collect()
}

/// Expects all that was sent on `streams` to have arrived, both ways; returns
/// how many bytes.
pub(super) async fn all_arrived(streams: Vec<Driven>, counts: &Counts) -> u64 {
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
pub(super) async fn all_came_back(flows: Vec<JoinHandle<(u64, u64)>>) -> u64 {
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
pub(super) fn ping(session: &Session, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<Duration> {
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
pub(super) fn datagrams(session: &Session, stop: &Arc<AtomicBool>) -> JoinHandle<(u64, u64)> {
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
pub(super) fn churn(pool: &Pool, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
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
pub(super) fn knock(session: &Session, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
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
