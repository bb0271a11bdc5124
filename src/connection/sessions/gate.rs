//! The gate that sessions make for the data plane: whether a client is admitted,
//! and what follows when its connection has ended. A client whose session is not
//! known here is pending until the port's agent has answered. The data plane's
//! threads call this, so nothing here waits. What agents decide about sessions
//! is in the parent, under the same lock.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use tracing::debug;

use super::flows::Flows;
use super::{Action, Actions, Inner, NO_SESSION, Sessions};
use crate::connection::sessions::span::SessionSpan;
use crate::forward::{Decision, Gate, PENDING_DEADLINE, PendingId, SessionKey, Traffic, Transport};
use crate::pool::EntryAdmission;
use crate::selection::{Session, ToAgent};
use crate::session::SessionId;
use crate::table::{ListenPort, Slot};

/// A client that waits for its session to be found.
#[derive(Debug)]
pub(super) struct PendingLookup {
    id: PendingId,
    client: IpAddr,
    since: Instant,
}

impl Inner {
    fn admit(&self, port: ListenPort, client: IpAddr) -> Decision {
        let Some(live) = self.on(port) else {
            return self.admit_without_session(port, client);
        };
        if live.bound_client.is_some_and(|bound| bound != client) {
            return Decision::Refuse;
        }
        if live.has_companions && self.join(live, client, true) {
            let session_id = live.session.id.clone();
            let joined = ToAgent::Joined {
                session_id,
                client,
                is_companion: false,
            };
            self.send(live.slot, joined);
        }
        self.change_flows(live, Flows::open);
        Decision::Admit(live.key)
    }

    /// The decision on a client of a port without a session that is known here. No
    /// one could say more about a port that has left the table, and is closed in a
    /// moment.
    fn admit_without_session(&self, port: ListenPort, client: IpAddr) -> Decision {
        let Some(table) = &self.table else {
            return Decision::Ask;
        };
        let Some((row, range)) = table.find(port) else {
            return Decision::Refuse;
        };
        let of_all = || table.table().sessions.admission.into();
        match range.admission.unwrap_or_else(of_all) {
            EntryAdmission::Open => Decision::Admit(NO_SESSION),
            EntryAdmission::Session => Decision::Ask,
            EntryAdmission::Companion => self.admit_companion(row.slot, port, client),
        }
    }

    /// Asks the agent for the session on `port`. The port is the request's id, as
    /// there is one unanswered lookup per port.
    fn look_up(&self, slot: Slot, port: ListenPort) {
        let request_id = u64::from(port.get());
        self.send(slot, ToAgent::Lookup { request_id, port });
    }
}

impl Sessions {
    /// The agent has answered the greeting: sessions of pending clients of its
    /// ports are looked up.
    ///
    /// One that does not know sessions of several ports has adopted their first
    /// ports only and may give the others to others, once it has recovered. So such
    /// sessions are given back.
    pub fn welcomed(&self, slot: Slot, knows_several_ports: bool) -> Actions {
        let mut inner = self.inner.write();
        let mut actions = Actions::default();
        if !knows_several_ports {
            let live = inner.live.values();
            let several =
                live.filter(|live| live.slot == slot && !live.session.ports.rest.is_empty());
            let ids: Vec<SessionId> = several.map(|live| live.session.id.clone()).collect();
            for id in ids {
                actions.extend(inner.give_back(&id).ok());
            }
        }
        let ports = inner
            .pending_lookups
            .keys()
            .filter(|port| inner.slot(**port) == Some(slot));
        for &port in ports {
            inner.look_up(slot, port);
        }
        actions
    }

    /// An agent's answer to the lookup `request_id`, which decides on the pending
    /// clients of its port.
    pub fn looked_up(&self, slot: Slot, request_id: u64, session: Option<Session>) -> Actions {
        let Some(port) = u16::try_from(request_id).ok().and_then(ListenPort::new) else {
            return Actions::default();
        };
        let mut actions = session.map_or_else(Actions::default, |session| {
            self.learn(slot, session, SessionSpan::learned)
        });
        let mut inner = self.inner.write();
        let pending = inner.pending_lookups.remove(&port).unwrap_or_default();
        for PendingLookup { id, client, since } in pending {
            if since.elapsed() > PENDING_DEADLINE {
                continue;
            }
            let decision = match inner.admit(port, client) {
                Decision::Ask => {
                    debug!(%port, %client, "client has no session and is refused");
                    Decision::Refuse
                }
                decision => decision,
            };
            actions.push(Action::Answer(port, id, decision));
        }
        actions
    }
}

impl Gate for Sessions {
    fn admit(&self, port: ListenPort, _transport: Transport, client: SocketAddr) -> Decision {
        self.inner.read().admit(port, client.ip().to_canonical())
    }

    fn ask(&self, id: PendingId, port: ListenPort, _transport: Transport, client: SocketAddr) {
        let now = Instant::now();
        let mut inner = self.inner.write();
        let Some(slot) = inner.slot(port) else {
            return;
        };
        let pending = inner.pending_lookups.entry(port).or_default();
        pending.retain(|client| now.duration_since(client.since) <= PENDING_DEADLINE);
        // One lookup at a time and port, however many clients wait for it.
        let is_first = pending.is_empty();
        pending.push(PendingLookup {
            id,
            client: client.ip().to_canonical(),
            since: now,
        });
        if is_first {
            inner.look_up(slot, port);
        }
    }

    fn closed(&self, port: ListenPort, session: SessionKey, traffic: Traffic) {
        if session == NO_SESSION {
            return;
        }
        {
            let inner = self.inner.read();
            if let Some(live) = inner.on(port).filter(|live| live.key == session) {
                inner.change_flows(live, |flows| flows.close(traffic));
                return;
            }
            if inner.close_companion(port, session, traffic) {
                return;
            }
        }
        let mut inner = self.inner.write();
        let cut_by = inner.companions.get_mut().cut_by(session);
        let session = cut_by.unwrap_or(session);
        let Some(ending) = inner.ending.get_mut(&session) else {
            return;
        };
        ending.flows.close(traffic);
        if ending.flows.own == 0
            && let Some(ended) = inner.ending.remove(&session)
        {
            inner
                .companions
                .get_mut()
                .forget_cuts(&ended.companion_keys);
            ended.span.ended(ended.cause, &ended.flows.carried);
            inner.send(ended.slot, ToAgent::Ended(ended.id));
        }
    }
}
