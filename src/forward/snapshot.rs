//! The data plane's part of a hand-over to another process: everything that a
//! thread has, as plain data with its descriptors.
//!
//! ```text
//! Worker ─hand_over→ ForwarderSnapshot ─another process→ ForwarderSnapshot ─take_over→ Worker
//!                       └──── or back, when that failed ────────↗
//! ```
//!
//! A thread hands over between two events, so nothing is half done: a byte is
//! in a socket, or kept and part of [`ForwarderSnapshot`]. Sockets are registered anew by
//! whoever takes over, which reports all that is ready on them; so what epoll
//! had told the former thread need not be known.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::net::getpeername;

use super::admission::{Permit, Source};
use super::listeners::Listener;
use super::worker::Command;
use super::{Forwarder, SessionKey, Traffic, Transport};
use crate::table::{ListenPort, Table};

/// An open connection port.
#[derive(Debug)]
pub struct PortSnapshot {
    /// Its number.
    pub port: ListenPort,
    /// A UDP port that the table no longer has and whose flows go on.
    pub is_draining: bool,
    /// Its queue moves with it.
    pub(super) listener: Listener,
}

impl PortSnapshot {
    /// A port that another process has opened.
    ///
    /// # Errors
    /// When `socket` is not what it is said to be.
    pub fn adopt(
        port: ListenPort,
        transport: Transport,
        is_draining: bool,
        socket: OwnedFd,
    ) -> io::Result<Self> {
        Ok(Self {
            port,
            is_draining,
            listener: Listener::adopt(socket, transport)?,
        })
    }

    /// TCP or UDP.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.listener.transport()
    }
}

impl AsFd for PortSnapshot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.socket()
    }
}

/// One direction of a TCP connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectionSnapshot {
    /// What was read from the source and not taken by the destination yet.
    pub kept: Vec<u8>,
    /// The source has ended its side.
    pub is_read: bool,
    /// The destination has been told so.
    pub is_done: bool,
    /// Bytes read from the source so far.
    pub bytes: u64,
}

/// A live TCP connection.
#[derive(Debug)]
pub struct ConnectionSnapshot<S = OwnedFd> {
    /// The connection port that it came in on.
    pub port: ListenPort,
    /// The session that it was admitted under.
    pub session: SessionKey,
    /// The client's socket.
    pub client: S,
    /// The processing server's socket.
    pub server: S,
    /// The server's socket is not connected yet.
    pub is_connecting: bool,
    /// One side is gone; the other one is reset when it has everything. ForwarderSnapshot
    /// over like others, so that no byte is lost and its session ends only then.
    pub is_broken: bool,
    /// For how long nothing has happened.
    pub idle: Duration,
    /// From the client to the server.
    pub upstream: DirectionSnapshot,
    /// From the server to the client.
    pub downstream: DirectionSnapshot,
}

/// A live UDP flow.
#[derive(Debug)]
pub struct FlowSnapshot {
    /// The connection port that it came in on.
    pub port: ListenPort,
    /// The session that it was admitted under.
    pub session: SessionKey,
    /// Where replies go.
    pub client: SocketAddr,
    /// The address that the client knows.
    pub local: Option<IpAddr>,
    /// The socket that is connected to the processing server.
    pub server: OwnedFd,
    /// For how long nothing has happened.
    pub idle: Duration,
    /// What has passed.
    pub traffic: Traffic,
    /// The client has sent again after a reply.
    pub is_assured: bool,
}

/// A client whose session is not known yet; it is asked for anew.
#[derive(Debug)]
pub enum ClientSnapshot {
    /// A connection that nothing was read from.
    Tcp {
        /// Where it came in.
        port: ListenPort,
        /// Its socket.
        socket: OwnedFd,
        /// Its address.
        address: SocketAddr,
    },
    /// The first datagrams of a client.
    Udp {
        /// Where they came in.
        port: ListenPort,
        /// Who sent them.
        address: SocketAddr,
        /// The address that they were sent to.
        local: Option<IpAddr>,
        /// In the order received.
        datagrams: Vec<Vec<u8>>,
    },
}

/// All that a data plane has.
#[derive(Debug, Default)]
pub struct ForwarderSnapshot {
    /// Open connection ports.
    pub ports: Vec<PortSnapshot>,
    /// Live TCP connections.
    pub connections: Vec<ConnectionSnapshot>,
    /// Live UDP flows; their ports are among `ports`.
    pub flows: Vec<FlowSnapshot>,
    /// Clients that wait for their session to be found.
    pub clients: Vec<ClientSnapshot>,
}

/// What one thread takes over. Clients have their places among the others
/// already: no thread admits new ones before all are counted.
#[derive(Debug, Default)]
pub(super) struct WorkerSnapshot {
    pub(super) ports: Vec<PortSnapshot>,
    /// Without a place where the client is gone, and its address with it.
    pub(super) connections: Vec<(ConnectionSnapshot, Option<Permit>)>,
    pub(super) flows: Vec<(FlowSnapshot, Permit)>,
    pub(super) clients: Vec<(ClientSnapshot, Permit)>,
}

impl ForwarderSnapshot {
    /// Live connections and flows, by session.
    pub fn sessions(&self) -> impl Iterator<Item = SessionKey> {
        let connections = self.connections.iter().map(|connection| connection.session);
        connections.chain(self.flows.iter().map(|flow| flow.session))
    }

    fn append(&mut self, mut other: Self) {
        self.ports.append(&mut other.ports);
        self.connections.append(&mut other.connections);
        self.flows.append(&mut other.flows);
        self.clients.append(&mut other.clients);
    }
}

impl Forwarder {
    /// Takes everything from the threads, which run on with nothing. Nothing
    /// is read, written, closed or reported until it is taken over again, here
    /// or by another process; dropping the result closes this process's
    /// descriptors and tells nobody.
    ///
    /// Nothing else may be asked of the forwarder meanwhile.
    ///
    /// # Errors
    /// When a thread cannot; what others had given is theirs again.
    pub fn hand_over(&self, table: &Arc<Table>) -> io::Result<ForwarderSnapshot> {
        let (sender, replies) = mpsc::channel();
        for worker in &self.workers {
            worker.send(Command::HandOver(sender.clone()));
        }
        drop(sender);
        let mut handed = ForwarderSnapshot::default();
        let mut failure = None;
        for _ in &self.workers {
            // A thread answers within a turn of its loop; one that has stopped
            // drops its sender.
            match replies.recv() {
                Ok(Ok(part)) => handed.append(part),
                Ok(Err(error)) => failure = Some(error),
                Err(_) => failure = Some(io::Error::other("a data thread has stopped")),
            }
        }
        match failure {
            None => Ok(handed),
            Some(error) => {
                self.take_over(handed, table);
                Err(error)
            }
        }
    }

    /// Goes on with what another process, or this one, has handed over. Ports
    /// lead where `table` says. Clients count towards the limits and none is
    /// refused, were there more than there may be.
    pub fn take_over(&self, handed: ForwarderSnapshot, table: &Arc<Table>) {
        let mut shares: Vec<WorkerSnapshot> = self
            .workers
            .iter()
            .map(|_| WorkerSnapshot::default())
            .collect();
        let mut open = BTreeSet::new();
        let mut draining = Vec::new();
        for port in handed.ports {
            if port.is_draining {
                draining.push(port.port);
            }
            open.extend((!port.is_draining).then(|| (port.port, port.transport())));
            shares[self.owner_index(port.port)].ports.push(port);
        }
        let (tcp, udp) = (&self.tcp_admission, &self.udp_admission);
        for connection in handed.connections {
            let port = connection.port;
            let client = getpeername(&connection.client).ok().flatten();
            let client = client.and_then(|client| SocketAddr::try_from(client).ok());
            let permit = client.map(|client| tcp.take_over(Source::of(client.ip()), port));
            let share = &mut shares[self.owner_index(port)];
            share.connections.push((connection, permit));
        }
        for flow in handed.flows {
            let permit = udp.take_over(Source::of(flow.client.ip()), flow.port);
            shares[self.owner_index(flow.port)]
                .flows
                .push((flow, permit));
        }
        for client in handed.clients {
            let (admission, port, address) = match &client {
                ClientSnapshot::Tcp { port, address, .. } => (tcp, *port, *address),
                ClientSnapshot::Udp { port, address, .. } => (udp, *port, *address),
            };
            let permit = admission.take_over(Source::of(address.ip()), port);
            shares[self.owner_index(port)]
                .clients
                .push((client, permit));
        }
        self.set_idle_times(table);
        self.routes.set(table.clone());
        self.draining.lock().extend(draining);
        self.set_limits(&open);
        *self.open.lock() = open;
        for (worker, share) in self.workers.iter().zip(shares) {
            worker.send(Command::TakeOver(Box::new(share)));
        }
    }
}
