//! The selection protocol between real port books and real session stores,
//! with the network, the clients and the clock in the test's hands: every
//! order of events up to a depth, and long random ones.
//!
//! What must never happen: two sessions on one port, a free port with a
//! connection somewhere, a port that is lost.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use portpool::connection::forward::{Gate, SessionKey, Traffic, Transport, Verdict};
use portpool::connection::sessions::{Action, Outbox, Sessions};
use portpool::pool::{LoadSharing, PortProtocol, ProxyProtocol};
use portpool::processing::book::{Book, GONE_AFTER, Listening, Notice, Now, Times, To};
use portpool::selection::v1::{self, ToAgent, from_agent, to_agent};
use portpool::table::{FORMAT_VERSION, ListenPort, PortRange, Row, RowState, Table, TargetPort};
use proptest::prelude::*;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const SERVERS: usize = 2;
const PORTS: u16 = 2;
const TIMES: Times = Times {
    claim: Duration::from_secs(30),
    linger: Duration::from_secs(5),
    max_duration: None,
};

/// A step of the world. Indices are taken modulo what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// Connection server asks for a port.
    Select(usize, usize),
    /// The next message of a stream arrives at the agent, or at the
    /// connection server.
    ToAgent(usize, usize),
    FromAgent(usize, usize),
    /// A client connects to a port of an agent through a connection server.
    Connect(usize, usize, u16),
    /// The oldest connection closes.
    Close,
    /// The client gives the session on a port back.
    Release(usize, usize, u16),
    /// A stream breaks with all that is under way; both sides notice.
    Break(usize, usize),
    Attach(usize, usize),
    /// The agent is killed and started again.
    RestartAgent(usize),
    /// The connection server is killed; another one takes its place.
    RestartConnectionServer(usize),
    /// Longer than any claim, linger and grace.
    TimePasses,
}

struct Stream {
    outbox: Outbox,
    sent: UnboundedReceiver<ToAgent>,
    to_agent: VecDeque<to_agent::Message>,
    from_agent: VecDeque<from_agent::Message>,
}

struct ConnectionServer {
    name: String,
    sessions: Sessions,
    streams: Vec<Option<Stream>>,
}

#[derive(Clone, Debug)]
struct Connection {
    server: usize,

    port: ListenPort,
    key: SessionKey,
    session: String,
}

struct World {
    now: Now,
    table: Table,
    agents: Vec<Book>,
    servers: Vec<ConnectionServer>,
    connections: Vec<Connection>,
    names: usize,
}

fn port(agent: usize, offset: u16) -> ListenPort {
    ListenPort::new(20_000 + u16::try_from(agent).unwrap() * PORTS + offset % PORTS).unwrap()
}

impl World {
    fn new(agents: usize) -> Self {
        let row = |agent: usize| Row {
            slot: u32::try_from(agent).unwrap(),
            server: format!("pool-{agent}"),
            server_uid: None,
            draining_since: None,
            address: None,
            state: RowState::Active,
            ranges: vec![PortRange {
                name: "main".to_owned(),
                connection_port: port(agent, 0),
                server_port: TargetPort::new(7000).unwrap(),
                count: PORTS,
                protocol: PortProtocol::TCP,
                shared: false,
                proxy_protocol: ProxyProtocol::None,
            }],
        };
        let table = Table {
            format_version: FORMAT_VERSION,
            pool: "pool".to_owned(),
            pool_uid: "uid".to_owned(),
            generation: 1,
            advertised_address: None,
            agent_port: TargetPort::new(7070).unwrap(),
            load_sharing: LoadSharing::default(),
            sessions: portpool::pool::Sessions::default(),
            rows: (0..agents).map(row).collect(),
        };
        let mut world = Self {
            now: Now::default(),
            agents: Vec::new(),
            servers: Vec::new(),
            connections: Vec::new(),
            names: 0,
            table,
        };
        world.agents = (0..agents).map(|agent| world.book(agent, None)).collect();
        for _ in 0..SERVERS {
            let server = world.connection_server();
            world.servers.push(server);
        }
        for server in 0..SERVERS {
            for agent in 0..agents {
                world.happen(Event::Attach(server, agent));
            }
        }
        world.deliver_all();
        world
    }

    fn book(&self, agent: usize, recovering: Option<Duration>) -> Book {
        let mut book = Book::new(TIMES, recovering);
        book.set_row(self.table.row(u32::try_from(agent).unwrap()), TIMES);
        book.set_listening(Listening {
            tcp: (7000..7000 + PORTS).collect(),
            ..Listening::default()
        });
        book
    }

    fn connection_server(&mut self) -> ConnectionServer {
        self.names += 1;
        let sessions = Sessions::default();
        sessions.set_table(&Arc::new(self.table.clone()));
        let streams = (0..self.table.rows.len()).map(|_| None).collect();
        ConnectionServer {
            name: format!("server-{}", self.names),
            sessions,
            streams,
        }
    }

    /// Takes what a connection server has sent into its streams.
    fn collect(&mut self) {
        for stream in self
            .servers
            .iter_mut()
            .flat_map(|server| server.streams.iter_mut().flatten())
        {
            while let Ok(ToAgent {
                message: Some(message),
            }) = stream.sent.try_recv()
            {
                stream.to_agent.push_back(message);
            }
        }
    }

    fn happen(&mut self, event: Event) {
        let agents = self.agents.len();
        match event {
            Event::Select(server, agent) => {
                self.names += 1;
                let session_id = format!("session-{}", self.names);
                if let Some(stream) = &mut self.servers[server % SERVERS].streams[agent % agents] {
                    let select = v1::Select {
                        session_id,
                        ..v1::Select::default()
                    };
                    stream.to_agent.push_back(to_agent::Message::Select(select));
                }
            }
            Event::ToAgent(server, agent) => {
                self.deliver_to_agent(server % SERVERS, agent % agents)
            }
            Event::FromAgent(server, agent) => {
                self.deliver_from_agent(server % SERVERS, agent % agents)
            }
            Event::Connect(server, agent, offset) => {
                let (server, agent) = (server % SERVERS, agent % agents);
                let port = port(agent, offset);
                let client = SocketAddr::from(([127, 0, 0, 1], 1));
                let sessions = &self.servers[server].sessions;
                if let Verdict::Admit(key) = sessions.admit(port, Transport::Tcp, client) {
                    let session = sessions.session_on(port).expect("admitted for a session");
                    self.connections.push(Connection {
                        server,
                        port,
                        key,
                        session,
                    });
                }
            }
            Event::Close => {
                if !self.connections.is_empty() {
                    let connection = self.connections.remove(0);
                    self.closed(&connection);
                }
            }
            Event::Release(server, agent, offset) => {
                let sessions = &self.servers[server % SERVERS].sessions;
                let id = sessions.session_on(port(agent % agents, offset));
                if let Some(Some(Ok(action))) = id.map(|id| sessions.release(&id)) {
                    self.carry_out(server % SERVERS, action);
                }
            }
            Event::Break(server, agent) => self.detach(server % SERVERS, agent % agents),
            Event::Attach(server, agent) => self.attach(server % SERVERS, agent % agents),
            Event::RestartAgent(agent) => {
                let agent = agent % agents;
                for server in 0..SERVERS {
                    self.detach(server, agent);
                }
                self.agents[agent] = self.book(agent, Some(self.now.monotonic + GONE_AFTER));
            }
            Event::RestartConnectionServer(server) => {
                let server = server % SERVERS;
                for agent in 0..agents {
                    self.detach(server, agent);
                }
                self.connections
                    .retain(|connection| connection.server != server);
                self.servers[server] = self.connection_server();
            }
            Event::TimePasses => self.time_passes(),
        }
        self.collect();
    }

    fn closed(&mut self, connection: &Connection) {
        let Connection {
            server, port, key, ..
        } = *connection;
        self.servers[server]
            .sessions
            .closed(port, key, Traffic::default());
    }

    fn carry_out(&mut self, server: usize, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            if let Action::Cut(port, key) = action {
                let is_cut = |connection: &Connection| {
                    connection.server == server && connection.port == port && connection.key == key
                };
                let cut: Vec<Connection> = self
                    .connections
                    .iter()
                    .filter(|c| is_cut(c))
                    .cloned()
                    .collect();
                self.connections.retain(|connection| !is_cut(connection));
                cut.iter().for_each(|connection| self.closed(connection));
            }
        }
    }

    fn attach(&mut self, server: usize, agent: usize) {
        if self.servers[server].streams[agent].is_some() {
            return;
        }
        let (outbox, sent) = unbounded_channel();
        let slot = u32::try_from(agent).unwrap();
        let name = self.servers[server].name.clone();
        let mut known = Vec::new();
        self.servers[server]
            .sessions
            .attach(slot, outbox.clone(), |sessions| {
                known.clone_from(&sessions);
                ToAgent::default()
            });
        let (to_agent, from_agent) = (VecDeque::new(), VecDeque::new());
        let mut stream = Stream {
            outbox,
            sent,
            to_agent,
            from_agent,
        };
        // The greeting is answered before anything else happens on the stream.
        let _greeting = stream.sent.try_recv();
        self.servers[server].streams[agent] = Some(stream);
        let notices = self.agents[agent].attach(&name, &known, self.now);
        self.send(agent, notices);
        self.servers[server].sessions.welcomed(slot);
    }

    fn detach(&mut self, server: usize, agent: usize) {
        if let Some(stream) = self.servers[server].streams[agent].take() {
            let slot = u32::try_from(agent).unwrap();
            self.servers[server].sessions.detach(slot, &stream.outbox);
            self.agents[agent].detach(&self.servers[server].name, self.now);
        }
    }

    fn send(&mut self, agent: usize, notices: Vec<Notice>) {
        for Notice { to, message } in notices {
            for server in &mut self.servers {
                let is_meant = match &to {
                    To::All => true,
                    To::AllBut(name) => *name != server.name,
                    To::One(name) => *name == server.name,
                };
                if let (true, Some(stream)) = (is_meant, &mut server.streams[agent]) {
                    stream.from_agent.push_back(message.clone());
                }
            }
        }
    }

    fn deliver_to_agent(&mut self, server: usize, agent: usize) {
        let Some(stream) = &mut self.servers[server].streams[agent] else {
            return;
        };
        let Some(message) = stream.to_agent.pop_front() else {
            return;
        };
        let name = self.servers[server].name.clone();
        let notices = match &message {
            to_agent::Message::Select(select) => {
                match self.agents[agent].select(&name, select, self.now) {
                    Ok((session, mut notices)) => {
                        let message = from_agent::Message::Session(session);
                        notices.push(Notice {
                            to: To::One(name),
                            message,
                        });
                        notices
                    }
                    Err(_) => Vec::new(),
                }
            }
            message => self.agents[agent].report(&name, message, self.now),
        };
        self.send(agent, notices);
    }

    fn deliver_from_agent(&mut self, server: usize, agent: usize) {
        let Some(stream) = &mut self.servers[server].streams[agent] else {
            return;
        };
        let Some(message) = stream.from_agent.pop_front() else {
            return;
        };
        let slot = u32::try_from(agent).unwrap();
        match message {
            from_agent::Message::Session(session) => {
                let actions = self.servers[server].sessions.learn(slot, session);
                self.carry_out(server, actions);
            }
            from_agent::Message::End(end) => {
                let action = self.servers[server]
                    .sessions
                    .end(slot, &end.session_id, end.cause());
                self.carry_out(server, action);
            }
            _ => {}
        }
    }

    /// Everything under way arrives; then nothing is.
    fn deliver_all(&mut self) {
        loop {
            self.collect();
            let mut is_quiet = true;
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

    /// Messages of a stream that is up arrive within seconds; connection
    /// servers that are detached cut after 10 s; agents count them as gone
    /// after 15 s.
    fn time_passes(&mut self) {
        self.deliver_all();
        for server in 0..SERVERS {
            for agent in 0..self.agents.len() {
                if self.servers[server].streams[agent].is_none() {
                    let actions = self.servers[server]
                        .sessions
                        .forget_server(u32::try_from(agent).unwrap());
                    self.carry_out(server, actions);
                }
            }
        }
        self.now.monotonic += TIMES.claim.max(GONE_AFTER);
        self.now.unix_ms += 30_000;
        for agent in 0..self.agents.len() {
            let notices = self.agents[agent].tick(self.now);
            self.send(agent, notices);
        }
    }

    /// What must hold at every moment.
    fn check(&self) {
        for (agent, book) in self.agents.iter().enumerate() {
            let counts = book.counts(self.now).ports[0].clone();
            let sum = counts.free + counts.held + counts.busy + counts.lingering + counts.silent;
            assert_eq!(
                sum,
                u32::from(PORTS),
                "a port is lost or counted twice: {counts:?}"
            );
            for offset in 0..PORTS {
                let port = port(agent, offset);
                let here = self
                    .connections
                    .iter()
                    .filter(|connection| connection.port == port);
                let mut sessions: Vec<&str> =
                    here.map(|connection| connection.session.as_str()).collect();
                sessions.dedup();
                assert!(sessions.len() <= 1, "two sessions on {port}: {sessions:?}");
                let is_recovering = counts.free == 0 && counts.silent > 0;
                let is_free = book.is_free(port);
                assert!(
                    !is_free || is_recovering || sessions.is_empty(),
                    "{port} is free and connected"
                );
            }
        }
    }

    /// When clients and connection servers are done, every port is free.
    fn end(&mut self) {
        while !self.connections.is_empty() {
            self.happen(Event::Close);
        }
        for server in 0..SERVERS {
            for agent in 0..self.agents.len() {
                self.happen(Event::Attach(server, agent));
            }
        }
        for _ in 0..4 {
            self.happen(Event::TimePasses);
            self.deliver_all();
        }
        for book in &self.agents {
            assert_eq!(
                book.counts(self.now).ports[0].free,
                u32::from(PORTS),
                "a port has leaked"
            );
            assert_eq!(book.session_count(), 0);
        }
    }
}

fn play(agents: usize, events: &[Event]) {
    let mut world = World::new(agents);
    for event in events {
        world.happen(*event);
        world.check();
    }
    world.end();
}

/// One agent with two ports, two connection servers, a session on its way:
/// every order of four further events.
#[test]
fn every_short_order_of_events_keeps_the_rules() {
    let events = [
        Event::ToAgent(0, 0),
        Event::FromAgent(0, 0),
        Event::ToAgent(1, 0),
        Event::FromAgent(1, 0),
        Event::Connect(0, 0, 0),
        Event::Connect(1, 0, 0),
        Event::Close,
        Event::Release(0, 0, 0),
        Event::Break(0, 0),
        Event::Attach(0, 0),
        Event::RestartAgent(0),
        Event::RestartConnectionServer(0),
        Event::TimePasses,
    ];
    let mut order = vec![Event::Select(0, 0), Event::ToAgent(0, 0)];
    let mut played = 0;
    fn explore(order: &mut Vec<Event>, depth: usize, events: &[Event], played: &mut u32) {
        if depth == 0 {
            let result = std::panic::catch_unwind(|| play(1, order));
            assert!(result.is_ok(), "after {order:?}");
            *played += 1;
            return;
        }
        for event in events {
            order.push(*event);
            explore(order, depth - 1, events, played);
            order.pop();
        }
    }
    explore(&mut order, 4, &events, &mut played);
    assert_eq!(played, 13u32.pow(4));
}

fn event() -> impl Strategy<Value = Event> {
    let (server, agent, offset) = (0..SERVERS, 0..2usize, 0..PORTS);
    prop_oneof![
        3 => (server.clone(), agent.clone()).prop_map(|(s, a)| Event::Select(s, a)),
        8 => (server.clone(), agent.clone()).prop_map(|(s, a)| Event::ToAgent(s, a)),
        8 => (server.clone(), agent.clone()).prop_map(|(s, a)| Event::FromAgent(s, a)),
        6 => (server.clone(), agent.clone(), offset.clone()).prop_map(|(s, a, o)| Event::Connect(s, a, o)),
        3 => Just(Event::Close),
        1 => (server.clone(), agent.clone(), offset).prop_map(|(s, a, o)| Event::Release(s, a, o)),
        1 => (server.clone(), agent.clone()).prop_map(|(s, a)| Event::Break(s, a)),
        2 => (server.clone(), agent.clone()).prop_map(|(s, a)| Event::Attach(s, a)),
        1 => agent.prop_map(Event::RestartAgent),
        1 => server.prop_map(Event::RestartConnectionServer),
        1 => Just(Event::TimePasses),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn long_random_orders_of_events_keep_the_rules(events in proptest::collection::vec(event(), 1..120)) {
        play(2, &events);
    }
}
