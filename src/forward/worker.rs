//! A data thread: one epoll, and everything that happens on the connection
//! ports it owns.
//!
//! Listeners and UDP sockets are level-triggered: what is not read now is
//! reported again. TCP sockets of sessions are edge-triggered and registered
//! once, so a session costs no epoll call while it runs.

#[path = "tcp/final_flushes.rs"]
mod closing;
mod cutting;
#[path = "udp/datagrams.rs"]
mod datagrams;
#[path = "udp/eviction.rs"]
mod eviction;
#[path = "tcp/coalescing.rs"]
mod gathering;
#[path = "pending.rs"]
mod parking;
mod snapshot;
#[path = "tcp/streams.rs"]
mod streams;

use std::collections::HashMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use self::closing::Closing;
use self::eviction::Random;
use self::gathering::Gathering;
use self::parking::Pending;
use super::admission::Admission;
use super::counters::{self, Counters, count};
use super::listeners::Listener;
use super::pipes::Pipes;
use super::routes::Routes;
use super::send_queue::SendQueues;
use super::slab::{Key, Slab};
use super::snapshot::{ForwarderSnapshot, WorkerSnapshot};
use super::tcp::{Connection, SCRATCH_BYTES, Scratch, Side, Signals};
use super::udp;
use super::{Decision, DrainingPorts, Gate, IdleTimes, PendingId, SessionKey, Traffic, Transport};
use crate::table::ListenPort;

/// Events taken from epoll at once.
const EVENTS: usize = 256;

/// How long accepting pauses when descriptors or memory ran out: often enough
/// to go on soon, seldom enough not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a server may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);

/// How often deadlines are looked at while there is anything with one.
const TICK: Duration = Duration::from_millis(250);

/// What a session's socket is watched for, once and for all: edges only.
const WATCHED: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// What control asks of a thread.
#[derive(Debug)]
pub(super) enum Command {
    Listen(Vec<(ListenPort, Listener)>),
    /// A UDP port that is draining is wanted again.
    Reopen(ListenPort),
    Close(ListenPort, Transport),
    Answer(ListenPort, PendingId, Decision),
    Cut(ListenPort, SessionKey),
    /// Say when everything before is done, and which port could not be watched.
    Settle(mpsc::Sender<Option<Unwatched>>),
    /// Give everything away.
    HandOver(mpsc::Sender<io::Result<ForwarderSnapshot>>),
    /// Go on with this.
    TakeOver(Box<WorkerSnapshot>),
    Stop,
}

/// A port that epoll did not take.
type Unwatched = (ListenPort, Transport, io::Error);

/// Kinds of event sources, in the upper 8 bits of epoll's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Source {
    Wake,
    TcpPort,
    UdpPort,
    Client,
    Server,
    Flow,
    Closing,
}

impl Source {
    const ALL: [Self; 7] = [
        Self::Wake,
        Self::TcpPort,
        Self::UdpPort,
        Self::Client,
        Self::Server,
        Self::Flow,
        Self::Closing,
    ];

    /// `id` is below 2^56: a key's bits, or a port's number.
    fn data(self, id: u64) -> EventData {
        EventData::new_u64(u64::from(self as u8) << 56 | id)
    }

    fn of(data: EventData) -> Option<(Self, u64)> {
        let bits = data.u64();
        let source = Self::ALL
            .into_iter()
            .find(|source| u64::from(*source as u8) == bits >> 56)?;
        Some((source, bits & !(0xff << 56)))
    }
}

/// What all data threads share with control.
pub(super) struct Shared {
    pub(super) threads: usize,
    pub(super) gate: Arc<dyn Gate>,
    pub(super) draining: DrainingPorts,
    pub(super) routes: Arc<Routes>,
    pub(super) idle: Arc<IdleTimes>,
    pub(super) counters: Arc<Counters>,
    pub(super) tcp_admission: Arc<Admission>,
    pub(super) udp_admission: Arc<Admission>,
    /// Most UDP flows of a thread.
    pub(super) flow_share: Arc<AtomicU32>,
    pub(super) peer_timeout: Duration,
}

/// A data thread's state.
pub(super) struct Worker {
    inbox: mpsc::Receiver<Command>,
    wake: Arc<OwnedFd>,
    gate: Arc<dyn Gate>,
    idle: Arc<IdleTimes>,
    counters: Arc<Counters>,
    tcp_admission: Arc<Admission>,
    udp_admission: Arc<Admission>,
    flow_share: Arc<AtomicU32>,
    peer_timeout: Duration,
    epoll: OwnedFd,
    routes: Arc<Routes>,
    tcp_ports: HashMap<ListenPort, TcpListener>,
    udp_ports: HashMap<ListenPort, udp::Port>,
    /// UDP ports that the table no longer has, until their flows have ended.
    draining: Vec<ListenPort>,
    draining_ports: DrainingPorts,
    connections: Slab<Connection>,
    closing: Slab<Closing>,
    send_queues: SendQueues,
    flows: Slab<udp::Flow>,
    random: Random,
    sessions: HashMap<SessionKey, Vec<(Transport, Key)>>,
    parked: HashMap<PendingId, (Instant, Pending)>,
    next_ticket: u64,
    /// Connections that want another turn.
    ready: Vec<Key>,
    gathering: Gathering,
    next_look: Instant,
    /// Connections since the last tick: their peers are not watched for life.
    unguarded: Vec<Key>,
    /// Until when nothing is accepted, and the ports that wait for that.
    paused: Option<(Instant, Vec<ListenPort>)>,
    /// A port that could not be watched since control last asked.
    unwatched: Option<Unwatched>,
    next_tick: Instant,
    now: Instant,
    scratch: Scratch,
    batch: udp::Batch,
    is_stopping: bool,
}

impl Worker {
    pub(super) fn new(
        inbox: mpsc::Receiver<Command>,
        wake: &Arc<OwnedFd>,
        shared: Shared,
    ) -> io::Result<Self> {
        let epoll = new_epoll(wake)?;
        let now = Instant::now();
        Ok(Self {
            inbox,
            wake: wake.clone(),
            gate: shared.gate,
            idle: shared.idle,
            counters: shared.counters,
            tcp_admission: shared.tcp_admission,
            udp_admission: shared.udp_admission,
            flow_share: shared.flow_share,
            peer_timeout: shared.peer_timeout,
            epoll,
            routes: shared.routes,
            tcp_ports: HashMap::new(),
            udp_ports: HashMap::new(),
            draining: Vec::new(),
            draining_ports: shared.draining,
            connections: Slab::default(),
            closing: Slab::default(),
            send_queues: SendQueues::open()?,
            flows: Slab::default(),
            random: Random::new(),
            sessions: HashMap::new(),
            parked: HashMap::new(),
            next_ticket: 0,
            ready: Vec::new(),
            gathering: Gathering::new(),
            next_look: now,
            unguarded: Vec::new(),
            paused: None,
            unwatched: None,
            next_tick: now,
            now,
            scratch: Scratch {
                scratch: vec![0; SCRATCH_BYTES],
                pipes: Pipes::new(shared.threads),
                carried: Traffic::default(),
            },
            batch: udp::Batch::new(),
            is_stopping: false,
        })
    }

    /// Handles events until told to stop.
    pub(super) fn run(mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        while !self.is_stopping {
            events.clear();
            let timeout = self.timeout().map(|timeout| {
                Timespec::try_from(timeout).expect("timeouts are far below the largest")
            });
            let waited = epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            );
            self.now = Instant::now();
            match waited {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "epoll failed; the data thread stops");
                    return;
                }
            }
            for event in &events {
                self.handle(*event);
            }
            for key in std::mem::take(&mut self.ready) {
                self.pump(key);
            }
            if self.gathering.is_active() && self.now >= self.next_look {
                self.look_at_gathering();
            }
            if self.now >= self.next_tick {
                self.tick();
            }
        }
    }

    /// How long to wait for events: not at all when connections want a turn,
    /// for ever when nothing has a deadline.
    fn timeout(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let until = |time: Instant| time.saturating_duration_since(self.now);
        if self.gathering.is_active() {
            return Some(until(self.next_look));
        }
        let waiting = self.parked.len() + self.draining.len() + self.closing.len();
        let live = self.connections.len() + self.flows.len();
        let has_deadlines = live + waiting > 0 || self.scratch.pipes.has_unused();
        (has_deadlines || self.paused.is_some())
            .then(|| until(self.next_tick).max(Duration::from_millis(1)))
    }

    fn handle(&mut self, event: Event) {
        let flags = event.flags;
        let Some((source, id)) = Source::of(event.data) else {
            return;
        };
        let (key, port) = (Key::from_bits(id), port_of(id));
        let signals = Signals {
            readable: flags.contains(EventFlags::IN),
            writable: flags.contains(EventFlags::OUT),
            ended: flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR),
            gone: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            failed: flags.contains(EventFlags::ERR),
        };
        match source {
            Source::Wake => self.take_commands(),
            // Of a port that was closed meanwhile nothing is found.
            Source::TcpPort => {
                port.map(|port| self.accept(port));
            }
            Source::UdpPort => {
                port.map(|port| self.receive_from_clients(port));
            }
            Source::Client => self.connection_event(key, Side::Client, signals),
            Source::Server => self.connection_event(key, Side::Server, signals),
            Source::Flow => self.receive_from_server(key),
            Source::Closing => self.close_further(key),
        }
    }

    fn take_commands(&mut self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.wake, &mut count);
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Listen(listeners) => {
                    self.tcp_ports.reserve(listeners.len());
                    for (port, listener) in listeners {
                        self.listen(port, listener);
                    }
                }
                Command::Reopen(port) => self.reopen(port),
                Command::Close(port, transport) => self.close_port(port, transport),
                Command::Answer(port, ticket, verdict) => self.answer(port, ticket, verdict),
                Command::Cut(port, session) => self.cut(port, session),
                Command::Settle(done) => {
                    // Whoever asked may have given up.
                    let _ = done.send(self.unwatched.take());
                }
                Command::HandOver(reply) => {
                    // Control waits for every thread.
                    let _ = reply.send(self.hand_over());
                }
                Command::TakeOver(share) => self.take_over(*share),
                Command::Stop => self.is_stopping = true,
            }
        }
    }

    fn listen(&mut self, port: ListenPort, listener: Listener) {
        let transport = listener.transport();
        let watched = match listener {
            Listener::Tcp(listener) => {
                let watched = self.watch_listener(port, &listener, Source::TcpPort);
                self.tcp_ports.insert(port, listener);
                watched
            }
            Listener::Udp(socket, state) => {
                let watched = self.watch_listener(port, &socket, Source::UdpPort);
                self.udp_ports.insert(port, udp::Port::new(socket, state));
                watched
            }
        };
        if let Err(error) = watched {
            self.unwatched = Some((port, transport, error.into()));
        }
    }

    fn watch_listener(
        &self,
        port: ListenPort,
        listener: impl AsFd,
        source: Source,
    ) -> rustix::io::Result<()> {
        let data = source.data(port.get().into());
        epoll::add(&self.epoll, listener, data, EventFlags::IN)
    }

    /// Closes a port. Its connections go on, and so do its flows, for which
    /// its socket stays open.
    fn close_port(&mut self, port: ListenPort, transport: Transport) {
        match transport {
            Transport::Tcp => {
                self.tcp_ports.remove(&port);
            }
            Transport::Udp => self.drain_udp_port(port),
        }
    }

    /// A connection or flow of `session` is over.
    fn leave_session(&mut self, session: SessionKey, transport: Transport, key: Key) {
        if let Some(members) = self.sessions.get_mut(&session) {
            members.retain(|member| *member != (transport, key));
            if members.is_empty() {
                self.sessions.remove(&session);
            }
        }
    }

    /// A flow is over.
    fn report(&mut self, port: ListenPort, session: SessionKey, traffic: Traffic) {
        self.count_carried();
        count(&self.counters.closed);
        self.gate.closed(port, session, traffic);
    }

    /// Counts what was carried meanwhile: not at once, as threads share counters.
    fn count_carried(&mut self) {
        let carried = std::mem::take(&mut self.scratch.carried);
        counters::add(&self.counters.upstream_bytes, carried.upstream_bytes);
        counters::add(&self.counters.downstream_bytes, carried.downstream_bytes);
    }

    /// Looks at everything that has a deadline. One pass over a thread's
    /// sessions costs about 10 µs per 1000.
    fn tick(&mut self) {
        self.next_tick = self.now + TICK;
        self.count_carried();
        self.resume_accepting();
        self.tick_parked();
        self.tick_connections();
        self.tick_closing();
        self.tick_flows();
        self.close_drained();
    }
}

fn port_of(id: u64) -> Option<ListenPort> {
    ListenPort::new(u16::try_from(id).ok()?)
}

/// An epoll that wakes when control has a command.
fn new_epoll(wake: &Arc<OwnedFd>) -> io::Result<OwnedFd> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, wake, Source::Wake.data(0), EventFlags::IN)?;
    Ok(epoll)
}

/// Registers a session's socket for all it will ever be asked about.
fn watch(epoll: &OwnedFd, socket: impl AsFd, data: EventData) -> rustix::io::Result<()> {
    epoll::add(epoll, socket, data, WATCHED)
}
