//! The counters of the data plane: plain atomics, added to by every thread.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::quota::QuotaExceeded;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of the data plane.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        /// The values of the counters at one time.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct CounterTotals {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(super) fn totals(&self) -> CounterTotals {
                CounterTotals { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Bytes from clients to servers, counted four times a second.
    upstream_bytes,
    /// Bytes from servers to clients, counted four times a second.
    downstream_bytes,
    /// TCP connections admitted.
    tcp_opened,
    /// UDP flows admitted.
    udp_opened,
    /// Connections and flows that have ended.
    closed,
    /// Clients refused: no session.
    no_session,
    /// Clients refused: the port's server has no address yet.
    no_server,
    /// Clients refused: their session was not found in time.
    pending_too_long,
    /// Clients refused: too many are pending.
    too_many,
    /// Clients refused: their transport has as many clients as it may have.
    limit_total,
    /// Clients refused: their source has as many as it may have.
    limit_source,
    /// Clients refused: their connection port has as many as it may have.
    limit_port,
    /// Datagrams refused: they came from one of our own ports.
    loops,
    /// Connections whose server refused.
    connect_refused,
    /// Connections whose server did not answer in time.
    connect_timed_out,
    /// Connections whose server or its network was reported as unreachable.
    connect_unreachable,
    /// Connections for which no local port was left.
    no_source_port,
    /// Connections whose server could not be reached otherwise.
    connect_failed,
    /// Connections that were idle, and flows whose client was silent, for too
    /// long.
    idle,
    /// Connections and flows cut with their session.
    cut,
    /// UDP flows whose client's host has reported that its port is closed.
    client_gone,
    /// UDP flows that have ended without an answer: the server sent nothing, or
    /// sent it from another port, which the kernel drops without a count of ours.
    unanswered,
    /// UDP flows evicted for another one.
    evicted,
    /// Connections reset before all that had been read was delivered.
    undelivered,
    /// Accepts that failed for lack of descriptors or memory.
    accept_failed,
    /// Datagrams dropped: a socket's buffer was full.
    datagrams_dropped,
    /// Datagrams dropped: they came to a flow with replies from any port, but from
    /// another address than its server's.
    datagrams_of_others,
}

impl Counters {
    /// The counter of connections that failed with `errno`.
    pub(super) fn unreachable(&self, errno: Errno) -> &AtomicU64 {
        match errno {
            Errno::CONNREFUSED => &self.connect_refused,
            Errno::TIMEDOUT => &self.connect_timed_out,
            Errno::HOSTUNREACH | Errno::NETUNREACH => &self.connect_unreachable,
            // UDP reports the latter.
            Errno::ADDRNOTAVAIL | Errno::AGAIN => &self.no_source_port,
            _ => &self.connect_failed,
        }
    }

    /// The counter of clients above a bound.
    pub(super) fn exceeded(&self, exceeded: QuotaExceeded) -> &AtomicU64 {
        match exceeded {
            QuotaExceeded::Total => &self.limit_total,
            QuotaExceeded::Source => &self.limit_source,
            QuotaExceeded::Port => &self.limit_port,
        }
    }
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

pub(super) fn count(counter: &AtomicU64) {
    add(counter, 1);
}
