//! The trial of a port whose session is over: whether the sockets that the
//! session used are there to stay. The head of `ports` has the rule.

use std::time::Duration;

use crate::agent::book::listening::{OUTLIVED_AFTER, Sight, SocketId, suffice};
use crate::pool::Offer;

/// What must be seen before a port is free again.
#[derive(Clone, Debug)]
pub(super) struct Trial {
    /// When its session ended. Only what was seen since then counts.
    since: Duration,
    /// When the sockets that the session used count as lasting.
    pub(super) ends: Duration,
    /// The sockets at the port when the session came, by protocol.
    sockets: Vec<Option<SocketId>>,
}

impl Trial {
    /// The trial after a session that ended at `now`, whose last connection
    /// closed at `closed` and that had found `sockets`.
    pub(super) fn new(sockets: Vec<Option<SocketId>>, closed: Duration, now: Duration) -> Self {
        Self {
            since: now,
            ends: closed + OUTLIVED_AFTER,
            sockets,
        }
    }

    /// Whether each socket of the port, which has `offer`, has outlived the session,
    /// by protocol. `None` while `sights`, what was seen last, do not decide what becomes of
    /// the port.
    pub(super) fn outcome(
        &self,
        sights: &[&Sight],
        offer: Offer,
        now: Duration,
    ) -> Option<Vec<bool>> {
        if sights.iter().any(|sight| sight.seen_at < self.since) {
            return None;
        }
        let is_gone = !suffice(sights.iter().map(|sight| sight.socket), offer);
        let is_same = |index: usize| self.sockets.get(index) == Some(&sights[index].socket);
        let all = 0..sights.len();
        let are_others = || {
            let mut all = all.clone();
            all.all(|index| sights[index].is_proven() || !is_same(index))
        };
        let has_ended = now >= self.ends && sights.iter().all(|sight| sight.seen_at >= self.ends);
        if !(is_gone || are_others() || has_ended) {
            return None;
        }
        Some(all.map(|index| !is_gone && is_same(index)).collect())
    }
}
