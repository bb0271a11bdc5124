//! The connection part: connects a connection port with its destination
//! processing server (TCP and UDP). Runs on its own threads, knows neither
//! Kubernetes nor HTTP.

use std::net::SocketAddr;

use crate::table::ListenPort;

/// Names a session within this process. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(pub u64);

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A connection.
    Tcp,
    /// A client's datagrams.
    Udp,
}

/// What the gate says to a client that arrives at a connection port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Forward. The gate has counted one flow for the session; the forwarder
    /// reports its end exactly once with [`Gate::closed`].
    Admit(SessionKey),
    /// Reset (TCP) or drop (UDP).
    Refuse,
    /// Not known yet. The forwarder parks the client and calls [`Gate::ask`]
    /// with a ticket; `Forwarder::answer` brings the verdict, or a deadline
    /// passes and the client is refused.
    Ask,
}

/// Names a parked client until it is answered.
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
