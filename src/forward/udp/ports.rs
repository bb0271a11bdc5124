//! The UDP ports of a thread, and their draining.

use std::collections::{HashMap, HashSet};
use std::net::UdpSocket;
use std::sync::Arc;

use parking_lot::Mutex;
use quinn_udp::UdpSocketState;
use rustix::event::epoll::EventFlags;

use super::addresses::AddressPair;
use super::port::Port;
use crate::forward::io::{EventSource, Io};
use crate::forward::slab::Key;
use crate::forward::snapshot::PortSnapshot;
use crate::table::ListenPort;

/// UDP ports that the table no longer has and whose flows go on. A thread
/// takes a port out when it has closed it, control when it opens it again.
pub(in crate::forward) type DrainingPorts = Arc<Mutex<HashSet<ListenPort>>>;

/// Open UDP ports, some of which may drain.
#[derive(Debug)]
pub(super) struct Ports {
    ports: HashMap<ListenPort, Port>,
    /// Ports that the table no longer has, until their flows have ended.
    draining: Vec<ListenPort>,
    /// The draining ports of all threads, shared with control.
    all_draining: DrainingPorts,
}

impl Ports {
    pub(super) fn new(all_draining: DrainingPorts) -> Self {
        Self {
            ports: HashMap::new(),
            draining: Vec::new(),
            all_draining,
        }
    }

    pub(super) fn open(
        &mut self,
        number: ListenPort,
        socket: UdpSocket,
        state: UdpSocketState,
        io: &Io,
    ) -> rustix::io::Result<()> {
        let source = EventSource::UdpPort.of_port(number);
        // A socket that cannot be watched is closed, so that the next try can bind.
        io.watch(&socket, source, EventFlags::IN)?;
        self.ports.insert(number, Port::new(socket, state));
        Ok(())
    }

    pub(super) fn get(&self, number: ListenPort) -> Option<&Port> {
        self.ports.get(&number)
    }

    pub(super) fn get_mut(&mut self, number: ListenPort) -> Option<&mut Port> {
        self.ports.get_mut(&number)
    }

    /// The flow between `addresses` on a port.
    pub(super) fn flow_of(&self, number: ListenPort, addresses: AddressPair) -> Option<Key> {
        self.ports.get(&number)?.flows.get(&addresses).copied()
    }

    /// Takes no new flows on a port, and closes it when the last one has ended.
    pub(super) fn drain(&mut self, number: ListenPort, io: &mut Io) {
        let Some(port) = self.ports.get_mut(&number) else {
            return;
        };
        if port.flows.is_empty() {
            self.ports.remove(&number);
            return;
        }
        self.all_draining.lock().insert(number);
        self.keep_draining(number, io);
    }

    /// Drains a port that control knows as draining.
    pub(super) fn keep_draining(&mut self, number: ListenPort, io: &mut Io) {
        if let Some(port) = self.ports.get_mut(&number) {
            port.is_draining = true;
            self.draining.push(number);
            io.schedule();
        }
    }

    /// The table has a draining port again.
    pub(super) fn reopen(&mut self, number: ListenPort) {
        self.draining.retain(|draining| *draining != number);
        if let Some(port) = self.ports.get_mut(&number) {
            port.is_draining = false;
        }
    }

    pub(super) fn has_draining(&self) -> bool {
        !self.draining.is_empty()
    }

    /// Closes draining ports without flows.
    pub(super) fn tick(&mut self) {
        // Control holds the lock while it opens ports: they can wait a tick.
        let Some(mut all_draining) = self.all_draining.try_lock() else {
            return;
        };
        let ports = &mut self.ports;
        self.draining.retain(|number| {
            let port = ports.get(number);
            let has_flows = port.is_some_and(|port| !port.flows.is_empty());
            // A port that is no longer in the set is about to be reopened.
            let is_over = !has_flows && all_draining.remove(number);
            if is_over {
                ports.remove(number);
            }
            !is_over
        });
    }

    /// Takes out all ports.
    pub(super) fn export(&mut self) -> impl Iterator<Item = PortSnapshot> {
        self.draining.clear();
        self.ports.drain().map(|(number, port)| PortSnapshot {
            port: number,
            is_draining: port.is_draining,
            listener: port.into_listener(),
        })
    }
}
