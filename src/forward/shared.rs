//! What all data threads share with control.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::counters::Counters;
use super::quota::ClientQuota;
use super::routes::Routes;
use super::timers::IdleTimes;
use super::udp::ports::DrainingPorts;

/// What all data threads share with control. Clones share the same.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    /// The number of data threads.
    pub(super) threads: usize,
    pub(super) draining_ports: DrainingPorts,
    pub(super) routes: Arc<Routes>,
    pub(super) idle_times: Arc<IdleTimes>,
    pub(super) counters: Arc<Counters>,
    pub(super) tcp_quota: Arc<ClientQuota>,
    pub(super) udp_quota: Arc<ClientQuota>,
    /// Most UDP flows of a thread.
    pub(super) flow_share: Arc<AtomicU32>,
    /// Time without a sign of life after which a TCP peer is given up.
    pub(super) peer_timeout: Duration,
}

impl Shared {
    pub(super) fn new(threads: usize, peer_timeout: Duration) -> Self {
        Self {
            threads,
            draining_ports: DrainingPorts::default(),
            routes: Arc::default(),
            idle_times: Arc::default(),
            counters: Arc::default(),
            tcp_quota: ClientQuota::new(),
            udp_quota: ClientQuota::new(),
            flow_share: Arc::default(),
            peer_timeout,
        }
    }
}
