//! The thread's part of a hand-over: giving everything away, and going on with
//! what another one gave.

use std::io;

use super::{Pending, Worker, new_epoll};
use crate::forward::admission::Permit;
use crate::forward::counters::count;
use crate::forward::listeners::Listener;
use crate::forward::snapshot::{ClientSnapshot, ForwarderSnapshot, PortSnapshot, WorkerSnapshot};
use crate::forward::tcp::Connection;
use crate::forward::udp::{self, Flow};
use crate::forward::{Decision, Transport};

impl Worker {
    /// Gives everything away.
    ///
    /// # Errors
    /// When there is no descriptor for a new epoll; nothing has changed then.
    pub(super) fn hand_over(&mut self) -> io::Result<ForwarderSnapshot> {
        self.stop_gathering();
        // In the old one sockets stay registered for as long as anybody has
        // them open, and would be refused when they come back.
        self.epoll = new_epoll(&self.wake)?;
        let clients = self.parked.drain().map(|(_, (_, parked))| match parked {
            Pending::Tcp {
                port,
                client,
                address,
                ..
            } => ClientSnapshot::Tcp {
                port,
                socket: client,
                address,
            },
            Pending::Udp(parked) => parked.hand_over(),
        });
        let clients = clients.collect();
        let mut connections = self.hand_over_closing();
        let (now, pipes) = (self.now, &mut self.scratch.pipes);
        let live = self.connections.drain();
        connections.extend(live.map(|connection| connection.hand_over(now, pipes)));
        let flows = self.flows.drain().map(|flow| flow.hand_over(now));
        let tcp = self.tcp_ports.drain().map(|(port, listener)| PortSnapshot {
            port,
            is_draining: false,
            listener: Listener::Tcp(listener),
        });
        let udp = self.udp_ports.drain().map(|(number, port)| PortSnapshot {
            port: number,
            is_draining: port.is_draining,
            listener: port.into_listener(),
        });
        let handed = ForwarderSnapshot {
            connections,
            flows: flows.collect(),
            ports: tcp.chain(udp).collect(),
            clients,
        };
        self.draining.clear();
        self.sessions.clear();
        self.ready.clear();
        self.unguarded.clear();
        self.paused = None;
        Ok(handed)
    }

    /// Goes on with a share of what was handed over.
    pub(super) fn take_over(&mut self, share: WorkerSnapshot) {
        for port in share.ports {
            let (number, is_draining) = (port.port, port.is_draining);
            self.listen(number, port.listener);
            if let Some((port, transport, error)) = self.unwatched.take() {
                // Nobody can give it back any more.
                tracing::error!(%port, ?transport, %error, "failed to watch a connection port that was taken over");
            }
            if is_draining {
                self.keep_draining(number);
            }
        }
        for (connection, permit) in share.connections {
            let is_broken = connection.is_broken;
            let connection = Connection::take_over(connection, permit, self.now);
            match is_broken {
                true => self.close_broken(connection),
                false => self.watch_connection(connection),
            }
        }
        for (flow, permit) in share.flows {
            let (port, session, traffic) = (flow.port, flow.session, flow.traffic);
            match Flow::take_over(flow, permit, self.now) {
                Some(flow) => drop(self.watch_flow(flow)),
                None => self.report(port, session, traffic),
            }
        }
        for (client, permit) in share.clients {
            self.meet_again(client, permit);
        }
    }

    /// A client that waited is met as if it had just come.
    fn meet_again(&mut self, client: ClientSnapshot, permit: Permit) {
        match client {
            ClientSnapshot::Tcp {
                port,
                socket,
                address,
            } => {
                let verdict = self.gate.admit(port, Transport::Tcp, address);
                self.admit(port, socket, address, verdict, permit);
            }
            ClientSnapshot::Udp {
                port,
                address,
                local,
                datagrams,
            } => {
                let parked = udp::Pending {
                    port,
                    client: address,
                    local,
                    datagrams: datagrams.into_iter().map(Vec::into_boxed_slice).collect(),
                    permit,
                };
                match self.gate.admit(port, Transport::Udp, address) {
                    Decision::Admit(session) => self.unpark_flow(parked, session),
                    Decision::Refuse => count(&self.counters.no_session),
                    Decision::Ask => self.park_flow(parked),
                }
            }
        }
    }
}
