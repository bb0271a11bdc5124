//! The datagrams of a thread: which flow each belongs to, and what becomes of
//! one that has none. The states of flows are drawn in the parent.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use quinn_udp::UdpSocketState;

use super::addresses::AddressPair;
use super::batch::{Batch, ReceiveBatchSize, Run};
use super::flow::{self, Flow};
use super::flows::Flows;
use super::port::Port;
use super::ports::{DrainingPorts, Ports};
use super::reports::Report;
use crate::forward::counters::{add, count};
use crate::forward::gate::{Decision, SessionKey, Traffic, Transport};
use crate::forward::io::Io;
use crate::forward::pending::{Client, PendingClients, UdpClient};
use crate::forward::quota::{ClientQuota, Permit, SourceNetwork};
use crate::forward::slab::Key;
use crate::forward::snapshot::{FlowSnapshot, PortSnapshot};
use crate::table::ListenPort;

/// Batches from one socket before others get their turn. All sockets here are
/// level-triggered, so what is left is reported again.
const BATCHES_PER_TURN: usize = 4;

/// ICMP reports on one socket before others get their turn.
const REPORTS_PER_TURN: usize = 64;

/// A thread's UDP part.
pub(in crate::forward) struct Datagrams {
    ports: Ports,
    flows: Flows,
    quota: Arc<ClientQuota>,
    batch: Batch,
}

impl Datagrams {
    pub(in crate::forward) fn new(
        quota: Arc<ClientQuota>,
        tcp_quota: Arc<ClientQuota>,
        flow_share: Arc<AtomicU32>,
        draining_ports: DrainingPorts,
    ) -> Self {
        Self {
            ports: Ports::new(draining_ports),
            flows: Flows::new(flow_share, tcp_quota),
            quota,
            batch: Batch::new(),
        }
    }

    pub(in crate::forward) fn has_deadlines(&self) -> bool {
        !self.flows.is_empty() || self.ports.has_draining()
    }

    pub(in crate::forward) fn open_port(
        &mut self,
        number: ListenPort,
        socket: UdpSocket,
        state: UdpSocketState,
        io: &Io,
    ) -> rustix::io::Result<()> {
        self.ports.open(number, socket, state, io)
    }

    /// Takes no new flows on a port, and closes it when the last one has ended.
    pub(in crate::forward) fn drain_port(&mut self, number: ListenPort, io: &mut Io) {
        self.ports.drain(number, io);
    }

    /// Drains an imported port that control knows as draining.
    pub(in crate::forward) fn keep_draining(&mut self, number: ListenPort, io: &mut Io) {
        self.ports.keep_draining(number, io);
    }

    /// The table has a draining port again.
    pub(in crate::forward) fn reopen_port(&mut self, number: ListenPort) {
        self.ports.reopen(number);
    }

    /// Receives datagrams of clients on a port, a few batches at most. Returns
    /// whether there were any.
    pub(in crate::forward) fn receive_from_clients(
        &mut self,
        number: ListenPort,
        pending: &mut PendingClients,
        io: &mut Io,
    ) -> bool {
        let mut batch = std::mem::take(&mut self.batch);
        let mut has_received = false;
        for _ in 0..BATCHES_PER_TURN {
            // The port may have been closed since it was reported.
            let Some(port) = self.ports.get_mut(number) else {
                break;
            };
            let received = match port.receive(&mut batch) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error of a reply, which is read from its queue.
                Err(_) => continue,
            };
            has_received = true;
            let mut next = 0;
            while next < received.count {
                let (run, after) = batch.run(next, received.count);
                self.handle_run(number, run, pending, io);
                next = after;
            }
            if !received.has_more {
                break;
            }
        }
        self.batch = batch;
        has_received
    }

    /// Ends the flows of clients whose host reports that their port is closed, a
    /// few at most. What is left is reported again.
    pub(in crate::forward) fn end_unreachable(&mut self, number: ListenPort, io: &mut Io) {
        for _ in 0..REPORTS_PER_TURN {
            let report = self.ports.get(number).and_then(Port::receive_report);
            let Some(report) = report else {
                break;
            };
            if let Report::Closed(addresses) = report
                && let Some(flow) = self.ports.flow_of(number, addresses)
            {
                count(&io.counters.client_gone);
                self.flows.end(flow, &mut self.ports, io);
            }
        }
    }

    fn handle_run(
        &mut self,
        number: ListenPort,
        run: Run<'_>,
        pending: &mut PendingClients,
        io: &mut Io,
    ) {
        if let Some(flow) = self.ports.flow_of(number, run.addresses) {
            return self.send_upstream(flow, run, io);
        }
        for datagram in run.datagrams() {
            let single = Run {
                bytes: datagram,
                stride: datagram.len(),
                ..run
            };
            match self.ports.flow_of(number, run.addresses) {
                Some(flow) => self.send_upstream(flow, single, io),
                None => self.meet(number, single, pending, io),
            }
        }
    }

    fn send_upstream(&mut self, key: Key, run: Run<'_>, io: &mut Io) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        let Some(port) = self.ports.get(flow.port) else {
            return;
        };
        flow.client_active = io.now;
        flow.is_assured |= flow.traffic.downstream_bytes > 0;
        let sent = port.send_upstream(flow, run);
        io.scratch.carried.upstream_bytes += sent.bytes;
        add(&io.counters.datagrams_dropped, sent.dropped);
        if sent.is_gone {
            self.flows.end_refused(key, &mut self.ports, io);
        }
    }

    /// Asks the gate about a client that has no flow, and does what it decides
    /// with its datagram.
    fn meet(
        &mut self,
        number: ListenPort,
        run: Run<'_>,
        pending: &mut PendingClients,
        io: &mut Io,
    ) {
        let Some(port) = self.ports.get(number) else {
            return;
        };
        if pending.keep_datagram(number, run.addresses, run.bytes) {
            return;
        }
        if port.is_draining {
            return count(&io.counters.no_session);
        }
        if self.leads_back(port, number, run, io) {
            return count(&io.counters.loops);
        }
        let AddressPair { client: sender, .. } = run.addresses;
        let source = SourceNetwork::of(sender.ip());
        let permit = match self.quota.acquire(source, number) {
            Ok(permit) => permit,
            Err(exceeded) => return count(io.counters.exceeded(exceeded)),
        };
        let mut client = UdpClient {
            port: number,
            addresses: run.addresses,
            datagrams: Vec::new(),
            permit,
        };
        match io.gate.admit(number, Transport::Udp, sender) {
            Decision::Admit(session) => {
                if let Some(flow) = self.open_flow(client, session, io) {
                    self.send_upstream(flow, run, io);
                }
            }
            Decision::Refuse => count(&io.counters.no_session),
            Decision::Ask => {
                client.datagrams.push(run.bytes.into());
                pending.ask(Client::Udp(client), io);
            }
        }
    }

    /// Asks the gate about a client whose datagrams are kept.
    pub(in crate::forward) fn meet_again(
        &mut self,
        client: UdpClient,
        pending: &mut PendingClients,
        io: &mut Io,
    ) {
        match io
            .gate
            .admit(client.port, Transport::Udp, client.addresses.client)
        {
            Decision::Admit(session) => self.open(client, session, io),
            Decision::Refuse => count(&io.counters.no_session),
            Decision::Ask => pending.ask(Client::Udp(client), io),
        }
    }

    /// Whether a datagram's sender would answer for ever: a connection port, or
    /// the server that the datagram would go to.
    fn leads_back(&self, port: &Port, number: ListenPort, run: Run<'_>, io: &Io) -> bool {
        let AddressPair { client, local } = run.addresses;
        let sender = SocketAddr::new(client.ip().to_canonical(), client.port());
        let route = io.routes.get(number);
        if route.is_some_and(|route| route.target == sender) {
            return true;
        }
        let is_open = |own: ListenPort| io.routes.has_udp(own) || self.ports.get(own).is_some();
        port.is_at(sender.ip(), local) && ListenPort::new(sender.port()).is_some_and(is_open)
    }

    /// Opens a flow for an admitted client and sends its first datagrams.
    pub(in crate::forward) fn open(
        &mut self,
        mut client: UdpClient,
        session: SessionKey,
        io: &mut Io,
    ) {
        let datagrams = std::mem::take(&mut client.datagrams);
        let addresses = client.addresses;
        if let Some(flow) = self.open_flow(client, session, io) {
            for datagram in &datagrams {
                let run = Run {
                    addresses,
                    bytes: datagram,
                    stride: datagram.len(),
                };
                self.send_upstream(flow, run, io);
            }
        }
    }

    fn open_flow(&mut self, client: UdpClient, session: SessionKey, io: &mut Io) -> Option<Key> {
        count(&io.counters.udp_opened);
        // A port may be closed while its client is pending.
        let route = io.routes.get(client.port);
        let opened = match route {
            None => Err(&io.counters.no_server),
            Some(route) => flow::open(route.target, route.replies)
                .map(|server| (server, route))
                .map_err(|errno| io.counters.unreachable(errno)),
        };
        let (server, route) = match opened {
            Ok(opened) => opened,
            Err(counter) => {
                count(counter);
                io.report(client.port, session, Traffic::default());
                return None;
            }
        };
        let flow = Flow {
            port: client.port,
            addresses: client.addresses,
            session,
            server,
            target: route.target,
            replies: route.replies,
            receive_batch_size: ReceiveBatchSize::new(),
            client_active: io.now,
            server_active: io.now,
            traffic: Traffic::default(),
            is_assured: false,
            _permit: client.permit,
        };
        self.flows.evict_if_full(&mut self.ports, io);
        self.flows.add(flow, &mut self.ports, io)
    }

    /// Receives datagrams of a flow's server, a few batches at most.
    pub(in crate::forward) fn receive_from_server(&mut self, key: Key, io: &mut Io) {
        let mut batch = std::mem::take(&mut self.batch);
        for _ in 0..BATCHES_PER_TURN {
            let Some(flow) = self.flows.get_mut(key) else {
                break;
            };
            let Some(port) = self.ports.get(flow.port) else {
                break;
            };
            let received = match port.receive_from_server(flow, &mut batch) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.flows.end_refused(key, &mut self.ports, io);
                    break;
                }
            };
            let mut next = 0;
            while next < received.count {
                let (run, after) = batch.run(next, received.count);
                next = after;
                if !flow.takes_from(run.addresses.client) {
                    add(&io.counters.datagrams_of_others, run.count());
                    continue;
                }
                flow.server_active = io.now;
                let length = run.bytes.len() as u64;
                flow.traffic.downstream_bytes += length;
                io.scratch.carried.downstream_bytes += length;
                let sent = port.reply(flow, run);
                add(&io.counters.datagrams_dropped, sent.dropped);
            }
            if !received.has_more {
                break;
            }
        }
        self.batch = batch;
    }

    /// Ends a flow whose session is cut.
    pub(in crate::forward) fn cut(&mut self, key: Key, io: &mut Io) {
        count(&io.counters.cut);
        self.flows.end(key, &mut self.ports, io);
    }

    /// Ends the flows of silent clients, and closes the ports that have drained.
    pub(in crate::forward) fn tick(&mut self, io: &mut Io) {
        self.flows.tick(&mut self.ports, io);
        self.ports.tick();
    }

    /// Takes out all flows.
    pub(in crate::forward) fn export(&mut self, io: &Io) -> Vec<FlowSnapshot> {
        self.flows.export(io)
    }

    /// Takes out all ports.
    pub(in crate::forward) fn export_ports(&mut self) -> impl Iterator<Item = PortSnapshot> {
        self.ports.export()
    }

    /// Continues an exported flow.
    pub(in crate::forward) fn import(
        &mut self,
        snapshot: FlowSnapshot,
        permit: Permit,
        io: &mut Io,
    ) {
        let (port, session, traffic) = (snapshot.port, snapshot.session, snapshot.traffic);
        match Flow::import(snapshot, permit, io.now) {
            Some(flow) => drop(self.flows.add(flow, &mut self.ports, io)),
            None => io.report(port, session, traffic),
        }
    }
}
