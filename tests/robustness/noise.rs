//! Random bytes in random pieces through many connections at once, both ways,
//! with random half-closes and resets. No byte is changed, no acknowledged byte
//! is lost, and no peer takes a part for the whole.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::target::Proxy;
use crate::{End, SOON, pattern, reset, socket};

/// Longest message of one side: more than the sockets on the way hold.
const LONGEST: usize = 2 << 20;

/// What a side does once it has sent its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    /// Ends its side and reads on.
    Ends,
    /// Ends its side, and resets at some time after that.
    EndsAndResets,
    Resets,
}

/// One side of a connection.
struct Party {
    stream: Option<TcpStream>,
    habit: Habit,
    /// It reads once in this many turns.
    slowness: usize,
    bytes: Vec<u8>,
    sent: usize,
    has_ended: bool,
    /// The other side does not take any more.
    is_cut: bool,
    /// How many bytes had been acknowledged when it reset.
    reset_after: Option<usize>,
    received: usize,
    end: Option<End>,
}

impl Party {
    fn new(stream: TcpStream, random: &mut Rng) -> Self {
        stream.set_nonblocking(true).unwrap();
        let habits = [
            Habit::Ends,
            Habit::Ends,
            Habit::EndsAndResets,
            Habit::Resets,
        ];
        let most = [1, 100, 64 << 10, LONGEST, LONGEST][random.usize(..5)];
        let length = random.usize(..most);
        Self {
            stream: Some(stream),
            habit: habits[random.usize(..habits.len())],
            slowness: [1, 1, 8][random.usize(..3)],
            bytes: pattern(length, random.u64(..)),
            sent: 0,
            has_ended: false,
            is_cut: false,
            reset_after: None,
            received: 0,
            end: None,
        }
    }

    /// Sends a piece or, after the last one, follows its habit. Returns whether
    /// anything happened.
    fn send(&mut self, random: &mut Rng) -> bool {
        let Some(stream) = &mut self.stream else {
            return false;
        };
        if self.is_cut || self.has_ended && self.habit == Habit::Ends {
            return false;
        }
        if self.sent < self.bytes.len() {
            let length = (1 + random.usize(..100_000)).min(self.bytes.len() - self.sent);
            return match stream.write(&self.bytes[self.sent..self.sent + length]) {
                Ok(length) => {
                    self.sent += length;
                    true
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => false,
                Err(error) => {
                    assert!(is_reset(&error), "sending: {error}");
                    // `receive` does not see this error a second time.
                    self.is_cut = true;
                    self.end = self.end.or(Some(End::Reset(self.received)));
                    true
                }
            };
        }
        if self.habit != Habit::Resets && !self.has_ended {
            // One that was reset meanwhile has no side to end.
            self.has_ended = stream.shutdown(Shutdown::Write).is_ok();
            self.is_cut = !self.has_ended;
            return true;
        }
        if self.has_ended && random.usize(..20) > 0 {
            return false;
        }
        let socket = socket(stream);
        if socket.as_ref().is_some_and(|socket| socket.is_ending) {
            // If the end were lost now, a reset could not reach the proxy.
            return false;
        }
        let waiting = socket.map_or(self.sent, |socket| socket.unacknowledged);
        self.reset_after = Some(self.sent.saturating_sub(waiting));
        self.stream.take().map(reset).is_some()
    }

    /// Reads a piece, which must be what `peer` sent. Returns whether anything
    /// happened.
    fn receive(&mut self, peer: &Self, random: &mut Rng) -> bool {
        let is_over = matches!(self.end, Some(End::Closed(_))) || self.is_over();
        let Some(stream) = self.stream.as_mut().filter(|_| !is_over) else {
            return false;
        };
        if random.usize(..self.slowness) > 0 {
            return false;
        }
        let mut space = [0; 64 << 10];
        let most = 1 + random.usize(..space.len());
        match stream.read(&mut space[..most]) {
            Ok(0) if self.end.is_some() => self.stream = None,
            Ok(0) => self.end = Some(End::Closed(self.received)),
            Ok(length) => {
                let after = self.received + length;
                let is_right = peer.bytes.get(self.received..after) == Some(&space[..length]);
                assert!(is_right, "bytes from {} on were changed", self.received);
                self.received = after;
                if let Some(End::Reset(received)) = &mut self.end {
                    *received = after;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => {
                assert!(is_reset(&error), "receiving: {error}");
                self.end = Some(End::Reset(self.received));
                self.stream = None;
            }
        }
        true
    }

    /// Whether it neither sends nor receives any more.
    fn is_over(&self) -> bool {
        let has_sent = self.has_ended && self.habit == Habit::Ends || self.is_cut;
        self.stream.is_none() || has_sent && matches!(self.end, Some(End::Closed(_)))
    }

    /// Asserts that it saw how `peer` ended, after all of its bytes.
    fn expect_whole(&self, peer: &Self) {
        if self.reset_after.is_some() {
            return;
        }
        match self.end {
            Some(End::Closed(received)) => {
                assert!(peer.has_ended, "a part of {received} looks whole");
                assert_eq!(received, peer.sent, "of an end in order");
            }
            Some(End::Reset(received)) => {
                let acknowledged = peer.reset_after;
                let is_whole = acknowledged.is_some_and(|bytes| received >= bytes);
                assert!(is_whole, "{received} of {acknowledged:?} and a reset");
            }
            None => panic!("it saw no end"),
        }
    }
}

fn is_reset(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

/// Lets every party act in turn until all are over.
fn play(pairs: &mut [[Party; 2]], random: &mut Rng) {
    let mut moved = Instant::now();
    while !pairs.iter().flatten().all(Party::is_over) {
        let mut has_moved = false;
        for [client, server] in &mut *pairs {
            has_moved |= client.send(random) | client.receive(server, random);
            has_moved |= server.send(random) | server.receive(client, random);
        }
        if has_moved {
            moved = Instant::now();
        } else {
            assert!(moved.elapsed() < SOON, "nothing moves any more");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn random_bytes_and_ends_change_and_lose_nothing() {
    const ROUNDS: u64 = 3;
    const CONNECTIONS: u16 = 120;
    let proxy = Proxy::start(|_| {});
    let listeners: Vec<_> = (0..4).map(|index| proxy.listener(index)).collect();
    let (mut bytes, mut resets) = (0, 0);
    for round in 0..ROUNDS {
        let mut random = Rng::with_seed(0x5eed + 1000 * round);
        let mut pairs = Vec::new();
        for number in 0..CONNECTIONS {
            let index = number % 4;
            let client = proxy.connect(index);
            let (server, _) = listeners[usize::from(index)].accept().unwrap();
            pairs.push([client, server].map(|stream| Party::new(stream, &mut random)));
        }
        play(&mut pairs, &mut random);
        for [client, server] in &pairs {
            client.expect_whole(server);
            server.expect_whole(client);
            bytes += client.received + server.received;
            resets += usize::from(client.reset_after.is_some() | server.reset_after.is_some());
        }
    }
    println!("{bytes} bytes arrived, {resets} connections were reset");
    assert!(resets > 0 && bytes > LONGEST, "not much was under way");
    drop(listeners);
    proxy.expect_clean();
}
