//! Which UDP flow makes room when there are as many as there may be.
//!
//! Refusing new clients would let whoever sends from many addresses, forged
//! ones even, lock out everybody. So a flow goes whose client has not sent
//! again after a reply, since a forged address cannot, and of those the one
//! idle for longest; only then one of the others, idle for longest. It is
//! looked for among [`SAMPLE`] flows taken at random, so that a flood costs the same
//! per datagram however many flows there are.
//!
//! Source: Linux `net/netfilter/nf_conntrack_core.c`, `early_drop`, spares
//! assured entries likewise; Redis `maxmemory-samples` samples likewise.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Worker;
use crate::forward::counters::count;
use crate::forward::slab::{Key, Slab};
use crate::forward::udp::Flow;

/// Flows looked at to find one that goes.
const SAMPLE: usize = 32;

impl Worker {
    /// Ends a flow if this thread has its share of them. Each thread has its
    /// own share, so that a flood on one port takes nothing from the ports of
    /// other threads.
    pub(super) fn make_room_for_flow(&mut self) {
        let share = self.flow_share.load(Ordering::Relaxed);
        if self.flows.len() < share as usize {
            return;
        }
        if let Some(key) = longest_idle(&self.flows, &mut self.random, standing) {
            count(&self.counters.evicted);
            self.end_flow(key);
        }
    }
}

/// What a flow has done to stay: more is better.
fn standing(flow: &Flow) -> (bool, Instant) {
    (flow.is_assured, flow.active)
}

/// The item of least standing among a few taken at random by `random`.
fn longest_idle<T, S: Ord>(
    items: &Slab<T>,
    random: &mut Random,
    standing: impl Fn(&T) -> S,
) -> Option<Key> {
    let sample = (0..SAMPLE).filter_map(|_| items.at(random.below(items.places())));
    let chosen = sample.min_by_key(|(_, item)| standing(item));
    // Few are left of many places: any will do.
    let chosen = chosen.or_else(|| items.iter().next());
    chosen.map(|(key, _)| key)
}

/// Numbers good enough to sample with. Neighbours came at the same time, so
/// taking turns would meet all the oldest flows at once.
///
/// Source: G. Marsaglia, Xorshift RNGs, 2003.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Self {
        Self(RandomState::new().hash_one(0) | 1)
    }

    /// A number below `bound`, or 0.
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let below = self.0 % (bound.max(1) as u64);
        usize::try_from(below).expect("it is below a usize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flow as the decision sees it: whether it is assured, when it last did
    /// something.
    fn place(items: &mut Slab<(bool, u32)>, standing: (bool, u32)) -> Key {
        items.insert(standing)
    }

    #[test]
    fn the_longest_idle_of_the_unassured_goes_first() {
        let mut items = Slab::default();
        let old = place(&mut items, (true, 1));
        let unassured = place(&mut items, (false, 7));
        let idle = place(&mut items, (false, 5));
        let mut random = Random(7);
        let mut order = Vec::new();
        while let Some(key) = longest_idle(&items, &mut random, |item| *item) {
            items.remove(key);
            order.push(key);
        }
        assert_eq!(order, [idle, unassured, old]);
    }

    #[test]
    fn a_flood_evicts_itself_and_spares_the_assured() {
        let mut items = Slab::default();
        let assured: Vec<Key> = (0..100)
            .map(|number| place(&mut items, (true, number)))
            .collect();
        for number in 0..900 {
            place(&mut items, (false, 1000 + number));
        }
        let mut random = Random(7);
        for number in 0..100_000 {
            let key = longest_idle(&items, &mut random, |item| *item).unwrap();
            items.remove(key);
            place(&mut items, (false, 2000 + number));
        }
        let left = assured
            .iter()
            .filter(|key| items.get_mut(**key).is_some())
            .count();
        // That 32 taken at random are all among the 100 does not happen.
        assert_eq!(left, 100);
        assert_eq!(items.len(), 1000);
    }
}
