//! The thread's UDP part: clients' flows.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::epoll::{self, EventFlags};

use super::{Pending, Source, Worker};
use crate::forward::admission::{self, Permit};
use crate::forward::counters::{add, count};
use crate::forward::slab::Key;
use crate::forward::udp::{self, Flow, ReceiveBatchSize, Run};
use crate::forward::{Decision, SessionKey, Traffic, Transport};
use crate::table::ListenPort;

/// Batches from one socket before others get their turn. All sockets here are
/// level-triggered, so what is left is reported again.
const BATCHES_PER_TURN: usize = 4;

impl Worker {
    /// Takes no new flows on a port, and closes it when the last one has ended.
    pub(super) fn drain_udp_port(&mut self, number: ListenPort) {
        let Some(port) = self.udp_ports.get_mut(&number) else {
            return;
        };
        if port.flows.is_empty() {
            self.udp_ports.remove(&number);
            return;
        }
        self.draining_ports.lock().insert(number);
        self.keep_draining(number);
    }

    pub(super) fn keep_draining(&mut self, number: ListenPort) {
        if let Some(port) = self.udp_ports.get_mut(&number) {
            port.is_draining = true;
            self.draining.push(number);
            self.schedule();
        }
    }

    /// The table has a draining port again.
    pub(super) fn reopen(&mut self, number: ListenPort) {
        self.draining.retain(|draining| *draining != number);
        if let Some(port) = self.udp_ports.get_mut(&number) {
            port.is_draining = false;
        }
    }

    /// Closes draining ports without flows.
    pub(super) fn close_drained(&mut self) {
        // Control holds the lock while it opens ports: they can wait a tick.
        let Some(mut ports) = self.draining_ports.try_lock() else {
            return;
        };
        let udp_ports = &mut self.udp_ports;
        self.draining.retain(|number| {
            let has_flows = udp_ports
                .get(number)
                .is_some_and(|port| !port.flows.is_empty());
            // A port that is no longer in the set is about to be reopened.
            let is_over = !has_flows && ports.remove(number);
            if is_over {
                udp_ports.remove(number);
            }
            !is_over
        });
    }

    /// Takes in datagrams of a port, a few batches at most. Whether there were
    /// any.
    pub(super) fn receive_from_clients(&mut self, number: ListenPort) -> bool {
        let mut batch = std::mem::take(&mut self.batch);
        let mut has_received = false;
        for _ in 0..BATCHES_PER_TURN {
            let Some(port) = self.udp_ports.get_mut(&number) else {
                break;
            };
            let (received, is_more) = match port.receive(&mut batch) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error of a reply: that client's flow will expire.
                Err(_) => continue,
            };
            has_received = true;
            let mut next = 0;
            while next < received {
                let (run, after) = batch.run(next, received);
                self.handle_run(number, run);
                next = after;
            }
            if !is_more {
                break;
            }
        }
        self.batch = batch;
        has_received
    }

    fn handle_run(&mut self, number: ListenPort, run: Run<'_>) {
        let flow_of = |worker: &Self| {
            let port = worker.udp_ports.get(&number)?;
            port.flows.get(&run.sender).copied()
        };
        if let Some(flow) = flow_of(self) {
            return self.send_upstream(flow, run);
        }
        for datagram in run.datagrams() {
            let one = Run {
                bytes: datagram,
                stride: datagram.len(),
                ..run
            };
            match flow_of(self) {
                Some(flow) => self.send_upstream(flow, one),
                None => self.meet_client(number, one),
            }
        }
    }

    fn send_upstream(&mut self, key: Key, run: Run<'_>) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        let Some(port) = self.udp_ports.get(&flow.port) else {
            return;
        };
        flow.active = self.now;
        flow.is_assured |= flow.traffic.downstream_bytes > 0;
        let sent = port.send_upstream(flow, run);
        self.scratch.carried.upstream_bytes += sent.bytes;
        add(&self.counters.datagrams_dropped, sent.dropped);
        if sent.is_gone {
            count(&self.counters.connect_refused);
            self.end_flow(key);
        }
    }

    /// A datagram of a client that has no flow.
    fn meet_client(&mut self, number: ListenPort, run: Run<'_>) {
        let (client, local, datagram) = (run.sender, run.local, run.bytes);
        let Some(port) = self.udp_ports.get(&number) else {
            return;
        };
        if let Some(ticket) = port.parked.get(&client) {
            if let Some((_, Pending::Udp(parked))) = self.parked.get_mut(ticket) {
                parked.keep(datagram);
            }
            return;
        }
        if port.is_draining {
            return count(&self.counters.no_session);
        }
        if self.leads_back(port, number, run) {
            return count(&self.counters.loops);
        }
        let source = admission::Source::of(client.ip());
        let permit = match self.udp_admission.admit(source, number) {
            Ok(permit) => permit,
            Err(refused) => return count(self.counters.refused(refused)),
        };
        match self.gate.admit(number, Transport::Udp, client) {
            Decision::Admit(session) => {
                if let Some(flow) = self.open_flow(number, client, local, session, permit) {
                    self.send_upstream(flow, run);
                }
            }
            Decision::Refuse => count(&self.counters.no_session),
            Decision::Ask => {
                let mut parked = udp::Pending {
                    port: number,
                    client,
                    local,
                    datagrams: Vec::new(),
                    permit,
                };
                parked.keep(datagram);
                self.park_flow(parked);
            }
        }
    }

    /// Whether a datagram's sender would answer for ever: a connection port, or
    /// the server that it would go to.
    fn leads_back(&self, port: &udp::Port, number: ListenPort, run: Run<'_>) -> bool {
        let sender = SocketAddr::new(run.sender.ip().to_canonical(), run.sender.port());
        let route = self.routes.get(number);
        if route.is_some_and(|route| route.target == sender) {
            return true;
        }
        let is_open =
            |own: ListenPort| self.routes.has_udp(own) || self.udp_ports.contains_key(&own);
        port.is_at(sender.ip(), run.local) && ListenPort::new(sender.port()).is_some_and(is_open)
    }

    pub(super) fn park_flow(&mut self, parked: udp::Pending) {
        let (number, client) = (parked.port, parked.client);
        let ticket = self.park(Pending::Udp(parked), number, Transport::Udp, client);
        if let Some((ticket, port)) = ticket.zip(self.udp_ports.get_mut(&number)) {
            port.parked.insert(client, ticket);
        }
        self.schedule();
    }

    pub(super) fn unpark_flow(&mut self, parked: udp::Pending, session: SessionKey) {
        let udp::Pending {
            port: number,
            client,
            local,
            datagrams,
            permit,
        } = parked;
        if let Some(port) = self.udp_ports.get_mut(&number) {
            port.parked.remove(&client);
        }
        if let Some(flow) = self.open_flow(number, client, local, session, permit) {
            for datagram in &datagrams {
                let run = Run {
                    sender: client,
                    local,
                    bytes: datagram,
                    stride: datagram.len(),
                };
                self.send_upstream(flow, run);
            }
        }
    }

    fn open_flow(
        &mut self,
        number: ListenPort,
        client: SocketAddr,
        local: Option<IpAddr>,
        session: SessionKey,
        permit: Permit,
    ) -> Option<Key> {
        count(&self.counters.udp_opened);
        // A port may be closed while its client is parked.
        let opened = match self.routes.get(number) {
            None => Err(&self.counters.no_server),
            Some(route) => udp::connect(route.target)
                .map(|server| (server, route.target))
                .map_err(|errno| self.counters.unreachable(errno)),
        };
        let (server, target) = match opened {
            Ok(opened) => opened,
            Err(counter) => {
                count(counter);
                self.report(number, session, Traffic::default());
                return None;
            }
        };
        let flow = Flow {
            port: number,
            client,
            local,
            session,
            server,
            target,
            receive_batch_size: ReceiveBatchSize::new(),
            active: self.now,
            traffic: Traffic::default(),
            is_assured: false,
            _permit: permit,
        };
        self.make_room_for_flow();
        self.watch_flow(flow)
    }

    pub(super) fn watch_flow(&mut self, flow: Flow) -> Option<Key> {
        let (number, client, session) = (flow.port, flow.client, flow.session);
        let flow_key = self.flows.insert(flow);
        self.sessions
            .entry(session)
            .or_default()
            .push((Transport::Udp, flow_key));
        let data = Source::Flow.data(flow_key.to_bits());
        let epoll = &self.epoll;
        let is_watched = self
            .flows
            .get_mut(flow_key)
            .is_some_and(|flow| epoll::add(epoll, &flow.server, data, EventFlags::IN).is_ok());
        if let Some(port) = self.udp_ports.get_mut(&number) {
            port.flows.insert(client, flow_key);
        }
        self.schedule();
        if !is_watched {
            count(&self.counters.connect_failed);
            self.end_flow(flow_key);
            return None;
        }
        Some(flow_key)
    }

    pub(super) fn receive_from_server(&mut self, key: Key) {
        let mut batch = std::mem::take(&mut self.batch);
        for _ in 0..BATCHES_PER_TURN {
            let Some(flow) = self.flows.get_mut(key) else {
                break;
            };
            let Some(port) = self.udp_ports.get(&flow.port) else {
                break;
            };
            let (received, is_more) = match port.receive_from_server(flow, &mut batch) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    // ICMP: the server does not listen any more.
                    count(&self.counters.connect_refused);
                    self.end_flow(key);
                    break;
                }
            };
            flow.active = self.now;
            let mut next = 0;
            while next < received {
                let (run, after) = batch.run(next, received);
                let length = run.bytes.len() as u64;
                flow.traffic.downstream_bytes += length;
                self.scratch.carried.downstream_bytes += length;
                add(
                    &self.counters.datagrams_dropped,
                    port.reply(flow, run).dropped,
                );
                next = after;
            }
            if !is_more {
                break;
            }
        }
        self.batch = batch;
    }

    pub(super) fn end_flow(&mut self, key: Key) {
        let Some(Flow {
            port: number,
            client,
            session,
            server,
            traffic,
            ..
        }) = self.flows.remove(key)
        else {
            return;
        };
        if let Some(port) = self.udp_ports.get_mut(&number) {
            port.flows.remove(&client);
        }
        self.leave_session(session, Transport::Udp, key);
        drop(server);
        self.report(number, session, traffic);
    }

    pub(super) fn tick_flows(&mut self) {
        let idle = Duration::from_secs(self.idle.udp.load(Ordering::Relaxed));
        let is_late = |flow: &Flow| !idle.is_zero() && self.now.duration_since(flow.active) >= idle;
        let late: Vec<Key> = self
            .flows
            .iter()
            .filter(|(_, flow)| is_late(flow))
            .map(|(key, _)| key)
            .collect();
        for key in late {
            count(&self.counters.idle);
            self.end_flow(key);
        }
    }
}
