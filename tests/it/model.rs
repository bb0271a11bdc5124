//! The selection protocol between real port books and real session stores,
//! with the network, the clients and the clock in the test's hands: every
//! order of events up to a depth, and long random ones.
//!
//! What must never happen: two sessions on one port, a session of two ports that
//! has only one, a free port with a connection somewhere, a port that is lost, a
//! session that is over and comes back.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU8;
use std::sync::Arc;
use std::time::Duration;

use crate::common::table;
use portpool::agent::book::{Book, Notice, Now, Selected, SocketId, Times, To};
use portpool::connection::sessions::span::SessionSpan;
use portpool::connection::sessions::{Action, Outbox, Sessions};
use portpool::forward::{Decision, Gate, PendingId, SessionKey, Traffic, Transport};
use portpool::pool::PortProtocol;
use portpool::selection::{
    CLOSED_AFTER, CUT_AFTER, CUT_SLACK, ConnectionServerId, FromAgent, GONE_AFTER,
    KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, Select, ToAgent,
};
use portpool::session::{Block, OneOrMore, PortFilter, SessionId};
use portpool::table::{ListenPort, PortIndex, PortRange, Slot, Table};
use proptest::prelude::*;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const SERVERS: usize = 2;
const PORTS: u16 = 2;
const TIMES: Times = Times {
    claim: Duration::from_secs(30),
    linger: Duration::from_secs(5),
    max_duration: None,
};

/// How long until a side notices a broken stream by itself.
const FOUND_OUT: Duration = KEEP_ALIVE_INTERVAL.saturating_add(KEEP_ALIVE_TIMEOUT);

/// How long the data plane keeps a pending client.
const PENDING_FOR: Duration = portpool::forward::PENDING_DEADLINE;

/// A step of the world. Indices are taken modulo the number of connection
/// servers, agents and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// A connection server asks an agent for a port, or for both that it has.
    Select(usize, usize),
    SelectBoth(usize, usize),
    /// The next message of a stream arrives at the agent, or at the
    /// connection server.
    ToAgent(usize, usize),
    FromAgent(usize, usize),
    /// All messages of a stream arrive, and what they cause.
    Deliver(usize, usize),
    /// A client connects to a port of an agent through a connection server.
    Connect(usize, usize, u16),
    /// A client gets a session through a connection server that is attached,
    /// with all messages between the two, and connects to every port it can.
    Client(usize, usize),
    /// A client connects to a port that has a session, and waits to be accepted.
    Wait(usize, usize, u16),
    /// The client that has waited for longest is accepted.
    Accept,
    /// The oldest connection closes.
    Close,
    /// A data plane carries out the oldest cut.
    Cut,
    /// The client gives the session on a port back.
    Release(usize, usize, u16),
    /// A stream breaks, what is under way is lost, and these notice at once.
    Break(usize, usize, Noticing),
    Attach(usize, usize),
    /// The agent is killed and started again. The flag says whether connection
    /// servers notice at once.
    RestartAgent(usize, bool),
    /// The connection server is killed and another one replaces it. The flag says
    /// whether agents notice at once.
    RestartConnectionServer(usize, bool),
    /// A successor takes over from the connection server. What was sent on the
    /// former streams may still arrive until they are replaced or noticed.
    HandOver(usize),
    /// Everything that is under way arrives, and so many seconds pass.
    Pass(u64),
}

/// Who notices the end of a stream at once; the others after [`FOUND_OUT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Noticing {
    Both,
    Agent,
    ConnectionServer,
}

struct Stream {
    outbox: Outbox,
    sent: UnboundedReceiver<ToAgent>,
    to_agent: VecDeque<ToAgent>,
    from_agent: VecDeque<FromAgent>,
    /// When the connection server notices that the stream is broken. Nothing
    /// arrives any more.
    broken: Option<Duration>,
    /// Whether its process has handed over, so that it receives nothing any more.
    is_former: bool,
}

struct ConnectionServer {
    name: ConnectionServerId,
    /// The identity of its listener, which the next process has too.
    host_identity: String,
    sessions: Sessions,
    streams: Vec<Option<Stream>>,
    /// When sessions of an agent that is out of reach are cut, by agent.
    cut_at: Vec<Option<Duration>>,
}

#[derive(Clone, Debug)]
struct Connection {
    server: usize,
    port: ListenPort,
    key: SessionKey,
    session: SessionId,
}

/// A client that has connected while `session` was live.
#[derive(Clone, Debug)]
struct Waiting {
    server: usize,
    port: ListenPort,
    session: SessionId,
}

/// A client that waits for the agent's answer.
#[derive(Clone, Debug)]
struct PendingClient {
    server: usize,
    port: ListenPort,
    until: Duration,
    /// The session that was live when the client connected, if it has waited to
    /// be accepted.
    session: Option<SessionId>,
}

struct World {
    now: Now,
    table: Table,
    agents: Vec<Book>,
    servers: Vec<ConnectionServer>,
    connections: Vec<Connection>,
    /// Connections of dead processes, with the time when the kernel closes them.
    closing: Vec<(Duration, Connection)>,
    /// Clients that the kernel has connected, until the data plane accepts them.
    waiting: Vec<Waiting>,
    pending: HashMap<PendingId, PendingClient>,
    /// Cuts that data planes have not carried out yet: connection server, port
    /// and session.
    cuts: Vec<(usize, ListenPort, SessionKey)>,
    /// When agents notice that a connection server is gone.
    unnoticed: Vec<(Duration, usize, ConnectionServerId)>,
    /// Connection servers, by name, and sessions that they knew and that are over
    /// for them: given back through them, or ended by their agent.
    over: HashSet<(ConnectionServerId, SessionId)>,
    /// When the recovery of each agent is over.
    recovered_at: Vec<Duration>,
    /// Sessions that each agent has ended since it was started.
    ended: Vec<HashSet<SessionId>>,
    names: usize,
}

fn port(agent: usize, offset: u16) -> ListenPort {
    ListenPort::new(20_000 + u16::try_from(agent).unwrap() * PORTS + offset % PORTS).unwrap()
}

/// Does the looks of `book` that are due: the workload listens on every port.
fn look(book: &mut Book, now: Now) {
    while book.next_look().is_some_and(|next| next <= now.monotonic) {
        for port in book.take_due_looks(now) {
            book.see(port, Some(SocketId(1)), now);
        }
    }
}

impl World {
    fn new(agents: usize) -> Self {
        let row = |agent: usize| {
            let range = PortRange {
                protocol: PortProtocol::TCP,
                ..table::range(port(agent, 0).get(), 7000, PORTS)
            };
            table::row(u32::try_from(agent).unwrap(), None, range)
        };
        let table = table::table(Default::default(), (0..agents).map(row).collect());
        let mut world = Self {
            now: Now::default(),
            agents: Vec::new(),
            servers: Vec::new(),
            connections: Vec::new(),
            closing: Vec::new(),
            waiting: Vec::new(),
            pending: HashMap::new(),
            cuts: Vec::new(),
            unnoticed: Vec::new(),
            over: HashSet::new(),
            recovered_at: vec![Duration::ZERO; agents],
            ended: vec![HashSet::new(); agents],
            names: 0,
            table,
        };
        world.agents = (0..agents).map(|agent| world.book(agent, None)).collect();
        for index in 0..SERVERS {
            let server = world.connection_server(index);
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
        let row = self.table.row(Slot(u32::try_from(agent).unwrap()));
        book.set_row(row, TIMES, self.now);
        look(&mut book, self.now);
        book
    }

    fn index(&self) -> Arc<PortIndex> {
        Arc::new(PortIndex::new(Arc::new(self.table.clone())))
    }

    fn connection_server(&mut self, index: usize) -> ConnectionServer {
        self.names += 1;
        let sessions = Sessions::default();
        sessions.set_table(self.index());
        let streams = (0..self.table.rows.len()).map(|_| None).collect();
        ConnectionServer {
            name: ConnectionServerId::new(&format!("server-{}", self.names)).unwrap(),
            host_identity: format!("host-{index}"),
            sessions,
            streams,
            cut_at: vec![None; self.table.rows.len()],
        }
    }

    /// Moves what connection servers have sent into their streams.
    fn collect(&mut self) {
        for stream in self
            .servers
            .iter_mut()
            .flat_map(|server| server.streams.iter_mut().flatten())
        {
            while let Ok(message) = stream.sent.try_recv() {
                if stream.broken.is_none() {
                    stream.to_agent.push_back(message);
                }
            }
        }
    }

    fn happen(&mut self, event: Event) {
        let agents = self.agents.len();
        match event {
            Event::Select(server, agent) | Event::SelectBoth(server, agent) => {
                let both = Block {
                    filter: PortFilter::default(),
                    count: const { NonZeroU8::new(2).unwrap() },
                };
                let ports = match event {
                    Event::SelectBoth(..) => OneOrMore::one(both),
                    _ => OneOrMore::default(),
                };
                self.names += 1;
                let session_id = format!("session-{}", self.names);
                if let Some(stream) = &mut self.servers[server % SERVERS].streams[agent % agents]
                    && stream.broken.is_none()
                    && !stream.is_former
                {
                    let select = Select {
                        request_id: 0,
                        session_id: SessionId::new(&session_id).unwrap(),
                        idempotency_key: None,
                        ports,
                        bound_client: None,
                    };
                    stream.to_agent.push_back(ToAgent::Select(select));
                }
            }
            Event::ToAgent(server, agent) => {
                self.deliver_to_agent(server % SERVERS, agent % agents)
            }
            Event::FromAgent(server, agent) => {
                self.deliver_from_agent(server % SERVERS, agent % agents)
            }
            Event::Connect(server, agent, offset) => {
                self.accept(server % SERVERS, port(agent % agents, offset), None);
            }
            Event::Wait(server, agent, offset) => {
                let (server, port) = (server % SERVERS, port(agent % agents, offset));
                let session = self.servers[server].sessions.session_on(port);
                self.waiting.extend(session.map(|session| Waiting {
                    server,
                    port,
                    session,
                }));
            }
            Event::Accept => {
                if !self.waiting.is_empty() {
                    let Waiting {
                        server,
                        port,
                        session,
                    } = self.waiting.remove(0);
                    self.accept(server, port, Some(session));
                }
            }
            Event::Deliver(server, agent) => self.deliver(server % SERVERS, agent % agents),
            Event::Client(server, agent) => self.client(server % SERVERS, agent % agents),
            Event::Close => {
                if !self.connections.is_empty() {
                    let connection = self.connections.remove(0);
                    self.closed(&connection);
                }
            }
            Event::Cut => {
                if !self.cuts.is_empty() {
                    let (server, port, key) = self.cuts.remove(0);
                    self.cut(server, port, key);
                }
            }
            Event::Release(server, agent, offset) => {
                let sessions = &self.servers[server % SERVERS].sessions;
                let id = sessions.session_on(port(agent % agents, offset));
                if let Some(id) = id
                    && let Ok(actions) = sessions.release(&id)
                {
                    let name = self.servers[server % SERVERS].name.clone();
                    self.over.insert((name, id));
                    self.carry_out(server % SERVERS, actions);
                }
            }
            Event::Break(server, agent, noticing) => {
                self.break_stream(server % SERVERS, agent % agents, noticing)
            }
            Event::Attach(server, agent) => self.attach(server % SERVERS, agent % agents),
            Event::RestartAgent(agent, is_noticed) => {
                let agent = agent % agents;
                let noticing = if is_noticed {
                    Noticing::Both
                } else {
                    Noticing::Agent
                };
                for server in 0..SERVERS {
                    self.break_stream(server, agent, noticing);
                }
                self.unnoticed.retain(|(_, of, _)| *of != agent);
                let recovered_at = self.now.monotonic + GONE_AFTER;
                self.recovered_at[agent] = recovered_at;
                self.agents[agent] = self.book(agent, Some(recovered_at));
                self.ended[agent].clear();
            }
            Event::RestartConnectionServer(server, is_noticed) => {
                let server = server % SERVERS;
                let noticing = if is_noticed {
                    Noticing::Both
                } else {
                    Noticing::ConnectionServer
                };
                for agent in 0..agents {
                    self.break_stream(server, agent, noticing);
                }
                let all = std::mem::take(&mut self.connections).into_iter();
                let (died, live): (Vec<_>, Vec<_>) = all.partition(|open| open.server == server);
                self.connections = live;
                let closed_at = self.now.monotonic + CLOSED_AFTER - Duration::from_millis(1);
                self.closing
                    .extend(died.into_iter().map(|died| (closed_at, died)));
                self.pending.retain(|_, pending| pending.server != server);
                self.waiting.retain(|waiting| waiting.server != server);
                self.cuts.retain(|(of, ..)| *of != server);
                self.servers[server] = self.connection_server(server);
            }
            Event::Pass(seconds) => self.pass(Duration::from_secs(seconds)),
            Event::HandOver(server) => self.hand_over(server % SERVERS),
        }
        self.collect();
    }

    fn client(&mut self, server: usize, agent: usize) {
        self.happen(Event::Attach(server, agent));
        self.happen(Event::Select(server, agent));
        self.deliver(server, agent);
        for offset in 0..PORTS {
            self.happen(Event::Connect(server, agent, offset));
        }
    }

    fn admitted(&mut self, server: usize, port: ListenPort, key: SessionKey) {
        let sessions = &self.servers[server].sessions;
        let session = sessions.session_on(port).expect("admitted for a session");
        let name = self.servers[server].name.clone();
        assert!(
            !self.over.contains(&(name, session.clone())),
            "{session} is over and admits"
        );
        self.connections.push(Connection {
            server,
            port,
            key,
            session,
        });
    }

    /// The data plane accepts a client. One that has waited since `session` was
    /// live is admitted to no other.
    fn accept(&mut self, server: usize, port: ListenPort, session: Option<SessionId>) {
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

    fn expect_own(&self, server: usize, port: ListenPort, session: Option<&SessionId>) {
        let live = self.servers[server].sessions.session_on(port);
        assert!(
            session.is_none() || session == live.as_ref(),
            "a client of {session:?} is admitted to {live:?}"
        );
    }

    /// What the data plane does to cut a session.
    fn cut(&mut self, server: usize, port: ListenPort, key: SessionKey) {
        let is_here = |waiting: &Waiting| waiting.server == server && waiting.port == port;
        while let Some(here) = self.waiting.iter().position(is_here) {
            let Waiting { session, .. } = self.waiting.remove(here);
            self.accept(server, port, Some(session));
        }
        self.pending
            .retain(|_, pending| pending.server != server || pending.port != port);
        let is_cut = |open: &Connection| open.server == server && open.key == key;
        while let Some(cut) = self.connections.iter().position(is_cut) {
            let connection = self.connections.remove(cut);
            self.closed(&connection);
        }
        self.servers[server]
            .sessions
            .closed(port, key, Traffic::default());
    }

    fn hand_over(&mut self, server: usize) {
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
        let keys = flows.map(|connection| connection.key);
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

    fn closed(&mut self, connection: &Connection) {
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

    fn carry_out(&mut self, server: usize, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            match action {
                Action::Cut(ports, key) => {
                    let cuts = ports.iter().map(|port| (server, *port, key));
                    self.cuts.extend(cuts);
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

    fn attach(&mut self, server: usize, agent: usize) {
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
    fn break_stream(&mut self, server: usize, agent: usize, noticing: Noticing) {
        let found_out = self.now.monotonic + FOUND_OUT;
        let name = self.servers[server].name.clone();
        if self.end_former(agent, &name) {
            // The former process is dead; the agent may still notice.
            if noticing != Noticing::ConnectionServer {
                self.unnoticed
                    .retain(|(_, of, from)| *of != agent || *from != name);
                self.agents[agent].detach(&name, self.now);
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
            _ => self.agents[agent].detach(&name, self.now),
        }
    }

    /// Removes the stream of a process that has handed over. Returns whether
    /// there was one.
    fn end_former(&mut self, agent: usize, name: &ConnectionServerId) -> bool {
        let of = self.servers.iter_mut().find(|server| server.name == *name);
        let former = of.and_then(|of| of.streams[agent].take_if(|stream| stream.is_former));
        former.is_some()
    }

    fn server_notices(&mut self, server: usize, agent: usize) {
        let of = &mut self.servers[server];
        if let Some(stream) = of.streams[agent].take() {
            let slot = u32::try_from(agent).unwrap();
            of.sessions.detach(Slot(slot), &stream.outbox);
            of.cut_at[agent] = Some(self.now.monotonic + CUT_AFTER + CUT_SLACK);
        }
    }

    fn send(&mut self, agent: usize, notices: Vec<Notice>) {
        for Notice { to, message } in notices {
            if let (To::All, FromAgent::End { session_id, .. }) = (&to, &message) {
                self.ended[agent].insert(session_id.clone());
            }
            for server in &mut self.servers {
                let is_meant = match &to {
                    To::All => true,
                    To::AllBut(name) => *name != server.name,
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

    fn deliver_to_agent(&mut self, server: usize, agent: usize) {
        let Some(stream) = &mut self.servers[server].streams[agent] else {
            return;
        };
        let Some(message) = stream.to_agent.pop_front() else {
            return;
        };
        let name = self.servers[server].name.clone();
        let notices = match &message {
            ToAgent::Select(select) => match self.agents[agent].select(&name, select, self.now) {
                Ok(Selected {
                    session,
                    mut notices,
                }) => {
                    notices.push(Notice {
                        to: To::One(name),
                        message: FromAgent::Session(session),
                    });
                    notices
                }
                Err(_) => Vec::new(),
            },
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

    fn deliver_from_agent(&mut self, server: usize, agent: usize) {
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
            _ => {}
        }
    }

    /// Delivers everything under way between the two.
    fn deliver(&mut self, server: usize, agent: usize) {
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
    fn deliver_all(&mut self) {
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

    /// Lets time pass. What is due meanwhile happens in order, and messages on a
    /// working stream arrive at once.
    fn pass(&mut self, duration: Duration) {
        let end = self.now.monotonic + duration;
        loop {
            self.deliver_all();
            self.check_over();
            let due = self.next_due().filter(|due| *due <= end);
            let now = due.unwrap_or(end).max(self.now.monotonic);
            let passed = now - self.now.monotonic;
            self.now.monotonic = now;
            self.now.time += passed;
            for book in &mut self.agents {
                look(book, self.now);
            }
            self.pending.retain(|_, pending| pending.until > now);
            self.closing.retain(|(until, _)| *until > now);
            if due.is_none() {
                return;
            }
            self.do_what_is_due();
        }
    }

    fn next_due(&self) -> Option<Duration> {
        let books = self.agents.iter().filter_map(Book::next_deadline);
        let unnoticed = self.unnoticed.iter().map(|(at, ..)| *at);
        let servers = self.servers.iter().flat_map(|server| {
            let broken = server.streams.iter().flatten();
            let broken = broken.filter_map(|stream| stream.broken);
            broken.chain(server.cut_at.iter().copied().flatten())
        });
        books.chain(unnoticed).chain(servers).min()
    }

    /// Agents first: they must not rely on connection servers being quick.
    fn do_what_is_due(&mut self) {
        let now = self.now.monotonic;
        for agent in 0..self.agents.len() {
            let notices = self.agents[agent].tick(self.now);
            self.send(agent, notices);
        }
        self.check();
        let all = std::mem::take(&mut self.unnoticed).into_iter();
        let (due, later): (Vec<_>, Vec<_>) = all.partition(|(at, ..)| *at <= now);
        self.unnoticed = later;
        for (_, agent, name) in due {
            self.agents[agent].detach(&name, self.now);
            self.end_former(agent, &name);
        }
        for server in 0..SERVERS {
            for agent in 0..self.agents.len() {
                let stream = self.servers[server].streams[agent].as_ref();
                let broken = stream.and_then(|stream| stream.broken);
                if broken.is_some_and(|at| at <= now) {
                    self.server_notices(server, agent);
                }
                if self.servers[server].cut_at[agent].is_some_and(|at| at <= now) {
                    self.servers[server].cut_at[agent] = None;
                    let slot = u32::try_from(agent).unwrap();
                    let actions = self.servers[server].sessions.forget_server(Slot(slot));
                    self.carry_out(server, actions);
                }
            }
        }
    }

    /// Asserts what must hold at every moment.
    fn check(&self) {
        for (agent, book) in self.agents.iter().enumerate() {
            let counts = book.counts(self.now).ports[0].clone();
            let sum =
                counts.free + counts.held + counts.busy + counts.lingering + counts.not_listening;
            assert_eq!(
                sum,
                u32::from(PORTS),
                "a port is lost or counted twice: {counts:?}"
            );
            for offset in 0..PORTS {
                let port = port(agent, offset);
                let closing = self.closing.iter().map(|(_, connection)| connection);
                let here = self
                    .connections
                    .iter()
                    .chain(closing)
                    .filter(|connection| connection.port == port);
                let mut sessions: Vec<&SessionId> =
                    here.map(|connection| &connection.session).collect();
                sessions.dedup();
                assert!(sessions.len() <= 1, "two sessions on {port}: {sessions:?}");
                let is_recovering = self.now.monotonic < self.recovered_at[agent];
                let live = book.look_up(port);
                for further in live.iter().flat_map(|live| &live.ports.rest) {
                    let there = book.look_up(further.port);
                    assert_eq!(there, live, "a part of a session is another's");
                }
                let live = live.map(|live| live.id);
                assert!(
                    !live
                        .as_ref()
                        .is_some_and(|id| self.ended[agent].contains(id)),
                    "{live:?} was ended and is live"
                );
                let is_free = book.is_free(port);
                assert!(
                    !is_free || is_recovering || sessions.is_empty(),
                    "{port} is free and connected"
                );
            }
        }
    }

    /// Asserts, when everything has arrived, that no agent counts a session as
    /// live that is over for a connection server with a working stream.
    fn check_over(&self) {
        for server in &self.servers {
            for (agent, stream) in server.streams.iter().enumerate() {
                let is_up = |stream: &Stream| stream.broken.is_none() && !stream.is_former;
                if !stream.as_ref().is_some_and(is_up) {
                    continue;
                }
                for offset in 0..PORTS {
                    let live = self.agents[agent].look_up(port(agent, offset));
                    let Some(id) = live.map(|live| live.id) else {
                        continue;
                    };
                    assert!(
                        !self.over.contains(&(server.name.clone(), id.clone())),
                        "{id} is over for {} and live",
                        server.name
                    );
                }
            }
        }
    }

    /// Ends all connections and asserts that every port becomes free.
    fn end(&mut self) {
        // Pending clients still get their answers.
        self.deliver_all();
        while !self.connections.is_empty() {
            self.happen(Event::Close);
        }
        // Longer than any claim, linger and grace together.
        for _ in 0..3 {
            self.happen(Event::Pass(30));
            for server in 0..SERVERS {
                for agent in 0..self.agents.len() {
                    self.happen(Event::Attach(server, agent));
                }
            }
        }
        self.deliver_all();
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

/// One agent with two ports, two connection servers, a session on its way, in
/// use or being cut: every order of four further events.
#[test]
fn every_short_order_of_events_keeps_the_rules() {
    let events = [
        Event::ToAgent(0, 0),
        Event::FromAgent(0, 0),
        Event::Deliver(0, 0),
        Event::Deliver(1, 0),
        Event::Connect(0, 0, 0),
        Event::Client(1, 0),
        Event::Accept,
        Event::Close,
        Event::Cut,
        Event::Release(0, 0, 0),
        Event::Break(0, 0, Noticing::Agent),
        Event::Attach(0, 0),
        Event::RestartAgent(0, false),
        Event::RestartConnectionServer(0, true),
        Event::HandOver(0),
        Event::Pass(6),
    ];
    let on_its_way = [Event::Select(0, 0), Event::ToAgent(0, 0)];
    let in_use = [
        Event::Select(0, 0),
        Event::Pass(0),
        Event::Connect(0, 0, 0),
        Event::Break(0, 0, Noticing::Agent),
        Event::Connect(0, 0, 0),
    ];
    let being_cut = [
        Event::Client(0, 0),
        Event::Wait(0, 0, 0),
        Event::Release(0, 0, 0),
        Event::Deliver(1, 0),
    ];
    let both_in_use = [
        Event::SelectBoth(0, 0),
        Event::Pass(0),
        Event::Connect(0, 0, 1),
        Event::Break(0, 0, Noticing::Agent),
        Event::Connect(0, 0, 0),
    ];
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
    for begin in [&on_its_way[..], &in_use, &being_cut] {
        explore(&mut begin.to_vec(), 4, &events, &mut played);
    }
    explore(&mut both_in_use.to_vec(), 3, &events, &mut played);
    assert_eq!(played, 3 * 16u32.pow(4) + 16u32.pow(3));
}

/// A client releases a session whose agent has restarted and does not know it
/// yet. The greeting of another connection server must not bring it back.
#[test]
fn a_session_released_to_a_restarted_agent_stays_over() {
    play(
        2,
        &[
            Event::Select(0, 1),
            Event::ToAgent(0, 1),
            Event::FromAgent(1, 1),
            Event::Client(0, 1),
            Event::Release(0, 1, 0),
            Event::Select(0, 0),
            Event::Close,
            Event::RestartAgent(1, true),
            Event::Client(0, 1),
            Event::Attach(1, 1),
        ],
    );
}

/// A client releases a session that a restarted agent has adopted, and the agent
/// forgets it. Another connection server's greeting comes late.
#[test]
fn a_session_ended_by_a_restarted_agent_stays_over() {
    play(
        1,
        &[
            Event::Client(1, 0),
            Event::Pass(0),
            Event::RestartAgent(0, true),
            Event::Attach(0, 0),
            Event::Release(0, 0, 0),
            Event::Deliver(0, 0),
            Event::Connect(0, 0, 0),
            Event::Client(1, 0),
            Event::Pass(0),
        ],
    );
}

/// An agent dies before one connection server has received a session's end. The
/// other one reports it to the restarted agent, whichever of the two attaches
/// first.
#[test]
fn an_end_that_one_connection_server_missed_outlives_the_agent() {
    for (first, second) in [(0, 1), (1, 0)] {
        play(
            1,
            &[
                Event::Client(0, 0),
                Event::Pass(0),
                Event::Close,
                Event::Release(0, 0, 0),
                Event::Deliver(0, 0),
                Event::RestartAgent(0, true),
                Event::Attach(first, 0),
                Event::Attach(second, 0),
                Event::Pass(0),
                Event::Connect(0, 0, 0),
                Event::Connect(1, 0, 0),
                Event::Pass(0),
            ],
        );
    }
}

fn event() -> impl Strategy<Value = Event> {
    let (server, agent, offset) = (0..SERVERS, 0..2usize, 0..PORTS);
    let pair = || (0..SERVERS, 0..2usize);
    let noticing = prop_oneof![
        Just(Noticing::Both),
        Just(Noticing::Agent),
        Just(Noticing::ConnectionServer)
    ];
    prop_oneof![
        3 => pair().prop_map(|(s, a)| Event::Select(s, a)),
        2 => pair().prop_map(|(s, a)| Event::SelectBoth(s, a)),
        8 => pair().prop_map(|(s, a)| Event::ToAgent(s, a)),
        8 => pair().prop_map(|(s, a)| Event::FromAgent(s, a)),
        6 => (server.clone(), agent.clone(), offset.clone()).prop_map(|(s, a, o)| Event::Connect(s, a, o)),
        4 => pair().prop_map(|(s, a)| Event::Deliver(s, a)),
        3 => pair().prop_map(|(s, a)| Event::Client(s, a)),
        3 => Just(Event::Close),
        2 => Just(Event::Cut),
        2 => (server.clone(), agent.clone(), offset.clone()).prop_map(|(s, a, o)| Event::Wait(s, a, o)),
        2 => Just(Event::Accept),
        1 => (server.clone(), agent.clone(), offset).prop_map(|(s, a, o)| Event::Release(s, a, o)),
        1 => (server.clone(), agent.clone(), noticing).prop_map(|(s, a, n)| Event::Break(s, a, n)),
        2 => pair().prop_map(|(s, a)| Event::Attach(s, a)),
        1 => (agent, any::<bool>()).prop_map(|(a, n)| Event::RestartAgent(a, n)),
        1 => (server.clone(), any::<bool>()).prop_map(|(s, n)| Event::RestartConnectionServer(s, n)),
        2 => server.prop_map(Event::HandOver),
        2 => (0..20u64).prop_map(Event::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn long_random_orders_of_events_keep_the_rules(events in proptest::collection::vec(event(), 1..120)) {
        play(2, &events);
    }
}
