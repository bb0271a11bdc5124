//! One TCP connection through a connection port: two sockets and two
//! directions.
//!
//! A direction holds no buffer. It reads into its thread's scratch space and
//! writes at once; only what the receiver does not take now is kept, and then
//! nothing more is read until that is gone. So a slow reader costs at most one
//! scratch space, and the sender feels it through TCP's own window.
//!
//! A direction that keeps filling the scratch space is lent a pipe, through
//! which the kernel moves pages instead of copying bytes twice.

mod remains;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

pub(super) use self::remains::{Delivery, Remains};
use super::admission::Permit;
use super::handover::{HandedConnection, HandedDirection};
use super::pipes::{Pipe, Pipes};
use super::stream::Stream;
use super::{SessionKey, Traffic};
use crate::table::ListenPort;

/// Bytes a thread reads at once, and most bytes that a direction keeps.
pub(super) const SCRATCH_BYTES: usize = 64 * 1024;

/// Reads of one direction before the others of its thread get their turn.
const READS_PER_TURN: usize = 8;

/// Scratch spaces that a direction fills one after the other before it is lent
/// a pipe: two, so that a message of a usual size never is.
const FULL_READS: u8 = 2;

/// Bytes between two looks at deadlines below which a direction needs no pipe.
const BUSY_BYTES: usize = 1024 * 1024;

/// Bytes between two looks at deadlines from which it is worth a delay that
/// more of them gather.
const MUCH_BYTES: usize = 4 * 1024 * 1024;

/// What a thread lends to the direction that has its turn.
#[derive(Debug)]
pub(super) struct Means {
    pub(super) scratch: Vec<u8>,
    pub(super) pipes: Pipes,
    /// What was carried since that was last counted.
    pub(super) carried: Traffic,
}

/// What the destination did not take yet.
#[derive(Debug)]
enum Held {
    /// Bytes, from an offset on.
    Bytes(Box<[u8]>, usize),
    /// A pipe, and how many bytes are in it: lent until the direction is quiet.
    Pipe(Pipe, usize),
}

/// A direction: from a source to a destination socket.
#[derive(Debug, Default)]
struct Direction {
    /// In a box: most directions hold nothing.
    held: Option<Box<Held>>,
    bytes: u64,
    /// Reads in a row that have filled the scratch space.
    full_reads: u8,
    /// The source has ended its side.
    is_read: bool,
    /// The destination was told of the end: nothing will follow.
    is_done: bool,
}

/// How far a direction got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Waits for the source or the destination.
    Blocked,
    /// Had its turn; there may be more.
    Yielded,
    /// The source has ended and the destination has everything.
    Done,
    /// A socket broke: both are to be reset.
    Broken(Fault),
}

/// Which socket of a direction broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Source(Errno),
    Destination(Errno),
}

impl Direction {
    /// Moves bytes until something blocks or the turn is over. `at_end` says
    /// that the source's end has been signalled, so that a short read is not
    /// taken for the last one.
    fn pump<S: Stream>(
        &mut self,
        source: &S,
        destination: &S,
        at_end: bool,
        means: &mut Means,
    ) -> Progress {
        if self.is_done {
            return Progress::Done;
        }
        for _ in 0..READS_PER_TURN {
            match self.flush(destination) {
                Ok(true) => {}
                Ok(false) => return Progress::Blocked,
                Err(errno) => return Progress::Broken(Fault::Destination(errno)),
            }
            if self.is_read {
                self.give_back(&mut means.pipes);
                self.is_done = true;
                return Progress::Done;
            }
            match self.fill(source, destination, means) {
                Ok(0) => self.is_read = true,
                // The source has nothing more; the next event tells.
                Ok(length) if length < SCRATCH_BYTES && !at_end && self.held.is_none() => {
                    return Progress::Blocked;
                }
                Ok(_) | Err(Fault::Source(Errno::INTR)) => {}
                Err(Fault::Source(Errno::AGAIN)) => return Progress::Blocked,
                Err(fault) => return Progress::Broken(fault),
            }
        }
        Progress::Yielded
    }

    /// Takes in what the source has, and passes on what the destination takes
    /// at once. The number of bytes taken in; 0 at the source's end.
    fn fill<S: Stream>(
        &mut self,
        source: &S,
        destination: &S,
        means: &mut Means,
    ) -> Result<usize, Fault> {
        if let Some(Held::Pipe(pipe, inside)) = self.held.as_deref_mut() {
            let length = source.fill_pipe(pipe).map_err(Fault::Source)?;
            *inside += length;
            pipe.moved += length;
            self.bytes += length as u64;
            return Ok(length);
        }
        let space = &mut means.scratch[..SCRATCH_BYTES];
        let length = source.read(space).map_err(Fault::Source)?;
        self.bytes += length as u64;
        let sent = match length {
            0 => 0,
            _ => send(destination, &space[..length]).map_err(Fault::Destination)?,
        };
        if sent < length {
            let kept = means.scratch[sent..length].into();
            self.held = Some(Box::new(Held::Bytes(kept, 0)));
        }
        self.full_reads = match length {
            SCRATCH_BYTES => self.full_reads.saturating_add(1),
            _ => 0,
        };
        if self.full_reads >= FULL_READS && self.held.is_none() {
            let pipe = means.pipes.lend();
            self.held = pipe.map(|pipe| Box::new(Held::Pipe(pipe, 0)));
        }
        Ok(length)
    }

    /// Sends what is held. Whether all of it is gone.
    fn flush<S: Stream>(&mut self, destination: &S) -> Result<bool, Errno> {
        match self.held.as_deref_mut() {
            None => return Ok(true),
            Some(Held::Bytes(kept, offset)) => {
                while *offset < kept.len() {
                    match send(destination, &kept[*offset..])? {
                        0 => return Ok(false),
                        sent => *offset += sent,
                    }
                }
            }
            Some(Held::Pipe(pipe, inside)) => {
                while *inside > 0 {
                    match destination.drain_pipe(pipe, *inside) {
                        Ok(sent) => *inside -= sent,
                        Err(Errno::AGAIN) => return Ok(false),
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno),
                    }
                }
                return Ok(true);
            }
        }
        self.held = None;
        Ok(true)
    }

    /// Whether bytes wait for the destination.
    fn is_holding(&self) -> bool {
        match self.held.as_deref() {
            None => false,
            Some(Held::Bytes(..)) => true,
            Some(Held::Pipe(_, inside)) => *inside > 0,
        }
    }

    /// The direction as another thread or process goes on with it; a lent pipe
    /// is emptied and given back.
    fn hand_over(mut self, pipes: &mut Pipes) -> HandedDirection {
        let kept = match self.held.take().map(|held| *held) {
            None => Vec::new(),
            Some(Held::Bytes(kept, offset)) => kept[offset..].to_vec(),
            Some(Held::Pipe(pipe, inside)) => {
                let kept = pipe.read(inside);
                pipes.take_back(pipe, inside - kept.len());
                kept
            }
        };
        HandedDirection {
            kept,
            is_read: self.is_read,
            is_done: self.is_done,
            bytes: self.bytes,
        }
    }

    fn take_over(handed: HandedDirection) -> Self {
        let held = Held::Bytes(handed.kept.into_boxed_slice(), 0);
        let is_holding = !matches!(&held, Held::Bytes(kept, _) if kept.is_empty());
        Self {
            held: is_holding.then(|| Box::new(held)),
            is_read: handed.is_read,
            is_done: handed.is_done,
            bytes: handed.bytes,
            full_reads: 0,
        }
    }

    /// Gives a lent pipe back, with what is in it.
    fn give_back(&mut self, pipes: &mut Pipes) {
        let held = self.held.take_if(|held| matches!(**held, Held::Pipe(..)));
        if let Some(Held::Pipe(pipe, inside)) = held.map(|held| *held) {
            self.full_reads = 0;
            pipes.take_back(pipe, inside);
        }
    }

    fn give_back_if_idle(&mut self, pipes: &mut Pipes) {
        if let Some(Held::Pipe(pipe, inside)) = self.held.as_deref_mut() {
            let moved = std::mem::take(&mut pipe.moved);
            if *inside == 0 && moved < BUSY_BYTES {
                self.give_back(pipes);
            }
        }
    }
}

/// Sends what the socket takes; 0 when its buffer is full.
fn send<S: Stream>(socket: &S, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        match socket.send(bytes) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(0),
            result => return result,
        }
    }
}

/// Which of the two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

/// What epoll says about a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Signals {
    /// There may be something to read, or the end of it.
    pub(super) readable: bool,
    /// There may be room to send.
    pub(super) writable: bool,
    /// The peer has ended its sending.
    pub(super) ended: bool,
    /// The connection is gone, in whichever way.
    pub(super) gone: bool,
    /// The connection has met an error.
    pub(super) failed: bool,
}

/// A connection's state after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Goes on with the next event.
    Waiting,
    /// Wants another turn without an event.
    Ready,
    /// Both directions have ended.
    Finished,
    /// Reset both sockets.
    Broken,
    /// The server could not be reached.
    Unreachable(Errno),
}

/// A connection from a client through a connection port to a server.
#[derive(Debug)]
pub(super) struct Connection<S = OwnedFd> {
    pub(super) port: ListenPort,
    pub(super) session: SessionKey,
    pub(super) client: S,
    pub(super) server: S,
    pub(super) is_connecting: bool,
    /// When something last happened.
    pub(super) active: Instant,
    client_ended: bool,
    server_ended: bool,
    /// Who sends much: the client, the server.
    is_busy: [bool; 2],
    upstream: Direction,
    downstream: Direction,
    /// Its place among the clients.
    permit: Option<Permit>,
}

impl Connection {
    /// Starts to connect `client` with `target`. `header` goes to the server
    /// first.
    pub(super) fn start(
        port: ListenPort,
        session: SessionKey,
        client: OwnedFd,
        target: SocketAddr,
        header: Option<Vec<u8>>,
        permit: Permit,
        now: Instant,
    ) -> Result<Self, (OwnedFd, Errno)> {
        match connect(target) {
            Ok(server) => {
                let connection = Self::new(port, session, client, server, header, now);
                Ok(Self {
                    permit: Some(permit),
                    ..connection
                })
            }
            Err(errno) => Err((client, errno)),
        }
    }
}

impl<S: Stream> Connection<S> {
    fn new(
        port: ListenPort,
        session: SessionKey,
        client: S,
        server: S,
        header: Option<Vec<u8>>,
        now: Instant,
    ) -> Self {
        let held = header.map(|header| Box::new(Held::Bytes(header.into_boxed_slice(), 0)));
        Self {
            port,
            session,
            client,
            server,
            is_connecting: true,
            active: now,
            client_ended: false,
            server_ended: false,
            is_busy: [false; 2],
            upstream: Direction {
                held,
                ..Direction::default()
            },
            downstream: Direction::default(),
            permit: None,
        }
    }

    /// The connection as another thread or process goes on with it.
    pub(super) fn hand_over(self, now: Instant, pipes: &mut Pipes) -> HandedConnection<S> {
        HandedConnection {
            port: self.port,
            session: self.session,
            client: self.client,
            server: self.server,
            is_connecting: self.is_connecting,
            is_broken: false,
            idle: now.saturating_duration_since(self.active),
            upstream: self.upstream.hand_over(pipes),
            downstream: self.downstream.hand_over(pipes),
        }
    }

    /// Goes on with a connection. Which sides have ended, and who sends much,
    /// is found out again when the sockets are registered.
    pub(super) fn take_over(
        handed: HandedConnection<S>,
        permit: Option<Permit>,
        now: Instant,
    ) -> Self {
        Self {
            port: handed.port,
            session: handed.session,
            client: handed.client,
            server: handed.server,
            is_connecting: handed.is_connecting,
            active: now.checked_sub(handed.idle).unwrap_or(now),
            client_ended: false,
            server_ended: false,
            is_busy: [false; 2],
            upstream: Direction::take_over(handed.upstream),
            downstream: Direction::take_over(handed.downstream),
            permit,
        }
    }

    /// Handles what epoll says about one side.
    pub(super) fn event(&mut self, side: Side, signals: Signals, means: &mut Means) -> Outcome {
        let Signals {
            readable,
            writable,
            ended,
            gone,
            failed,
        } = signals;
        let (is_read_done, is_stuck, is_holding) = match side {
            Side::Client => {
                self.client_ended |= ended;
                let (from, to) = (&self.upstream, &self.downstream);
                (from.is_done, from.is_holding(), to.is_holding())
            }
            Side::Server => {
                self.server_ended |= ended;
                let (from, to) = (&self.downstream, &self.upstream);
                (from.is_done, from.is_holding(), to.is_holding())
            }
        };
        if self.is_connecting {
            match side {
                Side::Client if gone => return Outcome::Broken,
                Side::Client => {}
                Side::Server => {
                    if gone && let Some(errno) = self.server.take_error() {
                        return Outcome::Unreachable(errno);
                    }
                    self.is_connecting = false;
                }
            }
        }
        // Nobody reads from this side any more, so nobody else would notice.
        if failed && is_read_done {
            return Outcome::Broken;
        }
        // What is held goes first, and its destination says when it can.
        let reads = (readable || ended || gone) && !is_stuck;
        let writes = writable && is_holding;
        match side {
            Side::Client => self.move_bytes(reads, writes, means),
            Side::Server => self.move_bytes(writes, reads, means),
        }
    }

    /// Moves what can be moved, both ways.
    pub(super) fn pump(&mut self, means: &mut Means) -> Outcome {
        self.move_bytes(true, true, means)
    }

    /// Moves what `source` has sent, unless bytes wait for the destination.
    pub(super) fn pump_from(&mut self, source: Side, means: &mut Means) -> Outcome {
        if self.is_stuck(source) {
            return Outcome::Waiting;
        }
        self.move_bytes(source == Side::Client, source == Side::Server, means)
    }

    fn direction_from(&self, source: Side) -> &Direction {
        match source {
            Side::Client => &self.upstream,
            Side::Server => &self.downstream,
        }
    }

    /// Whether bytes that `source` has sent wait for the destination.
    pub(super) fn is_stuck(&self, source: Side) -> bool {
        self.direction_from(source).is_holding()
    }

    /// Whether what `source` sends goes through a pipe.
    pub(super) fn has_pipe(&self, source: Side) -> bool {
        matches!(
            self.direction_from(source).held.as_deref(),
            Some(Held::Pipe(..))
        )
    }

    /// Whether `source` has begun to send much. True once, until it is no
    /// longer busy.
    pub(super) fn take_up_as_busy(&mut self, source: Side) -> bool {
        let held = self.direction_from(source).held.as_deref();
        let sends_much = matches!(held, Some(Held::Pipe(pipe, _)) if pipe.moved >= MUCH_BYTES);
        sends_much && !std::mem::replace(&mut self.is_busy[source as usize], true)
    }

    /// What follows counts anew: the next few bytes after a burst are not much.
    pub(super) fn is_no_longer_busy(&mut self, source: Side) {
        self.is_busy[source as usize] = false;
        let direction = match source {
            Side::Client => &mut self.upstream,
            Side::Server => &mut self.downstream,
        };
        if let Some(Held::Pipe(pipe, _)) = direction.held.as_deref_mut() {
            pipe.moved = 0;
        }
    }

    fn move_bytes(&mut self, upstream: bool, downstream: bool, means: &mut Means) -> Outcome {
        let was_done = (self.upstream.is_done, self.downstream.is_done);
        let before = self.traffic();
        let mut progress = [Progress::Blocked; 2];
        if upstream {
            progress[0] = self
                .upstream
                .pump(&self.client, &self.server, self.client_ended, means);
        }
        if downstream {
            progress[1] =
                self.downstream
                    .pump(&self.server, &self.client, self.server_ended, means);
        }
        means.carried.add_since(before, self.traffic());
        for progress in progress {
            match progress {
                Progress::Broken(Fault::Destination(errno)) if self.is_connecting => {
                    return Outcome::Unreachable(errno);
                }
                Progress::Broken(_) => return Outcome::Broken,
                _ => {}
            }
        }
        match (self.upstream.is_done, self.downstream.is_done) {
            // Closing tells whoever was not told.
            (true, true) => return Outcome::Finished,
            (true, false) if !was_done.0 => self.server.end(),
            (false, true) if !was_done.1 => self.client.end(),
            _ => {}
        }
        match progress.contains(&Progress::Yielded) {
            true => Outcome::Ready,
            false => Outcome::Waiting,
        }
    }

    /// Makes closing the sockets reset them.
    pub(super) fn reset(&self) {
        self.client.reset_on_close();
        self.server.reset_on_close();
    }

    /// Gives all pipes back: the connection is over.
    pub(super) fn give_back_pipes(&mut self, pipes: &mut Pipes) {
        self.upstream.give_back(pipes);
        self.downstream.give_back(pipes);
    }

    /// Gives back pipes that carried little since this was last asked.
    pub(super) fn give_back_idle_pipes(&mut self, pipes: &mut Pipes) {
        self.upstream.give_back_if_idle(pipes);
        self.downstream.give_back_if_idle(pipes);
    }

    /// What went through.
    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            upstream_bytes: self.upstream.bytes,
            downstream_bytes: self.downstream.bytes,
        }
    }
}

fn connect(target: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if target.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    match net::connect(&socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests;
