//! Requests for sessions, and sessions that workloads have yet to confirm.

use super::*;
use portpool::selection::Session;

/// How long a workload has to decide: shorter than a broken stream goes unnoticed.
const CONFIRM: Duration = Duration::from_secs(3);

impl World {
    /// The request of a [`Event::Select`], [`Event::SelectBoth`] or [`Event::Offer`].
    pub(super) fn request(&mut self, event: Event) -> Select {
        let both = Block {
            filter: PortFilter::default(),
            count: const { NonZeroU8::new(2).unwrap() },
        };
        let (key, confirm_within) = match event {
            Event::Offer(_, _, key) => (key, Some(CONFIRM)),
            _ => (None, None),
        };
        self.names += 1;
        Select {
            request_id: self.names as u64,
            session_id: SessionId::new(&format!("session-{}", self.names)).unwrap(),
            idempotency_key: key.map(|key| key.to_string()),
            ports: match event {
                Event::SelectBoth(..) => OneOrMore::one(both),
                _ => OneOrMore::default(),
            },
            bound_client: None,
            metadata: Metadata::default(),
            requester: None,
            confirm_within,
        }
    }

    /// A connection server asks an agent, if their stream is up.
    pub(super) fn ask(&mut self, server: usize, agent: usize, select: Select) {
        if let Some(stream) = &mut self.servers[server].streams[agent]
            && stream.broken.is_none()
            && !stream.is_former
        {
            if select.confirm_within.is_some() {
                let ask = Ask {
                    has_key: select.idempotency_key.is_some(),
                    ..Ask::default()
                };
                stream.asks.insert(select.request_id, ask);
            }
            stream.to_agent.push_back(ToAgent::Select(select));
        }
    }

    /// The agent answers a request, or offers its session to the workload.
    pub(super) fn select(
        &mut self,
        agent: usize,
        name: &ConnectionServerId,
        select: &Select,
    ) -> Vec<Notice> {
        let book = &mut self.agents[agent];
        let selected = book.select(name, select, self.now);
        let (request_id, counts) = (select.request_id, book.counts(self.now));
        let (mut notices, message) = match selected {
            Ok(selected) if select.confirm_within.is_none() => {
                (selected.notices, FromAgent::Session(selected.session))
            }
            Ok(selected) if selected.is_offered => {
                let offered = FromAgent::Offered { request_id, counts };
                (selected.notices, offered)
            }
            Ok(Selected {
                session, notices, ..
            }) => {
                let selected = FromAgent::Selected {
                    request_id,
                    session,
                    counts,
                };
                (notices, selected)
            }
            Err(_) if select.confirm_within.is_none() => return Vec::new(),
            Err(cause) => {
                let refused = FromAgent::Refused {
                    request_id,
                    cause,
                    reason: None,
                };
                (Vec::new(), refused)
            }
        };
        notices.push(Notice {
            to: To::One(name.clone()),
            message,
        });
        notices
    }

    /// The workload decides about the first session that it was offered.
    pub(super) fn decide(&mut self, agent: usize, is_confirmed: bool) {
        let offered = self.offered(agent).next();
        let Some(id) = offered else {
            return;
        };
        let book = &mut self.agents[agent];
        let notices = if is_confirmed {
            book.confirm(&id, Metadata::default(), self.now)
        } else {
            book.refuse(&id, None, self.now)
        };
        self.send(agent, notices.expect("it is offered"));
    }

    /// The sessions that the workload of an agent has yet to confirm.
    pub(super) fn offered(&self, agent: usize) -> impl Iterator<Item = SessionId> {
        let live = self.agents[agent].live_sessions_after("", 9).into_iter();
        let offered = live.filter(|session| session.confirm_deadline.is_some());
        offered.map(|session| session.id)
    }

    /// A connection server withdraws the oldest of its questions that a workload has.
    pub(super) fn withdraw(&mut self, server: usize, agent: usize) {
        if let Some(stream) = &mut self.servers[server].streams[agent]
            && !stream.is_former
        {
            let mut asks = stream.asks.iter_mut();
            let offered = asks.find(|(_, ask)| ask.is_offered && !ask.is_withdrawn);
            if let Some((&request_id, ask)) = offered {
                ask.is_withdrawn = true;
                if stream.broken.is_none() {
                    let withdraw = ToAgent::Withdraw { request_id };
                    stream.to_agent.push_back(withdraw);
                }
            }
        }
    }

    /// A connection server receives an answer.
    pub(super) fn answered(&mut self, server: usize, agent: usize, answer: FromAgent) {
        let Some(stream) = &mut self.servers[server].streams[agent] else {
            return;
        };
        match answer {
            FromAgent::Offered { request_id, .. } => {
                let ask = stream.asks.get_mut(&request_id).expect("it is asked");
                assert!(!ask.is_offered, "offered once");
                ask.is_offered = true;
            }
            FromAgent::Refused {
                request_id, cause, ..
            } => {
                let ask = stream.asks.remove(&request_id).expect("answered once");
                assert!(cause != RefusalCause::Withdrawn || ask.is_withdrawn);
            }
            FromAgent::Selected {
                request_id,
                session,
                ..
            } => {
                let ask = stream.asks.remove(&request_id).expect("answered once");
                self.selected(server, agent, ask, session);
            }
            _ => {}
        }
    }

    /// A session that no one needs any more is given back, as by the queue.
    fn selected(&mut self, server: usize, agent: usize, ask: Ask, session: Session) {
        let id = session.id.clone();
        let ConnectionServer { name, sessions, .. } = &self.servers[server];
        let (name, is_new) = (name.clone(), sessions.get(&id).is_none());
        let slot = Slot(u32::try_from(agent).unwrap());
        let actions = sessions.learn(slot, session, SessionSpan::learned);
        self.carry_out(server, actions);
        if ask.is_withdrawn
            && is_new
            && !ask.has_key
            && let Ok(actions) = self.servers[server].sessions.release(&id)
        {
            self.released.insert(id.clone());
            self.over.insert((name, id));
            self.carry_out(server, actions);
        }
    }

    /// Asserts that no connection server knows a session that is not confirmed.
    pub(super) fn check_offers(&self) {
        for agent in 0..self.agents.len() {
            for id in self.offered(agent) {
                let mut servers = self.servers.iter();
                let knows = servers.any(|server| server.sessions.get(&id).is_some());
                assert!(!knows, "{id} is known and not confirmed");
            }
        }
    }

    /// Asserts, when everything has arrived, that each question is answered or waits for
    /// a workload, and that no workload is asked for no one.
    pub(super) fn check_asks(&self) {
        for agent in 0..self.agents.len() {
            let offered = self.offered(agent).count();
            let streams = self.servers.iter().map(|it| it.streams[agent].as_ref());
            let is_up = |stream: &&Stream| stream.broken.is_none() && !stream.is_former;
            let up: Vec<&Stream> = streams.flatten().filter(is_up).collect();
            let asks: Vec<&Ask> = up.iter().flat_map(|stream| stream.asks.values()).collect();
            for ask in &asks {
                assert!(ask.is_offered && !ask.is_withdrawn, "{ask:?} has no answer");
            }
            let is_all_up = up.len() == SERVERS && self.unnoticed.iter().all(|it| it.1 != agent);
            assert!(asks.is_empty() || offered > 0, "{asks:?} wait for nothing");
            assert!(!asks.is_empty() || !is_all_up || offered == 0, "for no one");
        }
    }
}
