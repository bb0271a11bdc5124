//! The final flush of connections of which one side is lost: the other side
//! gets all that was read, and then the reset.
//!
//! Resetting a socket discards what its peer has not acknowledged, a megabyte
//! perhaps. So what the kernel holds of the lost side is read and passed on
//! first, and the reset waits until the peer has acknowledged everything. A
//! peer that takes nothing for [`PATIENCE`] is not waited for.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::connection::{Connection, Side, is_gone};
use super::direction::{Direction, Fault};
use super::pipes::Pipes;
use super::send_queue::SendQueues;
use crate::forward::counters::count;
use crate::forward::gate::{SessionKey, Traffic};
use crate::forward::io::{EventSource, Io};
use crate::forward::quota::Permit;
use crate::forward::scratch::Scratch;
use crate::forward::slab::{Key, Slab};
use crate::forward::snapshot::{ConnectionSnapshot, DirectionSnapshot};
use crate::table::ListenPort;

/// How long a peer may take nothing before it is reset all the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a peer may take altogether: a session's port should come back.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// Most final flushes of a thread; further connections are reset at once.
/// Bounds what looking at them costs.
const FLUSHES_MAX: usize = 1024;

/// A connection of which one side is lost.
#[derive(Debug)]
struct FinalFlush {
    port: ListenPort,
    session: SessionKey,
    traffic: Traffic,
    /// The side that lives.
    side: Side,
    destination: OwnedFd,
    source: OwnedFd,
    /// The direction from the lost side to the one that lives.
    direction: Direction,
    position: Position,
    since: Instant,
    /// The time at which `position` last changed.
    moved: Instant,
    /// The client's place in the quota, kept until the end.
    _permit: Option<Permit>,
}

/// How far a final flush got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    passed_on: u64,
    unacknowledged: u32,
}

/// What the destination's kernel has of a final flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    /// It has everything.
    Done,
    /// It takes no more now.
    Blocked,
    /// The destination is lost too.
    Lost,
}

impl FinalFlush {
    /// The final flush of `connection`; `None` when no side lives that could
    /// take it. The sockets are closed then.
    fn of(mut connection: Connection, now: Instant, pipes: &mut Pipes) -> Option<Self> {
        let (port, session) = (connection.port, connection.session);
        let traffic = connection.traffic();
        let gone = (is_gone(&connection.client), is_gone(&connection.server));
        let (side, source, destination, direction) = match gone {
            (true, false) => {
                connection.downstream.give_back(pipes);
                let (client, server) = (connection.client, connection.server);
                (Side::Server, client, server, connection.upstream)
            }
            (false, true) => {
                connection.upstream.give_back(pipes);
                let (client, server) = (connection.client, connection.server);
                (Side::Client, server, client, connection.downstream)
            }
            _ => {
                connection.give_back_pipes(pipes);
                return None;
            }
        };
        Some(Self {
            port,
            session,
            traffic,
            side,
            destination,
            source,
            direction,
            position: Position::default(),
            since: now,
            moved: now,
            _permit: connection.permit,
        })
    }

    /// Passes on what is left, as far as the destination takes it.
    fn deliver(&mut self, scratch: &mut Scratch) -> Delivery {
        let before = self.traffic;
        let delivery = self.move_bytes(scratch);
        match self.side {
            Side::Server => self.traffic.upstream_bytes = self.direction.bytes,
            Side::Client => self.traffic.downstream_bytes = self.direction.bytes,
        }
        scratch.carried.add_since(before, self.traffic);
        delivery
    }

    fn move_bytes(&mut self, scratch: &mut Scratch) -> Delivery {
        loop {
            match self.direction.flush(&self.destination) {
                Ok(true) => {}
                Ok(false) => return Delivery::Blocked,
                Err(_) => return Delivery::Lost,
            }
            if self.direction.is_read {
                return Delivery::Done;
            }
            let direction = &mut self.direction;
            match direction.fill(&self.source, &self.destination, scratch) {
                Err(Fault::Destination(_)) => return Delivery::Lost,
                Err(Fault::Source(Errno::INTR)) | Ok(1..) => {}
                // The end of the source, or its reset.
                Err(Fault::Source(_)) | Ok(0) => self.direction.is_read = true,
            }
        }
    }

    fn export(self, now: Instant, pipes: &mut Pipes) -> ConnectionSnapshot {
        let flushed = self.direction.export(pipes);
        let other = |bytes| DirectionSnapshot {
            bytes,
            ..DirectionSnapshot::default()
        };
        let (client, server, upstream, downstream) = match self.side {
            Side::Server => {
                let downstream = other(self.traffic.downstream_bytes);
                (self.source, self.destination, flushed, downstream)
            }
            Side::Client => {
                let upstream = other(self.traffic.upstream_bytes);
                (self.destination, self.source, upstream, flushed)
            }
        };
        ConnectionSnapshot {
            port: self.port,
            session: self.session,
            client,
            server,
            is_connecting: false,
            is_broken: true,
            idle: now.saturating_duration_since(self.moved),
            upstream,
            downstream,
        }
    }
}

/// The final flushes of a thread.
#[derive(Debug)]
pub(super) struct FinalFlushes {
    flushes: Slab<FinalFlush>,
    send_queues: SendQueues,
}

impl FinalFlushes {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            flushes: Slab::default(),
            send_queues: SendQueues::open()?,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flushes.len() == 0
    }

    /// Takes a connection of which one side is lost.
    pub(super) fn start(&mut self, connection: Connection, io: &mut Io) {
        let (port, session, traffic) = (connection.port, connection.session, connection.carried());
        connection.reset();
        let flush = FinalFlush::of(connection, io.now, &mut io.scratch.pipes);
        let Some(flush) = flush else {
            return io.report(port, session, traffic);
        };
        let is_full = self.flushes.len() >= FLUSHES_MAX;
        let key = self.flushes.insert(flush);
        if is_full {
            return self.end(key, false, io);
        }
        self.continue_flush(key, io);
        let is_watched = self.flushes.get_mut(key).is_none_or(|flush| {
            let events = EventFlags::OUT | EventFlags::ET;
            let data = EventSource::FinalFlush.of_key(key);
            let changed = io.change_watch(&flush.destination, data, events);
            // An imported socket is not registered yet.
            let watched = changed.or_else(|_| io.watch(&flush.destination, data, events));
            watched.is_ok()
        });
        if !is_watched {
            self.end(key, false, io);
        }
        io.schedule();
    }

    /// Passes on what the destination takes, and ends the flush when its peer
    /// has everything.
    pub(super) fn continue_flush(&mut self, key: Key, io: &mut Io) {
        let Some(flush) = self.flushes.get_mut(key) else {
            return;
        };
        let delivery = flush.deliver(&mut io.scratch);
        if delivery == Delivery::Lost {
            return self.end(key, false, io);
        }
        // Without an answer the destination is lost too, or the kernel cannot
        // be asked: nothing is waited for.
        let unacknowledged = self.send_queues.unacknowledged(&flush.destination);
        let unacknowledged = unacknowledged.unwrap_or(0);
        if delivery == Delivery::Done && unacknowledged == 0 {
            return self.end(key, true, io);
        }
        let position = Position {
            passed_on: flush.traffic.total(),
            unacknowledged,
        };
        if position != flush.position {
            (flush.position, flush.moved) = (position, io.now);
        }
    }

    /// Ends a final flush: both sockets are reset, and the end is reported.
    fn end(&mut self, key: Key, is_delivered: bool, io: &mut Io) {
        let Some(mut flush) = self.flushes.remove(key) else {
            return;
        };
        flush.direction.give_back(&mut io.scratch.pipes);
        if !is_delivered {
            count(&io.counters.undelivered);
        }
        let (port, session, traffic) = (flush.port, flush.session, flush.traffic);
        // Closed before it is reported: a free port has no connection.
        drop(flush);
        io.report(port, session, traffic);
    }

    /// Takes out all final flushes. The importing thread begins to wait anew.
    pub(super) fn export(&mut self, io: &mut Io) -> Vec<ConnectionSnapshot> {
        let (now, pipes) = (io.now, &mut io.scratch.pipes);
        let flushes = self.flushes.drain();
        flushes.map(|flush| flush.export(now, pipes)).collect()
    }

    pub(super) fn tick(&mut self, io: &mut Io) {
        let keys: Vec<Key> = self.flushes.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.continue_flush(key, io);
            let is_late = self.flushes.get_mut(key).is_some_and(|flush| {
                io.now.duration_since(flush.moved) >= PATIENCE
                    || io.now.duration_since(flush.since) >= DEADLINE
            });
            if is_late {
                self.end(key, false, io);
            }
        }
    }

    /// Ends the final flushes on `port` of a session that is cut.
    pub(super) fn cut(&mut self, port: ListenPort, session: SessionKey, io: &mut Io) {
        let is_cut = |flush: &FinalFlush| (flush.port, flush.session) == (port, session);
        let flushes = self.flushes.iter().filter(|(_, flush)| is_cut(flush));
        let cut: Vec<Key> = flushes.map(|(key, _)| key).collect();
        for key in cut {
            count(&io.counters.cut);
            self.end(key, false, io);
        }
    }
}
