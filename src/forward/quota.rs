//! Quotas of clients: how many there may be altogether, of one source, and on
//! one connection port.
//!
//! All data threads share one quota per transport, since a source uses ports of
//! any thread. A client costs three counts when it comes and when it leaves,
//! the source's behind one of [`SHARDS`] locks. A source without clients is not
//! remembered, so the table is never larger than the number of clients.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use std::hash::{BuildHasher, RandomState};

use crate::table::ListenPort;

/// Locks that sources are spread over: enough that data threads seldom meet.
const SHARDS: usize = 32;

/// The network that a client counts for: an IPv4 address or an IPv6 /64, from
/// which one subscriber can choose addresses (RFC 6177).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SourceNetwork(u64);

impl SourceNetwork {
    pub(super) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(u64::from(u32::from(address))),
            IpAddr::V6(address) => {
                let prefix = u128::from(address) >> 64;
                Self(u64::try_from(prefix).expect("64 bits are left"))
            }
        }
    }
}

/// Most clients at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Of UDP, the number of flows above which one is evicted. The quota itself
    /// refuses no one then.
    pub(super) total: u32,
    pub(super) per_source: u32,
    pub(super) per_port: u32,
}

/// The bound that a client would exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QuotaExceeded {
    Total,
    Source,
    Port,
}

/// The live clients of one transport, and how many there may be.
#[derive(Debug)]
pub(super) struct ClientQuota {
    total: AtomicU32,
    per_source: AtomicU32,
    per_port: AtomicU32,
    live: AtomicU32,
    /// Live clients by port number. Memory of ports that are not used is never
    /// touched.
    ports: Box<[AtomicU32]>,
    sources: Vec<Mutex<HashMap<SourceNetwork, u32>>>,
    hasher: RandomState,
}

/// A client's place in the quota, given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    quota: Arc<ClientQuota>,
    source: SourceNetwork,
    port: ListenPort,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.quota.release(self.source, self.port);
    }
}

impl ClientQuota {
    /// A quota without any place until its bounds are set.
    pub(super) fn new() -> Arc<Self> {
        let ports = 1 + usize::from(u16::MAX);
        Arc::new(Self {
            total: AtomicU32::new(0),
            per_source: AtomicU32::new(0),
            per_port: AtomicU32::new(0),
            live: AtomicU32::new(0),
            ports: std::iter::repeat_with(AtomicU32::default)
                .take(ports)
                .collect(),
            sources: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
        })
    }

    /// Sets the bounds. Clients above them keep their places.
    pub(super) fn set(&self, bounds: Bounds) {
        self.total.store(bounds.total, Ordering::Relaxed);
        self.per_source.store(bounds.per_source, Ordering::Relaxed);
        self.per_port.store(bounds.per_port, Ordering::Relaxed);
    }

    /// The number of clients.
    pub(super) fn live(&self) -> u32 {
        self.live.load(Ordering::Relaxed)
    }

    /// The number of clients on `port`.
    pub(super) fn live_on(&self, port: ListenPort) -> u32 {
        self.port(port).load(Ordering::Relaxed)
    }

    /// A place for a client of `source` on `port`, or the bound that it would
    /// exceed.
    pub(super) fn acquire(
        self: &Arc<Self>,
        source: SourceNetwork,
        port: ListenPort,
    ) -> Result<Permit, QuotaExceeded> {
        if !take(&self.live, &self.total) {
            return Err(QuotaExceeded::Total);
        }
        if !take(self.port(port), &self.per_port) {
            give(&self.live);
            return Err(QuotaExceeded::Port);
        }
        let mut sources = self.shard(source).lock();
        let most = self.per_source.load(Ordering::Relaxed);
        let count = sources.get(&source).copied().unwrap_or(0);
        if count >= most {
            give(&self.live);
            give(self.port(port));
            return Err(QuotaExceeded::Source);
        }
        sources.insert(source, count + 1);
        drop(sources);
        Ok(self.permit(source, port))
    }

    /// A place for a client that had one in another process, whatever the
    /// bounds.
    pub(super) fn import(self: &Arc<Self>, source: SourceNetwork, port: ListenPort) -> Permit {
        self.live.fetch_add(1, Ordering::Relaxed);
        self.port(port).fetch_add(1, Ordering::Relaxed);
        *self.shard(source).lock().entry(source).or_default() += 1;
        self.permit(source, port)
    }

    fn permit(self: &Arc<Self>, source: SourceNetwork, port: ListenPort) -> Permit {
        Permit {
            quota: self.clone(),
            source,
            port,
        }
    }

    fn release(&self, source: SourceNetwork, port: ListenPort) {
        give(&self.live);
        give(self.port(port));
        let mut sources = self.shard(source).lock();
        if let Some(count) = sources.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&source);
            }
        }
    }

    fn port(&self, port: ListenPort) -> &AtomicU32 {
        &self.ports[usize::from(port.get())]
    }

    fn shard(&self, source: SourceNetwork) -> &Mutex<HashMap<SourceNetwork, u32>> {
        let hash = self.hasher.hash_one(source);
        &self.sources[usize::try_from(hash % SHARDS as u64).expect("there are few shards")]
    }
}

/// Counts one more, unless there are `most` already. Returns whether it did.
fn take(count: &AtomicU32, most: &AtomicU32) -> bool {
    let most = most.load(Ordering::Relaxed);
    let more = |count| (count < most).then(|| count + 1);
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
        .is_ok()
}

fn give(count: &AtomicU32) {
    count.fetch_sub(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn port(number: u16) -> ListenPort {
        ListenPort::new(number).unwrap()
    }

    fn quota(total: u32, per_source: u32, per_port: u32) -> Arc<ClientQuota> {
        let quota = ClientQuota::new();
        quota.set(Bounds {
            total,
            per_source,
            per_port,
        });
        quota
    }

    fn remembered(quota: &ClientQuota) -> usize {
        quota.sources.iter().map(|shard| shard.lock().len()).sum()
    }

    #[test]
    fn sources_are_ipv4_addresses_and_ipv6_subnets() {
        let cases = [
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("::ffff:192.0.2.1", "::ffff:192.0.2.2", false),
            ("2001:db8::1", "2001:db8::ffff:0:0:1", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
        ];
        for (one, other, is_same) in cases {
            let source = |text: &str| SourceNetwork::of(text.parse().unwrap());
            assert_eq!(source(one) == source(other), is_same, "{one} {other}");
        }
    }

    #[test]
    fn each_bound_refuses_by_its_name() {
        let source = |last| SourceNetwork::of(IpAddr::from([192, 0, 2, last]));
        for (bounds, expected) in [
            ((1, 9, 9), QuotaExceeded::Total),
            ((9, 1, 9), QuotaExceeded::Source),
            ((9, 9, 1), QuotaExceeded::Port),
            ((0, 9, 9), QuotaExceeded::Total),
        ] {
            let quota = quota(bounds.0, bounds.1, bounds.2);
            let _first = quota.acquire(source(1), port(20_000));
            let refused = quota.acquire(source(1), port(20_000)).unwrap_err();
            assert_eq!(refused, expected, "{bounds:?}");
        }
        let quota = quota(9, 1, 1);
        let _first = quota.acquire(source(1), port(20_000)).unwrap();
        assert!(quota.acquire(source(2), port(20_001)).is_ok());
    }

    #[test]
    fn an_imported_client_is_counted_and_not_refused() {
        let quota = quota(1, 1, 1);
        let source = SourceNetwork::of(IpAddr::from([192, 0, 2, 1]));
        let first = quota.import(source, port(20_000));
        let second = quota.import(source, port(20_000));
        assert_eq!(quota.live(), 2);
        drop(first);
        let refused = quota.acquire(source, port(20_000)).unwrap_err();
        assert_eq!(refused, QuotaExceeded::Total);
        drop(second);
        assert!(quota.acquire(source, port(20_000)).is_ok());
    }

    proptest! {
        /// Against a model that holds the clients in a list.
        #[test]
        fn never_more_than_the_bounds_and_nothing_is_left(
            bounds in (0u32..12, 0u32..6, 0u32..6),
            steps in prop::collection::vec((any::<bool>(), 0u8..5, 0u16..4), 0..200),
        ) {
            let quota = quota(bounds.0, bounds.1, bounds.2);
            let mut inside: Vec<(u8, u16, Permit)> = Vec::new();
            for (comes, source, number) in steps {
                if !comes {
                    if !inside.is_empty() {
                        inside.swap_remove(usize::from(source) % inside.len());
                    }
                    continue;
                }
                let of_source = inside.iter().filter(|client| client.0 == source).count();
                let on_port = inside.iter().filter(|client| client.1 == number).count();
                let fits = inside.len() < bounds.0 as usize
                    && of_source < bounds.1 as usize
                    && on_port < bounds.2 as usize;
                let address = IpAddr::from([192, 0, 2, source]);
                let permit = quota.acquire(SourceNetwork::of(address), port(20_000 + number));
                prop_assert_eq!(permit.is_ok(), fits);
                inside.extend(permit.map(|permit| (source, number, permit)));
                prop_assert_eq!(quota.live() as usize, inside.len());
                prop_assert!(remembered(&quota) <= inside.len());
            }
            inside.clear();
            prop_assert_eq!(quota.live(), 0);
            prop_assert_eq!(remembered(&quota), 0);
        }
    }
}
