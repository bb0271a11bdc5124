//! What the data plane counts: plain atomics, added to by every thread.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::admission::Refused;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of the data plane.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        /// The counters at one time.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct CounterTotals {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(super) fn snapshot(&self) -> CounterTotals {
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
    parked_too_long,
    /// Clients refused: too many are parked.
    too_many,
    /// Clients refused: as many connections or flows in all as there may be.
    limit_total,
    /// Clients refused: as many of their source as there may be.
    limit_source,
    /// Clients refused: as many on their connection port as there may be.
    limit_port,
    /// Datagrams refused: they came from one of our own ports.
    loops,
    /// Connections whose server refused.
    connect_refused,
    /// Connections whose server did not answer in time.
    connect_timed_out,
    /// Connections whose server or its network was said to be unreachable.
    connect_unreachable,
    /// Connections for which no local port was left.
    no_source_port,
    /// Connections whose server could not be reached otherwise.
    connect_failed,
    /// Connections and flows that were silent for too long.
    idle,
    /// Connections and flows cut with their session.
    cut,
    /// UDP flows that made room for another one.
    evicted,
    /// Connections reset before all that had been read was delivered.
    undelivered,
    /// Accepts that failed for lack of descriptors or memory.
    accept_failed,
    /// Datagrams dropped: a socket's buffer was full.
    datagrams_dropped,
}

impl Counters {
    /// What counts connections whose server could not be reached.
    pub(super) fn unreachable(&self, errno: Errno) -> &AtomicU64 {
        match errno {
            Errno::CONNREFUSED => &self.connect_refused,
            Errno::TIMEDOUT => &self.connect_timed_out,
            Errno::HOSTUNREACH | Errno::NETUNREACH => &self.connect_unreachable,
            // The latter is UDP's.
            Errno::ADDRNOTAVAIL | Errno::AGAIN => &self.no_source_port,
            _ => &self.connect_failed,
        }
    }

    /// What counts clients above a bound.
    pub(super) fn refused(&self, refused: Refused) -> &AtomicU64 {
        match refused {
            Refused::Total => &self.limit_total,
            Refused::Source => &self.limit_source,
            Refused::Port => &self.limit_port,
        }
    }
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

pub(super) fn count(counter: &AtomicU64) {
    add(counter, 1);
}
