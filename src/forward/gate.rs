//! What the data plane asks of control, and tells it: who may use a connection
//! port, and what went through.

use std::net::SocketAddr;

use crate::table::ListenPort;

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
pub enum Decision {
    /// Forward. The gate has counted one flow for the session; its end is
    /// reported exactly once with [`Gate::closed`].
    Admit(SessionKey),
    /// Reset (TCP) or drop (UDP).
    Refuse,
    /// Not known yet. The client is parked and [`Gate::ask`] called with a
    /// ticket; [`super::Forwarder::answer`] brings the verdict, or a deadline passes
    /// and the client is refused.
    Ask,
}

/// Names a parked client of a port until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PendingId(pub u64);

/// What a flow carried, reported at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes from the client to the server.
    pub upstream_bytes: u64,
    /// Bytes from the server to the client.
    pub downstream_bytes: u64,
}

impl Traffic {
    /// Bytes both ways.
    #[must_use]
    pub fn total(self) -> u64 {
        self.upstream_bytes + self.downstream_bytes
    }

    /// Adds what has come to `before` until `now`.
    pub(super) fn add_since(&mut self, before: Self, now: Self) {
        self.upstream_bytes += now.upstream_bytes - before.upstream_bytes;
        self.downstream_bytes += now.downstream_bytes - before.downstream_bytes;
    }
}

/// Decides who may use a connection port. Called on data threads: it must not
/// block for longer than an uncontended lock takes.
pub trait Gate: Send + Sync + 'static {
    /// Whether `client` may use `port` now.
    fn admit(&self, port: ListenPort, transport: Transport, client: SocketAddr) -> Decision;
    /// Starts to find out about a parked client.
    fn ask(&self, ticket: PendingId, port: ListenPort, transport: Transport, client: SocketAddr);
    /// A flow admitted under `session` is over, or the session's cut is done.
    fn closed(&self, port: ListenPort, session: SessionKey, traffic: Traffic);
}
