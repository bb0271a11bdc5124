//! One TCP connection through a connection port: two sockets and two
//! directions.
//!
//! - `direction`: how bytes move from one to the other;
//! - `final_flush`: what is left to do when one of the two is gone;
//! - this file: what a connection does at an event.

mod direction;
mod final_flush;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

use self::direction::{Direction, Fault, Progress};
pub(super) use self::final_flush::{Delivery, FinalFlush};
use super::admission::Permit;
use super::pipes::Pipes;
use super::snapshot::ConnectionSnapshot;
use super::stream::Stream;
use super::{SessionKey, Traffic};
use crate::table::ListenPort;

/// Bytes a thread reads at once, and most bytes that a direction keeps.
pub(super) const SCRATCH_BYTES: usize = 64 * 1024;

/// Bytes of a direction that a closed socket delivers for certain. When TCP's
/// memory runs out, Linux resets closed sockets that hold more than
/// `SOCK_MIN_SNDBUF`, twice as much with what it adds to each packet.
const SMALL_BYTES: u64 = 2048;

/// What a thread lends to the direction that has its turn.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) scratch: Vec<u8>,
    pub(super) pipes: Pipes,
    /// What was carried since that was last counted.
    pub(super) carried: Traffic,
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
    /// Both directions have ended. Peers may not have everything yet.
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
            upstream: Direction::beginning_with(header),
            downstream: Direction::default(),
            permit: None,
        }
    }

    /// The connection as another thread or process goes on with it.
    pub(super) fn hand_over(self, now: Instant, pipes: &mut Pipes) -> ConnectionSnapshot<S> {
        ConnectionSnapshot {
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
        handed: ConnectionSnapshot<S>,
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
    pub(super) fn event(&mut self, side: Side, signals: Signals, scratch: &mut Scratch) -> Outcome {
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
            Side::Client => self.move_bytes(reads, writes, scratch),
            Side::Server => self.move_bytes(writes, reads, scratch),
        }
    }

    /// Moves what can be moved, both ways.
    pub(super) fn pump(&mut self, scratch: &mut Scratch) -> Outcome {
        self.move_bytes(true, true, scratch)
    }

    /// Moves what `source` has sent, unless bytes wait for the destination.
    pub(super) fn pump_from(&mut self, source: Side, scratch: &mut Scratch) -> Outcome {
        if self.is_stuck(source) {
            return Outcome::Waiting;
        }
        self.move_bytes(source == Side::Client, source == Side::Server, scratch)
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
        self.direction_from(source).has_pipe()
    }

    /// Whether `source` has begun to send much. True once, until it is no
    /// longer busy.
    pub(super) fn take_up_as_busy(&mut self, source: Side) -> bool {
        let sends_much = self.direction_from(source).carries_much();
        sends_much && !std::mem::replace(&mut self.is_busy[source as usize], true)
    }

    /// What follows counts anew: the next few bytes after a burst are not much.
    pub(super) fn is_no_longer_busy(&mut self, source: Side) {
        self.is_busy[source as usize] = false;
        match source {
            Side::Client => self.upstream.count_anew(),
            Side::Server => self.downstream.count_anew(),
        }
    }

    fn move_bytes(&mut self, upstream: bool, downstream: bool, scratch: &mut Scratch) -> Outcome {
        let was_done = (self.upstream.is_done, self.downstream.is_done);
        let before = self.traffic();
        let mut progress = [Progress::Blocked; 2];
        if upstream {
            progress[0] =
                self.upstream
                    .pump(&self.client, &self.server, self.client_ended, scratch);
        }
        if downstream {
            progress[1] =
                self.downstream
                    .pump(&self.server, &self.client, self.server_ended, scratch);
        }
        scratch.carried.add_since(before, self.traffic());
        for progress in progress {
            match progress {
                Progress::Broken(Fault::Destination(errno)) if self.is_connecting => {
                    return Outcome::Unreachable(errno);
                }
                Progress::Broken(_) => return Outcome::Broken,
                _ => {}
            }
        }
        let is_over = self.is_over();
        // Closing tells whoever was not told, when that is next.
        if !is_over || !self.is_small() {
            if self.upstream.is_done && !was_done.0 {
                self.server.end();
            }
            if self.downstream.is_done && !was_done.1 {
                self.client.end();
            }
        }
        if is_over {
            return Outcome::Finished;
        }
        match progress.contains(&Progress::Yielded) {
            true => Outcome::Ready,
            false => Outcome::Waiting,
        }
    }

    /// Whether both directions have ended.
    pub(super) fn is_over(&self) -> bool {
        self.upstream.is_done && self.downstream.is_done
    }

    /// Whether a closed socket's kernel delivers what it carried, however short
    /// of memory the machine is.
    fn is_small(&self) -> bool {
        self.upstream.bytes.max(self.downstream.bytes) <= SMALL_BYTES
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
