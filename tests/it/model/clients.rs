//! Clients, their connections, and what a data plane would do with them.

use super::checks::LATEST;
use super::*;
use portpool::session::{Amendment, MetadataPatch};

const A_MILLISECOND: Duration = Duration::from_millis(1);

impl World {
    /// Amends the session on a port, if there is one: its metadata says which amendment
    /// was the last.
    pub(super) fn amend(&mut self, agent: usize, offset: u16) {
        self.now.monotonic += A_MILLISECOND;
        self.now.time += A_MILLISECOND;
        let book = &mut self.agents[agent];
        let Some(session) = book.look_up(port(agent, offset)) else {
            return;
        };
        self.amendments += 1;
        let says = (LATEST.to_owned(), Some(self.amendments.to_string()));
        let amendment = Amendment {
            metadata: Some(MetadataPatch::Merge([says].into())),
            expires: None,
        };
        let amended = book.amend(&session.id, &amendment, self.now).unwrap();
        let notice = Notice {
            to: To::All,
            message: FromAgent::Session(amended.session),
        };
        self.send(agent, vec![notice]);
    }

    pub(super) fn client(&mut self, server: usize, agent: usize) {
        self.happen(Event::Attach(server, agent));
        self.happen(Event::Select(server, agent));
        self.deliver(server, agent);
        for offset in 0..PORTS {
            self.happen(Event::Connect(server, agent, offset));
        }
    }

    pub(super) fn admitted(&mut self, server: usize, port: ListenPort, key: SessionKey) {
        let sessions = &self.servers[server].sessions;
        let session = sessions.session_on(port);
        let is_companion = (0..self.agents.len()).any(|agent| companion(agent) == port);
        assert_eq!(session.is_none(), is_companion, "admitted for a session");
        let name = self.servers[server].name.clone();
        if let Some(session) = &session {
            assert!(
                !self.over.contains(&(name, session.clone())),
                "{session} is over and admits"
            );
        }
        self.connections.push(Connection {
            server,
            port,
            key,
            session,
        });
    }

    /// The data plane accepts a client. One that has waited since `session` was
    /// live is admitted to no other.
    pub(super) fn accept(&mut self, server: usize, port: ListenPort, session: Option<SessionId>) {
        let client = SocketAddr::from(([127, 0, 0, 1], 1));
        let sessions = &self.servers[server].sessions;
        match sessions.admit(port, Transport::Tcp, client) {
            Decision::Admit(key) => {
                self.expect_own(server, port, session.as_ref());
                self.admitted(server, port, key);
            }
            Decision::Refuse => {}
            Decision::Ask => {
                self.names += 1;
                let id = PendingId(self.names as u64);
                let pending = PendingClient {
                    server,
                    port,
                    until: self.now.monotonic + PENDING_FOR,
                    session,
                };
                self.pending.insert(id, pending);
                sessions.ask(id, port, Transport::Tcp, client);
            }
        }
    }

    pub(super) fn expect_own(&self, server: usize, port: ListenPort, session: Option<&SessionId>) {
        let live = self.servers[server].sessions.session_on(port);
        assert!(
            session.is_none() || session == live.as_ref(),
            "a client of {session:?} is admitted to {live:?}"
        );
    }

    /// What the data plane does to cut a session.
    pub(super) fn cut(&mut self, server: usize, port: ListenPort, key: SessionKey) {
        let is_here = |waiting: &Waiting| waiting.server == server && waiting.port == port;
        while let Some(here) = self.waiting.iter().position(is_here) {
            let Waiting { session, .. } = self.waiting.remove(here);
            self.accept(server, port, Some(session));
        }
        self.pending
            .retain(|_, pending| pending.server != server || pending.port != port);
        let is_cut =
            |open: &Connection| open.server == server && (open.port, open.key) == (port, key);
        while let Some(cut) = self.connections.iter().position(is_cut) {
            let connection = self.connections.remove(cut);
            self.closed(&connection);
        }
        self.servers[server]
            .sessions
            .closed(port, key, Traffic::default());
    }

    pub(super) fn hand_over(&mut self, server: usize) {
        // The data plane carries out its cuts before it pauses.
        let is_of_server = |(of, ..): &(usize, ListenPort, SessionKey)| *of == server;
        while let Some(cut) = self.cuts.iter().position(is_of_server) {
            let (_, port, key) = self.cuts.remove(cut);
            self.cut(server, port, key);
        }
        self.collect();
        // Pending clients give up here.
        self.pending.retain(|_, pending| pending.server != server);
        let table = self.index();
        let former = &mut self.servers[server];
        let sessions = Sessions::default();
        let flows = self.connections.iter();
        let flows = flows.filter(|connection| connection.server == server);
        let keys = flows.map(|connection| (connection.port, connection.key));
        let orphans = sessions.import(former.sessions.export(), &table, keys);
        assert!(orphans.is_empty(), "connections without a session");
        former.sessions = sessions;
        for (agent, place) in former.streams.iter_mut().enumerate() {
            let Some(stream) = place.as_mut().filter(|stream| !stream.is_former) else {
                continue;
            };
            former.cut_at[agent] = Some(self.now.monotonic + CUT_AFTER + CUT_SLACK);
            if stream.broken.is_some() {
                *place = None;
                continue;
            }
            stream.is_former = true;
            stream.from_agent.clear();
            let found_out = self.now.monotonic + FOUND_OUT;
            self.unnoticed.push((found_out, agent, former.name.clone()));
        }
    }

    pub(super) fn closed(&mut self, connection: &Connection) {
        let Connection {
            server, port, key, ..
        } = *connection;
        let traffic = Traffic {
            // Every third connection is a probe, which claims nothing.
            upstream_bytes: key.0 % 3,
            downstream_bytes: 0,
        };
        self.servers[server].sessions.closed(port, key, traffic);
    }

    pub(super) fn carry_out(&mut self, server: usize, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            match action {
                Action::Cut(ports, key, companions) => {
                    // All clients have one address: a cut of its companion connections
                    // refuses all who wait, like one of a session.
                    let own = ports.iter().map(|port| (*port, key));
                    let cuts = own.chain(companions.iter().map(|cut| (cut.port, cut.key)));
                    self.cuts
                        .extend(cuts.map(|(port, key)| (server, port, key)));
                }
                Action::CutCompanions(CompanionCut { port, key, .. })
                | Action::CutOpen(port, key) => {
                    self.cuts.push((server, port, key));
                }
                Action::Answer(port, id, Decision::Admit(key)) => {
                    self.admitted(server, port, key);
                    match self.pending.remove(&id) {
                        Some(pending) => self.expect_own(server, port, pending.session.as_ref()),
                        None => {
                            let gone = self.connections.pop().expect("was added");
                            self.closed(&gone);
                        }
                    }
                }
                Action::Answer(_, id, _) => {
                    self.pending.remove(&id);
                }
            }
        }
    }
}
