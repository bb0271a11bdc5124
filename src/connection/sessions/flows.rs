//! The connections and UDP flows of one session: how many are open here, and
//! whether one has claimed the session.

use std::time::{Duration, Instant};

use super::span::Carried;
use crate::forward::Traffic;
use crate::selection::Session;

/// How long a client that sends nothing must stay to claim its session: longer
/// than a scan, and longer than the data plane tries to reach a server.
pub(super) const CLAIMING_TIME: Duration = Duration::from_secs(5);

/// Connections and UDP flows of a session.
#[derive(Debug, Default)]
pub(super) struct Flows {
    pub(super) open: u32,
    /// From when on one has been open, if one is.
    pub(super) since: Option<Instant>,
    /// Whether one has claimed the session, see [`Flows::close`].
    pub(super) is_claimed: bool,
    pub(super) carried: Carried,
}

impl Flows {
    /// The flows of a session that comes from another process with `open` of them.
    pub(super) fn imported(open: u32, session: &Session, carried: Carried) -> Self {
        Self {
            open,
            since: (open > 0).then(Instant::now),
            is_claimed: session.is_claimed,
            carried,
        }
    }

    pub(super) fn open(&mut self) {
        self.open += 1;
        self.since.get_or_insert_with(Instant::now);
        self.carried.opened();
    }

    /// One has ended. Returns whether it was the last.
    ///
    /// It has claimed the session if something that the client sent has reached
    /// the server, or if the client stayed for [`CLAIMING_TIME`]. What connects and
    /// leaves is a scan or a probe, which may well receive a greeting.
    pub(super) fn close(&mut self, traffic: Traffic) -> bool {
        let has_lasted = self
            .since
            .is_some_and(|since| since.elapsed() >= CLAIMING_TIME);
        self.is_claimed |= traffic.upstream_bytes > 0 || has_lasted;
        self.open -= 1;
        self.carried.closed(traffic);
        if self.open == 0 {
            self.since = None;
        }
        self.open == 0
    }
}
