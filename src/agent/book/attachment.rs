//! Connection servers come and go: what their greetings tell of sessions, and
//! what their absence means. Who is there is kept by `connection_servers`.

use std::collections::BTreeMap;

use super::life::end_notice;
use super::session::{ADOPTED, Session, State};
use super::{Book, MAX_ID_BYTES, Notice, Now, PortFilter, To, millis};
use crate::selection::v1::{self, end, from_agent};
use crate::table::ListenPort;

impl Book {
    /// A connection server that listens at `place` attaches and tells which
    /// sessions it knows. What it does not list is not open there.
    pub fn attach(
        &mut self,
        name: &str,
        place: &str,
        known: &[v1::Session],
        now: Now,
    ) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.connection_servers.attach(name, place, now.monotonic);
        let listed: BTreeMap<&str, &v1::Session> = known
            .iter()
            .map(|session| (session.session_id.as_str(), session))
            .collect();
        let ids: Vec<String> = self.sessions.keys().cloned().collect();
        for id in ids {
            match listed.get(id.as_str()) {
                Some(session) if session.open_here => self.opened(name, &id, &mut notices),
                Some(_) => self.closed(name, &id, now, &mut notices),
                None => {
                    self.closed(name, &id, now, &mut notices);
                    self.ended(name, &id);
                }
            }
            let is_ending = self
                .sessions
                .get(&id)
                .is_some_and(|session| !session.is_live());
            if is_ending {
                notices.push(end_notice(
                    To::One(name.to_owned()),
                    &id,
                    end::Cause::Released,
                ));
            }
        }
        for (id, known) in listed {
            if self.sessions.contains_key(id) {
                continue;
            }
            if !self.adopt(name, known, now) {
                notices.push(end_notice(
                    To::One(name.to_owned()),
                    id,
                    end::Cause::Unknown,
                ));
            } else if let Some(session) = self.sessions.get(id) {
                // One of the others may have heard its end before the restart.
                notices.push(Notice {
                    to: To::AllBut(name.to_owned()),
                    message: from_agent::Message::Session(self.describe(id, session)),
                });
            }
        }
        for (id, session) in self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_live())
        {
            let message = from_agent::Message::Session(self.describe(id, session));
            notices.push(Notice {
                to: To::One(name.to_owned()),
                message,
            });
        }
        notices
    }

    /// Takes over a session made before a restart.
    fn adopt(&mut self, owner: &str, known: &v1::Session, now: Now) -> bool {
        let number = u16::try_from(known.connection_port).unwrap_or(0);
        let Some(port) = ListenPort::new(number).filter(|port| self.ports.has_room(*port)) else {
            return false;
        };
        if !self.is_recovering(now)
            || self.over.contains(&known.session_id)
            || known.session_id.len() > MAX_ID_BYTES
            || known.session_id.is_empty()
        {
            return false;
        }
        let is_open = known.open_here;
        let session = Session {
            number: ADOPTED,
            port,
            owner: owner.to_owned(),
            state: if is_open { State::Busy } else { State::Held },
            open: is_open.then(|| owner.to_owned()).into_iter().collect(),
            filter: PortFilter::default(),
            idempotency_key: known.idempotency_key.clone(),
            bound_client: known.bound_client.clone(),
            created_ms: known.created_ms,
            claim_deadline_ms: now.unix_ms + millis(self.times.claim),
            until: (!is_open).then_some(now.monotonic + self.times.claim),
            at_most: self.times.max_duration.map(|most| now.monotonic + most),
        };
        self.insert(known.session_id.clone(), session);
        true
    }

    /// A connection server's stream is gone.
    pub fn detach(&mut self, name: &str, now: Now) {
        self.connection_servers
            .detach(name, self.next_number, now.monotonic);
    }

    /// A connection server has said goodbye: nothing is open there, and nobody
    /// need wait for it. What it made may still be claimed through others.
    pub fn leave(&mut self, name: &str, now: Now) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.connection_servers.remove(name);
        self.has_nothing(name, now, &mut notices);
        notices
    }
}
