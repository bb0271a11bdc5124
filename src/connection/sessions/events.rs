//! What happens to sessions, for those who watch: a line for each change of a
//! session's state, in the order in which it was learned.

use serde::Serialize;
use tokio::sync::broadcast;
use utoipa::ToSchema;

use super::listing::SessionInfo;
use super::{Inner, Live, Sessions};

/// Events that are kept for a watcher that is slow; it loses the oldest.
const KEPT: usize = 1024;

/// A change of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionEvent {
    /// When this connection server learned of it (RFC 3339).
    #[schema(value_type = String, format = DateTime)]
    pub time: jiff::Timestamp,
    /// Why the session has ended; absent while it lives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// The session after the change; one that has ended, as it was before.
    pub session: SessionInfo,
    /// Whether the session was amended and is in the same state as before.
    #[serde(skip)]
    is_amendment: bool,
}

/// What has happened to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionChange {
    /// It is new, or in another state.
    State,
    /// Its metadata or its end has changed.
    Amendment,
    /// It has ended for this cause.
    End(&'static str),
}

impl SessionEvent {
    /// The name of the event: the state that the session is in, `Ended` or `Amended`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.cause {
            Some(_) => "Ended",
            None if self.is_amendment => "Amended",
            None => self.session.state.name(),
        }
    }
}

/// Where events go.
#[derive(Debug)]
pub(super) struct EventFeed(broadcast::Sender<SessionEvent>);

impl Default for EventFeed {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }
}

impl Inner {
    /// Announces the `change` of `live` to those who watch. Costs nothing while no one
    /// watches.
    pub(super) fn announce(&self, live: &Live, change: SessionChange) {
        if self.event_feed.0.receiver_count() == 0 {
            return;
        }
        let event = SessionEvent {
            time: jiff::Timestamp::now(),
            cause: match change {
                SessionChange::End(cause) => Some(cause),
                SessionChange::State | SessionChange::Amendment => None,
            },
            session: self.info(live),
            is_amendment: change == SessionChange::Amendment,
        };
        // The last one may have left meanwhile.
        let _ = self.event_feed.0.send(event);
    }
}

impl Sessions {
    /// All events from now on. A watcher that is more than 1024 events behind is
    /// told how many it has lost.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<SessionEvent> {
        self.inner.read().event_feed.0.subscribe()
    }
}
