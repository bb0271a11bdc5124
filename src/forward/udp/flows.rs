//! The flows of a thread, from the socket that is connected to the server to
//! the reported end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use fastrand::Rng;
use rustix::event::epoll::EventFlags;

use super::eviction;
use super::flow::Flow;
use super::ports::Ports;
use crate::forward::counters::count;
use crate::forward::gate::{Traffic, Transport};
use crate::forward::io::{EventSource, Io};
use crate::forward::quota::ClientQuota;
use crate::forward::slab::{Key, Slab};
use crate::forward::snapshot::FlowSnapshot;

/// The flows of a thread. [`Ports`] finds them by their addresses; a change of
/// which flows there are keeps both in step.
pub(super) struct Flows {
    flows: Slab<Flow>,
    /// Most flows of this thread. Each thread has its own share, so that a flood
    /// on one port takes nothing from the ports of other threads.
    share: Arc<AtomicU32>,
    /// The places of TCP connections: where a port has one, its client lives.
    tcp_quota: Arc<ClientQuota>,
    random: Rng,
}

impl Flows {
    pub(super) fn new(share: Arc<AtomicU32>, tcp_quota: Arc<ClientQuota>) -> Self {
        Self {
            flows: Slab::default(),
            share,
            tcp_quota,
            random: Rng::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flows.len() == 0
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut Flow> {
        self.flows.get_mut(key)
    }

    /// Ends a flow if this thread has its share of them.
    pub(super) fn evict_if_full(&mut self, ports: &mut Ports, io: &mut Io) {
        let share = self.share.load(Ordering::Relaxed);
        if self.flows.len() < share as usize {
            return;
        }
        if let Some(key) = eviction::choose(&self.flows, &mut self.random) {
            count(&io.counters.evicted);
            self.end(key, ports, io);
        }
    }

    /// Takes in a flow; `None` when it cannot be watched, and has ended.
    pub(super) fn add(&mut self, flow: Flow, ports: &mut Ports, io: &mut Io) -> Option<Key> {
        let (number, addresses, session) = (flow.port, flow.addresses, flow.session);
        let key = self.flows.insert(flow);
        io.sessions.add((number, session), Transport::Udp, key);
        let source = EventSource::Flow.of_key(key);
        let flow = self.flows.get_mut(key);
        let is_watched =
            flow.is_some_and(|flow| io.watch(&flow.server, source, EventFlags::IN).is_ok());
        if let Some(port) = ports.get_mut(number) {
            port.flows.insert(addresses, key);
        }
        io.schedule();
        if !is_watched {
            count(&io.counters.connect_failed);
            self.end(key, ports, io);
            return None;
        }
        Some(key)
    }

    /// Ends a flow whose server does not listen, as ICMP reports. If the server has
    /// never replied, nothing is known to have reached it.
    pub(super) fn end_refused(&mut self, key: Key, ports: &mut Ports, io: &mut Io) {
        count(&io.counters.connect_refused);
        if let Some(flow) = self.flows.get_mut(key)
            && flow.traffic.downstream_bytes == 0
        {
            flow.traffic = Traffic::default();
        }
        self.end(key, ports, io);
    }

    /// Ends a flow: the only way out of the flows, except for an export.
    pub(super) fn end(&mut self, key: Key, ports: &mut Ports, io: &mut Io) {
        let Some(flow) = self.flows.remove(key) else {
            return;
        };
        if let Some(port) = ports.get_mut(flow.port) {
            port.flows.remove(&flow.addresses);
        }
        let (number, session, traffic) = (flow.port, flow.session, flow.traffic);
        if traffic.downstream_bytes == 0 {
            count(&io.counters.unanswered);
        }
        io.sessions.remove((number, session), Transport::Udp, key);
        // Closed before it is reported: a free port has no flow.
        drop(flow);
        io.report(number, session, traffic);
    }

    /// Ends the flows of silent clients.
    pub(super) fn tick(&mut self, ports: &mut Ports, io: &mut Io) {
        if let Some(idle) = io.idle_times.udp() {
            let is_late = |since| io.now.duration_since(since) >= idle;
            // The kernel probes whether the peer of a TCP connection lives.
            let has_connection = |flow: &Flow| self.tcp_quota.live_on(flow.port) > 0;
            let late = self.flows.iter().filter(|(_, flow)| {
                is_late(flow.client_active)
                    && (is_late(flow.server_active) || !has_connection(flow))
            });
            let late: Vec<Key> = late.map(|(key, _)| key).collect();
            for key in late {
                count(&io.counters.idle);
                self.end(key, ports, io);
            }
        }
    }

    /// Takes out all flows.
    pub(super) fn export(&mut self, io: &Io) -> Vec<FlowSnapshot> {
        let flows = self.flows.drain();
        flows.map(|flow| flow.export(io.now)).collect()
    }
}
