//! One TCP connection through a connection port: two sockets and two
//! directions, and what it does at an event. Which state it is in is drawn in
//! the parent; what becomes of it after an [`Outcome`] is in `streams`.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

use super::direction::{Direction, Fault, Position, Progress};
use super::pipes::Pipes;
use super::stream::Stream;
use crate::forward::gate::{SessionKey, Traffic};
use crate::forward::pending::TcpClient;
use crate::forward::quota::Permit;
use crate::forward::scratch::Scratch;
use crate::forward::snapshot::ConnectionSnapshot;
use crate::table::ListenPort;

/// Bytes of a direction that a closed socket delivers for certain. When TCP's
/// memory runs out, Linux resets closed sockets that hold more than
/// `SOCK_MIN_SNDBUF`, twice as much with what it adds to each packet.
const SMALL_BYTES: u64 = 2048;

/// One of the two sockets of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::forward) enum Side {
    Client,
    Server,
}

/// What epoll reports about a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::forward) struct Signals {
    /// There may be something to read, or the end of it.
    pub(in crate::forward) readable: bool,
    /// There is an urgent byte.
    pub(in crate::forward) urgent: bool,
    /// There may be room to send.
    pub(in crate::forward) writable: bool,
    /// The peer has ended its sending.
    pub(in crate::forward) ended: bool,
    /// The connection is gone, in whichever way.
    pub(in crate::forward) gone: bool,
    /// The connection has met an error.
    pub(in crate::forward) failed: bool,
}

impl Signals {
    /// Something to read, and nothing else.
    pub(super) const READABLE: Self = Self {
        readable: true,
        urgent: false,
        writable: false,
        ended: false,
        gone: false,
        failed: false,
    };
}

/// A connection's state after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It goes on with the next event.
    Waiting,
    /// It wants another turn without an event.
    Ready,
    /// Both directions have ended. The peers may not have everything yet.
    Finished,
    /// One side is lost. The other one gets what was read of it, then a reset.
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
    /// The time when something was moved last; of a finished connection, when
    /// it was finished.
    pub(super) active: Instant,
    client_ended: bool,
    server_ended: bool,
    /// Whether the client sends much, and whether the server does.
    is_busy: [bool; 2],
    pub(super) upstream: Direction,
    pub(super) downstream: Direction,
    /// The client's place in the quota.
    pub(super) permit: Option<Permit>,
}

impl Connection {
    /// The connection of an admitted client with `server`, which need not be
    /// connected yet. `header` goes to the server first.
    pub(super) fn start(
        client: TcpClient,
        session: SessionKey,
        server: OwnedFd,
        header: Option<Vec<u8>>,
        now: Instant,
    ) -> Self {
        Self {
            upstream: Direction::beginning_with(header),
            permit: Some(client.permit),
            ..Self::new(client.port, session, client.socket, server, now)
        }
    }

    /// Whether a side that has met an error is gone: reset, or timed out.
    pub(super) fn has_lost(&self, side: Side) -> bool {
        let socket = match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        };
        !self.is_connecting && is_gone(socket)
    }

    /// Whether closing the sockets loses nothing once both directions have
    /// ended: their peers have acknowledged everything, the end as well.
    pub(super) fn is_delivered(&self) -> bool {
        self.is_small() || is_gone(&self.client) && is_gone(&self.server)
    }
}

/// Whether a connected socket has no peer any more: it was reset, it timed
/// out, or it has ended both ways.
pub(super) fn is_gone(socket: &OwnedFd) -> bool {
    net::getpeername(socket).is_err()
}

impl<S: Stream> Connection<S> {
    fn new(port: ListenPort, session: SessionKey, client: S, server: S, now: Instant) -> Self {
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
            upstream: Direction::default(),
            downstream: Direction::default(),
            permit: None,
        }
    }

    /// The connection as plain data, for another thread or process.
    pub(super) fn export(self, now: Instant, pipes: &mut Pipes) -> ConnectionSnapshot<S> {
        ConnectionSnapshot {
            port: self.port,
            session: self.session,
            client: self.client,
            server: self.server,
            is_connecting: self.is_connecting,
            is_broken: false,
            idle: now.saturating_duration_since(self.active),
            upstream: self.upstream.export(pipes),
            downstream: self.downstream.export(pipes),
        }
    }

    /// An exported connection. Which sides have ended, and which send much,
    /// shows again when the sockets are registered.
    pub(super) fn import(
        snapshot: ConnectionSnapshot<S>,
        permit: Option<Permit>,
        now: Instant,
    ) -> Self {
        Self {
            port: snapshot.port,
            session: snapshot.session,
            client: snapshot.client,
            server: snapshot.server,
            is_connecting: snapshot.is_connecting,
            active: now.checked_sub(snapshot.idle).unwrap_or(now),
            client_ended: false,
            server_ended: false,
            is_busy: [false; 2],
            upstream: Direction::import(snapshot.upstream),
            downstream: Direction::import(snapshot.downstream),
            permit,
        }
    }

    /// Handles what epoll reports about one side.
    pub(super) fn event(&mut self, side: Side, signals: Signals, scratch: &mut Scratch) -> Outcome {
        let Signals {
            readable,
            urgent,
            writable,
            ended,
            gone,
            failed,
        } = signals;
        let (is_read_done, is_stuck, is_holding) = match side {
            Side::Client => {
                self.client_ended |= ended;
                self.upstream.is_urgent |= urgent;
                let (from, to) = (&self.upstream, &self.downstream);
                (from.is_done, from.is_holding(), to.is_holding())
            }
            Side::Server => {
                self.server_ended |= ended;
                self.downstream.is_urgent |= urgent;
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
                        return self.connect_failed(errno);
                    }
                    self.is_connecting = false;
                }
            }
        }
        // This side is not read any more, so no read would find the error.
        if failed && is_read_done {
            return Outcome::Broken;
        }
        // What is held goes first; its destination is reported when it has room.
        let reads = (readable || urgent || ended || gone) && !is_stuck;
        let writes = writable && is_holding;
        match side {
            Side::Client => self.move_bytes(reads, writes, scratch),
            Side::Server => self.move_bytes(writes, reads, scratch),
        }
    }

    /// What an error of the server's socket means before its connecting was
    /// reported. Linux reports the first two only of a socket that had been
    /// connected: the server has accepted and left at once, and what it sent
    /// is still to be read.
    ///
    /// Source: Linux, `net/ipv4/tcp_input.c`, `tcp_reset`.
    fn connect_failed(&mut self, errno: Errno) -> Outcome {
        if matches!(errno, Errno::CONNRESET | Errno::PIPE) {
            self.is_connecting = false;
            return Outcome::Broken;
        }
        Outcome::Unreachable(errno)
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

    /// The bytes that `source` has sent so far.
    pub(super) fn bytes_from(&self, source: Side) -> u64 {
        self.direction_from(source).bytes
    }

    /// Marks `source` as busy if it sends much. Returns whether the mark is
    /// new.
    pub(super) fn mark_busy(&mut self, source: Side) -> bool {
        let sends_much = self.direction_from(source).carries_much();
        sends_much && !std::mem::replace(&mut self.is_busy[source as usize], true)
    }

    /// Takes the mark away. Counting begins anew: the next few bytes after a
    /// burst are not much.
    pub(super) fn clear_busy(&mut self, source: Side) {
        self.is_busy[source as usize] = false;
        match source {
            Side::Client => self.upstream.reset_count(),
            Side::Server => self.downstream.reset_count(),
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
                    return self.connect_failed(errno);
                }
                Progress::Broken(_) => return Outcome::Broken,
                _ => {}
            }
        }
        let is_finished = self.is_finished();
        // If the sockets are closed next anyway, closing sends the end.
        if !is_finished || !self.is_small() {
            if self.upstream.is_done && !was_done.0 {
                self.server.end();
            }
            if self.downstream.is_done && !was_done.1 {
                self.client.end();
            }
        }
        if is_finished {
            return Outcome::Finished;
        }
        if progress.contains(&Progress::Yielded) {
            Outcome::Ready
        } else {
            Outcome::Waiting
        }
    }

    /// Whether both directions have ended.
    pub(super) fn is_finished(&self) -> bool {
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

    /// Gives all pipes back: the connection ends.
    pub(super) fn give_back_pipes(&mut self, pipes: &mut Pipes) {
        self.upstream.give_back(pipes);
        self.downstream.give_back(pipes);
    }

    /// Gives back pipes that carried little since the last call.
    pub(super) fn give_back_idle_pipes(&mut self, pipes: &mut Pipes) {
        self.upstream.give_back_if_idle(pipes);
        self.downstream.give_back_if_idle(pipes);
    }

    /// What is reported at the end: nothing has reached a server that did not
    /// accept.
    pub(super) fn carried(&self) -> Traffic {
        if self.is_connecting {
            return Traffic::default();
        }
        self.traffic()
    }

    /// What was moved so far, both ways. An event after which it is the same was
    /// no sign of life: an import registers the sockets anew, and epoll reports
    /// then that there is room to send.
    pub(super) fn position(&self) -> (bool, [Position; 2]) {
        let positions = [self.upstream.position(), self.downstream.position()];
        (self.is_connecting, positions)
    }

    /// The bytes that were read so far.
    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            upstream_bytes: self.upstream.bytes,
            downstream_bytes: self.downstream.bytes,
        }
    }
}

/// A socket that connects, or is connected, to `target`.
pub(super) fn connect(target: SocketAddr) -> Result<OwnedFd, Errno> {
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
