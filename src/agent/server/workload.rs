//! What the local API shows a workload of its server and its sessions, and the
//! decisions that it takes from it. `workload_api` is where the workload asks.

use jiff::Timestamp;
use tokio::sync::broadcast;
use tracing::info;

use super::{Agent, Inner, send};
use crate::agent::book::{Amended, Book, NotOffered, Notice, Now, To};
use crate::agent::workload_view::{amended, event_of};
use crate::selection::{FromAgent, Session};
use crate::session::{
    AmendRefusal, Amendment, EntryView, Metadata, ServerView, SessionId, WorkloadEvent,
};

impl Agent {
    /// The server as the workload sees it; `None` without a row.
    #[must_use]
    pub fn view(&self) -> Option<ServerView> {
        let inner = self.inner.lock();
        let table = inner.table.as_ref()?;
        let row = table.row(self.slot)?;
        Some(ServerView {
            pool: table.pool.clone(),
            server: row.server.clone(),
            slot: self.slot,
            address: table.advertised_address.clone(),
            ready: inner.book.is_ready(),
            draining: inner.book.is_draining(),
            spent: inner.book.is_spent(),
            sessions: u32::try_from(inner.book.session_count()).unwrap_or(u32::MAX),
            ports: row.ranges.iter().map(EntryView::new).collect(),
        })
    }

    /// The first `most` live sessions with ids above `after`, in their order.
    #[must_use]
    pub fn sessions_after(&self, after: &str, most: usize) -> Vec<Session> {
        self.inner.lock().book.live_sessions_after(after, most)
    }

    /// The live session `id`.
    #[must_use]
    pub fn session(&self, id: &SessionId) -> Option<Session> {
        self.inner.lock().book.live_session(id)
    }

    /// Ends the session `id` for the workload. Returns whether it was live.
    pub fn end(&self, id: &SessionId) -> bool {
        let mut is_ended = false;
        self.change(|book, now| {
            let notices = book.end_for_workload(id, now);
            is_ended = !notices.is_empty();
            notices
        });
        if is_ended {
            info!(session = %id, "the workload ended a session");
        }
        is_ended
    }

    /// Changes the live session `id` and reports it to connection servers and to the
    /// workload, if it was otherwise before. Returns it.
    ///
    /// # Errors
    /// [`AmendRefusal`]; nothing has changed then.
    pub fn amend(&self, id: &SessionId, amendment: &Amendment) -> Result<Session, AmendRefusal> {
        let mut inner = self.inner.lock();
        let now = self.now();
        let Amended {
            session,
            is_changed,
        } = inner.book.amend(id, amendment, now)?;
        if is_changed {
            info!(session = %id, "session amended");
            // No connection server knows one that is not confirmed.
            let is_known = session.confirm_deadline.is_none();
            for outbox in inner.outboxes.values().filter(|_| is_known) {
                send(outbox, FromAgent::Session(session.clone()));
            }
            // No one may watch.
            let _ = inner.events.send(amended(&session, now.time));
        }
        drop(inner);
        self.sooner.notify_one();
        Ok(session)
    }

    /// Confirms the offered session `id` for the workload, which says `metadata` to the
    /// client. Returns the session.
    ///
    /// # Errors
    /// [`NotOffered`]; nothing has changed then.
    pub fn confirm_session(
        &self,
        id: &SessionId,
        metadata: &Metadata,
    ) -> Result<Session, NotOffered> {
        self.decide(|book, now| book.confirm(id, metadata.clone(), now))?;
        self.session(id).ok_or(NotOffered::Unknown)
    }

    /// Refuses the offered session `id` for the workload, which gives the `reason`.
    ///
    /// # Errors
    /// [`NotOffered`]; nothing has changed then.
    pub fn refuse_session(&self, id: &SessionId, reason: Option<&str>) -> Result<(), NotOffered> {
        self.decide(|book, now| book.refuse(id, reason, now))
    }

    fn decide(
        &self,
        decide: impl FnOnce(&mut Book, Now) -> Result<Vec<Notice>, NotOffered>,
    ) -> Result<(), NotOffered> {
        let mut outcome = Ok(());
        self.change(|book, now| {
            decide(book, now).unwrap_or_else(|error| {
                outcome = Err(error);
                Vec::new()
            })
        });
        outcome
    }

    /// Offers ports only while the workload `is_ready` for new sessions.
    pub fn set_ready(&self, is_ready: bool) {
        self.change(|book, _| {
            if book.is_ready() != is_ready {
                info!(is_ready, "the workload has changed its readiness");
            }
            book.set_ready(is_ready);
            Vec::new()
        });
    }

    /// Takes no more sessions, so that the server is replaced when they are over.
    pub fn spend(&self) {
        self.change(|book, _| {
            if !book.is_spent() {
                info!("the workload wants to be replaced");
            }
            book.spend();
            Vec::new()
        });
    }

    /// Changes of sessions from now on.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<WorkloadEvent> {
        self.inner.lock().events.subscribe()
    }
}

impl Inner {
    /// Tells the workload of a change, if it watches. What goes to one connection
    /// server only is no change.
    pub(super) fn tell_workload(&self, to: &To, message: &FromAgent) {
        if matches!(to, To::One(_) | To::ServersBut(_)) || self.events.receiver_count() == 0 {
            return;
        }
        if let Some(event) = event_of(message, Timestamp::now()) {
            // The last one may have left meanwhile.
            let _ = self.events.send(event);
        }
    }
}
