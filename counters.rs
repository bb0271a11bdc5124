//! What the forwarder counts. Each data thread has its own counts, so that
//! counting costs no cache line that another thread writes; reading sums them.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Transport;

macro_rules! refusals {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a client was refused, or a connection of it given up.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Refusal { $($(#[$doc])* $variant,)* }

        impl Refusal {
            /// Every cause.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$variant),*];

            /// The cause's name in metrics.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

refusals! {
    /// The gate refused: no live session for this client.
    NoSession = "no_session",
    /// The table has no address for the port's server.
    NoServer = "no_server",
    /// The server refused the connection.
    ConnectRefused = "connect_refused",
    /// The server did not answer within the connect deadline.
    ConnectTimeout = "connect_timeout",
    /// No route to the server.
    ConnectUnreachable = "connect_unreachable",
    /// Connecting failed otherwise.
    ConnectFailed = "connect_failed",
    /// No local port is left for a connection to the server.
    NoSourcePort = "no_source_port",
    /// No descriptor or memory is left for a socket to the server.
    NoDescriptor = "no_descriptor",
    /// The client reset its connection before the server answered.
    ClientGone = "client_gone",
    /// The gate gave no verdict on a parked client in time.
    ParkedTimeout = "parked_timeout",
    /// Too many clients are parked, or too many UDP flows open.
    TooMany = "too_many",
    /// Too many UDP flows from one address.
    TooManyFromSource = "too_many_from_source",
    /// The datagram came from one of our own connection ports: a loop.
    OwnPort = "own_port",
}

/// Flows of one transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flows {
    /// Open now: TCP connections being made included, parked clients not.
    pub open: u64,
    /// Opened since the start.
    pub total: u64,
}

/// What a forwarder has done since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes from clients to servers.
    pub upstream_bytes: u64,
    /// Bytes from servers to clients.
    pub downstream_bytes: u64,
    /// TCP connections.
    pub tcp: Flows,
    /// UDP flows.
    pub udp: Flows,
    /// Clients waiting for a verdict now.
    pub parked: u64,
    /// Datagrams given up because a socket could not take them.
    pub dropped_datagrams: u64,
    /// Failures to accept for want of descriptors or memory; each pauses the
    /// thread's accepting for 100 ms.
    pub accept_errors: u64,
    refused: [u64; Refusal::ALL.len()],
}

impl Counters {
    /// Clients refused, or given up, because of `cause`.
    #[must_use]
    pub fn refused(&self, cause: Refusal) -> u64 {
        self.refused[cause as usize]
    }
}

/// One thread's counts.
#[derive(Default)]
pub struct Cells {
    /// See [`Counters::upstream_bytes`].
    pub upstream_bytes: Cell,
    /// See [`Counters::downstream_bytes`].
    pub downstream_bytes: Cell,
    /// See [`Counters::dropped_datagrams`].
    pub dropped_datagrams: Cell,
    /// See [`Counters::accept_errors`].
    pub accept_errors: Cell,
    /// Clients parked, ever.
    pub parked: Cell,
    /// Parked clients answered or refused, ever.
    pub unparked: Cell,
    opened: [Cell; 2],
    closed: [Cell; 2],
    refused: [Cell; Refusal::ALL.len()],
}

/// A count that one thread adds to and others read.
#[derive(Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Cells {
    /// Counts a flow that began.
    pub fn opened(&self, transport: Transport) {
        self.opened[transport as usize].add(1);
    }

    /// Counts the end of a flow that was counted as opened.
    pub fn closed(&self, transport: Transport) {
        self.closed[transport as usize].add(1);
    }

    /// Counts a refusal.
    pub fn refused(&self, cause: Refusal) {
        self.refused[cause as usize].add(1);
    }

    /// Adds this thread's counts to `sum`.
    pub fn add_to(&self, sum: &mut Counters) {
        sum.upstream_bytes += self.upstream_bytes.get();
        sum.downstream_bytes += self.downstream_bytes.get();
        sum.dropped_datagrams += self.dropped_datagrams.get();
        sum.accept_errors += self.accept_errors.get();
        // Ends are read before beginnings, so that a flow which ends in
        // between never makes the difference negative.
        let unparked = self.unparked.get();
        sum.parked += self.parked.get().saturating_sub(unparked);
        for (flows, transport) in [
            (&mut sum.tcp, Transport::Tcp),
            (&mut sum.udp, Transport::Udp),
        ] {
            let closed = self.closed[transport as usize].get();
            let opened = self.opened[transport as usize].get();
            flows.total += opened;
            flows.open += opened.saturating_sub(closed);
        }
        for (total, cell) in sum.refused.iter_mut().zip(&self.refused) {
            *total += cell.get();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_threads_are_summed() {
        let threads = [Cells::default(), Cells::default()];
        for cells in &threads {
            cells.opened(Transport::Udp);
            cells.upstream_bytes.add(7);
            cells.refused(Refusal::OwnPort);
        }
        threads[0].closed(Transport::Udp);
        let mut sum = Counters::default();
        for cells in &threads {
            cells.add_to(&mut sum);
        }
        assert_eq!(sum.udp, Flows { open: 1, total: 2 });
        assert_eq!(sum.tcp, Flows::default());
        assert_eq!(sum.upstream_bytes, 14);
        assert_eq!(sum.refused(Refusal::OwnPort), 2);
        assert_eq!(sum.refused(Refusal::NoSession), 0);
    }

    #[test]
    fn every_refusal_has_its_own_name() {
        let names: std::collections::HashSet<_> = Refusal::ALL.map(Refusal::name).into();
        assert_eq!(names.len(), Refusal::ALL.len());
    }
}
