//! What happens to sessions, for those who watch: a line for each change of a
//! session's state, in the order in which it was learned.

use serde::Serialize;
use tokio::sync::broadcast;
use utoipa::ToSchema;

use super::listing::SessionInfo;
use super::{Inner, Live, Sessions};

/// Events that are kept for a watcher that is slow; it loses the oldest.
const KEPT: usize = 1024;

/// A change of a session's state.
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
}

impl SessionEvent {
    /// The name of the event: the state that the session is in, or `Ended`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.cause.map_or(self.session.state.name(), |_| "Ended")
    }
}

/// Where events go.
#[derive(Debug)]
pub(super) struct Watchers(broadcast::Sender<SessionEvent>);

impl Default for Watchers {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }
}

impl Inner {
    /// Tells those who watch of `live`, which has just changed, or ended for
    /// `cause`. Costs nothing while nobody watches.
    pub(super) fn tell(&self, live: &Live, cause: Option<&'static str>) {
        if self.watchers.0.receiver_count() == 0 {
            return;
        }
        let event = SessionEvent {
            time: jiff::Timestamp::now(),
            cause,
            session: self.info(live),
        };
        // The last one may have left meanwhile.
        let _ = self.watchers.0.send(event);
    }
}

impl Sessions {
    /// All events from now on. A watcher that is more than 1024 events behind is
    /// told how many it has lost.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<SessionEvent> {
        self.inner.read().watchers.0.subscribe()
    }
}
