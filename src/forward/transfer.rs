//! Export and import of the whole data plane, for a hand-over to another
//! process.
//!
//! ```text
//! Forwarder::export ─commands→ threads ─their parts→ ForwarderSnapshot ─→ another process
//! Forwarder::import ←── ForwarderSnapshot; Forwarder::resume when the hand-over failed
//!         └─ places in the quotas ─ WorkerSnapshot ─commands→ threads
//! ```

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustix::net::getpeername;

use super::Forwarder;
use super::command::Command;
use super::quota::SourceNetwork;
use super::snapshot::{ClientSnapshot, ForwarderSnapshot, WorkerSnapshot};
use crate::table::PortIndex;

impl Forwarder {
    /// Takes everything from the threads, which run on with nothing. Nothing
    /// is read, written, closed or reported until it is imported again, here or
    /// by another process. Dropping the result closes this process's descriptors
    /// and reports nothing.
    ///
    /// Call no other method until then but [`Forwarder::resume`].
    ///
    /// # Errors
    /// When a thread cannot export; everything goes on then.
    pub fn export(&self) -> io::Result<ForwarderSnapshot> {
        let replies = self.threads.ask_all(Command::Export);
        let mut snapshot = ForwarderSnapshot::default();
        let mut failure = None;
        for _ in 0..self.threads.count() {
            // A thread answers within a turn of its loop; one that has stopped
            // drops its sender.
            match replies.recv() {
                Ok(Ok(part)) => snapshot.append(part),
                Ok(Err(error)) => failure = Some(error),
                Err(_) => failure = Some(io::Error::other("a data thread has stopped")),
            }
        }
        match failure {
            None => Ok(snapshot),
            Some(error) => {
                self.resume(snapshot);
                Err(error)
            }
        }
    }

    /// Continues what another process has exported; `table` gives the routes.
    /// Clients count towards the limits, and none is refused even if there are
    /// more than the limits allow.
    pub fn import(&self, snapshot: ForwarderSnapshot, table: &Arc<PortIndex>) {
        self.set_idle_times(table.table());
        self.shared.routes.set(table.clone());
        self.resume(snapshot);
    }

    /// Continues what this process has exported, by the same table.
    pub fn resume(&self, snapshot: ForwarderSnapshot) {
        let mut shares: Vec<WorkerSnapshot> = Vec::new();
        shares.resize_with(self.threads.count(), WorkerSnapshot::default);
        let mut open = BTreeSet::new();
        let mut draining = Vec::new();
        for port in snapshot.ports {
            if port.is_draining {
                draining.push(port.port);
            }
            open.extend((!port.is_draining).then(|| (port.port, port.transport())));
            shares[self.threads.owner(port.port)].ports.push(port);
        }
        let (tcp, udp) = (&self.shared.tcp_quota, &self.shared.udp_quota);
        for connection in snapshot.connections {
            let port = connection.port;
            let client = getpeername(&connection.client).ok().flatten();
            let client = client.and_then(|client| SocketAddr::try_from(client).ok());
            let permit = client.map(|client| tcp.import(SourceNetwork::of(client.ip()), port));
            let share = &mut shares[self.threads.owner(port)];
            share.connections.push((connection, permit));
        }
        for flow in snapshot.flows {
            let permit = udp.import(SourceNetwork::of(flow.client.ip()), flow.port);
            shares[self.threads.owner(flow.port)]
                .flows
                .push((flow, permit));
        }
        for client in snapshot.clients {
            let (quota, port, address) = match &client {
                ClientSnapshot::Tcp { port, address, .. } => (tcp, *port, *address),
                ClientSnapshot::Udp { port, address, .. } => (udp, *port, *address),
            };
            let permit = quota.import(SourceNetwork::of(address.ip()), port);
            shares[self.threads.owner(port)]
                .clients
                .push((client, permit));
        }
        self.shared.draining_ports.lock().extend(draining);
        self.set_limits(&open);
        *self.open.lock() = open;
        for (index, share) in shares.into_iter().enumerate() {
            self.threads.send(index, Command::Import(Box::new(share)));
        }
    }
}
