//! The choice of the UDP flow that is evicted when there are as many as there
//! may be.
//!
//! If new clients were refused, someone who sends from many addresses, forged
//! ones even, could lock out everyone else. So a flow is evicted. First are the
//! flows whose client has not sent again after a reply, since a forged address
//! cannot; of them the one goes whose client has been silent for longest. Only
//! without such flows it is chosen among the others. The flow is chosen among [`SAMPLE`] flows taken at
//! random, so that a flood costs the same per datagram however many flows there
//! are. Neighbours in the table came at the same time, so taking turns would
//! meet all the oldest flows at once.
//!
//! Source: Linux `net/netfilter/nf_conntrack_core.c`, `early_drop`, spares
//! assured entries likewise; Redis `maxmemory-samples` samples likewise.

use std::time::Instant;

use fastrand::Rng;

use super::flow::Flow;
use crate::forward::slab::{Key, Slab};

/// Flows looked at to find one that is evicted.
const SAMPLE: usize = 32;

/// The flow to evict, if there is one.
pub(super) fn choose(flows: &Slab<Flow>, random: &mut Rng) -> Option<Key> {
    lowest_rank(flows, random, eviction_rank)
}

/// The rank of a flow: the lowest is evicted first.
fn eviction_rank(flow: &Flow) -> (bool, Instant) {
    (flow.is_assured, flow.client_active)
}

/// The item of the lowest rank among a few taken at random.
fn lowest_rank<T, R: Ord>(
    items: &Slab<T>,
    random: &mut Rng,
    rank: impl Fn(&T) -> R,
) -> Option<Key> {
    let places = items.places().max(1);
    let sample = (0..SAMPLE).filter_map(|_| items.at(random.usize(..places)));
    let chosen = sample.min_by_key(|(_, item)| rank(item));
    // Few places are taken: any item will do.
    let chosen = chosen.or_else(|| items.iter().next());
    chosen.map(|(key, _)| key)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flow as its rank: whether it is assured, and when it was last active.
    fn place(items: &mut Slab<(bool, u32)>, rank: (bool, u32)) -> Key {
        items.insert(rank)
    }

    #[test]
    fn the_longest_silent_of_the_unassured_goes_first() {
        let mut items = Slab::default();
        let old = place(&mut items, (true, 1));
        let unassured = place(&mut items, (false, 7));
        let idle = place(&mut items, (false, 5));
        let mut random = Rng::with_seed(7);
        let mut order = Vec::new();
        while let Some(key) = lowest_rank(&items, &mut random, |item| *item) {
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
        let mut random = Rng::with_seed(7);
        for number in 0..100_000 {
            let key = lowest_rank(&items, &mut random, |item| *item).unwrap();
            items.remove(key);
            place(&mut items, (false, 2000 + number));
        }
        let left = assured
            .iter()
            .filter(|key| items.get_mut(**key).is_some())
            .count();
        // It does not happen that 32 taken at random are all among the 100.
        assert_eq!(left, 100);
        assert_eq!(items.len(), 1000);
    }
}
