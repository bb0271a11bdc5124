//! The arrival and departure of connection servers: what their greetings say
//! about sessions, and what their absence means. `connection_servers` keeps
//! which of them are attached.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::life::end_notice;
use super::session::{ADOPTED, Closed, Session, State};
use super::times::time_after;
use super::{Book, Notice, Now, Times, To};
use crate::selection::{self, ConnectionServerId, EndCause, FromAgent};
use crate::session::{SessionId, SessionState};
use crate::table::ListenPort;

impl Book {
    /// Attaches a connection server that listens at `host_identity` and knows
    /// the sessions `known`. A session that it does not list is not open there.
    pub fn attach(
        &mut self,
        from: &ConnectionServerId,
        host_identity: &str,
        known: &[selection::Session],
        now: Now,
    ) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.forget_asker(from, now, &mut notices);
        self.connection_servers
            .attach(from, host_identity, now.monotonic);
        let listed: BTreeMap<&SessionId, &selection::Session> =
            known.iter().map(|session| (&session.id, session)).collect();
        let sessions = self.sessions.iter();
        let known = sessions.filter(|(_, session)| !session.is_offered());
        let ids: Vec<SessionId> = known.map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Some(known) = listed.get(&id) {
                self.joined(from, &id, &known.clients, &mut notices);
                self.catch_up(from, known, now, &mut notices);
            }
            match listed.get(&id) {
                Some(session) if session.open_here => self.opened(from, &id, &mut notices),
                Some(session) => {
                    let is_claimed = session.is_claimed;
                    self.closed(from, &id, is_claimed, now, &mut notices);
                }
                None => {
                    self.closed(from, &id, true, now, &mut notices);
                    self.ended(from, &id, now);
                }
            }
            let session = self.sessions.get(&id);
            if session.is_some_and(|session| !session.is_live()) {
                let to = To::One(from.clone());
                notices.push(end_notice(to, &id, EndCause::Released));
            }
        }
        for (id, known) in listed {
            if self.sessions.contains_key(id) {
                continue;
            }
            if !self.adopt(from, known, now) {
                notices.push(end_notice(To::One(from.clone()), id, EndCause::Unknown));
            } else if let Some(session) = self.sessions.get(id) {
                // Another one may have received its end before the restart.
                notices.push(Notice {
                    to: To::AllBut(from.clone()),
                    message: FromAgent::Session(self.describe(id, session)),
                });
            }
        }
        let sessions = self.sessions.iter();
        let live = sessions.filter(|(_, session)| session.is_live() && !session.is_offered());
        notices.extend(live.map(|(id, session)| Notice {
            to: To::One(from.clone()),
            message: FromAgent::Session(self.describe(id, session)),
        }));
        notices
    }

    /// Adopts a session made before a restart, with all its ports or not at all.
    /// Returns whether the book has it now.
    fn adopt(&mut self, owner: &ConnectionServerId, known: &selection::Session, now: Now) -> bool {
        let mut ports = BTreeSet::new();
        let mut is_new = known.ports.iter().map(|it| ports.insert(it.port));
        if !is_new.all(|is_new| is_new)
            || !ports.iter().all(|port| self.ports.has_room(*port))
            || !self.is_recovering(now)
            || self.over.contains(&known.id)
        {
            return false;
        }
        let Times {
            claim,
            linger,
            max_duration,
        } = self.times;
        let by_duration = max_duration.map(|most| time_after(known.created, most));
        let expires = if known.has_own_expiry {
            known.expires
        } else {
            by_duration
        };
        let closed = known.lingering_since.unwrap_or(now.time);
        let left_to_claim = now.until(known.claim_deadline).min(claim);
        let mut session = Session {
            number: ADOPTED,
            ports: known.ports.map(|known| known.port),
            owner: owner.clone(),
            state: State::Busy,
            open: BTreeSet::new(),
            is_claimed: known.is_claimed,
            has_used_companion: false,
            closed: None,
            idempotency_key: known.idempotency_key.clone(),
            bound_client: known.bound_client,
            metadata: known.metadata.clone(),
            clients: known.clients.clone(),
            created: known.created,
            claim_deadline: known.claim_deadline,
            claim_until: self.no_sooner_than_recovered(now.monotonic + left_to_claim),
            until: None,
            at_most: expires.map(|at| now.monotonic + now.until(at)),
            expires,
            has_own_expiry: known.has_own_expiry,
            amended: known.amended,
            // Where it is asked: who knows the session has learned it from the book before.
            is_confirmed: true,
            workload_metadata: known.workload_metadata.clone(),
        };
        if known.open_here {
            session.open.insert(owner.clone());
        } else {
            let left = match known.state {
                SessionState::Held => Duration::ZERO,
                SessionState::Busy | SessionState::Lingering => {
                    session.closed = Some(Closed {
                        monotonic: now.monotonic,
                        time: closed,
                    });
                    linger.saturating_sub(now.since(closed))
                }
            };
            let linger_until = self.no_sooner_than_recovered(now.monotonic + left);
            let (state, until) = session.at_rest(linger_until);
            (session.state, session.until) = (state, Some(until));
        }
        self.insert(known.id.clone(), session);
        true
    }

    /// Notes that the stream of a connection server has ended.
    pub fn detach(&mut self, from: &ConnectionServerId, now: Now) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.forget_asker(from, now, &mut notices);
        self.connection_servers
            .detach(from, self.next_number, now.monotonic);
        notices
    }

    /// Removes a connection server that has said goodbye. Nothing is open there
    /// and no port waits for it. The sessions that it made can still be claimed
    /// through others.
    pub fn leave(&mut self, from: &ConnectionServerId, now: Now) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.forget_asker(from, now, &mut notices);
        self.connection_servers.remove(from);
        self.renew_unavailable();
        self.write_off(from, now, &mut notices);
        notices
    }

    /// Offers none of `ports`, which the attached connection server `from` cannot
    /// listen on, whichever of them asks: clients may come through any. They count
    /// as in no state while they have no session. Replaces what it said before.
    pub fn set_unavailable(&mut self, from: &ConnectionServerId, ports: &[ListenPort]) {
        self.connection_servers.set_unavailable(from, ports);
        self.renew_unavailable();
    }

    /// Has the ports follow what the connection servers have said last.
    pub(super) fn renew_unavailable(&mut self) {
        self.ports
            .set_unavailable(self.connection_servers.unavailable());
    }
}
