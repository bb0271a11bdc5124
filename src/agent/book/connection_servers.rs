//! The connection servers that the book knows: which are attached, and which
//! sessions the others may still know. Sessions are numbers here.
//!
//! ```text
//!                 detach                    grace passed
//!   attached ───────────────→ away ───────────────────────→ gone
//!      ↑          attach       │ another one at its address    ↑
//!      └───────────────────────┤                grace passed   │
//!                              └─→ stopped, sockets closed ────┘
//! ```
//!
//! The end of a stream says nothing about the process. A middlebox may have
//! ended the stream while the connection server serves the sessions that it
//! knows. It cannot know a session that was made while it was away. When
//! another connection server attaches from the same address, the old process
//! must be dead, because two processes cannot listen there at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::selection::{CLOSED_AFTER, ConnectionServerId, GONE_AFTER};
use crate::table::ListenPort;

/// The connection servers that are known to the book.
#[derive(Clone, Debug, Default)]
pub(super) struct ConnectionServers(BTreeMap<ConnectionServerId, ConnectionServer>);

#[derive(Clone, Debug)]
struct ConnectionServer {
    /// Where it listens; empty when that proves nothing.
    host_identity: String,
    /// Set while it is not attached.
    away: Option<Away>,
    /// The ports that it cannot listen on, as it said last.
    unavailable: BTreeSet<ListenPort>,
}

#[derive(Clone, Debug)]
struct Away {
    /// The lowest number of the sessions that it cannot know.
    unknown_from: u64,
    /// When the last of its sockets is closed; set once its process is dead.
    closed_at: Option<Duration>,
    /// When it is gone for good.
    gone_at: Duration,
}

impl ConnectionServers {
    /// Attaches `id`, which listens at `host_identity`. Any other one that
    /// listened there and is away is dead.
    pub(super) fn attach(&mut self, id: &ConnectionServerId, host_identity: &str, now: Duration) {
        let mut is_shared = false;
        for (other, server) in &mut self.0 {
            if host_identity.is_empty() || server.host_identity != host_identity || other == id {
                continue;
            }
            match &mut server.away {
                Some(away) => {
                    away.closed_at.get_or_insert(now + CLOSED_AFTER);
                }
                // Two at a time, for example in machines copied while they ran.
                None => {
                    is_shared = true;
                    server.host_identity.clear();
                }
            }
        }
        let host_identity = if is_shared { "" } else { host_identity };
        let server = ConnectionServer {
            host_identity: host_identity.to_owned(),
            away: None,
            unavailable: BTreeSet::new(),
        };
        self.0.insert(id.clone(), server);
    }

    /// Notes that `id` cannot listen on `ports`.
    pub(super) fn set_unavailable(&mut self, id: &ConnectionServerId, ports: &[ListenPort]) {
        if let Some(server) = self.0.get_mut(id) {
            server.unavailable = ports.iter().copied().collect();
        }
    }

    /// The ports that any of them cannot listen on.
    pub(super) fn unavailable(&self) -> BTreeSet<ListenPort> {
        let servers = self.0.values();
        servers
            .flat_map(|server| &server.unavailable)
            .copied()
            .collect()
    }

    /// Notes that the stream of `id` has ended. Sessions made from now on have
    /// the number `next` or a higher one.
    pub(super) fn detach(&mut self, id: &ConnectionServerId, next: u64, now: Duration) {
        if let Some(server) = self.0.get_mut(id) {
            server.away = Some(Away {
                unknown_from: next,
                closed_at: None,
                gone_at: now + GONE_AFTER,
            });
        }
    }

    /// Forgets `id`, so that no port waits for it.
    pub(super) fn remove(&mut self, id: &ConnectionServerId) {
        self.0.remove(id);
    }

    /// Those that may have connections of the session `number`, or admit any.
    pub(super) fn may_know(&self, number: u64) -> BTreeSet<ConnectionServerId> {
        let may = |server: &ConnectionServer| match &server.away {
            Some(away) => number < away.unknown_from,
            None => true,
        };
        let those = self.0.iter().filter(|(_, server)| may(server));
        those.map(|(id, _)| id.clone()).collect()
    }

    /// Those whose last socket is closed by `now`, each once. They have no
    /// connection left.
    pub(super) fn take_closed(&mut self, now: Duration) -> Vec<ConnectionServerId> {
        let mut closed = Vec::new();
        for (id, server) in &mut self.0 {
            if let Some(away) = &mut server.away
                && away.closed_at.is_some_and(|at| at <= now)
            {
                away.closed_at = None;
                away.unknown_from = 0;
                server.unavailable = BTreeSet::new();
                closed.push(id.clone());
            }
        }
        closed
    }

    /// Those that are gone for good by `now`, which are forgotten.
    pub(super) fn take_gone(&mut self, now: Duration) -> Vec<ConnectionServerId> {
        let is_gone = |server: &ConnectionServer| {
            let away = server.away.as_ref();
            away.is_some_and(|away| away.gone_at <= now)
        };
        let gone = self.0.iter().filter(|(_, server)| is_gone(server));
        let gone: Vec<ConnectionServerId> = gone.map(|(id, _)| id.clone()).collect();
        for id in &gone {
            self.0.remove(id);
        }
        gone
    }

    /// When [`Self::take_closed`] or [`Self::take_gone`] returns one next.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let away = self.0.values().filter_map(|server| server.away.as_ref());
        away.flat_map(|away| [away.closed_at, Some(away.gone_at)])
            .flatten()
            .min()
    }
}
