//! Read coalescing: sources that send much are read now and then, not at every
//! segment.
//!
//! Moving bytes costs per segment and per wake-up. What has arrived in a
//! socket meanwhile moves as a few large segments, at about half the cost.
//!
//! - Several busy sources of a thread are not watched but polled in turns: one
//!   wake-up serves them all.
//! - A single one is watched, but reported only when much has arrived. With
//!   polls alone, both ends would sleep in between.
//! - Nothing is read while bytes wait for the destination.
//!
//! The end of a burst waits for the next poll, [`INTERVAL`] at most. Where the
//! window is too small for so much to arrive, the kernel reports less.
//!
//! Source: Linux, `net/ipv4/tcp.c`, `tcp_set_rcvlowat` and `tcp_epollin_ready`.

use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::SetSockOpt;
use nix::sys::socket::sockopt::SetUsize;
use rustix::event::epoll::EventFlags;

use super::connection::{Connection, Outcome, Side};
use crate::forward::io::{EventSource, Io, STREAM_EVENTS};
use crate::forward::slab::{Key, Slab};

/// Fewest busy sources that are polled only.
const POLLED_MIN: usize = 2;

/// Bytes that have arrived in a single source's socket when it is reported. So
/// many fill the destination's send queue: from then on the work goes by what
/// the destination takes, a third of that queue at a time.
const LOW_WATER_BYTES: usize = 2 * 1024 * 1024;

/// Time between two polls. What arrives in it is bounded by TCP's window.
const INTERVAL: Duration = Duration::from_millis(1);

/// Idle polls in a row after which every segment of the source is reported
/// again.
const IDLE_POLLS_MAX: u8 = 4;

/// A poll that moves fewer bytes than this counts as idle. It is the rate at
/// which a direction counts as busy, per [`INTERVAL`].
const BUSY_BYTES: u64 = 16 * 1024;

// The system call interfaces used elsewhere have no safe call for it.
nix::setsockopt_impl!(
    LowWater,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    usize,
    SetUsize
);

/// Bytes that have arrived in a socket when it is reported as readable.
#[derive(Clone, Copy, Debug)]
struct LowWater;

/// What is reported of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// Every segment.
    Segments,
    /// The arrival of much.
    Bursts,
    /// Only its end.
    End,
}

/// A side of a connection that sends much.
#[derive(Debug)]
pub(super) struct BusySource {
    pub(super) key: Key,
    side: Side,
    watch: Watch,
    idle_polls: u8,
    /// Bytes that it had sent by the last poll.
    seen: u64,
}

/// The busy sources of a thread, and the time of the next poll.
#[derive(Debug)]
pub(super) struct Coalescing {
    sources: Vec<BusySource>,
    next_poll: Instant,
}

impl Coalescing {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sources: Vec::new(),
            next_poll: now,
        }
    }

    /// The time of the next poll; `None` when no source is busy.
    pub(super) fn next_poll(&self) -> Option<Instant> {
        (!self.sources.is_empty()).then_some(self.next_poll)
    }

    pub(super) fn is_single(&self) -> bool {
        self.sources.len() < POLLED_MIN
    }

    /// Takes in the sides of a connection that have begun to send much.
    pub(super) fn add_if_busy(&mut self, key: Key, connections: &mut Slab<Connection>, io: &Io) {
        let Some(connection) = connections.get_mut(key) else {
            return;
        };
        let mut is_new = false;
        for side in [Side::Client, Side::Server] {
            if connection.mark_busy(side) {
                self.sources.push(BusySource {
                    key,
                    side,
                    watch: Watch::Segments,
                    idle_polls: 0,
                    seen: 0,
                });
                self.next_poll = io.now + INTERVAL;
                is_new = true;
            }
        }
        // A single one may wait for its destination now, or no longer.
        let single = self.sources.first();
        let is_single = self.is_single() && single.is_some_and(|single| single.key == key);
        if is_new || is_single {
            self.update_watches(connections, io);
        }
    }

    /// Watches all busy sources as they and their number require.
    pub(super) fn update_watches(&mut self, connections: &mut Slab<Connection>, io: &Io) {
        let is_single = self.is_single();
        for source in &mut self.sources {
            if let Some(connection) = connections.get_mut(source.key) {
                let watch = if is_single && !connection.is_stuck(source.side) {
                    Watch::Bursts
                } else {
                    Watch::End
                };
                source.set_watch(watch, connection, io);
            }
        }
    }

    /// Takes out the busy sources, for a poll of each.
    pub(super) fn take_sources(&mut self) -> Vec<BusySource> {
        std::mem::take(&mut self.sources)
    }

    /// Moves what has arrived from `source`, and keeps it while it is busy.
    pub(super) fn poll(
        &mut self,
        mut source: BusySource,
        connection: &mut Connection,
        io: &mut Io,
    ) -> Outcome {
        let outcome = connection.pump_from(source.side, &mut io.scratch);
        // Its own bytes: it may have stopped at an urgent one while the other
        // side sends on.
        let total = connection.bytes_from(source.side);
        let bytes = total - std::mem::replace(&mut source.seen, total);
        if bytes > 0 {
            connection.active = io.now;
        }
        if bytes >= BUSY_BYTES {
            source.idle_polls = 0;
        } else {
            source.idle_polls += 1;
        }
        if source.idle_polls < IDLE_POLLS_MAX && connection.has_pipe(source.side) {
            self.sources.push(source);
        } else {
            source.release(connection, io);
        }
        outcome
    }

    /// Sets the next poll, after every source was polled.
    pub(super) fn end_poll(&mut self, now: Instant) {
        self.next_poll = now + INTERVAL;
    }

    /// Releases all sources, so that every segment is reported, as the
    /// importing thread expects.
    pub(super) fn stop(&mut self, connections: &mut Slab<Connection>, io: &Io) {
        for mut source in self.take_sources() {
            if let Some(connection) = connections.get_mut(source.key) {
                source.release(connection, io);
            }
        }
    }
}

impl BusySource {
    /// Ends the coalescing of this source.
    fn release(&mut self, connection: &mut Connection, io: &Io) {
        connection.clear_busy(self.side);
        self.set_watch(Watch::Segments, connection, io);
    }

    /// Where the system refuses, the source is polled and watched as well.
    fn set_watch(&mut self, watch: Watch, connection: &Connection, io: &Io) {
        let former = std::mem::replace(&mut self.watch, watch);
        if former == watch {
            return;
        }
        let (socket, source) = match self.side {
            Side::Client => (&connection.client, EventSource::Client),
            Side::Server => (&connection.server, EventSource::Server),
        };
        if (former == Watch::Segments) != (watch == Watch::Segments) {
            let bytes = match watch {
                Watch::Bursts | Watch::End => LOW_WATER_BYTES,
                Watch::Segments => 1,
            };
            // What is there already is reported at once.
            let _ = LowWater.set(socket, &bytes);
        }
        if (former == Watch::End) != (watch == Watch::End) {
            let events = match watch {
                // Every segment would wake up who waits for an urgent byte. A
                // splice stops there, so the source soon counts as idle.
                Watch::End => STREAM_EVENTS.difference(EventFlags::IN.union(EventFlags::PRI)),
                Watch::Segments | Watch::Bursts => STREAM_EVENTS,
            };
            let _ = io.change_watch(socket, source.of_key(self.key), events);
        }
    }
}
