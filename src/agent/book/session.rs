//! A session as the book has it: its ports, its state and its deadlines. `life`
//! makes the changes and keeps the rest of the book in step.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;

use super::Now;
use super::ports::Occupancy;
use crate::selection::{ConnectionServerId, MAX_CLIENTS};
use crate::session::{Metadata, OneOrMore};
use crate::table::ListenPort;

/// The number of each session made before a restart. Any connection server may
/// know such a session, whenever it attaches.
pub(super) const ADOPTED: u64 = 0;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The workload has yet to confirm it; no connection server knows it.
    Offered(Offer),
    Held,
    Busy,
    Lingering,
    /// It is over; these have not acknowledged the end yet.
    Ending(BTreeSet<ConnectionServerId>),
}

/// A session that the workload has yet to confirm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// The requests that the answer is for: at least one.
    pub(super) askers: Vec<Asker>,
    /// Until when the workload may confirm it.
    pub(super) deadline: Timestamp,
}

/// A request of a connection server that is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asker {
    pub(super) from: ConnectionServerId,
    pub(super) request_id: u64,
}

/// When the last connection of a session closed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Closed {
    pub(super) monotonic: Duration,
    /// The time of day, which a restarted agent can use.
    pub(super) time: Timestamp,
}

#[derive(Clone, Debug)]
pub(super) struct Session {
    /// A number above those of all sessions made before it in this book.
    pub(super) number: u64,
    pub(super) ports: OneOrMore<ListenPort>,
    pub(super) owner: ConnectionServerId,
    pub(super) state: State,
    /// Connection servers with connections open on it.
    pub(super) open: BTreeSet<ConnectionServerId>,
    /// Whether a connection has claimed it.
    pub(super) is_claimed: bool,
    /// Whether a client of it has come to a companion port. That claims no session, but
    /// the server has been used. A restarted agent does not need to know: it takes no
    /// more sessions where they are counted.
    pub(super) has_used_companion: bool,
    /// When the last connection on it closed.
    pub(super) closed: Option<Closed>,
    pub(super) idempotency_key: Option<String>,
    pub(super) bound_client: Option<IpAddr>,
    pub(super) metadata: Metadata,
    /// The addresses that may use companion ports, at most [`MAX_CLIENTS`].
    pub(super) clients: Vec<IpAddr>,
    pub(super) created: Timestamp,
    pub(super) claim_deadline: Timestamp,
    /// The same moment on the other clock.
    pub(super) claim_until: Duration,
    /// When the state ends without an event.
    pub(super) until: Option<Duration>,
    /// When the session ends in any state.
    pub(super) at_most: Option<Duration>,
    /// The same moment on the other clock.
    pub(super) expires: Option<Timestamp>,
    /// Whether an amendment has set it.
    pub(super) has_own_expiry: bool,
    /// When its metadata and its end were set last, by the request or an amendment; each
    /// time is later than the one before. Unknown if a greeting had no room for them.
    pub(super) amended: Option<Timestamp>,
    /// Whether the workload has confirmed it, and what it has said then.
    pub(super) is_confirmed: bool,
    pub(super) workload_metadata: Metadata,
}

impl Session {
    /// The state of a session without connections that would linger until
    /// `linger_until`, and when that state ends. One that no connection has
    /// claimed is held until the claim deadline, unless that is earlier.
    pub(super) fn at_rest(&self, linger_until: Duration) -> (State, Duration) {
        if !self.is_claimed && self.claim_until >= linger_until {
            (State::Held, self.claim_until)
        } else {
            (State::Lingering, linger_until)
        }
    }

    /// Lets `client` use companion ports. Returns whether that is new. Beyond the
    /// limit, and where only another address may connect, nothing changes.
    pub(super) fn join(&mut self, client: IpAddr) -> bool {
        let is_new = !self.clients.contains(&client)
            && self.clients.len() < MAX_CLIENTS
            && self.bound_client.is_none_or(|bound| bound == client);
        if is_new {
            self.clients.push(client);
        }
        is_new
    }

    /// Has the session end at `expires`, or at no set time.
    pub(super) fn set_expiry(&mut self, expires: Option<Timestamp>, now: Now) {
        self.expires = expires;
        self.at_most = expires.map(|at| now.monotonic + now.until(at));
        self.has_own_expiry = true;
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        if matches!(self.state, State::Ending(_)) {
            return None;
        }
        self.until.into_iter().chain(self.at_most).min()
    }

    pub(super) fn occupancy(&self) -> Occupancy {
        match self.state {
            State::Offered(_) | State::Held => Occupancy::Held,
            State::Busy => Occupancy::Busy,
            State::Lingering => Occupancy::Lingering,
            State::Ending(_) => Occupancy::Ending,
        }
    }

    /// Whether the workload has yet to confirm it.
    pub(super) fn is_offered(&self) -> bool {
        matches!(self.state, State::Offered(_))
    }

    pub(super) fn is_live(&self) -> bool {
        !matches!(self.state, State::Ending(_))
    }
}
