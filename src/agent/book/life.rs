//! What becomes of sessions: the arrows of the book's diagram. Each keeps a
//! session's state, its deadline and its port in step, and says who is told.

use std::collections::BTreeMap;

use super::ports::Occupancy;
use super::session::{Session, State};
use super::{Book, MAX_ID_BYTES, Notice, Now, To};
use crate::selection::v1::{self, end, from_agent, session};

impl Book {
    pub(super) fn insert(&mut self, id: String, session: Session) {
        self.ports.occupy(session.port, &id, session.occupancy());
        if !session.idempotency_key.is_empty() {
            self.id_by_key
                .insert(session.idempotency_key.clone(), id.clone());
        }
        if let Some(deadline) = session.deadline() {
            self.deadlines.insert((deadline, id.clone()));
        }
        self.sessions.insert(id, session);
    }

    pub(super) fn opened(&mut self, name: &str, id: &str, notices: &mut Vec<Notice>) {
        self.update(id, notices, |session| {
            session.open.insert(name.to_owned());
            session.state = State::Busy;
            session.until = None;
        });
    }

    pub(super) fn closed(&mut self, name: &str, id: &str, now: Now, notices: &mut Vec<Notice>) {
        let linger = self.times.linger;
        self.update(id, notices, |session| {
            let was_open = session.open.remove(name);
            if was_open && session.open.is_empty() {
                session.state = State::Lingering;
                session.until = Some(now.monotonic + linger);
            }
        });
        let is_over = |session: &Session| session.state == State::Lingering && linger.is_zero();
        if self.sessions.get(id).is_some_and(is_over) {
            self.end(id, end::Cause::Finished, notices);
        }
    }

    /// Changes a live session, keeps its deadline in step, and tells everyone
    /// when its state changed.
    fn update(&mut self, id: &str, notices: &mut Vec<Notice>, change: impl FnOnce(&mut Session)) {
        let Some(session) = live(&mut self.sessions, id) else {
            return;
        };
        let (state, deadline) = (session.state.clone(), session.deadline());
        change(session);
        if session.deadline() != deadline {
            if let Some(deadline) = deadline {
                self.deadlines.remove(&(deadline, id.to_owned()));
            }
            if let Some(deadline) = session.deadline() {
                self.deadlines.insert((deadline, id.to_owned()));
            }
        }
        if session.state != state
            && let Some(session) = self.sessions.get(id)
        {
            self.ports.mark(session.port, session.occupancy());
            let message = from_agent::Message::Session(self.describe(id, session));
            notices.push(Notice {
                to: To::All,
                message,
            });
        }
    }

    /// Ends a live session: everyone is told, and its port waits for all who
    /// may have connections on it.
    pub(super) fn end(&mut self, id: &str, cause: end::Cause, notices: &mut Vec<Notice>) {
        let Some(session) = live(&mut self.sessions, id) else {
            return;
        };
        if let Some(deadline) = session.deadline() {
            self.deadlines.remove(&(deadline, id.to_owned()));
        }
        self.id_by_key.remove(&session.idempotency_key);
        session.state = State::Ending(self.connection_servers.may_know(session.number));
        self.ports.mark(session.port, Occupancy::Lingering);
        notices.push(end_notice(To::All, id, cause));
        self.remember_over(id);
        self.free_when_acknowledged(id);
    }

    /// While recovering, greetings to come must not bring `id` back.
    pub(super) fn remember_over(&mut self, id: &str) {
        // No more sessions than ports were live before the restart.
        if self.recovering_until.is_some()
            && id.len() <= MAX_ID_BYTES
            && self.over.len() < self.ports.count()
        {
            self.over.insert(id.to_owned());
        }
    }

    pub(super) fn ended(&mut self, name: &str, id: &str) {
        if let Some(Session {
            state: State::Ending(waiting),
            ..
        }) = self.sessions.get_mut(id)
        {
            waiting.remove(name);
            self.free_when_acknowledged(id);
        }
    }

    fn free_when_acknowledged(&mut self, id: &str) {
        let is_acknowledged = |session: &Session| matches!(&session.state, State::Ending(waiting) if waiting.is_empty());
        if self.sessions.get(id).is_some_and(is_acknowledged)
            && let Some(session) = self.sessions.remove(id)
        {
            self.ports.vacate(session.port);
        }
    }

    /// Nothing is open at `name`, and nothing will be; nobody waits for it.
    pub(super) fn has_nothing(&mut self, name: &str, now: Now, notices: &mut Vec<Notice>) {
        let ids: Vec<String> = self.sessions.keys().cloned().collect();
        for id in ids {
            self.closed(name, &id, now, notices);
            self.ended(name, &id);
        }
    }

    /// Ends the sessions that `name` made and that are open nowhere: it may have
    /// told nobody of them.
    pub(super) fn end_orphans(&mut self, name: &str, notices: &mut Vec<Notice>) {
        let is_orphan = |session: &Session| session.owner == name && session.open.is_empty();
        let orphans = self.sessions.iter();
        let orphans = orphans.filter(|(_, session)| is_orphan(session));
        let orphans: Vec<String> = orphans.map(|(id, _)| id.clone()).collect();
        for id in orphans {
            self.end(&id, end::Cause::OwnerGone, notices);
        }
    }

    pub(super) fn describe(&self, id: &str, session: &Session) -> v1::Session {
        let (port_name, protocol) = self.ports.name_and_protocol(session.port);
        let state = match session.occupancy() {
            Occupancy::Held => session::State::Held,
            Occupancy::Busy => session::State::Busy,
            Occupancy::Lingering => session::State::Lingering,
        };
        v1::Session {
            session_id: id.to_owned(),
            idempotency_key: session.idempotency_key.clone(),
            connection_port: session.port.get().into(),
            port_name: port_name.to_owned(),
            protocol: protocol.name().to_owned(),
            bound_client: session.bound_client.clone(),
            state: state.into(),
            claim_deadline_ms: session.claim_deadline_ms,
            created_ms: session.created_ms,
            open_here: false,
        }
    }
}

/// The session `id`, unless it is ending or unknown.
fn live<'a>(sessions: &'a mut BTreeMap<String, Session>, id: &str) -> Option<&'a mut Session> {
    sessions.get_mut(id).filter(|session| session.is_live())
}

pub(super) fn end_notice(to: To, id: &str, cause: end::Cause) -> Notice {
    let end = v1::End {
        session_id: id.to_owned(),
        cause: cause.into(),
    };
    Notice {
        to,
        message: from_agent::Message::End(end),
    }
}
