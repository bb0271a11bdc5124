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
//! - `amendments`: changes of sessions that agents are asked for;
//! - `queries`: what others ask about the live sessions;
//! - `listing`, `events`: which session is where, and what happens to it, for
//!   the admin port;
//! - `snapshot`: to a successor and from a predecessor; `span`: logs;
//! - this file: the live sessions, and what agents and clients change.

mod actions;
mod amendments;
pub mod events;
mod flows;
mod gate;
pub mod listing;
mod queries;
pub mod snapshot;
pub mod span;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc::UnboundedSender;

pub use self::actions::{Action, Actions};
use self::amendments::Amendments;
pub use self::amendments::{AmendAnswer, AmendError};
use self::events::{Change, Watchers};
use self::flows::Flows;
use self::gate::PendingLookup;
pub use self::queries::KnownSession;
use self::span::SessionSpan;
use crate::forward::SessionKey;
use crate::selection::{EndCause, Session, ToAgent};
use crate::session::{Metadata, OneOrMore, SessionId, SessionPort};
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

/// Most bytes of metadata in a greeting: that of 2048 sessions with the most that one
/// may have. An agent takes no larger messages, and has little memory.
const GREETING_METADATA_BYTES: usize = 8 * 1024 * 1024;

/// The `sessions` for a greeting: once their metadata has reached its bound, the
/// others are without. An agent that was restarted does not know theirs then.
fn within_budget(sessions: impl Iterator<Item = Session>) -> Vec<Session> {
    let mut left = GREETING_METADATA_BYTES;
    let take = |session: Session| match left.checked_sub(session.metadata.bytes()) {
        Some(less) => {
            left = less;
            session
        }
        None => Session {
            metadata: Metadata::default(),
            ..session
        },
    };
    sessions.map(take).collect()
}

/// The sessions of all processing servers that are known here.
#[derive(Debug, Default)]
pub struct Sessions {
    inner: RwLock<Inner>,
    next_key: AtomicU64,
    amendments: Amendments,
}

#[derive(Debug, Default)]
struct Inner {
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
    watchers: Watchers,
}

#[derive(Debug)]
struct Live {
    key: SessionKey,
    slot: Slot,
    bound_client: Option<IpAddr>,
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

    /// The session with what is known here, for its agent or another process.
    fn report(&self) -> Session {
        let flows = self.flows.lock();
        Session {
            is_claimed: self.session.is_claimed || flows.is_claimed,
            open_here: flows.open > 0,
            ..self.session.clone()
        }
    }
}

/// A session that has ended and whose connections are being cut.
#[derive(Debug)]
struct Ending {
    id: SessionId,
    slot: Slot,
    flows: Flows,
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
        self.tell(&live, Change::State);
        self.port_by_id.insert(id, port);
        self.live.insert(port, live);
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
        self.tell(&live, Change::End(cause));
        // The key may name a later session by now.
        if let Some(key) = &live.session.idempotency_key
            && self.id_by_idempotency_key.get(key) == Some(id)
        {
            self.id_by_idempotency_key.remove(key);
        }
        let mut flows = live.flows.into_inner();
        // The cut itself, which is reported like a flow for each port: a client
        // that connected in time may still wait to be accepted, and must not count
        // as one of the next session.
        flows.open += u32::try_from(ports.iter().count()).unwrap_or(u32::MAX);
        let ending = Ending {
            id: id.clone(),
            slot: live.slot,
            flows,
            cause,
            span: live.span,
        };
        self.ending.insert(live.key, ending);
        Some(Action::Cut(ports, live.key))
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

    /// Follows the former table again, or none.
    pub fn restore_table(&self, former: Option<Arc<PortIndex>>) {
        self.inner.write().table = former;
    }

    /// Forgets what was kept for ports and slots that `table`, which is in
    /// force, does not have.
    pub fn forget_removed(&self, table: &PortIndex) {
        let mut inner = self.inner.write();
        inner
            .last_ended
            .retain(|port, _| table.find(*port).is_some());
        inner
            .released
            .retain(|_, slot| table.table().row(*slot).is_some());
    }

    /// An agent's stream is up: from now on its messages go to `outbox`, the
    /// greeting first. `greet` makes it from the sessions known on this server.
    pub fn attach(&self, slot: Slot, outbox: Outbox, greet: impl FnOnce(Vec<Session>) -> ToAgent) {
        self.forget_agent(slot);
        let mut inner = self.inner.write();
        let known = inner
            .live
            .values()
            .filter(|live| live.slot == slot)
            .map(Live::report);
        let _ = outbox.send(greet(within_budget(known)));
        // They may have been lost with the former stream.
        for (id, _) in inner.released.iter().filter(|(_, of)| **of == slot) {
            let _ = outbox.send(ToAgent::Release(id.clone()));
        }
        inner.outboxes.insert(slot, outbox);
    }

    /// An agent's stream has ended: it is sent nothing more. Does nothing when a
    /// newer stream than `outbox` is up.
    pub fn detach(&self, slot: Slot, outbox: &Outbox) {
        let mut inner = self.inner.write();
        if inner
            .outboxes
            .get(&slot)
            .is_some_and(|current| current.same_channel(outbox))
        {
            inner.outboxes.remove(&slot);
        }
    }

    /// Forgets every session of `slot` and has its connections cut: the server
    /// was removed, or out of reach for too long.
    pub fn forget_server(&self, slot: Slot) -> Actions {
        let mut inner = self.inner.write();
        let ids: Vec<SessionId> = inner
            .live
            .values()
            .filter(|live| live.slot == slot)
            .map(|live| live.session.id.clone())
            .collect();
        ids.iter()
            .filter_map(|id| inner.end(id, "SERVER_GONE"))
            .collect()
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

    /// An agent reports a session, new or changed. A new one is logged under
    /// the span that `span` gives.
    pub fn learn(
        &self,
        slot: Slot,
        session: Session,
        span: impl FnOnce() -> SessionSpan,
    ) -> Actions {
        let port = session.ports.first.port;
        let mut inner = self.inner.write();
        // Another server cannot speak for these ports.
        let is_its = |it: &SessionPort| inner.slot(it.port) == Some(slot);
        if !session.ports.iter().all(is_its) {
            return Actions::default();
        }
        let known = inner.live.get(&port);
        if known.is_some_and(|live| live.session.id == session.id) {
            if let Some(live) = inner.live.get_mut(&port) {
                let known = std::mem::replace(&mut live.session, session);
                // A session keeps its ports.
                live.session.ports.clone_from(&known.ports);
                let live = &inner.live[&port];
                let (is, was) = (&live.session, &known);
                if is.state != was.state {
                    inner.tell(live, Change::State);
                } else if is.metadata != was.metadata || is.expires != was.expires {
                    inner.tell(live, Change::Amendment);
                }
            }
            return Actions::default();
        }
        let id = &session.id;
        if inner.is_ending(id) || inner.released.contains_key(id) {
            return Actions::default();
        }
        if inner.last_ended.get(&port) == Some(id) {
            // Another connection server brought it back; the agent reports its
            // end to that one now.
            inner.send(slot, ToAgent::Release(id.clone()));
            return Actions::default();
        }
        // A successor on a port means that we missed the end of the former.
        let mut cut = Vec::new();
        for port in session.ports.iter() {
            if let Some(former) = inner.on(port.port).map(|live| live.session.id.clone()) {
                cut.extend(inner.end(&former, "SUPERSEDED"));
            }
        }
        let span = span();
        let server = inner.row(port).map_or("", |row| &row.server);
        span.selected(&session, server);
        let live = Live {
            key: SessionKey(self.next_key.fetch_add(1, Ordering::Relaxed) + 1),
            slot,
            bound_client: session.bound_client.map(|client| client.to_canonical()),
            flows: Mutex::default(),
            session,
            span,
        };
        inner.insert(live);
        cut.into_iter().collect()
    }

    /// An agent ends a session. `Ended` is sent to it when no connection is
    /// left.
    pub fn end(&self, slot: Slot, id: &SessionId, cause: EndCause) -> Actions {
        let mut inner = self.inner.write();
        inner.released.remove(id);
        inner.note_end(id);
        let action = inner.end(id, cause.name());
        if action.is_none() && !inner.is_ending(id) {
            inner.send(slot, ToAgent::Ended(id.clone()));
        }
        action.into_iter().collect()
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
