//! The selection protocol between real port books and real session stores,
//! with the network, the clients and the clock in the test's hands: every
//! order of events up to a depth, and long random ones.
//!
//! What must never happen: two sessions on one port, a session of two ports that
//! has only one, a free port with a connection somewhere, a port that is lost, a
//! session that is over and comes back, a companion connection that outlives the
//! sessions of its client, an amendment that is undone, a session that a connection
//! server knows before the workload has confirmed it or that one gives back which others
//! have, a question that is answered twice or never.

mod checks;
mod clients;
mod offers;
mod orders;
mod streams;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU8;
use std::sync::Arc;
use std::time::Duration;

use crate::common::table;
use portpool::agent::book::{Book, Notice, Now, Selected, SocketId, Times, To};
use portpool::connection::sessions::span::SessionSpan;
use portpool::connection::sessions::{Action, CompanionCut, Outbox, Sessions};
use portpool::forward::{Decision, Gate, PendingId, SessionKey, Traffic, Transport};
use portpool::pool::{EntryAdmission, PortProtocol};
use portpool::selection::{
    CLOSED_AFTER, CUT_AFTER, CUT_SLACK, ConnectionServerId, EndCause, FromAgent, GONE_AFTER,
    KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, RefusalCause, Select, ToAgent,
};
use portpool::session::{Block, Metadata, OneOrMore, PortFilter, SessionId};
use portpool::table::{ListenPort, PortIndex, PortRange, Slot, Table};
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
    /// The same for a port that the workload has to confirm, with a key or without.
    Offer(usize, usize, Option<u8>),
    /// The workload of an agent confirms an offered session, or refuses it.
    Decide(usize, bool),
    /// The clients of a connection server leave that wait for a workload: the oldest
    /// question to it is withdrawn.
    Withdraw(usize, usize),
    /// The next message of a stream arrives at the agent, or at the
    /// connection server.
    ToAgent(usize, usize),
    FromAgent(usize, usize),
    /// All messages of a stream arrive, and what they cause.
    Deliver(usize, usize),
    /// A client connects to a port of an agent through a connection server.
    Connect(usize, usize, u16),
    /// A client connects to the companion port of an agent through a connection
    /// server.
    Companion(usize, usize),
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
    /// The session on a port is amended, after a millisecond.
    Amend(usize, u16),
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
    /// The questions that are not answered.
    asks: BTreeMap<u64, Ask>,
    /// When the connection server notices that the stream is broken. Nothing
    /// arrives any more.
    broken: Option<Duration>,
    /// Whether its process has handed over, so that it receives nothing any more.
    is_former: bool,
}

/// A question of a connection server whose answer waits for a workload.
#[derive(Clone, Copy, Debug, Default)]
struct Ask {
    has_key: bool,
    is_offered: bool,
    is_withdrawn: bool,
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
    /// `None` on a companion port.
    session: Option<SessionId>,
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
    /// Sessions that clients have given back.
    released: HashSet<SessionId>,
    /// When the recovery of each agent is over.
    recovered_at: Vec<Duration>,
    /// Sessions that each agent has ended since it was started.
    ended: Vec<HashSet<SessionId>>,
    /// The number of amendments so far, and the latest one of each session that a
    /// connection server knew.
    amendments: u32,
    latest: HashMap<(ConnectionServerId, String), u32>,
    names: usize,
}

fn port(agent: usize, offset: u16) -> ListenPort {
    ListenPort::new(20_000 + u16::try_from(agent).unwrap() * PORTS + offset % PORTS).unwrap()
}

/// The companion port of an agent.
fn companion(agent: usize) -> ListenPort {
    ListenPort::new(20_100 + u16::try_from(agent).unwrap()).unwrap()
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
            let companion = PortRange {
                name: "companion".to_owned(),
                protocol: PortProtocol::TCP,
                admission: Some(EntryAdmission::Companion),
                ..table::range(companion(agent).get(), 8000, 1)
            };
            let mut row = table::row(u32::try_from(agent).unwrap(), None, range);
            row.ranges.push(companion);
            row
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
            released: HashSet::new(),
            recovered_at: vec![Duration::ZERO; agents],
            ended: vec![HashSet::new(); agents],
            amendments: 0,
            latest: HashMap::new(),
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
            Event::Select(server, agent)
            | Event::SelectBoth(server, agent)
            | Event::Offer(server, agent, _) => {
                let select = self.request(event);
                self.ask(server % SERVERS, agent % agents, select);
            }
            Event::Decide(agent, is_confirmed) => self.decide(agent % agents, is_confirmed),
            Event::Withdraw(server, agent) => self.withdraw(server % SERVERS, agent % agents),
            Event::ToAgent(server, agent) => {
                self.deliver_to_agent(server % SERVERS, agent % agents)
            }
            Event::FromAgent(server, agent) => {
                self.deliver_from_agent(server % SERVERS, agent % agents)
            }
            Event::Connect(server, agent, offset) => {
                self.accept(server % SERVERS, port(agent % agents, offset), None);
            }
            Event::Companion(server, agent) => {
                self.accept(server % SERVERS, companion(agent % agents), None);
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
            Event::Amend(agent, offset) => self.amend(agent % agents, offset),
            Event::Release(server, agent, offset) => {
                let sessions = &self.servers[server % SERVERS].sessions;
                let id = sessions.session_on(port(agent % agents, offset));
                if let Some(id) = id
                    && let Ok(actions) = sessions.release(&id)
                {
                    let name = self.servers[server % SERVERS].name.clone();
                    self.released.insert(id.clone());
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
        self.check_amendments();
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
            self.agent_notices(agent, &name);
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
}

fn play(agents: usize, events: &[Event]) {
    let mut world = World::new(agents);
    for event in events {
        world.happen(*event);
        world.check();
    }
    world.end();
}
