//! Clients that wait for a verdict: their session is not known here, and the
//! gate asks for it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::Worker;
use crate::forward::admission::Permit;
use crate::forward::counters::count;
use crate::forward::stream::Stream;
use crate::forward::{Decision, PendingId, Traffic, Transport, udp};
use crate::table::ListenPort;

/// How long a parked client waits for its verdict.
const PARKED_DEADLINE: Duration = Duration::from_secs(2);

/// Most parked clients of a thread; further ones are refused. Bounds what
/// scanning for ports costs.
const MAX_PARKED: usize = 1024;

/// A parked client.
#[derive(Debug)]
pub(super) enum Pending {
    Tcp {
        port: ListenPort,
        client: OwnedFd,
        address: SocketAddr,
        permit: Permit,
    },
    Udp(udp::Pending),
}

impl Pending {
    /// The port that it came to.
    pub(super) fn port(&self) -> ListenPort {
        match self {
            Self::Tcp { port, .. } => *port,
            Self::Udp(parked) => parked.port,
        }
    }
}

impl Worker {
    /// Parks a client and asks for its verdict.
    pub(super) fn park(
        &mut self,
        parked: Pending,
        port: ListenPort,
        transport: Transport,
        client: SocketAddr,
    ) -> Option<PendingId> {
        if self.parked.len() >= MAX_PARKED {
            count(&self.counters.too_many);
            self.turn_away(parked);
            return None;
        }
        self.next_ticket += 1;
        let ticket = PendingId(self.next_ticket);
        self.parked.insert(ticket, (self.now, parked));
        self.gate.ask(ticket, port, transport, client);
        Some(ticket)
    }

    /// The gate has decided on a parked client.
    pub(super) fn answer(&mut self, number: ListenPort, ticket: PendingId, verdict: Decision) {
        let Some((_, parked)) = self.parked.remove(&ticket) else {
            // Too late: what the gate has counted is over.
            if let Decision::Admit(session) = verdict {
                self.gate.closed(number, session, Traffic::default());
            }
            return;
        };
        match (verdict, parked) {
            (
                Decision::Admit(session),
                Pending::Tcp {
                    port,
                    client,
                    address,
                    permit,
                },
            ) => {
                self.start(port, client, address, session, permit);
            }
            (Decision::Admit(session), Pending::Udp(parked)) => {
                self.unpark_flow(parked, session);
            }
            (Decision::Refuse | Decision::Ask, parked) => {
                count(&self.counters.no_session);
                self.turn_away(parked);
            }
        }
    }

    pub(super) fn turn_away(&mut self, parked: Pending) {
        match parked {
            Pending::Tcp { client, .. } => client.reset_on_close(),
            Pending::Udp(parked) => {
                if let Some(port) = self.udp_ports.get_mut(&parked.port) {
                    port.parked.remove(&parked.client);
                }
            }
        }
    }

    /// Turns those away that have waited too long.
    pub(super) fn tick_parked(&mut self) {
        let is_late = |since| self.now.duration_since(since) >= PARKED_DEADLINE;
        let late = self.parked.iter().filter(|(_, (since, _))| is_late(*since));
        let late: Vec<PendingId> = late.map(|(ticket, _)| *ticket).collect();
        for ticket in late {
            if let Some((_, parked)) = self.parked.remove(&ticket) {
                count(&self.counters.parked_too_long);
                self.turn_away(parked);
            }
        }
    }
}
