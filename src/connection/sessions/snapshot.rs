//! Sessions that go from one process to its successor, which has their
//! connections from then on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use super::flows::Flows;
use super::{Live, NO_SESSION, Sessions};
use crate::connection::sessions::span::{Carried, SessionSpan};
use crate::forward::SessionKey;
use crate::selection::Session;
use crate::session::SessionId;
use crate::table::{ListenPort, PortIndex, Slot};

/// A live session, for another process.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionSnapshot {
    /// The slot of its processing server.
    pub slot: Slot,
    /// The key that its connections name.
    pub key: SessionKey,
    /// The session as its agent reported it last.
    pub session: Session,
    /// What it has carried, without the bytes of live connections.
    pub carried: Carried,
    /// The address of its requester, if it was requested here.
    pub client: Option<IpAddr>,
    /// How long it has been known here.
    pub age: Duration,
}

/// A client with companion connections, for another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompanionSnapshot {
    /// The key that its companion connections name.
    pub key: SessionKey,
    /// The slot of their processing server.
    pub slot: Slot,
    /// The client's address.
    pub client: IpAddr,
}

/// All that a connection server knows of sessions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionsSnapshot {
    /// The highest key given so far.
    pub last_key: u64,
    /// Live sessions.
    pub live: Vec<SessionSnapshot>,
    /// Clients with companion connections.
    pub companions: Vec<CompanionSnapshot>,
    /// The ids of sessions that clients have given back, with their slots: the
    /// agents have not confirmed their end yet.
    pub released: BTreeMap<SessionId, Slot>,
    /// The id of the session that ended last on each port.
    pub last_ended: BTreeMap<ListenPort, SessionId>,
}

impl Sessions {
    /// What a successor needs to know. Nothing changes here.
    ///
    /// Sessions that have ended and whose connections are being cut are not
    /// part of it: the data plane is paused, so there are none.
    #[must_use]
    pub fn export(&self) -> SessionsSnapshot {
        let inner = self.inner.read();
        debug_assert!(inner.ending.is_empty(), "the data plane is paused");
        let live = inner.live.values().map(|live| SessionSnapshot {
            slot: live.slot,
            key: live.key,
            session: inner.report(live),
            carried: live.flows.lock().carried,
            client: live.span.client(),
            age: live.span.age(),
        });
        let live = live.collect();
        let companions = inner.companions.lock();
        let companions = companions
            .keys()
            .map(|(key, (slot, client))| CompanionSnapshot { key, slot, client });
        SessionsSnapshot {
            last_key: inner.last_key.load(Ordering::Relaxed),
            live,
            companions: companions.collect(),
            released: inner
                .released
                .iter()
                .map(|(id, slot)| (id.clone(), *slot))
                .collect(),
            last_ended: inner
                .last_ended
                .iter()
                .map(|(port, id)| (*port, id.clone()))
                .collect(),
        }
    }

    /// Goes on with what a predecessor knew. `flows` names the port and the session
    /// of each connection and flow that comes along: which sessions are open is
    /// counted from them, so that the two cannot differ.
    ///
    /// Returns the keys of flows that belong to no session and must be closed.
    pub fn import(
        &self,
        snapshot: SessionsSnapshot,
        table: &Arc<PortIndex>,
        flows: impl Iterator<Item = (ListenPort, SessionKey)>,
    ) -> HashSet<SessionKey> {
        self.set_table(table.clone());
        let mut open: HashMap<SessionKey, u32> = HashMap::new();
        let mut companions = Vec::new();
        let companion_keys: HashSet<SessionKey> =
            snapshot.companions.iter().map(|it| it.key).collect();
        for (port, key) in flows {
            if companion_keys.contains(&key) {
                companions.push((port, key));
            } else {
                *open.entry(key).or_default() += 1;
            }
        }
        open.remove(&NO_SESSION);
        let mut inner = self.inner.write();
        inner.last_key = snapshot.last_key.into();
        for SessionSnapshot {
            slot,
            key,
            session,
            carried,
            client,
            age,
        } in snapshot.live
        {
            let span = SessionSpan::taken_over(client, age);
            let server = inner
                .row(session.ports.first.port)
                .map_or("", |row| &row.server);
            span.selected(&session, server);
            let has_companions = inner.has_companions(slot);
            inner.insert(Live {
                key,
                slot,
                bound_client: session.bound_client.map(|client| client.to_canonical()),
                has_companions,
                flows: Mutex::new(Flows::imported(
                    open.remove(&key).unwrap_or(0),
                    &session,
                    carried,
                )),
                session,
                span,
            });
        }
        for CompanionSnapshot { key, slot, client } in snapshot.companions {
            let companions = inner.companions.get_mut();
            companions.restore_key(key, (slot, client));
        }
        let mut orphans: HashSet<SessionKey> = open.into_keys().collect();
        for (port, key) in companions {
            if !inner.restore_companion(port, key) {
                orphans.insert(key);
            }
        }
        // The greetings repeat the releases, which may not have arrived.
        inner.released = snapshot.released.into_iter().collect();
        inner.last_ended = snapshot.last_ended.into_iter().collect();
        orphans
    }
}
