//! Directions that carry much are read now and then, not at every segment.
//!
//! Moving bytes costs per segment and per wake-up; what has gathered in a
//! socket meanwhile moves as a few large segments, at about half the cost. So
//! when several directions of a thread are busy their sources are not watched,
//! but looked at in turns. A lone one is watched: with nothing else to do
//! until its next look, both processors would sleep and it would slow down.
//!
//! The end of a burst waits for the next look, [`LONGEST`] at most. What can
//! gather is bounded by TCP's window.

use std::time::Duration;

use rustix::event::epoll::{self, EventFlags};

use super::{Source, WATCHED, Worker};
use crate::connection::forward::slab::Key;
use crate::connection::forward::tcp::Side;

/// Busy directions that it takes.
const FEWEST: usize = 2;

/// Bytes that should have gathered in a socket when it is looked at: more
/// gain little, and fewer fit a window that is still small.
const TARGET_BYTES: u64 = 256 * 1024;

/// Bounds of the time between two looks.
const SHORTEST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(1);

/// Looks in a row that find nothing, before the source is watched again.
const IDLE_LOOKS: u8 = 4;

/// A direction that carries much.
#[derive(Debug)]
pub(super) struct Busy {
    key: Key,
    source: Side,
    /// It is not watched.
    is_gathering: bool,
    idle_looks: u8,
}

/// The busy directions of a thread, and when to look at them.
#[derive(Debug)]
pub(super) struct Gathering {
    busy: Vec<Busy>,
    interval: Duration,
}

impl Gathering {
    pub(super) fn new() -> Self {
        Self {
            busy: Vec::new(),
            interval: SHORTEST,
        }
    }

    /// Whether directions are to be looked at.
    pub(super) fn is_active(&self) -> bool {
        self.busy.len() >= FEWEST
    }

    /// Learns that the last look has moved `bytes` altogether.
    fn learn(&mut self, bytes: u64) {
        let target = TARGET_BYTES * self.busy.len() as u64;
        let factor = if bytes < target { 1.125 } else { 0.8 };
        self.interval = self.interval.mul_f64(factor).clamp(SHORTEST, LONGEST);
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
        for source in sources.into_iter().flatten() {
            self.gathering.busy.push(Busy {
                key,
                source,
                is_gathering: false,
                idle_looks: 0,
            });
            self.next_look = self.now + self.gathering.interval;
            self.watch_or_gather();
        }
    }

    /// Has all busy directions gather, or a lone one watched.
    fn watch_or_gather(&mut self) {
        let gathers = self.gathering.is_active();
        let mut busy = std::mem::take(&mut self.gathering.busy);
        for direction in busy
            .iter_mut()
            .filter(|direction| direction.is_gathering != gathers)
        {
            // Where the system refuses, it is looked at and watched as well.
            self.set_watched(direction, !gathers);
            direction.is_gathering = gathers;
        }
        self.gathering.busy = busy;
    }

    fn set_watched(&mut self, direction: &Busy, is_watched: bool) {
        let Some(connection) = self.connections.get_mut(direction.key) else {
            return;
        };
        let (socket, kind) = match direction.source {
            Side::Client => (&connection.client, Source::Client),
            Side::Server => (&connection.server, Source::Server),
        };
        let flags = match is_watched {
            // What is there already is reported at once.
            true => WATCHED,
            false => WATCHED.difference(EventFlags::IN),
        };
        let _ = epoll::modify(
            &self.epoll,
            socket,
            kind.data(direction.key.to_bits()),
            flags,
        );
    }

    /// Moves what has gathered.
    pub(super) fn look_at_gathering(&mut self) {
        let mut moved = 0;
        for mut direction in std::mem::take(&mut self.gathering.busy) {
            let (key, source) = (direction.key, direction.source);
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            let before = connection.traffic().total();
            let outcome = connection.pump_from(source, &mut self.means);
            let bytes = connection.traffic().total() - before;
            moved += bytes;
            if bytes > 0 {
                direction.idle_looks = 0;
                connection.active = self.now;
            } else {
                direction.idle_looks += 1;
            }
            if direction.idle_looks < IDLE_LOOKS && connection.has_pipe(source) {
                self.gathering.busy.push(direction);
            } else {
                connection.is_no_longer_busy(source);
                self.set_watched(&direction, true);
            }
            self.conclude(key, outcome);
        }
        self.gathering.learn(moved);
        self.next_look = self.now + self.gathering.interval;
        if !self.gathering.is_active() {
            self.watch_or_gather();
        }
    }

    /// Forgets a lone direction that is busy no more; others are found by
    /// looking.
    pub(super) fn tick_gathering(&mut self) {
        if self.gathering.is_active() {
            return;
        }
        let connections = &mut self.connections;
        self.gathering.busy.retain(|direction| {
            let Some(connection) = connections.get_mut(direction.key) else {
                return false;
            };
            let is_busy = connection.has_pipe(direction.source);
            if !is_busy {
                connection.is_no_longer_busy(direction.source);
            }
            is_busy
        });
    }
}
