//! The sessions this connection server knows, and the gate they make for the
//! data plane.
//!
//! The processing servers' agents own the sessions; here is what they reported,
//! in the order of their reports. The rules that keep a port from serving two
//! clients:
//!
//! - A connection is admitted under the same lock that ends sessions, so it
//!   belongs to a live session, and `Opened` is sent to its agent before any
//!   other message. If the agent is out of reach, the next greeting says so.
//!   Meanwhile the agent gives no port to others that an unreachable connection
//!   server may use, and it waits until after the sessions here are forgotten.
//! - `End` is final: the session leaves the gate, its connections are cut,
//!   clients that wait to be accepted are refused, and only then `Ended` is
//!   sent and the agent frees the port. An agent that was restarted and reports
//!   the session again is sent a `Release`.
//!
//! ```text
//! data plane ─admit/closed→ Sessions ─Opened/Closed/Ended→ agents
//! agents ─Session/End→ Sessions ─Actions→ control ─cut→ data plane
//! ```
//!
//! - `gate`: what the data plane asks and reports;
//! - `actions`: what it must do after a change;
//! - `flows`: the connections of a session, and which of them claim it;
//! - `reports`: what agents report; `greeting`: what one that attaches receives;
//! - `amendments`: changes of sessions that agents are asked for;
//! - `companions`: which clients may use companion ports, and their connections;
//! - `queries`: what others ask about the live sessions;
//! - `listing`, `events`: which session is where, and what happens to it, for
//!   the admin port;
//! - `snapshot`: to a successor and from a predecessor; `span`: logs;
//! - this file: the live sessions, and what the table and clients change.

mod actions;
mod amendments;
mod companions;
pub mod events;
mod flows;
mod gate;
mod greeting;
pub mod listing;
mod queries;
mod reports;
pub mod snapshot;
pub mod span;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc::UnboundedSender;

pub use self::actions::{Action, Actions, CompanionCut};
use self::amendments::Amendments;
pub use self::amendments::{AmendAnswer, AmendError};
use self::companions::Companions;
use self::events::{EventFeed, SessionChange};
use self::flows::Flows;
use self::gate::PendingLookup;
pub use self::queries::KnownSession;
use self::span::SessionSpan;
use crate::forward::SessionKey;
use crate::selection::{EndCause, Session, ToAgent};
use crate::session::{OneOrMore, SessionId};
use crate::table::{ListenPort, PortIndex, Row, Slot};

/// Where messages to one agent go. Unbounded: every message stands for a
/// request, a connection or a session, and those are bounded where they begin.
pub type Outbox = UnboundedSender<ToAgent>;

/// The key of connections under `admission: Open`, which belong to no session.
const NO_SESSION: SessionKey = SessionKey(0);

/// Why a client cannot give a session back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseError {
    /// No live session has this id.
    Unknown,
    /// The session's agent is not attached.
    OutOfReach,
}

/// The sessions of all processing servers that are known here.
#[derive(Debug, Default)]
pub struct Sessions {
    inner: RwLock<Inner>,
    amendments: Amendments,
}

#[derive(Debug, Default)]
struct Inner {
    /// The highest key given so far.
    last_key: AtomicU64,
    /// The table in force; `None` before the first.
    table: Option<Arc<PortIndex>>,
    outboxes: HashMap<Slot, Outbox>,
    /// By the first port of each.
    live: HashMap<ListenPort, Live>,
    /// The first port of the session on each further port: empty as long as all
    /// sessions have one port.
    first_by_further: HashMap<ListenPort, ListenPort>,
    port_by_id: HashMap<SessionId, ListenPort>,
    id_by_idempotency_key: HashMap<String, SessionId>,
    ending: HashMap<SessionKey, Ending>,
    /// Sessions released by a client whose agent has not confirmed the end yet,
    /// with their slot. Late reports about them are ignored, and the release is
    /// repeated after a reconnect.
    released: HashMap<SessionId, Slot>,
    /// The session that ended last on each port, until the next one: its agent
    /// may restart before every connection server has the end, and adopt it from
    /// one that has not. Earlier ones need not be known: their port was free, so
    /// every connection server had the end.
    last_ended: HashMap<ListenPort, SessionId>,
    pending_lookups: HashMap<ListenPort, Vec<PendingLookup>>,
    // Clients join and connect while the sessions are read. Locked before the flows
    // of a session. One lock for all servers: a connection or flow takes it when it
    // begins and when it ends, for a few look-ups, and not for what it carries. Two
    // threads with connections of two servers slow each other down hardly less without it,
    // as they share the lock of the sessions.
    companions: Mutex<Companions>,
    event_feed: EventFeed,
}

#[derive(Debug)]
struct Live {
    key: SessionKey,
    slot: Slot,
    bound_client: Option<IpAddr>,
    /// Whether its server has companion ports.
    has_companions: bool,
    // A lock, not an atomic: Opened and Closed must be sent in the order in
    // which the count leaves and reaches zero.
    flows: Mutex<Flows>,
    session: Session,
    span: SessionSpan,
}

impl Live {
    /// The session's ports.
    fn ports(&self) -> OneOrMore<ListenPort> {
        self.session.ports.map(|it| it.port)
    }

    /// Its first port, by which it is found.
    fn first(&self) -> ListenPort {
        self.session.ports.first.port
    }
}

/// A session that has ended and whose connections are being cut.
#[derive(Debug)]
struct Ending {
    id: SessionId,
    slot: Slot,
    flows: Flows,
    /// The keys of companion connections that are cut with it.
    companion_keys: Vec<SessionKey>,
    cause: &'static str,
    span: SessionSpan,
}

impl Inner {
    /// The row that `port` belongs to.
    fn row(&self, port: ListenPort) -> Option<&Row> {
        let (row, _) = self.table.as_ref()?.find(port)?;
        Some(row)
    }

    /// The live session on `port`.
    fn on(&self, port: ListenPort) -> Option<&Live> {
        let live = self.live.get(&port);
        live.or_else(|| self.live.get(self.first_by_further.get(&port)?))
    }

    /// The slot that `port` leads to.
    fn slot(&self, port: ListenPort) -> Option<Slot> {
        self.row(port).map(|row| row.slot)
    }

    /// A key that is given to nothing else.
    fn new_key(&self) -> SessionKey {
        SessionKey(self.last_key.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The session with what is known here, for its agent or another process.
    fn report(&self, live: &Live) -> Session {
        let mut session = live.session.clone();
        if live.has_companions {
            session.clients = self.companions.lock().clients_of(live.first()).to_vec();
        }
        let flows = live.flows.lock();
        session.is_claimed |= flows.is_claimed;
        session.open_here = flows.is_open();
        session
    }

    /// Changes the flows of `live`. Its agent is sent when the session comes to be
    /// in use here, and when it ceases to be.
    fn change_flows(&self, live: &Live, change: impl FnOnce(&mut Flows)) {
        let mut flows = live.flows.lock();
        let was_open = flows.is_open();
        change(&mut flows);
        let session_id = || live.session.id.clone();
        match (was_open, flows.is_open()) {
            (false, true) => self.send(live.slot, ToAgent::Opened(session_id())),
            (true, false) => {
                let message = ToAgent::Closed {
                    session_id: session_id(),
                    is_claimed: flows.is_claimed,
                };
                self.send(live.slot, message);
            }
            _ => {}
        }
    }

    fn send(&self, slot: Slot, message: ToAgent) {
        if let Some(outbox) = self.outboxes.get(&slot) {
            // A closed outbox is a stream that just broke; the next greeting has
            // everything that the agent missed.
            let _ = outbox.send(message);
        }
    }

    /// Adds a session.
    fn insert(&mut self, live: Live) {
        let Session {
            id,
            idempotency_key,
            ports,
            ..
        } = &live.session;
        let (id, port) = (id.clone(), ports.first.port);
        if let Some(key) = idempotency_key {
            self.id_by_idempotency_key.insert(key.clone(), id.clone());
        }
        self.last_ended.remove(&port);
        for further in &ports.rest {
            self.last_ended.remove(&further.port);
            self.first_by_further.insert(further.port, port);
        }
        self.announce(&live, SessionChange::State);
        self.port_by_id.insert(id, port);
        self.live.insert(port, live);
        self.join_known(port);
    }

    /// Takes a session out of the gate, for the log's `cause`. `Ended` is sent to
    /// its agent when the data plane has done what the result says.
    fn end(&mut self, id: &SessionId, cause: &'static str) -> Option<Action> {
        let port = self.port_by_id.remove(id)?;
        let live = self.live.remove(&port)?;
        let ports = live.ports();
        for further in &ports.rest {
            self.first_by_further.remove(further);
        }
        self.announce(&live, SessionChange::End(cause));
        // The key may name a later session by now.
        if let Some(key) = &live.session.idempotency_key
            && self.id_by_idempotency_key.get(key) == Some(id)
        {
            self.id_by_idempotency_key.remove(key);
        }
        let companions = self.companions.get_mut();
        let left = companions.remove(live.slot, port, live.key);
        let mut flows = live.flows.into_inner();
        // The cut itself, which is reported like a flow for each port: a client
        // that connected in time may still wait to be accepted, and must not count
        // as one of the next session.
        flows.own += u32::try_from(ports.iter().count()).unwrap_or(u32::MAX);
        // Those that go on belong to other sessions of their clients.
        flows.own += left.reports;
        flows.companions = 0;
        let ending = Ending {
            id: id.clone(),
            slot: live.slot,
            flows,
            companion_keys: left.cuts.iter().map(|cut| cut.key).collect(),
            cause,
            span: live.span,
        };
        self.ending.insert(live.key, ending);
        Some(Action::Cut(ports, live.key, left.cuts))
    }

    /// Notes that `id` is the session that ended last on its ports.
    fn note_end(&mut self, id: &SessionId) {
        let port = self.port_by_id.get(id);
        if let Some(live) = port.and_then(|port| self.live.get(port)) {
            for port in live.ports().iter() {
                self.last_ended.insert(*port, id.clone());
            }
        }
    }

    /// Gives a session back to its agent and takes it out of the gate.
    fn give_back(&mut self, id: &SessionId) -> Result<Action, ReleaseError> {
        let port = self.port_by_id.get(id);
        let live = port.and_then(|port| self.live.get(port));
        let slot = live.ok_or(ReleaseError::Unknown)?.slot;
        if !self.outboxes.contains_key(&slot) {
            return Err(ReleaseError::OutOfReach);
        }
        self.send(slot, ToAgent::Release(id.clone()));
        self.released.insert(id.clone(), slot);
        self.note_end(id);
        let action = self.end(id, EndCause::Released.name());
        action.ok_or(ReleaseError::Unknown)
    }

    fn is_ending(&self, id: &SessionId) -> bool {
        self.ending.values().any(|ending| ending.id == *id)
    }
}

impl Sessions {
    /// Follows `table`: which slot a port belongs to, and whether a session is
    /// needed. Returns the one that was in force before.
    pub fn set_table(&self, table: Arc<PortIndex>) -> Option<Arc<PortIndex>> {
        self.inner.write().table.replace(table)
    }

    /// Forgets what was kept for ports and slots that `table`, which is in force
    /// after `former`, does not have. Companion connections are cut on ports that
    /// lead elsewhere, or are for others now.
    pub fn forget_removed(&self, former: Option<&PortIndex>, table: &PortIndex) -> Actions {
        let mut inner = self.inner.write();
        inner
            .last_ended
            .retain(|port, _| table.find(*port).is_some());
        inner
            .released
            .retain(|_, slot| table.table().row(*slot).is_some());
        inner.follow_companions();
        inner.cut_after_change(former, table)
    }

    /// Whether connections of ended sessions of `slot` are still being cut: a
    /// greeting would not list them.
    #[must_use]
    pub fn is_cutting(&self, slot: Slot) -> bool {
        self.inner
            .read()
            .ending
            .values()
            .any(|ending| ending.slot == slot)
    }

    /// Whether sessions are over whose end their agents have yet to confirm.
    #[must_use]
    pub fn is_any_ending(&self) -> bool {
        let inner = self.inner.read();
        !inner.ending.is_empty() || !inner.released.is_empty()
    }

    /// The client gives a session back.
    ///
    /// # Errors
    /// [`ReleaseError`]; nothing has changed then.
    pub fn release(&self, id: &SessionId) -> Result<Actions, ReleaseError> {
        let action = self.inner.write().give_back(id)?;
        Ok(Actions::from_iter([action]))
    }
}

#[cfg(test)]
mod tests;
