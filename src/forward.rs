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
//! - `gate`: what is asked of control and told to it;
//! - `worker`: the event loop and its deadlines; `tcp`: one connection's state
//!   and its two directions; `stream`: its sockets; `udp`: clients' flows;
//! - `pipes`: what busy directions splice through;
//! - `listeners`: opening ports; `limits`: descriptors, port ranges, clients;
//!   `admission`: counts of clients;
//! - `snapshot`: the state of a stopped data plane, for another process;
//! - `routes`: where a port leads, looked up once for each client;
//! - `liveness`: peers that are gone; `send_queue`: what they have not
//!   acknowledged;
//! - `slab`: where sessions live; `proxy_protocol`: its header; `counters`.

#[path = "forward/quota.rs"]
mod admission;
mod counters;
mod gate;
mod limits;
mod listeners;
#[path = "forward/tcp/liveness.rs"]
mod liveness;
#[path = "forward/tcp/pipes.rs"]
mod pipes;
#[path = "forward/tcp/proxy_protocol.rs"]
mod proxy_protocol;
mod routes;
#[path = "forward/tcp/send_queue.rs"]
mod send_queue;
mod slab;
pub mod snapshot;
#[path = "forward/tcp/stream.rs"]
mod stream;
#[path = "forward/tcp/connection.rs"]
mod tcp;
#[path = "forward/udp/port.rs"]
mod udp;
mod worker;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use self::admission::{Admission, Bounds};
pub use self::counters::{CounterTotals, Counters};
pub use self::gate::{Decision, Gate, PendingId, SessionKey, Traffic, Transport};
pub use self::limits::{Limits, OpenFilesError, check_open_files, ephemeral_overlap, make_room};
use self::listeners::Listener;
use self::routes::Routes;
use self::worker::{Command, Worker};
use crate::table::{ListenPort, Table};

/// How long applying a table waits for ports to be watched or closed: 60,000
/// take a data thread about 0.1 s, a turn of its loop milliseconds.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// How the data plane runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address that connection ports are bound to; `::` takes IPv4 too.
    pub listen: IpAddr,
    /// Data threads, 1 to 1024.
    pub threads: usize,
    /// How many clients there may be.
    pub limits: Limits,
    /// After how long without a sign of life a TCP peer is given up; zero for
    /// the system's default, hours.
    pub peer_timeout: Duration,
}

impl Config {
    /// Long enough for a reader that pauses, short enough that the ports of
    /// clients that are gone come back.
    pub const PEER_TIMEOUT: Duration = Duration::from_secs(300);

    /// Listens on `listen` with `threads` threads, by default one per
    /// processor, and with default limits.
    #[must_use]
    pub fn new(listen: IpAddr, threads: Option<usize>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            listen,
            threads: threads.unwrap_or(processors).clamp(1, 1024),
            limits: Limits::default(),
            peer_timeout: Self::PEER_TIMEOUT,
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
    config: Config,
    tcp_admission: Arc<Admission>,
    udp_admission: Arc<Admission>,
    flow_share: Arc<AtomicU32>,
    workers: Vec<Handle>,
    open: Mutex<BTreeSet<(ListenPort, Transport)>>,
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
        let (tcp_admission, udp_admission) = (Admission::new(), Admission::new());
        let flow_share = Arc::new(AtomicU32::new(0));
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
                tcp_admission: tcp_admission.clone(),
                udp_admission: udp_admission.clone(),
                flow_share: flow_share.clone(),
                peer_timeout: config.peer_timeout,
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
            config: config.clone(),
            tcp_admission: tcp_admission.clone(),
            udp_admission: udp_admission.clone(),
            flow_share: flow_share.clone(),
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
        let opened = self.open_ports(&new)?;
        draining.retain(|port| !reopened.contains(&&(*port, Transport::Udp)));
        drop(draining);
        // Before the ports are: nobody must find one that leads nowhere.
        let former = self.routes.set(table.clone());
        self.set_limits(&wanted);
        for (worker, listeners) in self.workers.iter().zip(opened) {
            if !listeners.is_empty() {
                worker.send(Command::Listen(listeners));
            }
        }
        if !new.is_empty()
            && let Some(error) = self.settle()
        {
            self.close(new);
            self.routes.restore(former);
            self.set_limits(&open);
            let reopened = reopened.into_iter().map(|(port, _)| *port);
            self.draining.lock().extend(reopened);
            return Err(error);
        }
        self.set_idle_times(table);
        for (port, _) in reopened {
            self.owner(*port).send(Command::Reopen(*port));
        }
        self.close(open.difference(&wanted));
        *open = wanted;
        Ok(())
    }

    /// Opens listeners, those of each worker on a thread of its own, and
    /// returns them by worker.
    fn open_ports(
        &self,
        wanted: &[&(ListenPort, Transport)],
    ) -> Result<Vec<Vec<(ListenPort, Listener)>>, ApplyError> {
        let mut shares: Vec<Vec<(ListenPort, Transport)>> = vec![Vec::new(); self.workers.len()];
        for &&(port, transport) in wanted {
            shares[self.owner_index(port)].push((port, transport));
        }
        let listen = self.config.listen;
        let open = |share: Vec<(ListenPort, Transport)>| {
            let open = |(port, transport)| {
                let listener = Listener::open(listen, port, transport)?;
                Ok((port, listener))
            };
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

    /// Closes ports; they can be opened again then.
    fn close<'a>(&self, ports: impl IntoIterator<Item = &'a (ListenPort, Transport)>) {
        let mut is_any_gone = false;
        for &(port, transport) in ports {
            self.owner(port).send(Command::Close(port, transport));
            is_any_gone = true;
        }
        if is_any_gone {
            self.settle();
        }
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

    /// Shares the open files out anew, since listeners take some.
    fn set_limits(&self, listeners: &BTreeSet<(ListenPort, Transport)>) {
        let is_udp = |(_, transport): &&(ListenPort, Transport)| *transport == Transport::Udp;
        let udp = listeners.iter().filter(is_udp).count();
        let tcp = listeners.len() - udp;
        let open_files = limits::open_files();
        let (connections, flows) = self.config.limits.bounds(open_files, tcp, udp);
        self.tcp_admission.set(connections);
        let threads = u32::try_from(self.workers.len()).unwrap_or(u32::MAX);
        self.flow_share
            .store(flows.total.div_ceil(threads), Ordering::Relaxed);
        // One more flow takes the place of another, unless there is to be none.
        let total = if flows.total == 0 { 0 } else { u32::MAX };
        self.udp_admission.set(Bounds { total, ..flows });
    }

    /// Brings the verdict on a client parked at `port`; [`Decision::Ask`] counts
    /// as refused. The end of one that was admitted too late is reported at once.
    pub fn answer(&self, port: ListenPort, ticket: PendingId, verdict: Decision) {
        self.owner(port)
            .send(Command::Answer(port, ticket, verdict));
    }

    /// Cuts the session's connections (reset) and flows on `port`. Clients that
    /// came to `port` before and wait to be accepted or for a verdict are
    /// refused, unless the gate admits them at once. When all is done, the cut
    /// itself is reported with [`Gate::closed`].
    pub fn cut(&self, port: ListenPort, session: SessionKey) {
        self.owner(port).send(Command::Cut(port, session));
    }

    /// What was forwarded and refused so far.
    #[must_use]
    pub fn counters(&self) -> CounterTotals {
        self.counters.snapshot()
    }

    /// Live TCP connections and UDP flows, parked ones included.
    #[must_use]
    pub fn live(&self) -> (u32, u32) {
        (self.tcp_admission.live(), self.udp_admission.live())
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

    /// Waits until the threads have carried out what they were told, and gives
    /// a port that could not be watched, if there is one.
    fn settle(&self) -> Option<ApplyError> {
        let (done, settled) = mpsc::channel();
        for worker in &self.workers {
            worker.send(Command::Settle(done.clone()));
        }
        drop(done);
        let mut failed = None;
        for _ in &self.workers {
            // A thread answers within a turn of its loop, or has stopped.
            match settled.recv_timeout(SETTLE_LIMIT) {
                Ok(answer) => failed = failed.or(answer),
                Err(_) => {
                    tracing::warn!("a data thread is slow to open or close connection ports");
                    break;
                }
            }
        }
        failed.map(|(port, transport, source)| ApplyError {
            address: SocketAddr::new(self.config.listen, port.get()),
            transport,
            source,
        })
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
/// In their order: the kernel opens neighbours faster than ports at random.
fn listeners_of(table: &Table) -> BTreeSet<(ListenPort, Transport)> {
    let ranges = table.rows.iter().flat_map(|row| &row.ranges);
    let listeners = ranges.flat_map(|range| {
        let tcp = range.protocol.has_tcp().then_some(Transport::Tcp);
        let udp = range.protocol.has_udp().then_some(Transport::Udp);
        let transports = tcp.into_iter().chain(udp);
        transports.flat_map(|transport| range.connection_ports().map(move |port| (port, transport)))
    });
    listeners.collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::Ipv4Addr;

    use super::*;

    struct Nobody;

    impl Gate for Nobody {
        fn admit(&self, _: ListenPort, _: Transport, _: SocketAddr) -> Decision {
            Decision::Refuse
        }
        fn ask(&self, _: PendingId, _: ListenPort, _: Transport, _: SocketAddr) {}
        fn closed(&self, _: ListenPort, _: SessionKey, _: Traffic) {}
    }

    #[test]
    fn a_port_that_cannot_be_watched_is_told() {
        let config = Config::new(Ipv4Addr::LOCALHOST.into(), Some(1));
        let forwarder = Forwarder::start(&config, &Arc::new(Nobody)).unwrap();
        let port = ListenPort::new(20_000).unwrap();
        // A regular file is what epoll surely refuses.
        let file = OwnedFd::from(File::open("Cargo.toml").unwrap());
        let listener = Listener::Tcp(file.into());
        let owner = forwarder.owner(port);
        owner.send(Command::Listen(vec![(port, listener)]));
        let error = forwarder.settle().unwrap();
        assert_eq!(error.address.port(), 20_000);
        assert_eq!(error.source.kind(), io::ErrorKind::PermissionDenied);
        assert!(forwarder.settle().is_none(), "told once");
    }
}
