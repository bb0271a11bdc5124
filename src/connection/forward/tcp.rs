//! One TCP connection through a connection port: two sockets and two
//! directions.
//!
//! A direction holds no buffer. It reads into its thread's scratch space and
//! writes at once; only what the receiver does not take now is kept, and then
//! nothing more is read until that is gone. So a slow reader costs at most one
//! scratch space, and the sender feels it through TCP's own window.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, sockopt};

use super::{SessionKey, Traffic};
use crate::table::ListenPort;

/// Bytes a thread reads at once, and most bytes that a direction keeps.
pub(super) const SCRATCH_BYTES: usize = 64 * 1024;

/// Reads of one direction before the others of its thread get their turn.
const READS_PER_TURN: usize = 8;

/// A direction: from a source to a destination socket.
#[derive(Debug, Default)]
struct Direction {
    /// What the destination did not take yet, from an offset on.
    kept: Option<(Box<[u8]>, usize)>,
    /// The source has ended its side.
    is_read: bool,
    /// The destination was told of the end: nothing will follow.
    is_done: bool,
    bytes: u64,
}

/// How far a direction got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Waits for the source or the destination.
    Blocked,
    /// Had its turn; there may be more.
    Yielded,
    Done,
    /// A socket broke: both are to be reset.
    Broken,
}

impl Direction {
    /// Moves bytes until something blocks or the turn is over. `at_end` says
    /// that the source's end has been signalled, so that a short read is not
    /// taken for the last one.
    fn pump(
        &mut self,
        source: &OwnedFd,
        destination: &OwnedFd,
        at_end: bool,
        scratch: &mut [u8],
    ) -> Progress {
        if self.is_done {
            return Progress::Done;
        }
        for _ in 0..READS_PER_TURN {
            match self.flush(destination) {
                Ok(true) => {}
                Ok(false) => return Progress::Blocked,
                Err(_) => return Progress::Broken,
            }
            if self.is_read {
                // A destination that is gone cannot be told; it has its end.
                let _ = net::shutdown(destination, Shutdown::Write);
                self.is_done = true;
                return Progress::Done;
            }
            let length = match rustix::io::read(source, &mut *scratch) {
                Ok(length) => length,
                Err(Errno::AGAIN) => return Progress::Blocked,
                Err(Errno::INTR) => continue,
                Err(_) => return Progress::Broken,
            };
            if length == 0 {
                self.is_read = true;
                continue;
            }
            self.bytes += length as u64;
            match send(destination, &scratch[..length]) {
                Ok(sent) if sent < length => self.kept = Some((scratch[sent..length].into(), 0)),
                Ok(_) => {}
                Err(_) => return Progress::Broken,
            }
            // The source has nothing more; the next event tells.
            if length < scratch.len() && !at_end && self.kept.is_none() {
                return Progress::Blocked;
            }
        }
        Progress::Yielded
    }

    /// Sends what was kept. Whether all of it is gone.
    fn flush(&mut self, destination: &OwnedFd) -> Result<bool, Errno> {
        while let Some((kept, offset)) = &mut self.kept {
            let sent = send(destination, &kept[*offset..])?;
            if sent == 0 {
                return Ok(false);
            }
            *offset += sent;
            if *offset == kept.len() {
                self.kept = None;
            }
        }
        Ok(true)
    }
}

/// Sends what the socket takes; 0 when its buffer is full.
fn send(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        match net::send(socket, bytes, SendFlags::NOSIGNAL) {
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
pub(super) struct Connection {
    pub(super) port: ListenPort,
    pub(super) session: SessionKey,
    pub(super) client: OwnedFd,
    pub(super) server: OwnedFd,
    pub(super) is_connecting: bool,
    /// When something last happened.
    pub(super) active: Instant,
    client_ended: bool,
    server_ended: bool,
    upstream: Direction,
    downstream: Direction,
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
        now: Instant,
    ) -> Result<Self, (OwnedFd, Errno)> {
        match connect(target) {
            Ok(server) => {
                let kept = header.map(|header| (header.into_boxed_slice(), 0));
                Ok(Self {
                    port,
                    session,
                    client,
                    server,
                    is_connecting: true,
                    active: now,
                    client_ended: false,
                    server_ended: false,
                    upstream: Direction {
                        kept,
                        ..Direction::default()
                    },
                    downstream: Direction::default(),
                })
            }
            Err(errno) => Err((client, errno)),
        }
    }

    /// Handles an event on one side. `ended`: that side has ended its sending;
    /// `broken`: it is gone altogether.
    pub(super) fn event(
        &mut self,
        side: Side,
        ended: bool,
        broken: bool,
        scratch: &mut [u8],
    ) -> Outcome {
        match side {
            Side::Client => self.client_ended |= ended,
            Side::Server => self.server_ended |= ended,
        }
        if self.is_connecting {
            if side == Side::Client {
                // What the client sends waits in the kernel until the server is there.
                return if broken {
                    Outcome::Broken
                } else {
                    Outcome::Waiting
                };
            }
            match sockopt::socket_error(&self.server) {
                Ok(Ok(())) => self.is_connecting = false,
                Ok(Err(errno)) | Err(errno) => return Outcome::Unreachable(errno),
            }
        }
        self.pump(scratch)
    }

    /// Moves what can be moved, both ways.
    pub(super) fn pump(&mut self, scratch: &mut [u8]) -> Outcome {
        let upstream = self
            .upstream
            .pump(&self.client, &self.server, self.client_ended, scratch);
        let downstream =
            self.downstream
                .pump(&self.server, &self.client, self.server_ended, scratch);
        match (upstream, downstream) {
            (Progress::Broken, _) | (_, Progress::Broken) => Outcome::Broken,
            (Progress::Done, Progress::Done) => Outcome::Finished,
            (Progress::Yielded, _) | (_, Progress::Yielded) => Outcome::Ready,
            _ => Outcome::Waiting,
        }
    }

    /// Makes closing the sockets reset them.
    pub(super) fn reset(&self) {
        reset(&self.client);
        reset(&self.server);
    }

    /// What went through.
    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            upstream_bytes: self.upstream.bytes,
            downstream_bytes: self.downstream.bytes,
        }
    }
}

/// Makes closing `socket` reset the connection.
pub(super) fn reset(socket: &OwnedFd) {
    // A socket that is gone already needs no reset.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
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
    sockopt::set_socket_keepalive(&socket, true)?;
    match net::connect(&socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}
