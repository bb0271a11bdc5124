//! What goes into the queue and comes out of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::super::refusal::Refusal;
use super::super::servers::ReportNumber;
use super::{AskId, Caller, Place, Request};
use crate::selection::{RefusalCause, Session};
use crate::session::{Block, Metadata, OneOrMore, PortState};
use crate::table::Slot;

/// What requests ask for that can use the same ports: those that match, of one server
/// or of any that has not turned them down.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Usable {
    pub(super) ports: OneOrMore<Block>,
    pub(super) only: Option<Slot>,
    pub(super) turned_down_by: BTreeSet<Slot>,
}

impl Usable {
    /// Whether they ask for one port each.
    pub(super) fn is_for_one(&self) -> bool {
        self.ports.as_single().is_some()
    }

    /// Whether ports of the server of `slot` may be among them.
    pub(super) fn may_use(&self, slot: Slot) -> bool {
        self.only.is_none_or(|only| only == slot) && !self.turned_down_by.contains(&slot)
    }

    /// Whether `ports`, those of an entry of the server of `slot`, are among them.
    pub(super) fn includes(&self, slot: Slot, ports: &PortState) -> bool {
        let mut blocks = self.ports.iter();
        let admits = |block: &Block| block.filter.admits(&ports.name, ports.protocol);
        self.may_use(slot) && blocks.any(admits)
    }
}

/// Waiting requests that can use the same ports.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    /// Their places: at least one.
    pub(super) places: BTreeSet<Place>,
    /// For several ports: the servers that did not select them for one of the requests,
    /// with the number of what they had reported last. It holds for the others as well.
    pub(super) refused_by: BTreeMap<Slot, ReportNumber>,
}

/// The servers that have refused a request, or another one that waits for the same
/// several ports.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusals<'a> {
    own: &'a BTreeMap<Slot, ReportNumber>,
    of_group: Option<&'a BTreeMap<Slot, ReportNumber>>,
}

impl<'a> Refusals<'a> {
    pub(super) fn of(request: &'a Request, waiting: &'a BTreeMap<Usable, Group>) -> Self {
        let is_for_several = request.wanted.ports.as_single().is_none();
        let group = is_for_several.then(|| waiting.get(&request.usable()));
        let group = group.flatten();
        Self {
            own: &request.refused_by,
            of_group: group.map(|group| &group.refused_by),
        }
    }

    /// Whether the server of `slot` has refused since the report of this number.
    pub(super) fn include(self, slot: Slot, report: ReportNumber) -> bool {
        let of_group = self.of_group.and_then(|refused_by| refused_by.get(&slot));
        [self.own.get(&slot), of_group].contains(&Some(&report))
    }
}

/// What a request wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The ports that it asks for: all of them or none.
    pub ports: OneOrMore<Block>,
    /// The only server whose ports it can use, if it is for one.
    pub only: Option<Slot>,
    /// What the policy `AffinityHash` goes by.
    pub affinity_key: Option<String>,
    /// The key under which the same request gets the same session.
    pub idempotency_key: Option<String>,
    /// The requester's address when only it may connect.
    pub bound_client: Option<IpAddr>,
    /// What the client says to the workload.
    pub metadata: Metadata,
    /// The requester's address. One request may come from several.
    pub requester: Option<IpAddr>,
}

impl Wanted {
    /// Whether this request could have made `session` on the server of `slot`.
    pub(super) fn made(&self, slot: Slot, session: &Session) -> bool {
        self.may_use(slot)
            && self.ports.could_be(&session.ports)
            && self.bound_client == session.bound_client
    }

    /// Whether it may get a port of the server of `slot`.
    pub(super) fn may_use(&self, slot: Slot) -> bool {
        self.only.is_none_or(|only| only == slot)
    }

    /// Whether both are one request under one key.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.ports == other.ports
            && self.only == other.only
            && self.bound_client == other.bound_client
    }
}

/// A session that a request got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// The slot of its server.
    pub slot: Slot,
    /// The session as its agent reported it.
    pub session: Session,
}

/// How a workload has not confirmed a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unconfirmed {
    /// It did not decide in time.
    Silent,
    /// It has refused, perhaps with a reason.
    Refused(Option<String>),
}

impl Unconfirmed {
    /// What `cause` says about the workload, with its `reason`; `None` if another one
    /// than the workload has refused.
    #[must_use]
    pub fn new(cause: RefusalCause, reason: Option<String>) -> Option<Self> {
        match cause {
            RefusalCause::NotConfirmed => Some(Self::Silent),
            RefusalCause::RefusedByWorkload => Some(Self::Refused(reason)),
            _ => None,
        }
    }

    /// The cause that says so.
    pub(super) fn cause(&self) -> RefusalCause {
        match self {
            Self::Silent => RefusalCause::NotConfirmed,
            Self::Refused(_) => RefusalCause::RefusedByWorkload,
        }
    }
}

/// Why a processing server did not select a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AskError {
    /// It refused.
    Refused(RefusalCause),
    /// It did not answer in time.
    TimedOut,
    /// Its stream went down before the answer.
    Detached,
}

impl AskError {
    /// The static name of the error, for metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused(cause) => cause.name(),
            Self::TimedOut => "TIMED_OUT",
            Self::Detached => "DETACHED",
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Ask the server of `slot` to select the ports for a request.
    Ask {
        /// The number to ask under.
        ask: AskId,
        /// The server's slot.
        slot: Slot,
        /// The request.
        wanted: Wanted,
        /// The time that the workload has to confirm the session, where it is asked.
        confirm_within: Option<Duration>,
    },
    /// Withdraw a question: no client needs the answer any more, and the workload is
    /// being asked.
    Withdraw {
        /// The number that it was asked under.
        ask: AskId,
        /// The server's slot.
        slot: Slot,
    },
    /// Answer a client.
    Answer(Caller, Result<Allocated, Refusal>),
    /// Count a server that was asked and did not select a port.
    NotSelected(Slot, AskError),
}
