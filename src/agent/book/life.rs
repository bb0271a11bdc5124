//! The changes of sessions, which are the arrows of the book's diagram. Each
//! keeps a session's state, deadline and ports in step, and adds the messages to
//! send.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::offers::refusals;
use super::ports::Occupancy;
use super::session::{Closed, Session, State};
use super::{Book, Notice, Now, To};
use crate::selection::{self, ConnectionServerId, EndCause, FromAgent};
use crate::session::{SessionId, SessionPort, SessionState};

impl Book {
    pub(super) fn insert(&mut self, id: SessionId, session: Session) {
        for port in session.ports.iter() {
            self.ports.occupy(*port, &id, session.occupancy());
        }
        if let Some(key) = session.idempotency_key.clone() {
            self.id_by_key.insert(key, id.clone());
        }
        if let Some(deadline) = session.deadline() {
            self.deadlines.insert((deadline, id.clone()));
        }
        self.sessions.insert(id, session);
    }

    pub(super) fn opened(
        &mut self,
        from: &ConnectionServerId,
        id: &SessionId,
        notices: &mut Vec<Notice>,
    ) {
        self.update(id, notices, |session| {
            session.open.insert(from.clone());
            session.state = State::Busy;
            session.until = None;
        });
    }

    /// Clients of `id` came from these addresses. The other connection servers learn
    /// those that are new, because they may use companion ports there.
    pub(super) fn joined(
        &mut self,
        from: &ConnectionServerId,
        id: &SessionId,
        clients: &[IpAddr],
        notices: &mut Vec<Notice>,
    ) {
        let session = live(&mut self.sessions, id).filter(|session| !session.is_offered());
        let is_new = session.is_some_and(|session| {
            let new = clients.iter().filter(|client| session.join(**client));
            new.count() > 0
        });
        if is_new && let Some(session) = self.sessions.get(id) {
            notices.push(Notice {
                to: To::ServersBut(from.clone()),
                message: FromAgent::Session(self.describe(id, session)),
            });
        }
    }

    /// A client of `id` has come to a companion port.
    pub(super) fn used(&mut self, id: &SessionId) {
        if let Some(session) = live(&mut self.sessions, id) {
            session.has_used_companion = true;
        }
    }

    pub(super) fn closed(
        &mut self,
        from: &ConnectionServerId,
        id: &SessionId,
        is_claimed: bool,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        if self.sessions.get(id).is_some_and(Session::is_offered) {
            return;
        }
        let until = self.no_sooner_than_recovered(now.monotonic + self.times.linger);
        self.update(id, notices, |session| {
            let was_open = session.open.remove(from);
            session.is_claimed |= is_claimed;
            if was_open && session.open.is_empty() {
                session.closed = Some(Closed {
                    monotonic: now.monotonic,
                    time: now.time,
                });
                let (state, until) = session.at_rest(until);
                session.state = state;
                session.until = Some(until);
            }
        });
        let is_over = |session: &Session| {
            session.state == State::Lingering
                && session.until.is_some_and(|until| until <= now.monotonic)
        };
        if self.sessions.get(id).is_some_and(is_over) {
            self.end(id, EndCause::Finished, now, notices);
        }
    }

    /// `deadline`, but not before the recovery is over: no session ends for want
    /// of a connection while one may be open at a connection server that has not
    /// greeted yet.
    pub(super) fn no_sooner_than_recovered(&self, deadline: Duration) -> Duration {
        self.recovering_until
            .map_or(deadline, |recovered| recovered.max(deadline))
    }

    /// Changes a live session, keeps its deadline in step, and reports a new
    /// state to all.
    pub(super) fn update(
        &mut self,
        id: &SessionId,
        notices: &mut Vec<Notice>,
        change: impl FnOnce(&mut Session),
    ) {
        let Some(session) = live(&mut self.sessions, id) else {
            return;
        };
        let (state, deadline) = (session.state.clone(), session.deadline());
        change(session);
        if session.deadline() != deadline {
            if let Some(deadline) = deadline {
                self.deadlines.remove(&(deadline, id.clone()));
            }
            if let Some(deadline) = session.deadline() {
                self.deadlines.insert((deadline, id.clone()));
            }
        }
        if session.state != state
            && let Some(session) = self.sessions.get(id)
        {
            for port in session.ports.iter() {
                self.ports.mark(*port, session.occupancy());
            }
            let message = FromAgent::Session(self.describe(id, session));
            notices.push(Notice {
                to: To::All,
                message,
            });
        }
    }

    /// Ends a live session and reports the end to all. Its ports wait for all
    /// that may have connections on them.
    pub(super) fn end(
        &mut self,
        id: &SessionId,
        cause: EndCause,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        self.end_for(id, cause, None, now, notices);
    }

    /// The same for the `reason` that the workload gives.
    pub(super) fn end_for(
        &mut self,
        id: &SessionId,
        cause: EndCause,
        reason: Option<&str>,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        let Some(session) = live(&mut self.sessions, id) else {
            return;
        };
        if let Some(deadline) = session.deadline() {
            self.deadlines.remove(&(deadline, id.clone()));
        }
        if let Some(key) = &session.idempotency_key {
            self.id_by_key.remove(key);
        }
        if !session.is_claimed && !session.has_used_companion && session.open.is_empty() {
            self.recycling.unused();
        }
        let (knowing, to) = match &session.state {
            State::Offered(offer) => {
                notices.extend(refusals(offer, cause, reason));
                (BTreeSet::new(), To::Workload)
            }
            _ => (self.connection_servers.may_know(session.number), To::All),
        };
        session.state = State::Ending(knowing);
        for port in session.ports.iter() {
            self.ports.mark(*port, Occupancy::Ending);
        }
        notices.push(end_notice(to, id, cause));
        self.remember_over(id);
        self.free_when_acknowledged(id, now);
    }

    /// Remembers the end of `id` while recovering, so that no later greeting
    /// brings it back.
    pub(super) fn remember_over(&mut self, id: &SessionId) {
        // No more sessions than ports were live before the restart.
        if self.recovering_until.is_some() && self.over.len() < self.ports.count() {
            self.over.insert(id.clone());
        }
    }

    pub(super) fn ended(&mut self, from: &ConnectionServerId, id: &SessionId, now: Now) {
        if let Some(Session {
            state: State::Ending(waiting),
            ..
        }) = self.sessions.get_mut(id)
        {
            waiting.remove(from);
            self.free_when_acknowledged(id, now);
        }
    }

    fn free_when_acknowledged(&mut self, id: &SessionId, now: Now) {
        let is_acknowledged = |session: &Session| matches!(&session.state, State::Ending(waiting) if waiting.is_empty());
        if self.sessions.get(id).is_some_and(is_acknowledged)
            && let Some(session) = self.sessions.remove(id)
        {
            // Connections that were cut are closed only now.
            let is_cut = !session.open.is_empty();
            let closed = session.closed.map(|closed| closed.monotonic);
            let closed = if is_cut { Some(now.monotonic) } else { closed };
            for port in session.ports.iter() {
                self.ports.vacate(*port, closed, now.monotonic);
            }
        }
    }

    /// Counts every session as closed and acknowledged at `from`, which has no
    /// connections and will admit none. Those that it had may have claimed their
    /// sessions.
    pub(super) fn write_off(
        &mut self,
        from: &ConnectionServerId,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        let ids: Vec<SessionId> = self.sessions.keys().cloned().collect();
        for id in ids {
            self.closed(from, &id, true, now, notices);
            self.ended(from, &id, now);
        }
    }

    /// Ends the sessions that `from` made and that are open nowhere. It may have
    /// stopped before their clients received them.
    pub(super) fn end_orphans(
        &mut self,
        from: &ConnectionServerId,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        let is_orphan = |session: &Session| session.owner == *from && session.open.is_empty();
        let orphans = self.sessions.iter();
        let orphans = orphans.filter(|(_, session)| is_orphan(session));
        let orphans: Vec<SessionId> = orphans.map(|(id, _)| id.clone()).collect();
        for id in orphans {
            self.end(&id, EndCause::OwnerGone, now, notices);
        }
    }

    /// The session as connection servers see it.
    pub(super) fn describe(&self, id: &SessionId, session: &Session) -> selection::Session {
        let ports = session.ports.map(|port| {
            let (port_name, protocol) = self.ports.name_and_protocol(*port);
            SessionPort {
                port: *port,
                port_name: port_name.to_owned(),
                protocol,
            }
        });
        let state = match session.occupancy() {
            Occupancy::Held => SessionState::Held,
            Occupancy::Busy => SessionState::Busy,
            Occupancy::Lingering | Occupancy::Ending => SessionState::Lingering,
        };
        selection::Session {
            id: id.clone(),
            idempotency_key: session.idempotency_key.clone(),
            ports,
            bound_client: session.bound_client,
            clients: session.clients.clone(),
            state,
            claim_deadline: session.claim_deadline,
            created: session.created,
            lingering_since: (session.state == State::Lingering)
                .then_some(session.closed)
                .flatten()
                .map(|closed| closed.time),
            is_claimed: session.is_claimed,
            open_here: false,
            metadata: session.metadata.clone(),
            expires: session.expires,
            has_own_expiry: session.has_own_expiry,
            amended: session.amended,
            workload_metadata: session.workload_metadata.clone(),
            confirm_deadline: match &session.state {
                State::Offered(offer) => Some(offer.deadline),
                _ => None,
            },
        }
    }
}

/// The session `id`, unless it is ending or unknown.
fn live<'a>(
    sessions: &'a mut BTreeMap<SessionId, Session>,
    id: &SessionId,
) -> Option<&'a mut Session> {
    sessions.get_mut(id).filter(|session| session.is_live())
}

pub(super) fn end_notice(to: To, id: &SessionId, cause: EndCause) -> Notice {
    Notice {
        to,
        message: FromAgent::End {
            session_id: id.clone(),
            cause,
        },
    }
}
