//! The connections and flows of each session on a thread, so that a cut finds
//! them without looking at all.

use std::collections::HashMap;

use super::gate::{SessionKey, Transport};
use super::slab::Key;

/// A connection or flow of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) transport: Transport,
    /// Its key among the connections or the flows.
    pub(super) key: Key,
}

/// Live connections and flows by session; a session without any has no entry.
#[derive(Debug, Default)]
pub(super) struct SessionIndex(HashMap<SessionKey, Vec<Member>>);

impl SessionIndex {
    pub(super) fn add(&mut self, session: SessionKey, transport: Transport, key: Key) {
        let members = self.0.entry(session).or_default();
        members.push(Member { transport, key });
    }

    pub(super) fn remove(&mut self, session: SessionKey, transport: Transport, key: Key) {
        if let Some(members) = self.0.get_mut(&session) {
            members.retain(|member| *member != Member { transport, key });
            if members.is_empty() {
                self.0.remove(&session);
            }
        }
    }

    /// Takes out all members of a session.
    pub(super) fn take(&mut self, session: SessionKey) -> Vec<Member> {
        self.0.remove(&session).unwrap_or_default()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
