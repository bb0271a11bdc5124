//! The snapshot of a stopped data plane: everything that its threads have, as
//! plain data with its descriptors. `transfer` makes and takes it.
//!
//! A thread exports between two events, so nothing is half done: a byte is in a
//! socket, or kept and part of the snapshot. The importing thread registers all
//! sockets anew, and epoll reports again all that is ready on them. So what it
//! had reported to the exporting thread need not be known.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::gate::{SessionKey, Traffic, Transport};
use super::listeners::Listener;
use super::quota::Permit;
use crate::table::ListenPort;

/// An open connection port.
#[derive(Debug)]
pub struct PortSnapshot {
    /// The number of the port.
    pub port: ListenPort,
    /// Whether it is a UDP port that the table no longer has and whose flows go
    /// on.
    pub is_draining: bool,
    /// The listener; its queue moves with it.
    pub(super) listener: Listener,
}

impl PortSnapshot {
    /// A port that another process has opened.
    ///
    /// # Errors
    /// When `socket` is not a socket of `transport`.
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

    /// The transport of the port.
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
    /// Bytes that were read from the source and that the destination did not take
    /// yet.
    pub kept: Vec<u8>,
    /// Whether `kept` is one urgent byte.
    pub is_urgent: bool,
    /// Whether the source has ended its side.
    pub is_read: bool,
    /// Whether the end was passed on to the destination.
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
    /// Whether the server's socket is not connected yet.
    pub is_connecting: bool,
    /// Whether one side is lost, and the other one is reset when it has
    /// everything. It is exported like others, so that no byte is lost and its
    /// session ends only then.
    pub is_broken: bool,
    /// The time since the last event.
    pub idle: Duration,
    /// The direction from the client to the server.
    pub upstream: DirectionSnapshot,
    /// The direction from the server to the client.
    pub downstream: DirectionSnapshot,
}

/// A live UDP flow.
#[derive(Debug)]
pub struct FlowSnapshot {
    /// The connection port that it came in on.
    pub port: ListenPort,
    /// The session that it was admitted under.
    pub session: SessionKey,
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client sends to; `None` where there is only one.
    pub local: Option<IpAddr>,
    /// The socket towards the processing server.
    pub server: OwnedFd,
    /// Of a flow with replies from any port, whose socket is not connected: the
    /// server's address and the port that the client's datagrams go to.
    pub target: Option<SocketAddr>,
    /// The time since the client's last datagram.
    pub idle: Duration,
    /// The bytes that have passed.
    pub traffic: Traffic,
    /// Whether the client has sent again after a reply.
    pub is_assured: bool,
}

/// A pending client; the importing thread asks for its session again.
#[derive(Debug)]
pub enum ClientSnapshot {
    /// A connection that nothing was read from.
    Tcp {
        /// The connection port that it came in on.
        port: ListenPort,
        /// The client's socket.
        socket: OwnedFd,
        /// The client's address.
        address: SocketAddr,
    },
    /// The first datagrams of a client.
    Udp {
        /// The connection port that they came in on.
        port: ListenPort,
        /// The client's address.
        address: SocketAddr,
        /// The address that they were sent to; `None` where there is only one.
        local: Option<IpAddr>,
        /// The datagrams in the order received.
        datagrams: Vec<Vec<u8>>,
    },
}

/// Everything that a data plane has.
#[derive(Debug, Default)]
pub struct ForwarderSnapshot {
    /// Open connection ports.
    pub ports: Vec<PortSnapshot>,
    /// Live TCP connections.
    pub connections: Vec<ConnectionSnapshot>,
    /// Live UDP flows; their ports are among `ports`.
    pub flows: Vec<FlowSnapshot>,
    /// Pending clients.
    pub clients: Vec<ClientSnapshot>,
}

/// The part of a snapshot that one thread imports. The clients have their places
/// in the quotas already: no thread admits new ones before all are counted.
#[derive(Debug, Default)]
pub(super) struct WorkerSnapshot {
    pub(super) ports: Vec<PortSnapshot>,
    /// Without a place where the client is gone: it has no address any more.
    pub(super) connections: Vec<(ConnectionSnapshot, Option<Permit>)>,
    pub(super) flows: Vec<(FlowSnapshot, Permit)>,
    pub(super) clients: Vec<(ClientSnapshot, Permit)>,
}

impl ForwarderSnapshot {
    /// The port and the session of each live connection and flow.
    pub fn sessions(&self) -> impl Iterator<Item = (ListenPort, SessionKey)> {
        let connections = self.connections.iter();
        let connections = connections.map(|connection| (connection.port, connection.session));
        connections.chain(self.flows.iter().map(|flow| (flow.port, flow.session)))
    }

    pub(super) fn append(&mut self, mut other: Self) {
        self.ports.append(&mut other.ports);
        self.connections.append(&mut other.connections);
        self.flows.append(&mut other.flows);
        self.clients.append(&mut other.clients);
    }
}
