//! The one owner of "change the sessions, then have the data plane follow".
//!
//! ```text
//! agents, api, table ─begin_change→ Change ─→ Sessions ─Actions→ Forwarder
//! hand-over ─pause→ Pause: waits for every Change, and none begins while it lives
//! ```
//!
//! A caller that changes sessions holds a [`Change`], which carries out at once
//! what follows. So no caller can forget a cut, and none needs to know that a
//! hand-over may be waiting. [`Sessions`] decide what a session is and when it
//! ends.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedRwLockWriteGuard, RwLock, RwLockReadGuard};
use tokio::time::timeout;

use super::sessions::snapshot::SessionsSnapshot;
use super::sessions::span::SessionSpan;
use super::sessions::{Action, Actions, AmendError, CompanionCut, Outbox, ReleaseError, Sessions};
use crate::forward::snapshot::ForwarderSnapshot;
use crate::forward::{Forwarder, SessionKey, UnavailablePort};
use crate::selection::{EndCause, Session, ToAgent};
use crate::session::{Amendment, SessionId};
use crate::table::{PortIndex, Slot, Table};

/// How long an agent may take to amend a session: it decides at once, so that a second
/// is one in trouble.
const AMEND_DEADLINE: Duration = Duration::from_secs(1);

/// The sessions and the data plane that follows them.
#[derive(Debug)]
pub struct Control {
    sessions: Arc<Sessions>,
    forwarder: Arc<Forwarder>,
    /// Held for reading by every change, for writing by a hand-over.
    changes: Arc<RwLock<()>>,
}

/// The right to change sessions. A hand-over begins only after the end of every
/// change that is under way.
#[derive(Debug)]
#[must_use = "sessions may change only while this lives"]
pub struct Change<'a> {
    control: &'a Control,
    _under_way: RwLockReadGuard<'a, ()>,
}

/// No change is under way, and none begins while this lives: agents are sent
/// nothing and their messages wait.
#[derive(Debug)]
#[must_use = "changes go on when this is dropped"]
pub struct Pause(OwnedRwLockWriteGuard<()>);

/// The sessions and the data plane, for another process.
#[derive(Debug, Default)]
pub struct ControlSnapshot {
    /// The sessions known here.
    pub sessions: SessionsSnapshot,
    /// The data plane's ports, connections, flows and pending clients.
    pub forwarder: ForwarderSnapshot,
}

impl Control {
    /// Has `forwarder` follow `sessions`, which are its gate.
    #[must_use]
    pub fn new(sessions: Arc<Sessions>, forwarder: Arc<Forwarder>) -> Self {
        Self {
            sessions,
            forwarder,
            changes: Arc::default(),
        }
    }

    /// Waits until no hand-over is under way.
    pub async fn begin_change(&self) -> Change<'_> {
        Change {
            control: self,
            _under_way: self.changes.read().await,
        }
    }

    /// Waits until no change is under way.
    pub async fn pause(&self) -> Pause {
        Pause(self.changes.clone().write_owned().await)
    }

    /// Ends a session that its client gives back, and cuts its connections.
    ///
    /// # Errors
    /// [`ReleaseError`] when there is no such session, or its agent cannot be
    /// reached; nothing has changed then.
    pub async fn release(&self, id: &SessionId) -> Result<(), ReleaseError> {
        self.begin_change().await.release(id)
    }

    /// Has the agent of the session `id` change it, and waits until it has.
    ///
    /// # Errors
    /// [`AmendError`].
    pub async fn amend(&self, id: &SessionId, amendment: Amendment) -> Result<(), AmendError> {
        let change = self.begin_change().await;
        let answer = self.sessions.amend(id, amendment)?;
        drop(change);
        let answered = timeout(AMEND_DEADLINE, answer.wait()).await;
        answered.unwrap_or(Err(AmendError::OutOfReach))
    }

    /// Takes everything out of the data plane and copies what is known of
    /// sessions. The data plane stands still until [`Control::resume`].
    ///
    /// # Errors
    /// When a data thread cannot be paused; nothing has changed then.
    pub fn export(&self, _: &Pause) -> io::Result<ControlSnapshot> {
        Ok(ControlSnapshot {
            forwarder: self.forwarder.export()?,
            sessions: self.sessions.export(),
        })
    }

    /// Goes on with everything of another process. Connections and flows
    /// without a session are closed.
    pub fn import(&self, snapshot: ControlSnapshot, table: &Arc<Table>) -> Imported {
        let ControlSnapshot {
            sessions,
            mut forwarder,
        } = snapshot;
        let table = Arc::new(PortIndex::new(table.clone()));
        let orphans: HashSet<SessionKey> =
            self.sessions.import(sessions, &table, forwarder.sessions());
        let has_session = |key: &SessionKey| !orphans.contains(key);
        forwarder
            .connections
            .retain(|connection| has_session(&connection.session));
        forwarder.flows.retain(|flow| has_session(&flow.session));
        let imported = Imported {
            connections: forwarder.connections.len(),
            flows: forwarder.flows.len(),
        };
        // After the sessions, which data threads ask at once.
        self.forwarder.import(forwarder, &table);
        imported
    }

    /// Has the data plane go on after a hand-over that failed. The sessions
    /// never left.
    pub fn resume(&self, snapshot: ForwarderSnapshot) {
        self.forwarder.resume(snapshot);
    }

    /// The connection ports that cannot be listened on for now.
    #[must_use]
    pub fn unavailable_ports(&self) -> Vec<UnavailablePort> {
        self.forwarder.unavailable()
    }

    fn cut_companions(&self, cut: CompanionCut) {
        self.forwarder.cut_client(cut.port, cut.key, cut.client);
    }

    fn carry_out(&self, actions: Actions) {
        for action in actions {
            match action {
                Action::Cut(ports, session, companions) => {
                    for port in ports.iter() {
                        self.forwarder.cut(*port, session);
                    }
                    for cut in companions {
                        self.cut_companions(cut);
                    }
                }
                Action::CutCompanions(cut) => self.cut_companions(cut),
                Action::CutOpen(port, key) => self.forwarder.cut(port, key),
                Action::Answer(port, id, decision) => self.forwarder.answer(port, id, decision),
            }
        }
    }
}

/// What [`Control::import`] goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The number of TCP connections.
    pub connections: usize,
    /// The number of UDP flows.
    pub flows: usize,
}

impl Pause {
    /// Ends all changes in this process, for a successor makes them now.
    pub fn make_permanent(self) {
        std::mem::forget(self.0);
    }
}

impl Change<'_> {
    /// Follows `table`. Returns its connection ports that cannot be opened; following
    /// the same table again tries them again.
    ///
    /// The sessions are first: a client may come as soon as its port is open,
    /// and its session must be looked up then. No client is sent to a port that
    /// is not open yet, since agents get the table last.
    pub fn set_table(&self, table: &Arc<Table>) -> Vec<UnavailablePort> {
        let Control {
            sessions,
            forwarder,
            ..
        } = self.control;
        let index = Arc::new(PortIndex::new(table.clone()));
        let former = sessions.set_table(index.clone());
        let unavailable = forwarder.apply(&index);
        let actions = sessions.forget_removed(former.as_deref(), &index);
        self.control.carry_out(actions);
        unavailable
    }

    /// See [`Sessions::attach`].
    pub fn attach(&self, slot: Slot, outbox: Outbox, greet: impl FnOnce(Vec<Session>) -> ToAgent) {
        self.control.sessions.attach(slot, outbox, greet);
    }

    /// See [`Sessions::welcomed`].
    pub fn welcomed(&self, slot: Slot, knows_several_ports: bool) {
        let actions = self.control.sessions.welcomed(slot, knows_several_ports);
        self.control.carry_out(actions);
    }

    /// See [`Sessions::learn`].
    pub fn learn(&self, slot: Slot, session: Session, span: impl FnOnce() -> SessionSpan) {
        let actions = self.control.sessions.learn(slot, session, span);
        self.control.carry_out(actions);
    }

    /// See [`Sessions::end`].
    pub fn end(&self, slot: Slot, id: &SessionId, cause: EndCause) {
        let actions = self.control.sessions.end(slot, id, cause);
        self.control.carry_out(actions);
    }

    /// See [`Control::release`].
    ///
    /// # Errors
    /// [`ReleaseError`]; nothing has changed then.
    pub fn release(&self, id: &SessionId) -> Result<(), ReleaseError> {
        let actions = self.control.sessions.release(id)?;
        self.control.carry_out(actions);
        Ok(())
    }

    /// See [`Sessions::looked_up`].
    pub fn looked_up(&self, slot: Slot, request_id: u64, session: Option<Session>) {
        let actions = self.control.sessions.looked_up(slot, request_id, session);
        self.control.carry_out(actions);
    }

    /// See [`Sessions::forget_server`]. Returns the number of sessions that
    /// ended.
    pub fn forget_server(&self, slot: Slot) -> usize {
        let actions = self.control.sessions.forget_server(slot);
        let count = actions.len();
        self.control.carry_out(actions);
        count
    }
}
