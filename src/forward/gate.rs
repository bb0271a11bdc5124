//! What the data plane asks of control and reports to it: who may use a
//! connection port, and what went through it.

use std::net::SocketAddr;
use std::time::Duration;

use crate::table::ListenPort;

/// How long a client waits for its session to be found. The data plane refuses
/// it after that, and an answer that comes later finds no one.
pub const PENDING_DEADLINE: Duration = Duration::from_secs(2);

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

/// The gate's decision on a client that arrives at a connection port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The client is forwarded. The gate has counted one flow for the session;
    /// its end is reported exactly once with [`Gate::closed`].
    Admit(SessionKey),
    /// The client is reset (TCP) or its datagram dropped (UDP).
    Refuse,
    /// The gate does not know yet. The client becomes pending and
    /// [`Gate::ask`] is called. [`super::Forwarder::answer`] brings the
    /// decision, or the client is refused after [`PENDING_DEADLINE`].
    Ask,
}

/// Names a pending client of a port until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PendingId(pub u64);

/// What a flow carried, reported at its end: nothing if it did not reach the
/// server.
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

    /// Adds the difference between `before` and `now`.
    pub(super) fn add_since(&mut self, before: Self, now: Self) {
        self.upstream_bytes += now.upstream_bytes - before.upstream_bytes;
        self.downstream_bytes += now.downstream_bytes - before.downstream_bytes;
    }
}

/// Decides who may use a connection port. Data threads call it: it must not
/// block for longer than an uncontended lock takes.
pub trait Gate: Send + Sync + 'static {
    /// Whether `client` may use `port` now.
    fn admit(&self, port: ListenPort, transport: Transport, client: SocketAddr) -> Decision;
    /// Starts to find the session of the pending client `id`.
    fn ask(&self, id: PendingId, port: ListenPort, transport: Transport, client: SocketAddr);
    /// A flow admitted under `session` has ended, or the session's cut is done.
    fn closed(&self, port: ListenPort, session: SessionKey, traffic: Traffic);
}
