//! The end of a session, as the data plane sees it.

use super::Worker;
use super::parking::Pending;
use crate::forward::counters::count;
use crate::forward::{PendingId, SessionKey, Traffic, Transport};
use crate::table::ListenPort;

/// Most clients that are looked at when a session is cut: what a listener's
/// queue holds by default. Who came before the cut is at its head, and whoever
/// fills it meanwhile does not hold the thread.
const MOST_WAITING: usize = 4096;
/// Likewise of datagrams, in turns of 128: many times what a socket's buffer
/// holds by default.
const MOST_TURNS: usize = 64;

impl Worker {
    /// Cuts a session. After that, whoever is met on its port has come later.
    pub(super) fn cut(&mut self, port: ListenPort, session: SessionKey) {
        self.refuse_waiting(port);
        for (transport, key) in self.sessions.remove(&session).unwrap_or_default() {
            // One that has ended in order and waits for its peers is not cut.
            if transport == Transport::Udp || !self.has_finished(key) {
                count(&self.counters.cut);
            }
            match transport {
                Transport::Tcp => self.end_connection(key),
                Transport::Udp => self.end_flow(key),
            }
        }
        self.cut_closing(session);
        self.gate.closed(port, session, Traffic::default());
    }

    /// Meets everyone who has come to `port` so far, and refuses whom the gate
    /// does not admit at once: the next session on the port is not theirs.
    fn refuse_waiting(&mut self, port: ListenPort) {
        for _ in 0..MOST_WAITING {
            if !self.accept(port) {
                break;
            }
        }
        for _ in 0..MOST_TURNS {
            if !self.receive_from_clients(port) {
                break;
            }
        }
        let is_here = |parked: &Pending| parked.port() == port;
        let parked = self.parked.iter();
        let here = parked.filter(|(_, (_, parked))| is_here(parked));
        let here: Vec<PendingId> = here.map(|(ticket, _)| *ticket).collect();
        for ticket in here {
            if let Some((_, parked)) = self.parked.remove(&ticket) {
                count(&self.counters.no_session);
                self.turn_away(parked);
            }
        }
    }
}
