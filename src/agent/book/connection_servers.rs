//! The connection servers that the book knows: which are attached, and what
//! the others may still have. Knows sessions by number only.
//!
//! ```text
//!                 detach                    grace passed
//!   attached ───────────────→ away ───────────────────────→ gone
//!      ↑          attach       │ another one in its place      ↑
//!      └───────────────────────┤                grace passed   │
//!                              └──→ over, its sockets closed ──┘
//! ```
//!
//! A stream's end tells nothing about the process: a middlebox may have ended
//! it, and the connection server goes on with the sessions that it knows. What
//! it cannot have is what it was never told: a session made while it was away.
//! And that it is no more is told by another one that listens in its place,
//! which no two processes can at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::selection::{CLOSED_AFTER, GONE_AFTER};

/// Those known to the book, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct ConnectionServers(BTreeMap<String, ConnectionServer>);

#[derive(Clone, Debug)]
struct ConnectionServer {
    /// Where it listens; empty when that proves nothing.
    place: String,
    /// Set while it is not attached.
    away: Option<Away>,
}

#[derive(Clone, Debug)]
struct Away {
    /// Sessions of this number and above it cannot know.
    unknown_from: u64,
    /// When the last of its sockets is closed: its process is no more.
    closed_at: Option<Duration>,
    /// When it is gone for good.
    gone_at: Duration,
}

impl ConnectionServers {
    /// `name` is attached, and listens at `place`. Who was there before it, and
    /// is away, is no more.
    pub(super) fn attach(&mut self, name: &str, place: &str, now: Duration) {
        let mut is_shared = false;
        for (other, server) in &mut self.0 {
            if place.is_empty() || server.place != place || other == name {
                continue;
            }
            match &mut server.away {
                Some(away) => {
                    away.closed_at.get_or_insert(now + CLOSED_AFTER);
                }
                // Two at a time: machines that were copied while they ran, say.
                None => {
                    is_shared = true;
                    server.place.clear();
                }
            }
        }
        let place = if is_shared { "" } else { place };
        let server = ConnectionServer {
            place: place.to_owned(),
            away: None,
        };
        self.0.insert(name.to_owned(), server);
    }

    /// The stream of `name` is gone. Sessions made from now on have `next`
    /// as number, or a higher one.
    pub(super) fn detach(&mut self, name: &str, next: u64, now: Duration) {
        if let Some(server) = self.0.get_mut(name) {
            server.away = Some(Away {
                unknown_from: next,
                closed_at: None,
                gone_at: now + GONE_AFTER,
            });
        }
    }

    /// Nobody waits for `name` any more.
    pub(super) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Who may have connections of the session `number`, or admit any.
    pub(super) fn may_know(&self, number: u64) -> BTreeSet<String> {
        let may = |server: &ConnectionServer| match &server.away {
            Some(away) => number < away.unknown_from,
            None => true,
        };
        let those = self.0.iter().filter(|(_, server)| may(server));
        those.map(|(name, _)| name.clone()).collect()
    }

    /// Those whose last socket is closed by `now`, each once: they have nothing.
    pub(super) fn take_closed(&mut self, now: Duration) -> Vec<String> {
        let mut closed = Vec::new();
        for (name, server) in &mut self.0 {
            if let Some(away) = &mut server.away
                && away.closed_at.is_some_and(|at| at <= now)
            {
                away.closed_at = None;
                away.unknown_from = 0;
                closed.push(name.clone());
            }
        }
        closed
    }

    /// Those that are gone for good by `now`; they are known no more.
    pub(super) fn take_gone(&mut self, now: Duration) -> Vec<String> {
        let is_gone = |server: &ConnectionServer| {
            let away = server.away.as_ref();
            away.is_some_and(|away| away.gone_at <= now)
        };
        let gone = self.0.iter().filter(|(_, server)| is_gone(server));
        let gone: Vec<String> = gone.map(|(name, _)| name.clone()).collect();
        for name in &gone {
            self.0.remove(name);
        }
        gone
    }

    /// When one of the two has something next.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let away = self.0.values().filter_map(|server| server.away.as_ref());
        away.flat_map(|away| [away.closed_at, Some(away.gone_at)])
            .flatten()
            .min()
    }
}
