//! A session as the book has it: whose port it is, what it is doing, and until
//! when. Changes are made in `life`, which keeps all else in step.

use std::collections::BTreeSet;
use std::time::Duration;

use super::PortFilter;
use super::ports::Occupancy;
use crate::table::ListenPort;

/// The number of sessions made before a restart: any connection server may know
/// them, whenever it attaches.
pub(super) const ADOPTED: u64 = 0;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    Held,
    Busy,
    Lingering,
    /// Over; these have not acknowledged it yet.
    Ending(BTreeSet<String>),
}

#[derive(Clone, Debug)]
pub(super) struct Session {
    /// Higher than those of sessions made before it in this book.
    pub(super) number: u64,
    pub(super) port: ListenPort,
    pub(super) owner: String,
    pub(super) state: State,
    /// Connection servers with connections open on it.
    pub(super) open: BTreeSet<String>,
    pub(super) filter: PortFilter,
    pub(super) idempotency_key: String,
    pub(super) bound_client: String,
    pub(super) created_ms: u64,
    pub(super) claim_deadline_ms: u64,
    /// When the state ends by itself.
    pub(super) until: Option<Duration>,
    /// When the session ends whatever its state.
    pub(super) at_most: Option<Duration>,
}

impl Session {
    pub(super) fn deadline(&self) -> Option<Duration> {
        if matches!(self.state, State::Ending(_)) {
            return None;
        }
        self.until.into_iter().chain(self.at_most).min()
    }

    pub(super) fn occupancy(&self) -> Occupancy {
        match self.state {
            State::Held => Occupancy::Held,
            State::Busy => Occupancy::Busy,
            State::Lingering | State::Ending(_) => Occupancy::Lingering,
        }
    }

    pub(super) fn is_live(&self) -> bool {
        !matches!(self.state, State::Ending(_))
    }
}
