//! Clients that take sessions and check every byte that comes back.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use jiff::Timestamp;
use portpool::client::Client;
use portpool::pool::PortProtocol;
use portpool::session::{Session, SessionRequest};
use tokio::runtime::Handle;

use crate::faults::{Announced, Scope};

/// Longest silence of a connection that works.
const SILENCE: Duration = Duration::from_secs(5);
/// Most bytes of a session.
const MOST: usize = 2 << 20;
/// Time after which an unanswered datagram is sent again, and how often.
const DATAGRAM_WAIT: Duration = Duration::from_millis(700);
const DATAGRAM_TRIES: usize = 4;

/// What happened to all clients so far.
#[derive(Default)]
pub struct Counts {
    pub sessions: AtomicU64,
    pub bytes: AtomicU64,
    pub datagrams: AtomicU64,
    pub datagrams_resent: AtomicU64,
    pub half_closes: AtomicU64,
    pub resets: AtomicU64,
    /// Requests that found no free port.
    pub exhausted: AtomicU64,
    /// Failures within announced faults.
    pub excused: AtomicU64,
    /// Failures outside of them.
    pub lost: AtomicU64,
    /// Bytes that differ from those sent. No fault excuses them.
    pub corrupted: AtomicU64,
}

/// Bytes came back that were not sent.
#[derive(Debug, thiserror::Error)]
#[error("wrong bytes came back")]
struct Corrupted;

/// Takes sessions until `stop`, `load_sharing` being the connection servers.
pub fn run(
    load_sharing: &[String],
    announced: &Announced,
    counts: &Counts,
    runtime: &Handle,
    stop: &AtomicBool,
    seed: u64,
) {
    let mut random = Rng::with_seed(seed);
    let clients: Vec<Client> = load_sharing
        .iter()
        .flat_map(|address| Client::new(address))
        .collect();
    while !stop.load(Ordering::Relaxed) {
        let index = random.usize(..clients.len());
        let asked = Instant::now();
        let is_udp = random.usize(..4) == 0;
        let request = SessionRequest {
            protocol: Some(if is_udp {
                PortProtocol::UDP
            } else {
                PortProtocol::TCP
            }),
            wait_seconds: 5,
            ..SessionRequest::default()
        };
        let connection_server = Scope::ConnectionServer(index as u32);
        let session = match runtime.block_on(clients[index].request(request)) {
            Ok(session) => session,
            Err(error) => {
                // The client does not know which server was chosen.
                let is_excused = announced.any_since(asked);
                let counter = match (error.is_exhausted(), is_excused) {
                    (true, _) => &counts.exhausted,
                    (false, true) => &counts.excused,
                    (false, false) => {
                        eprintln!(
                            "{} lost: a request, after {:?}: {error}",
                            Timestamp::now(),
                            asked.elapsed()
                        );
                        &counts.lost
                    }
                };
                counter.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let result = if is_udp {
            datagrams(&session, &mut random, counts)
        } else {
            stream(&session, &mut random, counts)
        };
        counts.sessions.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = result {
            let slot = session
                .server
                .rsplit('-')
                .next()
                .and_then(|slot| slot.parse().ok());
            let scopes = [connection_server, Scope::Server(slot.unwrap_or(u32::MAX))];
            let what = format!(
                "session {} on {} at {}:{}",
                session.id, session.server, session.address, session.port
            );
            if is_corruption(&error) {
                eprintln!("{} corrupted: {what}", Timestamp::now());
                counts.corrupted.fetch_add(1, Ordering::Relaxed);
            } else if announced.excuse(asked, &scopes) {
                counts.excused.fetch_add(1, Ordering::Relaxed);
            } else {
                eprintln!(
                    "{} lost: {what}, after {:?}: {error}",
                    Timestamp::now(),
                    asked.elapsed()
                );
                counts.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        // Other sessions end by themselves, with UDP only once they are idle.
        if is_udp || random.usize(..2) == 0 {
            let _ = runtime.block_on(clients[index].release(&session.id));
        }
    }
}

fn is_corruption(error: &io::Error) -> bool {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Corrupted>());
    inner.is_some()
}

fn address(session: &Session) -> io::Result<SocketAddr> {
    let text = portpool::client::endpoint(session);
    text.parse().map_err(io::Error::other)
}

fn random_bytes(random: &mut Rng, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

/// Sends random bytes in random chunks and checks what comes back, to the end
/// or, at times, to a reset halfway.
fn stream(session: &Session, random: &mut Rng, counts: &Counts) -> io::Result<()> {
    let stream = TcpStream::connect_timeout(&address(session)?, SILENCE)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    // Every order of magnitude is equally likely.
    let magnitude = random.u32(1..=MOST.ilog2());
    let size = random.usize(1..=1 << magnitude);
    let bytes = random_bytes(random, size);
    let bytes = bytes.as_slice();
    let is_reset = random.usize(..8) == 0;
    let pauses = random.usize(..8) == 0;
    let mut chunks = random.fork();
    let half_close = random.usize(..2) == 0;
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| write(&stream, bytes, random, half_close));
        let upto = if is_reset { size / 2 } else { size };
        let read = read(&stream, &bytes[..upto], &mut chunks, pauses);
        if is_reset || read.is_err() {
            // Closed with unread bytes: the other side sees a reset.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            let _ = stream.shutdown(Shutdown::Both);
        }
        let written = writing
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("writer panicked")));
        read?;
        if is_reset {
            counts.resets.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        written?;
        if half_close {
            counts.half_closes.fetch_add(1, Ordering::Relaxed);
            if (&stream).read(&mut [0; 16])? != 0 {
                return Err(io::Error::other(Corrupted));
            }
        }
        counts.bytes.fetch_add(size as u64, Ordering::Relaxed);
        Ok(())
    })
}

fn write(
    mut stream: &TcpStream,
    mut rest: &[u8],
    random: &mut Rng,
    half_close: bool,
) -> io::Result<()> {
    while !rest.is_empty() {
        let most = 1 << random.usize(..18);
        let (chunk, later) = rest.split_at(rest.len().min(random.usize(1..=most)));
        stream.write_all(chunk)?;
        rest = later;
        if random.usize(..64) == 0 {
            std::thread::sleep(Duration::from_micros(random.u64(..3_000)));
        }
    }
    if half_close {
        stream.shutdown(Shutdown::Write)?;
    }
    Ok(())
}

fn read(
    mut stream: &TcpStream,
    mut expected: &[u8],
    random: &mut Rng,
    pauses: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 17];
    let mut pauses_left = if pauses { 20 } else { 0 };
    while !expected.is_empty() {
        let most = expected.len().min(random.usize(1..=buffer.len()));
        let taken = stream.read(&mut buffer[..most])?;
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (now, later) = expected.split_at(taken);
        if buffer[..taken] != *now {
            return Err(io::Error::other(Corrupted));
        }
        expected = later;
        if pauses_left > 0 {
            pauses_left -= 1;
            std::thread::sleep(Duration::from_millis(random.u64(..60)));
        }
    }
    Ok(())
}

/// Sends datagrams one after another. One without an answer is sent again,
/// because datagrams may be lost.
fn datagrams(session: &Session, random: &mut Rng, counts: &Counts) -> io::Result<()> {
    let to = address(session)?;
    let socket = UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(DATAGRAM_WAIT))?;
    let mut buffer = vec![0; 65_536];
    let mut sent = Vec::new();
    for _ in 0..random.u32(1..=8) {
        let size = random.usize(8..1_408);
        sent.push(random_bytes(random, size));
        let datagram = sent.last().expect("just pushed");
        let mut tries = 0;
        'sent: loop {
            if tries == DATAGRAM_TRIES {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if tries > 0 {
                counts.datagrams_resent.fetch_add(1, Ordering::Relaxed);
            }
            tries += 1;
            if socket.send(datagram).is_err() {
                // An earlier datagram was refused: the workload is being restarted.
                std::thread::sleep(DATAGRAM_WAIT);
                continue;
            }
            while let Ok(length) = socket.recv(&mut buffer) {
                if buffer[..length] == datagram[..] {
                    break 'sent;
                }
                // Only a late answer to an earlier datagram may come instead.
                if !sent.iter().any(|earlier| buffer[..length] == earlier[..]) {
                    return Err(io::Error::other(Corrupted));
                }
            }
        }
        counts.datagrams.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
