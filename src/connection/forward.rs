//! The connection part of claim 1: connects a connection port with its
//! destination processing server, for TCP connections and UDP datagrams.
//!
//! This is the data plane. It runs on its own threads, each with its own
//! epoll, and knows neither Kubernetes nor HTTP: a table says where ports
//! lead, a [`Gate`] says who may use them. One thread owns a connection port
//! and everything that comes in on it; threads share nothing but counters.
//!
//! ```text
//! apply(table) ─bind─→ listeners ─commands─→ worker threads (port mod N)
//! client ─accept→ Gate::admit ─connect→ processing server ⇄ copy ⇄ client
//!                     └ Ask → parked ←answer─ control
//! ```
//!
//! - `worker`: the event loop and its deadlines; `tcp`: one connection's state
//!   and its two directions; `stream`: its sockets; `udp`: clients' flows;
//! - `pipes`: what busy directions splice through;
//! - `listeners`: opening ports; `limits`: descriptors and port ranges;
//! - `routes`: where a port leads, looked up once for each client;
//! - `slab`: where sessions live; `proxy_protocol`: its header; `counters`.

mod counters;
mod limits;
mod listeners;
mod pipes;
mod proxy_protocol;
mod routes;
mod slab;
mod stream;
mod tcp;
mod udp;
mod worker;

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

pub use self::counters::{Counters, Snapshot};
pub use self::limits::{OpenFilesError, check_open_files, ephemeral_overlap};
use self::listeners::Listener;
use self::routes::Routes;
use self::worker::{Command, Worker};
use crate::table::{ListenPort, Table};

/// Names a session within this process. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(pub u64);

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// A connection.
    Tcp,
    /// A client's datagrams.
    Udp,
}

/// What the gate says to a client that arrives at a connection port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Forward. The gate has counted one flow for the session; its end is
    /// reported exactly once with [`Gate::closed`].
    Admit(SessionKey),
    /// Reset (TCP) or drop (UDP).
    Refuse,
    /// Not known yet. The client is parked and [`Gate::ask`] called with a
    /// ticket; [`Forwarder::answer`] brings the verdict, or a deadline passes
    /// and the client is refused.
    Ask,
}

/// Names a parked client of a port until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// What a flow carried, reported at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes from the client to the server.
    pub upstream_bytes: u64,
    /// Bytes from the server to the client.
    pub downstream_bytes: u64,
}

/// Decides who may use a connection port. Called on data threads: it must not
/// block for longer than an uncontended lock takes.
pub trait Gate: Send + Sync + 'static {
    /// Whether `client` may use `port` now.
    fn admit(&self, port: ListenPort, transport: Transport, client: SocketAddr) -> Verdict;
    /// Starts to find out about a parked client.
    fn ask(&self, ticket: Ticket, port: ListenPort, transport: Transport, client: SocketAddr);
    /// A flow admitted under `session` is over.
    fn closed(&self, port: ListenPort, session: SessionKey, traffic: Traffic);
}

/// How long applying a table waits for ports to be closed. A turn of a data
/// thread takes milliseconds at most.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);

/// How the data plane runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address that connection ports are bound to; `::` takes IPv4 too.
    pub listen: IpAddr,
    /// Data threads, 1 to 1024.
    pub threads: usize,
}

impl Config {
    /// Listens on `listen` with `threads` threads, by default one per
    /// processor.
    #[must_use]
    pub fn new(listen: IpAddr, threads: Option<usize>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            listen,
            threads: threads.unwrap_or(processors).clamp(1, 1024),
        }
    }
}

/// Idle times in seconds, 0 for none; read by threads at their deadlines.
#[derive(Debug, Default)]
struct IdleTimes {
    tcp: AtomicU64,
    udp: AtomicU64,
}

/// UDP ports that the table no longer has and whose flows go on. A thread
/// takes a port out when it has closed it, control when it opens it again.
type DrainingPorts = Arc<Mutex<HashSet<ListenPort>>>;

/// Why the data plane cannot start.
#[derive(Debug, thiserror::Error)]
#[error("failed to start the data plane: {0}")]
pub struct ForwardError(#[from] io::Error);

/// Why a table cannot be applied; the former one stays in force.
#[derive(Debug, thiserror::Error)]
#[error("failed to open connection port {address} ({transport:?}): {source}{}", hint(.source))]
pub struct ApplyError {
    address: SocketAddr,
    transport: Transport,
    source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another program uses it: stop that, or move spec.connectionServer.connectionPorts"
        }
        io::ErrorKind::PermissionDenied => {
            "; ports below 1024 need a privilege: move spec.connectionServer.connectionPorts"
        }
        _ => "",
    }
}

/// The running data plane. Stops when dropped.
#[derive(Debug)]
pub struct Forwarder {
    listen: IpAddr,
    workers: Vec<Handle>,
    open: Mutex<HashSet<(ListenPort, Transport)>>,
    draining: DrainingPorts,
    routes: Arc<Routes>,
    idle: Arc<IdleTimes>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Handle {
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Handle {
    fn send(&self, command: Command) {
        // A thread that has stopped has nothing left to command.
        if self.commands.send(command).is_ok() {
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Forwarder {
    /// Starts the threads; ports open with [`Forwarder::apply`].
    ///
    /// # Errors
    /// [`ForwardError`] when the system gives no thread or descriptor.
    pub fn start(config: &Config, gate: &Arc<impl Gate>) -> Result<Self, ForwardError> {
        let (idle, counters) = (
            Arc::new(IdleTimes::default()),
            Arc::new(Counters::default()),
        );
        let (draining, routes) = (DrainingPorts::default(), Arc::new(Routes::default()));
        let workers = (0..config.threads).map(|index| {
            let (commands, inbox) = mpsc::channel();
            let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
            let shared = worker::Shared {
                threads: config.threads,
                gate: gate.clone(),
                draining: draining.clone(),
                routes: routes.clone(),
                idle: idle.clone(),
                counters: counters.clone(),
            };
            let worker = Worker::new(inbox, &wake, shared)?;
            let name = format!("forward-{index}");
            let thread = std::thread::Builder::new()
                .name(name)
                .spawn(move || worker.run())?;
            Ok(Handle {
                commands,
                wake,
                thread: Mutex::new(Some(thread)),
            })
        });
        Ok(Self {
            listen: config.listen,
            workers: workers.collect::<Result<_, io::Error>>()?,
            routes,
            open: Mutex::default(),
            draining,
            idle,
            counters,
        })
    }

    /// Opens the connection ports of `table`, routes them, and closes those
    /// that it does not have. New ports are bound before anything changes.
    /// Live connections and UDP flows go on to where they were going, also those
    /// of a removed port: it takes no new ones.
    ///
    /// # Errors
    /// [`ApplyError`] names the port that cannot be opened; nothing has
    /// changed then.
    pub fn apply(&self, table: &Arc<Table>) -> Result<(), ApplyError> {
        let wanted = listeners_of(table);
        let mut open = self.open.lock();
        // Held while opening: no thread closes a port that is to be kept.
        let mut draining = self.draining.lock();
        let is_draining = |(port, transport): &(ListenPort, Transport)| {
            *transport == Transport::Udp && draining.contains(port)
        };
        let (reopened, new): (Vec<_>, Vec<_>) =
            wanted.difference(&open).partition(|key| is_draining(key));
        let opened = self.open_ports(new)?;
        draining.retain(|port| !reopened.contains(&&(*port, Transport::Udp)));
        drop(draining);
        self.set_idle_times(table);
        // Before the ports are: nobody must find one that leads nowhere.
        self.routes.set(table.clone());
        for (worker, listeners) in self.workers.iter().zip(opened) {
            if !listeners.is_empty() {
                worker.send(Command::Listen(listeners));
            }
        }
        for (port, _) in reopened {
            self.owner(*port).send(Command::Reopen(*port));
        }
        let mut is_any_gone = false;
        for (port, transport) in open.difference(&wanted) {
            self.owner(*port).send(Command::Close(*port, *transport));
            is_any_gone = true;
        }
        if is_any_gone {
            self.settle();
        }
        *open = wanted;
        Ok(())
    }

    /// Opens listeners, those of each worker on a thread of its own, and
    /// returns them by worker.
    fn open_ports(
        &self,
        wanted: Vec<&(ListenPort, Transport)>,
    ) -> Result<Vec<Vec<(ListenPort, Listener)>>, ApplyError> {
        let mut shares: Vec<Vec<(ListenPort, Transport)>> = vec![Vec::new(); self.workers.len()];
        for &(port, transport) in wanted {
            shares[self.owner_index(port)].push((port, transport));
        }
        let open = |share: Vec<(ListenPort, Transport)>| {
            let open =
                |(port, transport)| Ok((port, Listener::open(self.listen, port, transport)?));
            share.into_iter().map(open).collect::<Result<Vec<_>, _>>()
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = shares
                .into_iter()
                .map(|share| scope.spawn(move || open(share)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("opening a socket does not panic"))
                .collect()
        })
    }

    fn set_idle_times(&self, table: &Table) {
        let seconds = |value: i32| u64::try_from(value).unwrap_or(0);
        let sessions = &table.sessions;
        self.idle
            .tcp
            .store(seconds(sessions.idle_timeout_seconds), Ordering::Relaxed);
        self.idle.udp.store(
            seconds(sessions.udp_idle_timeout_seconds),
            Ordering::Relaxed,
        );
    }

    /// Brings the verdict on a client parked at `port`; [`Verdict::Ask`] counts
    /// as refused. The end of one that was admitted too late is reported at once.
    pub fn answer(&self, port: ListenPort, ticket: Ticket, verdict: Verdict) {
        self.owner(port)
            .send(Command::Answer(port, ticket, verdict));
    }

    /// Cuts the session's connections (reset) and flows on `port`.
    pub fn cut(&self, port: ListenPort, session: SessionKey) {
        self.owner(port).send(Command::Cut(session));
    }

    /// What was forwarded and refused so far.
    #[must_use]
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// Number of open listeners: a TCPUDP port has two.
    #[must_use]
    pub fn open_listeners(&self) -> usize {
        self.open.lock().len()
    }

    /// Stops the threads and closes everything; returns when it is done.
    pub fn shutdown(&self) {
        for worker in &self.workers {
            worker.send(Command::Stop);
        }
        for worker in &self.workers {
            if let Some(thread) = worker.thread.lock().take()
                && thread.join().is_err()
            {
                tracing::error!("a data thread has panicked");
            }
        }
    }

    /// Waits until the threads have carried out what they were told: a port
    /// that was closed can be opened again then.
    fn settle(&self) {
        let (done, settled) = mpsc::channel();
        for worker in &self.workers {
            worker.send(Command::Settle(done.clone()));
        }
        drop(done);
        for _ in &self.workers {
            // A thread answers within a turn of its loop, or has stopped.
            if settled.recv_timeout(SETTLE_LIMIT).is_err() {
                tracing::warn!("a data thread is slow to close connection ports");
                return;
            }
        }
    }

    fn owner(&self, port: ListenPort) -> &Handle {
        &self.workers[self.owner_index(port)]
    }

    fn owner_index(&self, port: ListenPort) -> usize {
        usize::from(port.get()) % self.workers.len()
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Every listener that `table` asks for.
fn listeners_of(table: &Table) -> HashSet<(ListenPort, Transport)> {
    let ranges = table.rows.iter().flat_map(|row| &row.ranges);
    let listeners = ranges.flat_map(|range| {
        let tcp = range.protocol.has_tcp().then_some(Transport::Tcp);
        let udp = range.protocol.has_udp().then_some(Transport::Udp);
        let transports = tcp.into_iter().chain(udp);
        transports.flat_map(|transport| range.connection_ports().map(move |port| (port, transport)))
    });
    listeners.collect()
}
