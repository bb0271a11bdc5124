//! What the load-sharing port and the metrics ask about the live sessions.
//! Nothing changes here.

use super::Sessions;
use crate::selection::Session;
use crate::session::{SessionId, SessionState};
use crate::table::{ListenPort, Slot};

/// A live session and where it is.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownSession {
    /// The slot of its processing server.
    pub slot: Slot,
    /// The session as its agent reported it last.
    pub session: Session,
}

impl Sessions {
    /// The live session `id`.
    #[must_use]
    pub fn get(&self, id: &SessionId) -> Option<KnownSession> {
        let inner = self.inner.read();
        let live = inner.live.get(inner.port_by_id.get(id)?)?;
        Some(KnownSession {
            slot: live.slot,
            session: live.session.clone(),
        })
    }

    /// The live session on `port`, by id.
    #[must_use]
    pub fn session_on(&self, port: ListenPort) -> Option<SessionId> {
        let inner = self.inner.read();
        Some(inner.on(port)?.session.id.clone())
    }

    /// The live session made under an idempotency key.
    #[must_use]
    pub fn get_by_idempotency_key(&self, key: &str) -> Option<KnownSession> {
        let id = self.inner.read().id_by_idempotency_key.get(key).cloned()?;
        self.get(&id)
    }

    /// The number of live sessions by state, as their agents reported last.
    #[must_use]
    pub fn count_by_state(&self) -> [(&'static str, i64); 3] {
        let mut counts = [("held", 0), ("busy", 0), ("lingering", 0)];
        for live in self.inner.read().live.values() {
            let index = match live.session.state {
                SessionState::Held => 0,
                SessionState::Busy => 1,
                SessionState::Lingering => 2,
            };
            counts[index].1 += 1;
        }
        counts
    }

    /// The number of live sessions with connections here.
    #[must_use]
    pub fn open_count(&self) -> usize {
        let inner = self.inner.read();
        inner
            .live
            .values()
            .filter(|live| live.flows.lock().is_open())
            .count()
    }
}
