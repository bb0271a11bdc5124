//! The connections and UDP flows of one session: how many are open here, and
//! whether one has claimed the session.
//!
//! Companion connections do not claim a session, and they keep it only after a
//! connection to one of its own ports has been open. Otherwise a session whose
//! client never comes would last as long as another one's of the same address.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::span::Carried;
use crate::forward::Traffic;
use crate::selection::Session;
use crate::session::SessionState;

/// How long a client that sends nothing must stay to claim its session: longer
/// than a scan, and longer than the data plane tries to reach a server.
pub(super) const CLAIMING_TIME: Duration = Duration::from_secs(5);

/// Connections and UDP flows of a session.
#[derive(Debug, Default)]
pub(super) struct Flows {
    /// Those that are open on the session's own ports.
    pub(super) own: u32,
    /// Those of its clients that are open on companion ports.
    pub(super) companions: u32,
    /// A client that has come to a companion port, as its agent learns.
    pub(super) companion: Option<IpAddr>,
    /// Whether one has been open on its own ports, here or elsewhere.
    pub(super) is_begun: bool,
    /// From when on one has been open, if one is on its own ports.
    pub(super) since: Option<Instant>,
    /// Whether one has claimed the session, see [`Flows::close`].
    pub(super) is_claimed: bool,
    pub(super) carried: Carried,
}

impl Flows {
    /// Those of a `session` that is new here: none.
    pub(super) fn of(session: &Session) -> Self {
        Self {
            is_begun: has_begun(session),
            ..Self::default()
        }
    }

    /// The flows of a session that comes from another process with `open` of them.
    pub(super) fn imported(open: u32, session: &Session, carried: Carried) -> Self {
        Self {
            own: open,
            companions: 0,
            companion: None,
            is_begun: open > 0 || has_begun(session),
            since: (open > 0).then(Instant::now),
            is_claimed: session.is_claimed,
            carried,
        }
    }

    /// Whether the session is in use here.
    pub(super) fn is_open(&self) -> bool {
        self.own > 0 || (self.is_begun && self.companions > 0)
    }

    /// The number of those that are open, companions included.
    pub(super) fn count(&self) -> u32 {
        self.own + self.companions
    }

    pub(super) fn open(&mut self) {
        self.own += 1;
        self.is_begun = true;
        self.since.get_or_insert_with(Instant::now);
        self.carried.opened();
    }

    /// `count` companion connections of its clients are open.
    pub(super) fn open_companions(&mut self, count: u32) {
        self.companions += count;
        self.carried.connections += u64::from(count);
    }

    /// A companion connection has ended.
    pub(super) fn close_companion(&mut self, traffic: Traffic) {
        self.companions -= 1;
        self.carried.closed(traffic);
    }

    /// Notes what its agent reports.
    pub(super) fn follow(&mut self, session: &Session) {
        self.is_begun |= has_begun(session);
    }

    /// One on the session's own ports has ended.
    ///
    /// It has claimed the session if something that the client sent has reached
    /// the server, or if the client stayed for [`CLAIMING_TIME`]. What connects and
    /// leaves is a scan or a probe, which may well receive a greeting.
    pub(super) fn close(&mut self, traffic: Traffic) {
        let has_lasted = self
            .since
            .is_some_and(|since| since.elapsed() >= CLAIMING_TIME);
        self.is_claimed |= traffic.upstream_bytes > 0 || has_lasted;
        self.own -= 1;
        self.carried.closed(traffic);
        if self.own == 0 {
            self.since = None;
        }
    }
}

/// Whether a connection to a port of `session` has been open somewhere.
fn has_begun(session: &Session) -> bool {
    session.is_claimed || session.state != SessionState::Held
}
