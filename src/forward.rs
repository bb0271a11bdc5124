//! The connection part of claim 1: connects a connection port with its
//! destination processing server, for TCP connections and UDP datagrams.
//!
//! This is the data plane. It runs on its own threads, each with its own
//! epoll, and knows neither Kubernetes nor HTTP: a table gives the routes of
//! ports, a [`Gate`] decides who may use them. One thread owns a connection
//! port and everything that comes in on it; threads share nothing but counters
//! and quotas.
//!
//! ```text
//! apply(table) ─bind─→ listeners ─commands─→ worker threads (port mod N)
//! client ─accept→ Gate::admit ─connect→ processing server ⇄ copy ⇄ client
//!                     └ Ask → pending ←answer─ control
//! ```
//!
//! - `gate`: what the data plane asks of control and reports to it;
//! - `threads`: the data threads, the way of a `command` to one, and what is
//!   `shared` with them;
//! - `worker`: the event loop of a thread; `io`: what its parts share, with
//!   `timers`, `scratch`, `session_index`, `slab`;
//! - `tcp`: connections and their states; `udp`: flows and their states;
//!   `pending`: clients whose session is asked for;
//! - `listeners`: opening ports; `limits`: descriptors, port ranges, clients;
//!   `quota`: places for clients; `routes`: the servers of ports; `counters`;
//! - `snapshot`: the state of a stopped data plane; `transfer`: making it and
//!   continuing from it.

mod command;
mod counters;
mod gate;
mod io;
mod limits;
mod listeners;
mod pending;
mod quota;
mod routes;
mod scratch;
mod session_index;
mod shared;
mod slab;
pub mod snapshot;
mod tcp;
mod threads;
mod timers;
mod transfer;
mod udp;
mod worker;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use self::command::Command;
pub use self::counters::{CounterTotals, Counters};
pub use self::gate::{Decision, Gate, PENDING_DEADLINE, PendingId, SessionKey, Traffic, Transport};
pub use self::limits::{
    Limits, OpenFilesError, check_open_files, ephemeral_overlap, reserve_file_table,
};
use self::listeners::Listener;
pub use self::listeners::UnavailablePort;
use self::quota::Bounds;
use self::shared::Shared;
use self::threads::Threads;
use crate::table::{ListenPort, PortIndex, Table};

/// The configuration of the data plane.
#[derive(Clone, Debug)]
pub struct Config {
    /// The address that connection ports are bound to; `::` includes IPv4.
    pub listen: IpAddr,
    /// The number of data threads, 1 to 1024.
    pub threads: usize,
    /// The number of clients that there may be.
    pub limits: Limits,
    /// The open files that the rest of the process takes for clients, at most.
    pub other_files: u64,
    /// Time without a sign of life after which a TCP peer is given up; zero for
    /// the system's default, hours.
    pub peer_timeout: Duration,
}

impl Config {
    /// The default peer timeout: long enough for a reader that pauses, short
    /// enough that the ports of clients that are gone come back.
    pub const PEER_TIMEOUT: Duration = Duration::from_secs(300);

    /// A data plane on `listen` with `threads` threads, by default one per
    /// processor, and with default limits.
    #[must_use]
    pub fn new(listen: IpAddr, threads: Option<usize>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            listen,
            threads: threads.unwrap_or(processors).clamp(1, 1024),
            limits: Limits::default(),
            other_files: 0,
            peer_timeout: Self::PEER_TIMEOUT,
        }
    }
}

/// The error of a data plane that cannot start.
#[derive(Debug, thiserror::Error)]
#[error("failed to start the data plane: {0}")]
pub struct ForwardError(#[from] std::io::Error);

/// The numbers of live clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveClients {
    /// TCP connections.
    pub connections: u32,
    /// UDP flows.
    pub flows: u32,
}

/// The running data plane. Stops when dropped.
#[derive(Debug)]
pub struct Forwarder {
    config: Config,
    shared: Shared,
    threads: Threads,
    open: Mutex<BTreeSet<(ListenPort, Transport)>>,
    /// The ports of the table that could not be opened when it was last applied.
    unavailable: Mutex<Vec<UnavailablePort>>,
}

/// Ports of one data thread.
#[derive(Debug, Default)]
struct Opened {
    listeners: Vec<(ListenPort, Listener)>,
    failed: Vec<UnavailablePort>,
}

impl Forwarder {
    /// Starts the threads; ports open with [`Forwarder::apply`].
    ///
    /// # Errors
    /// [`ForwardError`] when the system has no thread or descriptor left.
    pub fn start(config: &Config, gate: &Arc<impl Gate>) -> Result<Self, ForwardError> {
        let shared = Shared::new(config.threads, config.peer_timeout);
        Ok(Self {
            config: config.clone(),
            threads: Threads::start(gate, &shared)?,
            shared,
            open: Mutex::default(),
            unavailable: Mutex::default(),
        })
    }

    /// Opens the connection ports of `table`, routes them, and closes the ports
    /// that it does not have. Live connections and UDP flows keep their server, also
    /// on a removed port, which takes no new ones. Returns the ports that cannot be
    /// opened, in the order of their numbers; applying the same table again tries
    /// them again.
    pub fn apply(&self, table: &Arc<PortIndex>) -> Vec<UnavailablePort> {
        let mut wanted = listeners_of(table.table());
        let mut open = self.open.lock();
        // Locked while opening, so that no thread closes a port that is kept.
        let mut draining = self.shared.draining_ports.lock();
        let is_draining = |(port, transport): &(ListenPort, Transport)| {
            *transport == Transport::Udp && draining.contains(port)
        };
        let missing = wanted.difference(&open).copied();
        let (reopened, new): (Vec<_>, Vec<_>) = missing.partition(is_draining);
        let reopened: Vec<ListenPort> = reopened.into_iter().map(|(port, _)| port).collect();
        let opened = self.open_ports(&new);
        draining.retain(|port| !reopened.contains(port));
        drop(draining);
        // The routes are set before the ports open: each port must lead somewhere.
        self.shared.routes.set(table.clone());
        self.set_limits(&wanted);
        let mut unavailable = Vec::new();
        for (index, opened) in opened.into_iter().enumerate() {
            unavailable.extend(opened.failed);
            if !opened.listeners.is_empty() {
                self.threads.send(index, Command::Listen(opened.listeners));
            }
        }
        if !new.is_empty() {
            let unwatched = self.threads.settle().into_iter();
            unavailable.extend(unwatched.map(|unwatched| {
                let address = SocketAddr::new(self.config.listen, unwatched.port.get());
                UnavailablePort::new(address, unwatched.transport, &unwatched.error)
            }));
        }
        self.set_idle_times(table.table());
        for port in reopened {
            self.threads.send_to_owner(port, Command::Reopen(port));
        }
        self.close(open.difference(&wanted));
        for failed in &unavailable {
            let port = failed.port().expect("it is a port of the table");
            wanted.remove(&(port, failed.transport));
        }
        *open = wanted;
        unavailable.sort_by_key(|failed| failed.address.port());
        self.unavailable.lock().clone_from(&unavailable);
        unavailable
    }

    /// The ports that could not be opened when a table was last applied.
    #[must_use]
    pub fn unavailable(&self) -> Vec<UnavailablePort> {
        self.unavailable.lock().clone()
    }

    /// Opens listeners, those of each data thread on a thread of its own, and
    /// returns them by thread, with those that failed.
    fn open_ports(&self, wanted: &[(ListenPort, Transport)]) -> Vec<Opened> {
        let mut shares: Vec<Vec<(ListenPort, Transport)>> = vec![Vec::new(); self.threads.count()];
        for &(port, transport) in wanted {
            shares[self.threads.owner(port)].push((port, transport));
        }
        let listen = self.config.listen;
        let open = |share: Vec<(ListenPort, Transport)>| {
            let mut opened = Opened::default();
            for (port, transport) in share {
                match Listener::open(listen, port, transport) {
                    Ok(listener) => opened.listeners.push((port, listener)),
                    Err(error) => opened.failed.push(error),
                }
            }
            opened
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

    /// Closes ports, and returns when they can be opened again.
    fn close<'a>(&self, ports: impl IntoIterator<Item = &'a (ListenPort, Transport)>) {
        let mut is_any_closed = false;
        for &(port, transport) in ports {
            self.threads
                .send_to_owner(port, Command::Close(port, transport));
            is_any_closed = true;
        }
        if is_any_closed {
            self.threads.settle();
        }
    }

    fn set_idle_times(&self, table: &Table) {
        let sessions = &table.sessions;
        self.shared.idle_times.set(
            sessions.idle_timeout_seconds,
            sessions.udp_idle_timeout_seconds,
        );
    }

    /// Sets the limits by the open files that `listeners` leave.
    fn set_limits(&self, listeners: &BTreeSet<(ListenPort, Transport)>) {
        let is_udp = |(_, transport): &&(ListenPort, Transport)| *transport == Transport::Udp;
        let udp = listeners.iter().filter(is_udp).count();
        let tcp = listeners.len() - udp;
        let open_files = limits::open_files();
        let others = self.config.other_files;
        let bounds = self.config.limits.bounds(open_files, others, tcp, udp);
        self.shared.tcp_quota.set(bounds.connections);
        let flows = bounds.flows;
        let threads = u32::try_from(self.threads.count()).unwrap_or(u32::MAX);
        self.shared
            .flow_share
            .store(flows.total.div_ceil(threads), Ordering::Relaxed);
        // One more flow evicts another one, unless there may be none.
        let total = if flows.total == 0 { 0 } else { u32::MAX };
        self.shared.udp_quota.set(Bounds { total, ..flows });
    }

    /// Brings the decision on the client `id` that is pending at `port`;
    /// [`Decision::Ask`] counts as a refusal. The end of a client that was
    /// admitted too late is reported at once.
    pub fn answer(&self, port: ListenPort, id: PendingId, decision: Decision) {
        self.threads
            .send_to_owner(port, Command::Answer(port, id, decision));
    }

    /// Cuts the session's connections (reset) and flows on `port`. Clients that
    /// came to `port` before and wait to be accepted or for a decision are
    /// refused, unless the gate admits them at once. When all is done,
    /// [`Gate::closed`] reports the cut itself.
    pub fn cut(&self, port: ListenPort, session: SessionKey) {
        self.threads
            .send_to_owner(port, Command::Cut(port, session));
    }

    /// Like [`Forwarder::cut`], for a session that is only `client`'s (canonical) on
    /// `port`: of those that wait for a decision only this client is refused, and no
    /// one else loses anything.
    pub fn cut_client(&self, port: ListenPort, session: SessionKey, client: IpAddr) {
        self.threads
            .send_to_owner(port, Command::CutClient(port, session, client));
    }

    /// The counts of what was forwarded and refused so far.
    #[must_use]
    pub fn counters(&self) -> CounterTotals {
        self.shared.counters.totals()
    }

    /// The numbers of live clients, pending ones included.
    #[must_use]
    pub fn live(&self) -> LiveClients {
        LiveClients {
            connections: self.shared.tcp_quota.live(),
            flows: self.shared.udp_quota.live(),
        }
    }

    /// The number of open listeners: a TCPUDP port has two.
    #[must_use]
    pub fn open_listeners(&self) -> usize {
        self.open.lock().len()
    }

    /// Stops the threads and closes everything; returns when that is done.
    pub fn shutdown(&self) {
        self.threads.stop();
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The listeners of `table`, sorted: the kernel opens neighbours faster than
/// ports at random.
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
    use std::os::fd::OwnedFd;

    use super::*;

    struct ClosedGate;

    impl Gate for ClosedGate {
        fn admit(&self, _: ListenPort, _: Transport, _: SocketAddr) -> Decision {
            Decision::Refuse
        }
        fn ask(&self, _: PendingId, _: ListenPort, _: Transport, _: SocketAddr) {}
        fn closed(&self, _: ListenPort, _: SessionKey, _: Traffic) {}
    }

    #[test]
    fn a_port_that_cannot_be_watched_is_reported() {
        let config = Config::new(Ipv4Addr::LOCALHOST.into(), Some(1));
        let forwarder = Forwarder::start(&config, &Arc::new(ClosedGate)).unwrap();
        let port = ListenPort::new(20_000).unwrap();
        // Epoll refuses regular files.
        let file = OwnedFd::from(File::open("Cargo.toml").unwrap());
        let listener = Listener::Tcp(file.into());
        let listeners = vec![(port, listener)];
        let threads = &forwarder.threads;
        threads.send_to_owner(port, Command::Listen(listeners));
        let unwatched = threads.settle();
        assert_eq!(unwatched.len(), 1);
        assert_eq!(unwatched[0].port, port);
        let kind = unwatched[0].error.kind();
        assert_eq!(kind, std::io::ErrorKind::PermissionDenied);
        assert!(threads.settle().is_empty(), "reported once");
    }
}
