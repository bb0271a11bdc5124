//! The selection of ports for a request, which makes a session.
//!
//! Source: US 8,544,018 B2, claim 1, the request receiving part.

use std::collections::BTreeSet;

use super::listening::ServerPort;
use super::session::{Asker, Offer, Session, State};
use super::{Book, Notice, Now, To};
use crate::selection::{self, ConnectionServerId, FromAgent, RefusalCause, Select};
use crate::session::{Block, Metadata, OneOrMore};
use crate::table::ListenPort;

/// The ports that a request gets next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextPorts {
    /// The ports, in the order of the request.
    pub ports: OneOrMore<ListenPort>,
    /// The server ports that they lead to and whose sockets matter.
    pub server_ports: Vec<ServerPort>,
}

/// The selection of ports for a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Selected {
    /// The session on the selected ports.
    pub session: selection::Session,
    /// The messages to send before the answer.
    pub notices: Vec<Notice>,
    /// Whether the workload has yet to confirm the session. The answer is a notice
    /// then, once it has decided or its time is over.
    pub is_offered: bool,
}

impl Book {
    /// The ports that [`Book::select`] gives a request for `blocks` next. What was
    /// seen there last may be a second old, so that the caller looks again.
    #[must_use]
    pub fn next_ports(&self, blocks: &OneOrMore<Block>) -> Option<NextPorts> {
        let ports = self.ports.choose(blocks)?;
        let server_ports = ports.iter().flat_map(|port| self.ports.server_ports(*port));
        Some(NextPorts {
            server_ports: server_ports.collect(),
            ports,
        })
    }

    /// The server ports to look at before a request for `blocks` is refused, where
    /// [`Book::next_ports`] gives it none: those that it could get if the workload
    /// listened on them. Few at a time, and none for a while after that.
    pub fn take_looks_on_request(
        &mut self,
        blocks: &OneOrMore<Block>,
        now: Now,
    ) -> Vec<ServerPort> {
        if self.cause_not_to_offer(now).is_some() {
            return Vec::new();
        }
        self.ports.take_on_request(blocks, now.monotonic)
    }

    /// Why no port is offered, free or not.
    fn cause_not_to_offer(&self, now: Now) -> Option<RefusalCause> {
        if self.is_draining() || self.is_spent() {
            return Some(RefusalCause::Draining);
        }
        if self.is_not_ready() {
            return Some(RefusalCause::NotReady);
        }
        self.is_recovering(now).then_some(RefusalCause::Recovering)
    }

    /// Selects available connection ports for a request of the connection server
    /// `owner`, all that it asks for or none: those that have been free for the
    /// longest time. The same idempotency key selects the same live session.
    ///
    /// # Errors
    /// The cause of the refusal; nothing has changed then.
    pub fn select(
        &mut self,
        owner: &ConnectionServerId,
        request: &Select,
        now: Now,
    ) -> Result<Selected, RefusalCause> {
        if let Some(same) = self.with_key_of(request) {
            let session = same?;
            let is_offered = self.join_offer(&session.id, owner, request)?;
            return Ok(Selected {
                session,
                notices: Vec::new(),
                is_offered,
            });
        }
        if self.sessions.contains_key(&request.session_id) {
            return Err(RefusalCause::DuplicateId);
        }
        if let Some(cause) = self.cause_not_to_offer(now) {
            return Err(cause);
        }
        let is_known = |block: &Block| self.ports.knows(&block.filter);
        if !request.ports.iter().all(is_known) {
            return Err(RefusalCause::UnknownPort);
        }
        let ports = self.ports.choose(&request.ports);
        let ports = ports.ok_or(RefusalCause::NoFreePort)?;
        let id = request.session_id.clone();
        let confirm_within = request.confirm_within;
        let wait = confirm_within.unwrap_or(self.times.claim);
        let state = confirm_within.map_or(State::Held, |within| {
            State::Offered(Offer {
                askers: vec![Asker {
                    from: owner.clone(),
                    request_id: request.request_id,
                }],
                deadline: now.time_in(within),
            })
        });
        let session = Session {
            number: self.next_number,
            ports,
            owner: owner.clone(),
            state,
            open: BTreeSet::new(),
            is_claimed: false,
            has_used_companion: false,
            closed: None,
            idempotency_key: request.idempotency_key.clone(),
            bound_client: request.bound_client,
            metadata: request.metadata.clone(),
            clients: request
                .bound_client
                .or(request.requester)
                .into_iter()
                .collect(),
            created: now.time,
            claim_deadline: now.time_in(self.times.claim),
            claim_until: now.monotonic + self.times.claim,
            until: Some(now.monotonic + wait),
            at_most: self.times.max_duration.map(|most| now.monotonic + most),
            expires: self.times.max_duration.map(|most| now.time_in(most)),
            has_own_expiry: false,
            // So that a greeting without its metadata does not count as much as others.
            amended: Some(now.time),
            is_confirmed: false,
            workload_metadata: Metadata::default(),
        };
        self.next_number += 1;
        let described = self.describe(&id, &session);
        self.insert(id, session);
        self.recycling.begun();
        let is_offered = confirm_within.is_some();
        let notice = Notice {
            to: if is_offered {
                To::Workload
            } else {
                To::AllBut(owner.clone())
            },
            message: FromAgent::Session(described.clone()),
        };
        Ok(Selected {
            session: described,
            notices: vec![notice],
            is_offered,
        })
    }

    /// The live session with the idempotency key of `request`, or the refusal
    /// when a different request made it.
    fn with_key_of(&self, request: &Select) -> Option<Result<selection::Session, RefusalCause>> {
        let id = self.id_by_key.get(request.idempotency_key.as_ref()?)?;
        let session = self.sessions.get(id)?;
        let session = self.describe(id, session);
        let is_same =
            session.bound_client == request.bound_client && request.ports.could_be(&session.ports);
        Some(if is_same {
            Ok(session)
        } else {
            Err(RefusalCause::KeyReused)
        })
    }
}
