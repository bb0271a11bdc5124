//! The connections and flows of each session on a thread, so that a cut finds
//! them without looking at all.

use std::collections::HashMap;

use super::gate::{SessionKey, Transport};
use super::slab::Key;
use crate::table::ListenPort;

/// A connection or flow of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) transport: Transport,
    /// Its key among the connections or the flows.
    pub(super) key: Key,
}

/// A session on one of its ports.
pub(super) type PortOfSession = (ListenPort, SessionKey);

/// Live connections and flows by port and session, as a session is cut port by port;
/// one without any has no entry.
#[derive(Debug, Default)]
pub(super) struct SessionIndex(HashMap<PortOfSession, Vec<Member>>);

impl SessionIndex {
    pub(super) fn add(&mut self, of: PortOfSession, transport: Transport, key: Key) {
        let members = self.0.entry(of).or_default();
        members.push(Member { transport, key });
    }

    pub(super) fn remove(&mut self, of: PortOfSession, transport: Transport, key: Key) {
        if let Some(members) = self.0.get_mut(&of) {
            members.retain(|member| *member != Member { transport, key });
            if members.is_empty() {
                self.0.remove(&of);
            }
        }
    }

    /// Takes out all members of a session on one port.
    pub(super) fn take(&mut self, of: PortOfSession) -> Vec<Member> {
        self.0.remove(&of).unwrap_or_default()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
