//! The queue of requests for a session: which request gets a free port, and
//! what its clients are answered. A state machine without I/O, clock or lock:
//! it takes what happened and the time, and returns what is to be done.
//!
//! ```text
//!          a port is free                    selected
//!   enter ───────────────→ asking ─────────────────────────→ answered
//!     │               turn ↑    │ refused, late, stream down
//!     │ waitSeconds        │    ↓
//!     └─────────────────→ waiting ─deadline, queue closed──→ refused
//! ```
//!
//! # The rules
//!
//! 1. **Order.** A port that becomes free goes to the earliest waiting request
//!    that can use it. So while a request for one port waits, no port that it could
//!    use is free, and a later one that is served at once takes nothing from it:
//!    only those who could use the same ports are before one another.
//! 2. **Waiting.** A request waits as long as its client said, 0 s if it said
//!    nothing. Then it is refused with the reason why nothing is free. While
//!    sessions are over whose ports are not free yet, every request waits at
//!    least [`RETURN_TIME`]: who gives a port back may ask at once.
//! 3. **Leaving.** A request whose client is gone leaves at once, with or
//!    without a key. If a server is being asked for it, what that selects is
//!    given back, unless the client has asked again under its key. If a workload is
//!    being asked, the question is withdrawn: see rule 10.
//! 4. **Keys.** Requests with the same idempotency key are one request with
//!    several clients: one place, one session. Each client has its own deadline;
//!    one that does not wait is refused at once while the others wait. The
//!    request keeps its place while one of its clients is left. A different
//!    request with the same key is refused at once.
//! 5. **Bound.** A client holds one place for each key, and one for each request
//!    without a key. So many clients may wait as [`Queue::new`] is given; further
//!    ones are refused at once, so that there is room for those who give back or
//!    ask.
//! 6. **Failure.** A server that refuses a request, or does not answer within
//!    [`ASK_DEADLINE`], is not asked again for it before it has reported anew, nor
//!    for others that wait for the same several ports. The request keeps its place.
//! 7. **Looking.** A request that finds nothing free when it enters asks servers
//!    that have reported ports as not listening: their agents look again, so that
//!    it gets a port that was opened a moment ago. It asks [`MOST_LOOKS`] of them at
//!    most, one after another, none that was asked so 20 ms ago or has yet to answer that,
//!    and for no port that an earlier one waits for. When one does not answer, it
//!    asks no further ones: it would be refused seconds late.
//! 8. **Several ports.** A request for several ports needs them on one server at
//!    once, and servers report numbers, not which ports are adjacent. Later
//!    requests may take ports that it could use for [`PASSED_FOR`]. From then on
//!    it has its turn: the ports of one server are kept for it. There, order is by
//!    arrival alone, so that later requests which could use the same ports get
//!    none, and earlier ones go first. The server is the one with the fewest of
//!    those ports in use. One request has a turn at a time, of the earliest
//!    [`MOST_LOOKED_AT`] the first that any server could serve. Other connection
//!    servers do not know what is kept here.
//! 9. **Turns.** A turn lasts until the request is served or leaves, and no longer than
//!    [`KEPT_FOR`]. A request whose turn was in vain has its next one after those that
//!    waited for theirs then, of twice the length unless its server cut it short. For as
//!    long as the turn has lasted, nothing that shares ports with it is kept, and for up
//!    to twice as long while a request for one port still waits that waited at its end
//!    and could use what was kept. So of each kind of port, what is kept in vain is kept
//!    for half of the time at most. A request that has every turn begins its turns of 10,
//!    20, 40 and 80 s no later than 1, 31, 91 and 211 s after it came, and is served in
//!    one in which the sessions on a server end, unless earlier requests take their
//!    ports. With several such requests it takes up to as many times as long.
//! 10. **Confirmation.** Where workloads confirm sessions, a server that has a port offers
//!     the session to its workload before it answers. If that refuses, or is silent for
//!     too long, the next server is asked, and this one not again for the request. It is
//!     refused when all servers have turned it down, or as otherwise. A client is refused
//!     [`ASK_LIMIT`] after its wait at the latest, and a workload has no longer than
//!     that. A question that no client needs any more is withdrawn: what the same
//!     workload is asked for others, under the same key, goes on. So what was offered
//!     under a key is never given back for want of a client here: others may have it.

mod keeping;
mod offers;
mod request;
mod steps;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use self::keeping::Keeping;
pub use self::request::{Allocated, AskError, Decision, Unconfirmed, Wanted};
use self::request::{Group, Usable};
use super::refusal::Refusal;
use super::servers::{ReportNumber, Reservation, Servers};
use crate::selection::{Counts, RefusalCause};
use crate::table::{Slot, Table};

/// How long a server may take to select a port before the next one is asked. A
/// selection takes well under a millisecond; a second is a server in trouble.
pub const ASK_DEADLINE: Duration = Duration::from_secs(1);

/// How long a request waits in any case while ports are on their way back. That
/// takes milliseconds, or half a second where a workload must first prove that
/// it goes on listening; as much again is for a busy machine.
pub const RETURN_TIME: Duration = Duration::from_secs(1);

/// Most servers that a request asks although they have reported no free port: each
/// costs it a millisecond.
pub const MOST_LOOKS: u32 = 8;

/// How long later requests may take ports that an earlier request for several
/// ports could use: as a rule it is served meanwhile, and no port lies idle for it.
pub const PASSED_FOR: Duration = Duration::from_secs(1);

/// How long the first turn of a request for several ports is at most: many sessions
/// are shorter, and clients of one port that wait hardly notice.
pub const KEPT_FOR: Duration = Duration::from_secs(10);

/// How many different requests for several ports are looked at for the next turn. It
/// bounds the work for each report. Those that no server can serve are looked at again
/// after the others.
pub const MOST_LOOKED_AT: usize = 16;

/// How long a request may take besides its own wait: a few servers that miss
/// their deadline.
pub const ASK_LIMIT: Duration = Duration::from_secs(5);

/// A client's request, as long as it is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Caller(u64);

/// A question to a server's agent, until it is answered: the `request_id` of
/// the selection protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AskId(pub u64);

/// The place of a request in the order of arrival; smaller ones came earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place(u64);

/// A request that is not answered.
#[derive(Clone, Debug)]
struct Request {
    wanted: Wanted,
    /// Its clients, with the time until which each waits: at least one.
    callers: BTreeMap<Caller, Instant>,
    /// The question under way; it waits while there is none.
    asking: Option<AskId>,
    /// The servers that did not select a port for it, with the number of what
    /// they had reported last.
    refused_by: BTreeMap<Slot, ReportNumber>,
    /// The servers whose workloads have not confirmed it. They are not asked again.
    turned_down_by: BTreeMap<Slot, Unconfirmed>,
    /// How many servers it may still ask that have reported no free port.
    looks_left: u32,
    /// From when on it may have a turn; `None` for a request for one port.
    kept_from: Option<Instant>,
    /// Its place among those that wait for a turn, and the turns that it has had.
    turn: Place,
    turns: u32,
}

/// A question under way, also when no request needs the answer any more: until
/// then the port counts as taken.
#[derive(Clone, Debug)]
struct Ask {
    reservation: Reservation,
    deadline: Instant,
    /// The request that needs the answer.
    place: Option<Place>,
    /// The time that the workload has to confirm the session, where it is asked.
    confirm_within: Option<Duration>,
    /// Whether the workload is being asked. The server's counts have the port then.
    is_offered: bool,
}

/// What may be due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Caller(Caller),
    Ask(AskId),
    /// A request for several ports has been passed for long enough, or is over, or its
    /// turn or that of the others is.
    Keep(Place),
}

/// The requests that are not answered, and the servers that they wait for.
#[derive(Clone, Debug)]
pub struct Queue {
    most_waiting: usize,
    servers: Servers,
    requests: BTreeMap<Place, Request>,
    // By what they can use first: a request that cannot be served must not make every
    // later one be looked at again and again.
    waiting: BTreeMap<Usable, Group>,
    keeping: Keeping,
    places: HashMap<Caller, Place>,
    by_key: HashMap<String, Place>,
    asks: BTreeMap<AskId, Ask>,
    deadlines: BTreeSet<(Instant, Due)>,
    is_closed: bool,
    /// The time that workloads have to confirm a session, where the pool asks them.
    confirm: Option<Duration>,
    last_number: u64,
    /// What the change under way leads to.
    decisions: Vec<Decision>,
}

impl Queue {
    /// An empty queue in which at most `most_waiting` clients wait.
    #[must_use]
    pub fn new(most_waiting: usize) -> Self {
        Self {
            most_waiting,
            servers: Servers::default(),
            requests: BTreeMap::new(),
            waiting: BTreeMap::new(),
            keeping: Keeping::default(),
            places: HashMap::new(),
            by_key: HashMap::new(),
            asks: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            is_closed: false,
            confirm: None,
            last_number: 0,
            decisions: Vec::new(),
        }
    }
}

/// What may happen. Each method returns what is to be done, in order.
impl Queue {
    /// A client asks, and waits until `until` when nothing is free. `live` is
    /// the live session of its key, if there is one. `is_returning` says that
    /// sessions are over here whose end their agents have yet to report.
    #[must_use]
    pub fn enter(
        &mut self,
        wanted: Wanted,
        live: Option<Allocated>,
        is_returning: bool,
        until: Instant,
        now: Instant,
    ) -> (Caller, Vec<Decision>) {
        let caller = Caller(self.number());
        if let Some(live) = live {
            let is_its = wanted.made(live.slot, &live.session);
            let answer = is_its.then_some(live).ok_or(Refusal::KeyReused);
            return (caller, vec![Decision::Answer(caller, answer)]);
        }
        if self.is_closed && self.confirm.is_some() {
            // A workload may take longer than a server that stops has.
            let refusal = Decision::Answer(caller, Err(Refusal::ShuttingDown));
            return (caller, vec![refusal]);
        }
        let until = if is_returning || self.servers.has_returning() {
            until.max(now + RETURN_TIME)
        } else {
            until
        };
        let key = wanted.idempotency_key.as_ref();
        let known = key.and_then(|key| self.by_key.get(key)).copied();
        let place = match known.map(|place| (place, &self.requests[&place].wanted)) {
            Some((_, other)) if !other.is_same(&wanted) => {
                let refusal = Decision::Answer(caller, Err(Refusal::KeyReused));
                return (caller, vec![refusal]);
            }
            Some((place, _)) => place,
            None => self.add(wanted, now),
        };
        self.join(place, caller, until, now);
        // The earlier ones have all they can use: see rules 1 and 8.
        if known.is_none() && !self.ask(place, now) {
            self.line_up(place);
            self.ask_to_look(place, now);
        }
        self.refuse_the_impatient(place, now);
        if self.is_waiting(place) && self.places.len() > self.most_waiting {
            self.answer(caller, Err(Refusal::QueueFull));
        }
        (caller, self.take_decisions())
    }

    /// A client is gone. [`Queue::tick`] may be due then.
    #[must_use]
    pub fn leave(&mut self, caller: Caller) -> Vec<Decision> {
        if let Some(&place) = self.places.get(&caller) {
            self.forget(place, caller);
            self.note_left(place);
        }
        self.take_decisions()
    }

    /// A server has selected the ports under `ask`; `counts` are those after it.
    /// Returns also whether someone needs the session: a client receives it, or those
    /// of other connection servers may have been offered it under its key.
    #[must_use]
    pub fn selected(
        &mut self,
        ask: AskId,
        allocated: &Allocated,
        counts: Counts,
        now: Instant,
    ) -> (bool, Vec<Decision>) {
        let ask = self.settle(ask);
        let slot = allocated.slot;
        self.servers.counted(slot, counts);
        let is_received = match ask.as_ref().and_then(|ask| ask.place) {
            Some(place) => self.give(place, allocated),
            None => self.give_by_key(allocated),
        };
        let has_key = allocated.session.idempotency_key.is_some();
        let is_shared = has_key && ask.is_some_and(|ask| ask.is_offered);
        self.wake(Some(slot), now);
        (is_received || is_shared, self.take_decisions())
    }

    /// A server has refused to select a port under `ask`.
    #[must_use]
    pub fn refused(&mut self, ask: AskId, cause: RefusalCause, now: Instant) -> Vec<Decision> {
        let ask = self.settle(ask);
        self.failed(ask, AskError::Refused(cause), now);
        self.take_decisions()
    }

    /// A session became known that another connection server made.
    #[must_use]
    pub fn found(&mut self, live: &Allocated) -> Vec<Decision> {
        self.give_by_key(live);
        self.take_decisions()
    }

    /// An agent's stream is up; its server counts from its first counts on.
    pub fn attach(&mut self, slot: Slot, knows_several_ports: bool) {
        self.servers.attach(slot, knows_several_ports);
    }

    /// An agent's stream is down.
    #[must_use]
    pub fn detach(&mut self, slot: Slot, now: Instant) -> Vec<Decision> {
        self.servers.detach(slot);
        let is_lost = |(_, ask): &(&AskId, &Ask)| ask.reservation.slot == slot;
        let lost: Vec<AskId> = self
            .asks
            .iter()
            .filter(is_lost)
            .map(|(id, _)| *id)
            .collect();
        let lost: Vec<Ask> = lost.into_iter().filter_map(|id| self.settle(id)).collect();
        self.failed(lost, AskError::Detached, now);
        self.take_decisions()
    }

    /// An agent reported its ports.
    #[must_use]
    pub fn counted(&mut self, slot: Slot, counts: Counts, now: Instant) -> Vec<Decision> {
        self.servers.counted(slot, counts);
        self.wake(Some(slot), now);
        self.take_decisions()
    }

    /// Follows `table`: its policy, and its rows. Those that go are detached.
    #[must_use]
    pub fn follow(&mut self, table: &Table, now: Instant) -> Vec<Decision> {
        self.servers.follow(table);
        self.confirm = table.sessions.confirm_within();
        self.wake(None, now);
        self.take_decisions()
    }

    /// Refuses every waiting request, and from now on those that would wait, but
    /// for those that wait no longer than [`RETURN_TIME`]. Where workloads confirm
    /// sessions, all are refused: those that a workload is asked for at once, those that
    /// a server is asked for when it offers the session, and further ones.
    #[must_use]
    pub fn close(&mut self, now: Instant) -> Vec<Decision> {
        self.is_closed = true;
        let places: Vec<Place> = self.requests.keys().copied().collect();
        for place in places {
            self.refuse_the_impatient(place, now);
        }
        self.take_decisions()
    }

    /// Lets requests wait again.
    pub fn open(&mut self) {
        self.is_closed = false;
    }

    /// Does what is due at `now`.
    #[must_use]
    pub fn tick(&mut self, now: Instant) -> Vec<Decision> {
        let mut late = Vec::new();
        while let Some(&(at, due)) = self.deadlines.first() {
            if at > now {
                break;
            }
            self.deadlines.remove(&(at, due));
            match due {
                Due::Caller(caller) => {
                    if let Some(&place) = self.places.get(&caller) {
                        self.refuse_the_impatient(place, now);
                    }
                }
                Due::Ask(id) => {
                    // Until the answer the port counts as taken.
                    late.extend(self.asks.get(&id).cloned());
                    self.abandon(id);
                }
                // Servers are kept below, when requests are woken.
                Due::Keep(_) => {}
            }
        }
        self.failed(late, AskError::TimedOut, now);
        self.take_decisions()
    }

    /// When [`Queue::tick`] has something to do next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// The processing servers.
    #[must_use]
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// The number of requests that wait for a port.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.values().map(|group| group.places.len()).sum()
    }

    /// The only server that the request with `key` can use the ports of, if there is
    /// such a request and it is for one server.
    #[must_use]
    pub fn only_of_key(&self, key: &str) -> Option<Slot> {
        let place = self.by_key.get(key)?;
        self.requests.get(place)?.wanted.only
    }

    /// A client that the answer to `ask` is for.
    #[must_use]
    pub fn caller_of(&self, ask: AskId) -> Option<Caller> {
        let place = self.asks.get(&ask)?.place?;
        self.requests.get(&place)?.callers.keys().next().copied()
    }
}

#[cfg(test)]
mod tests;
