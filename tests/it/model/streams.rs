//! Streams between connection servers and agents: what is sent, delivered and lost.

use super::*;

impl World {
    pub(super) fn attach(&mut self, server: usize, agent: usize) {
        let slot = u32::try_from(agent).unwrap();
        let ConnectionServer {
            sessions, streams, ..
        } = &self.servers[server];
        let current = streams[agent].as_ref().filter(|stream| !stream.is_former);
        if current.is_some() || sessions.is_cutting(Slot(slot)) {
            return;
        }
        let (outbox, sent) = unbounded_channel();
        let name = self.servers[server].name.clone();
        let mut known = Vec::new();
        sessions.attach(Slot(slot), outbox.clone(), |sessions| {
            known = sessions;
            // Any message stands for the greeting, which is taken out below.
            ToAgent::Goodbye
        });
        let (to_agent, from_agent) = (VecDeque::new(), VecDeque::new());
        let mut stream = Stream {
            outbox,
            sent,
            to_agent,
            from_agent,
            asks: BTreeMap::new(),
            broken: None,
            is_former: false,
        };
        // The greeting is answered before anything else happens on the stream.
        let _greeting = stream.sent.try_recv();
        self.servers[server].streams[agent] = Some(stream);
        self.servers[server].cut_at[agent] = None;
        // The new stream replaces the broken one.
        self.unnoticed
            .retain(|(_, of, from)| *of != agent || *from != name);
        let host_identity = self.servers[server].host_identity.clone();
        let notices = self.agents[agent].attach(&name, &host_identity, &known, self.now);
        self.send(agent, notices);
        let actions = self.servers[server].sessions.welcomed(Slot(slot), true);
        self.carry_out(server, actions);
    }

    /// Breaks a stream. A side that does not notice now does so after [`FOUND_OUT`].
    pub(super) fn break_stream(&mut self, server: usize, agent: usize, noticing: Noticing) {
        let found_out = self.now.monotonic + FOUND_OUT;
        let name = self.servers[server].name.clone();
        if self.end_former(agent, &name) {
            // The former process is dead; the agent may still notice.
            if noticing != Noticing::ConnectionServer {
                self.unnoticed
                    .retain(|(_, of, from)| *of != agent || *from != name);
                self.agent_notices(agent, &name);
            }
            return;
        }
        let Some(stream) = &mut self.servers[server].streams[agent] else {
            return;
        };
        let was_broken = stream.broken.is_some();
        stream.to_agent.clear();
        stream.from_agent.clear();
        stream.broken.get_or_insert(found_out);
        if noticing != Noticing::Agent {
            self.server_notices(server, agent);
        }
        match noticing {
            _ if was_broken => {}
            Noticing::ConnectionServer => self.unnoticed.push((found_out, agent, name)),
            _ => self.agent_notices(agent, &name),
        }
    }

    /// The agent notices that the stream of this connection server has ended.
    pub(super) fn agent_notices(&mut self, agent: usize, name: &ConnectionServerId) {
        let notices = self.agents[agent].detach(name, self.now);
        self.send(agent, notices);
    }

    /// Removes the stream of a process that has handed over. Returns whether
    /// there was one.
    pub(super) fn end_former(&mut self, agent: usize, name: &ConnectionServerId) -> bool {
        let of = self.servers.iter_mut().find(|server| server.name == *name);
        let former = of.and_then(|of| of.streams[agent].take_if(|stream| stream.is_former));
        former.is_some()
    }

    pub(super) fn server_notices(&mut self, server: usize, agent: usize) {
        let of = &mut self.servers[server];
        if let Some(stream) = of.streams[agent].take() {
            let slot = u32::try_from(agent).unwrap();
            of.sessions.detach(Slot(slot), &stream.outbox);
            of.cut_at[agent] = Some(self.now.monotonic + CUT_AFTER + CUT_SLACK);
        }
    }

    pub(super) fn send(&mut self, agent: usize, notices: Vec<Notice>) {
        for Notice { to, message } in notices {
            if let (To::All, FromAgent::End { session_id, cause }) = (&to, &message) {
                self.ended[agent].insert(session_id.clone());
                let mut over = self.over.iter();
                assert!(
                    *cause != EndCause::Released
                        || self.released.contains(session_id)
                        || over.any(|(_, id)| id == session_id),
                    "no client has given {session_id} back"
                );
            }
            for server in &mut self.servers {
                let is_meant = match &to {
                    To::Workload => false,
                    To::All => true,
                    To::AllBut(name) | To::ServersBut(name) => *name != server.name,
                    To::One(name) => *name == server.name,
                };
                if let (true, Some(stream)) = (is_meant, &mut server.streams[agent])
                    && stream.broken.is_none()
                    && !stream.is_former
                {
                    stream.from_agent.push_back(message.clone());
                }
            }
        }
    }

    pub(super) fn deliver_to_agent(&mut self, server: usize, agent: usize) {
        let Some(stream) = &mut self.servers[server].streams[agent] else {
            return;
        };
        let Some(message) = stream.to_agent.pop_front() else {
            return;
        };
        let name = self.servers[server].name.clone();
        let notices = match &message {
            ToAgent::Select(select) => self.select(agent, &name, select),
            ToAgent::Lookup { request_id, port } => vec![Notice {
                to: To::One(name),
                message: FromAgent::LookedUp {
                    request_id: *request_id,
                    session: self.agents[agent].look_up(*port),
                },
            }],
            message => self.agents[agent].report(&name, message, self.now),
        };
        self.send(agent, notices);
    }

    pub(super) fn deliver_from_agent(&mut self, server: usize, agent: usize) {
        let Some(stream) = &mut self.servers[server].streams[agent] else {
            return;
        };
        let Some(message) = stream.from_agent.pop_front() else {
            return;
        };
        let slot = u32::try_from(agent).unwrap();
        match message {
            FromAgent::Session(session) => {
                let sessions = &self.servers[server].sessions;
                let actions = sessions.learn(Slot(slot), session, SessionSpan::learned);
                self.carry_out(server, actions);
            }
            FromAgent::End { session_id, cause } => {
                let ConnectionServer { name, sessions, .. } = &self.servers[server];
                let is_known = sessions.get(&session_id).is_some();
                let actions = sessions.end(Slot(slot), &session_id, cause);
                if is_known {
                    self.over.insert((name.clone(), session_id));
                }
                self.carry_out(server, actions);
            }
            FromAgent::LookedUp {
                request_id,
                session,
            } => {
                let sessions = &self.servers[server].sessions;
                let actions = sessions.looked_up(Slot(slot), request_id, session);
                self.carry_out(server, actions);
            }
            message => self.answered(server, agent, message),
        }
    }

    /// Delivers everything under way between the two.
    pub(super) fn deliver(&mut self, server: usize, agent: usize) {
        loop {
            self.collect();
            match &self.servers[server].streams[agent] {
                Some(stream) if !stream.to_agent.is_empty() => self.deliver_to_agent(server, agent),
                Some(stream) if !stream.from_agent.is_empty() => {
                    self.deliver_from_agent(server, agent)
                }
                _ => return,
            }
        }
    }

    /// Delivers and carries out everything, until nothing is under way.
    pub(super) fn deliver_all(&mut self) {
        loop {
            self.collect();
            let mut is_quiet = true;
            while !self.cuts.is_empty() {
                self.happen(Event::Cut);
                is_quiet = false;
            }
            for server in 0..SERVERS {
                for agent in 0..self.agents.len() {
                    if let Some(stream) = &self.servers[server].streams[agent] {
                        is_quiet &= stream.to_agent.is_empty() && stream.from_agent.is_empty();
                    }
                    self.deliver_to_agent(server, agent);
                    self.collect();
                    self.deliver_from_agent(server, agent);
                }
            }
            self.check();
            if is_quiet {
                return;
            }
        }
    }
}
