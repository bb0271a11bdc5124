//! What the network and peers can do to a forwarder, and how it must react.
//!
//! The tests are black-box: the proxy is a process of its own, observed through
//! its ports, `/proc` and, for portpool, its metrics. `PORTPOOL_TEST_TARGET`
//! points the suite at `haproxy` or `nginx` instead; `make robustness` runs it
//! against all three and writes docs/robustness.md. Each test ends with
//! [`target::Proxy::expect_clean`]: no descriptor, session or memory is left.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

mod changes;
mod endings;
mod limits;
mod namespace;
#[path = "../common/network.rs"]
mod network;
mod noise;
mod pressure;
mod reaching;
#[path = "../common/table.rs"]
mod tables;
mod target;
mod udp;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use fastrand::Rng;

/// Longest that anything may take, on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(30);

/// Waits until the condition holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Random bytes, the same for each seed.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// The kernel's state of one end of a connection.
pub struct Socket {
    /// Both sides have ended the connection, and the peer has not acknowledged
    /// this end yet. Linux then forgets a connection instead of resetting it.
    pub is_ending: bool,
    /// Bytes that the peer's kernel has not acknowledged. An end counts as one.
    pub unacknowledged: usize,
}

/// The kernel's state of `stream`; `None` if it is no longer connected.
pub fn socket(stream: &TcpStream) -> Option<Socket> {
    let hexadecimal = |address: SocketAddr| {
        let IpAddr::V4(ip) = address.ip() else {
            panic!("{address} is not IPv4");
        };
        let ip = u32::from_ne_bytes(ip.octets());
        format!("{ip:08X}:{:04X}", address.port())
    };
    let local = hexadecimal(stream.local_addr().ok()?);
    let peer = hexadecimal(stream.peer_addr().ok()?);
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        if fields.next()? != local || fields.next()? != peer {
            return None;
        }
        // LAST_ACK and CLOSING.
        let is_ending = matches!(fields.next()?, "09" | "0B");
        let (unacknowledged, _) = fields.next()?.split_once(':')?;
        Some(Socket {
            is_ending,
            unacknowledged: usize::from_str_radix(unacknowledged, 16).ok()?,
        })
    })
}

/// Closes the connection with a reset.
pub fn reset(stream: TcpStream) {
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// How a connection ended, after how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The connection was closed in order.
    Closed(usize),
    /// The connection was reset.
    Reset(usize),
}

/// Reads until the connection ends.
pub fn end_of(stream: &mut TcpStream) -> End {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let (mut space, mut length) = ([0; 16 * 1024], 0);
    loop {
        match stream.read(&mut space) {
            Ok(0) => return End::Closed(length),
            Ok(read) => length += read,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return End::Reset(length),
            Err(error) => panic!("neither closed nor reset: {error}"),
        }
    }
}

/// Asserts that a message arrives in both directions.
pub fn echoes(client: &mut TcpStream, server: &mut TcpStream, message: &[u8]) {
    let mut space = vec![0; message.len()];
    for (from, to) in [(1, 2), (2, 1)] {
        let (from, to): (&mut TcpStream, &mut TcpStream) = match (from, to) {
            (1, _) => (&mut *client, &mut *server),
            _ => (&mut *server, &mut *client),
        };
        from.write_all(message).unwrap();
        to.set_read_timeout(Some(SOON)).unwrap();
        to.read_exact(&mut space).unwrap();
        assert_eq!(space, message);
    }
}

/// The path of the surrounding test, without the crate's name.
#[macro_export]
macro_rules! here {
    () => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        let name = name.strip_suffix("::here").unwrap();
        name.split_once("::").unwrap().1
    }};
}

/// Returns from the test, with a note, unless the target is one of these.
#[macro_export]
macro_rules! only_for {
    ($($target:ident),+; $reason:expr) => {
        let target = $crate::target::Target::chosen();
        if !matches!(target, $($crate::target::Target::$target)|+) {
            return $crate::target::not_applicable($crate::here!(), $reason);
        }
    };
}
