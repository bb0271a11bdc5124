//! Directions that carry much are read now and then, not at every segment.
//!
//! Moving bytes costs per segment and per wake-up; what has gathered in a
//! socket meanwhile moves as a few large segments, at about half the cost.
//!
//! - Several busy directions of a thread are not watched, but looked at in
//!   turns: one wake-up serves them all.
//! - A lone one is watched, but reported only when much has gathered. Were it
//!   only looked at, both ends would sleep in between.
//! - Nothing is read while bytes wait for the destination.
//!
//! The end of a burst waits for the next look, [`INTERVAL`] at most. Where the
//! window is too small for so much to gather, the kernel reports less.
//!
//! Source: Linux, `net/ipv4/tcp.c`, `tcp_set_rcvlowat` and `tcp_epollin_ready`.

use std::time::Duration;

use nix::libc;
use nix::sys::socket::SetSockOpt;
use nix::sys::socket::sockopt::SetUsize;
use rustix::event::epoll::{self, EventFlags};

use super::{Source, WATCHED, Worker};
use crate::forward::slab::Key;
use crate::forward::tcp::Side;

/// Busy directions that are looked at only.
const FEWEST: usize = 2;

/// Bytes that have gathered in a lone one's socket when it is reported. So
/// many fill the destination's send queue: from then on the work goes by what
/// the destination takes, a third of that queue at a time.
const LOW_WATER_BYTES: usize = 2 * 1024 * 1024;

/// Time between two looks. What gathers in it is bounded by TCP's window.
const INTERVAL: Duration = Duration::from_millis(1);

/// Looks in a row that find little, before the source is watched closely.
const IDLE_LOOKS: u8 = 4;

/// From how many bytes on a look finds more than little: in the time between
/// two as many as a direction has to carry to count as busy.
const LEAST_BYTES: u64 = 16 * 1024;

// The system call interfaces used elsewhere have no safe call for it.
nix::setsockopt_impl!(
    LowWater,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    usize,
    SetUsize
);

/// Bytes that have gathered in a socket when it is reported as readable.
#[derive(Clone, Copy, Debug)]
struct LowWater;

/// How the source of a direction is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// Every segment is reported.
    Close,
    /// Much is reported.
    Gathered,
    /// Nothing is, but its end.
    Not,
}

/// A direction that carries much.
#[derive(Debug)]
struct Busy {
    key: Key,
    source: Side,
    watch: Watch,
    idle_looks: u8,
    /// Bytes of its connection at the last look.
    seen: u64,
}

/// The busy directions of a thread, and when to look at them.
#[derive(Debug)]
pub(super) struct Gathering {
    busy: Vec<Busy>,
}

impl Gathering {
    pub(super) fn new() -> Self {
        Self { busy: Vec::new() }
    }

    /// Whether directions are to be looked at.
    pub(super) fn is_active(&self) -> bool {
        !self.busy.is_empty()
    }

    fn is_lone(&self) -> bool {
        self.busy.len() < FEWEST
    }
}

impl Worker {
    /// Has the connection's directions gather that carry much.
    pub(super) fn gather_if_busy(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let sources = [Side::Client, Side::Server]
            .map(|source| connection.take_up_as_busy(source).then_some(source));
        let mut is_new = false;
        for source in sources.into_iter().flatten() {
            self.gathering.busy.push(Busy {
                key,
                source,
                watch: Watch::Close,
                idle_looks: 0,
                seen: 0,
            });
            self.next_look = self.now + INTERVAL;
            is_new = true;
        }
        // A lone one may wait for its destination now, or no longer.
        let lone = self.gathering.busy.first();
        let is_lone = self.gathering.is_lone() && lone.is_some_and(|lone| lone.key == key);
        if is_new || is_lone {
            self.watch_busy();
        }
    }

    /// Has all busy directions watched as they and their number ask for.
    fn watch_busy(&mut self) {
        let is_lone = self.gathering.is_lone();
        let mut busy = std::mem::take(&mut self.gathering.busy);
        for direction in &mut busy {
            let connection = self.connections.get_mut(direction.key);
            let is_stuck =
                connection.is_some_and(|connection| connection.is_stuck(direction.source));
            let watch = match is_lone && !is_stuck {
                true => Watch::Gathered,
                false => Watch::Not,
            };
            self.set_watch(direction, watch);
        }
        self.gathering.busy = busy;
    }

    /// Where the system refuses, a source is looked at and watched as well.
    fn set_watch(&mut self, direction: &mut Busy, watch: Watch) {
        let former = std::mem::replace(&mut direction.watch, watch);
        if former == watch {
            return;
        }
        let Some(connection) = self.connections.get_mut(direction.key) else {
            return;
        };
        let (socket, kind) = match direction.source {
            Side::Client => (&connection.client, Source::Client),
            Side::Server => (&connection.server, Source::Server),
        };
        if (former == Watch::Close) != (watch == Watch::Close) {
            let bytes = match watch {
                Watch::Gathered | Watch::Not => LOW_WATER_BYTES,
                Watch::Close => 1,
            };
            // What is there already is reported at once.
            let _ = LowWater.set(socket, &bytes);
        }
        if (former == Watch::Not) != (watch == Watch::Not) {
            let flags = match watch {
                Watch::Not => WATCHED.difference(EventFlags::IN),
                Watch::Close | Watch::Gathered => WATCHED,
            };
            let data = kind.data(direction.key.to_bits());
            let _ = epoll::modify(&self.epoll, socket, data, flags);
        }
    }

    /// Has every source watched closely, as whoever takes it over expects.
    pub(super) fn stop_gathering(&mut self) {
        for mut direction in std::mem::take(&mut self.gathering.busy) {
            if let Some(connection) = self.connections.get_mut(direction.key) {
                connection.is_no_longer_busy(direction.source);
            }
            self.set_watch(&mut direction, Watch::Close);
        }
    }

    /// Moves what has gathered.
    pub(super) fn look_at_gathering(&mut self) {
        let was_lone = self.gathering.is_lone();
        for mut direction in std::mem::take(&mut self.gathering.busy) {
            let (key, source) = (direction.key, direction.source);
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            let outcome = connection.pump_from(source, &mut self.scratch);
            let total = connection.traffic().total();
            let bytes = total - std::mem::replace(&mut direction.seen, total);
            if bytes > 0 {
                connection.active = self.now;
            }
            match bytes >= LEAST_BYTES {
                true => direction.idle_looks = 0,
                false => direction.idle_looks += 1,
            }
            if direction.idle_looks < IDLE_LOOKS && connection.has_pipe(source) {
                self.gathering.busy.push(direction);
            } else {
                connection.is_no_longer_busy(source);
                self.set_watch(&mut direction, Watch::Close);
            }
            self.conclude(key, outcome);
        }
        self.next_look = self.now + INTERVAL;
        if self.gathering.is_lone() && !was_lone {
            self.watch_busy();
        }
    }
}
