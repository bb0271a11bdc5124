//! Connections of which one side is gone: the other one gets all that was
//! read, and then the reset.
//!
//! Resetting a socket throws away what its peer has not acknowledged, a
//! megabyte perhaps. So what the kernel holds of the side that is gone is read
//! and passed on first, and the reset waits until the peer has acknowledged
//! everything; a peer that takes nothing for [`PATIENCE`] is not waited for.

use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventFlags};

use super::{Source, Worker};
use crate::forward::counters::count;
use crate::forward::slab::Key;
use crate::forward::snapshot::{ConnectionSnapshot, DirectionSnapshot};
use crate::forward::tcp::{Connection, Delivery, FinalFlush, Side};
use crate::forward::{SessionKey, Traffic, Transport};
use crate::table::ListenPort;

/// How long a peer may take nothing before it is reset all the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a peer may take in all: a session's port should come back.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// Most connections of a thread that wait for their reset; others are reset at
/// once. Bounds what looking at them costs.
const MAX_CLOSING: usize = 1024;

/// A connection that waits for its reset.
#[derive(Debug)]
pub(super) struct Closing {
    port: ListenPort,
    session: SessionKey,
    traffic: Traffic,
    final_flush: FinalFlush,
    /// What had been passed on and not acknowledged when it was last looked at.
    seen: (u64, u32),
    since: Instant,
    /// When `seen` last changed.
    moved: Instant,
}

impl Worker {
    /// One side of a connection is gone.
    pub(super) fn break_connection(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(key) else {
            return;
        };
        self.leave_session(connection.session, Transport::Tcp, key);
        self.close_broken(connection);
    }

    /// Resets a connection of which one side is gone, the other one when it has
    /// everything.
    pub(super) fn close_broken(&mut self, connection: Connection) {
        let (port, session, traffic) = (connection.port, connection.session, connection.traffic());
        connection.reset();
        let final_flush = connection.into_final_flush(&mut self.scratch.pipes);
        let Some(mut final_flush) = final_flush else {
            return self.report(port, session, traffic);
        };
        if self.closing.len() >= MAX_CLOSING {
            count(&self.counters.undelivered);
            final_flush.give_back_pipe(&mut self.scratch.pipes);
            drop(final_flush);
            return self.report(port, session, traffic);
        }
        let key = self.closing.insert(Closing {
            port,
            session,
            traffic,
            final_flush,
            seen: (0, 0),
            since: self.now,
            moved: self.now,
        });
        self.close_further(key);
        let epoll = &self.epoll;
        let is_watched = self.closing.get_mut(key).is_none_or(|closing| {
            let flags = EventFlags::OUT | EventFlags::ET;
            let data = Source::Closing.data(key.to_bits());
            let destination = &closing.final_flush.destination;
            let changed = epoll::modify(epoll, destination, data, flags);
            // One that was handed over is not registered yet.
            let watched = changed.or_else(|_| epoll::add(epoll, destination, data, flags));
            watched.is_ok()
        });
        if !is_watched {
            self.end_closing(key, false);
        }
        self.schedule();
    }

    /// Passes on what the destination takes, and resets it when it has all.
    pub(super) fn close_further(&mut self, key: Key) {
        let Some(closing) = self.closing.get_mut(key) else {
            return;
        };
        let before = closing.traffic;
        let delivery = closing.final_flush.deliver(&mut self.scratch);
        match closing.final_flush.side {
            Side::Server => closing.traffic.upstream_bytes = closing.final_flush.bytes(),
            Side::Client => closing.traffic.downstream_bytes = closing.final_flush.bytes(),
        }
        self.scratch.carried.add_since(before, closing.traffic);
        let destination = &closing.final_flush.destination;
        let left = match delivery {
            Delivery::Gone => return self.end_closing(key, false),
            // Gone as well, or not to be found out.
            _ => self.send_queues.unacknowledged(destination).unwrap_or(0),
        };
        if delivery == Delivery::Done && left == 0 {
            return self.end_closing(key, true);
        }
        let seen = (
            closing.traffic.upstream_bytes + closing.traffic.downstream_bytes,
            left,
        );
        if seen != closing.seen {
            (closing.seen, closing.moved) = (seen, self.now);
        }
    }

    fn end_closing(&mut self, key: Key, is_delivered: bool) {
        let Some(mut closing) = self.closing.remove(key) else {
            return;
        };
        closing.final_flush.give_back_pipe(&mut self.scratch.pipes);
        if !is_delivered {
            count(&self.counters.undelivered);
        }
        let (port, session, traffic) = (closing.port, closing.session, closing.traffic);
        // Closed before it is reported: a free port has no connection.
        drop(closing);
        self.report(port, session, traffic);
    }

    /// Gives away connections that wait for their reset. Whoever takes them over
    /// begins to wait anew.
    pub(super) fn hand_over_closing(&mut self) -> Vec<ConnectionSnapshot> {
        let (now, pipes) = (self.now, &mut self.scratch.pipes);
        let handed = self.closing.drain().map(|closing| {
            let side = closing.final_flush.side;
            let (client, server, rest) = closing.final_flush.hand_over(pipes);
            let other = |bytes| DirectionSnapshot {
                bytes,
                ..DirectionSnapshot::default()
            };
            let (upstream, downstream) = match side {
                Side::Server => (rest, other(closing.traffic.downstream_bytes)),
                Side::Client => (other(closing.traffic.upstream_bytes), rest),
            };
            ConnectionSnapshot {
                port: closing.port,
                session: closing.session,
                client,
                server,
                is_connecting: false,
                is_broken: true,
                idle: now.saturating_duration_since(closing.moved),
                upstream,
                downstream,
            }
        });
        handed.collect()
    }

    pub(super) fn tick_closing(&mut self) {
        let waiting: Vec<Key> = self.closing.iter().map(|(key, _)| key).collect();
        for key in waiting {
            self.close_further(key);
            let is_late = self.closing.get_mut(key).is_some_and(|closing| {
                self.now.duration_since(closing.moved) >= PATIENCE
                    || self.now.duration_since(closing.since) >= DEADLINE
            });
            if is_late {
                self.end_closing(key, false);
            }
        }
    }

    /// A session is cut: nothing of it is waited for.
    pub(super) fn cut_closing(&mut self, session: SessionKey) {
        let of_session =
            |(key, closing): (Key, &Closing)| (closing.session == session).then_some(key);
        let cut: Vec<Key> = self.closing.iter().filter_map(of_session).collect();
        for key in cut {
            count(&self.counters.cut);
            self.end_closing(key, false);
        }
    }
}
