//! The policies of the load sharing part: which processing server gets a
//! request. Pure functions of the candidates; `servers` decides which servers
//! are candidates: attached, not draining, with a free port.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::pool::Policy;
use crate::table::Slot;

/// A processing server that could take the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its slot.
    pub slot: Slot,
    /// The number of its live sessions and of the requests on their way to it.
    pub sessions: u32,
}

/// Chooses among `candidates`, which are in ascending order of slot.
///
/// `affinity_key` matters to [`Policy::AffinityHash`] only, which falls back
/// to least sessions without one; `last` is the slot chosen before and matters
/// to [`Policy::RoundRobin`] only. `None` when there is no candidate.
pub fn choose(
    policy: Policy,
    candidates: impl Iterator<Item = Candidate>,
    affinity_key: Option<&str>,
    last: Option<Slot>,
) -> Option<Slot> {
    let chosen = match (policy, affinity_key) {
        (Policy::RoundRobin, _) => {
            // Slots after the last one come first, then the others.
            let turn = |candidate: &Candidate| (Some(candidate.slot) <= last, candidate.slot);
            candidates.min_by_key(turn)
        }
        (Policy::Packed, _) => candidates
            .min_by_key(|candidate| (std::cmp::Reverse(candidate.sessions), candidate.slot)),
        (Policy::AffinityHash, Some(key)) => {
            candidates.max_by_key(|candidate| (weight(key, candidate.slot), candidate.slot))
        }
        (Policy::LeastSessions, _) | (Policy::AffinityHash, None) => {
            candidates.min_by_key(|candidate| (candidate.sessions, candidate.slot))
        }
    };
    chosen.map(|candidate| candidate.slot)
}

/// Weight of `slot` for `key` in rendezvous hashing: each key has its own
/// order of slots, and a slot that comes or goes moves only its own keys.
///
/// Source: Thaler and Ravishankar, "Using name-based mappings to increase hit
/// rates", 1998.
fn weight(key: &str, slot: Slot) -> u64 {
    xxh3_64_with_seed(key.as_bytes(), u64::from(slot.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pick(
        policy: Policy,
        sessions: &[(u32, u32)],
        key: Option<&str>,
        last: Option<u32>,
    ) -> Option<u32> {
        let candidates = sessions.iter().map(|&(slot, sessions)| Candidate {
            slot: Slot(slot),
            sessions,
        });
        choose(policy, candidates, key, last.map(Slot)).map(|slot| slot.0)
    }

    #[test]
    fn each_policy_chooses_as_documented() {
        let servers = [(0, 3), (1, 1), (2, 7), (4, 1)];
        let cases = [
            (Policy::LeastSessions, None, Some(1)),
            (Policy::Packed, None, Some(2)),
            (Policy::RoundRobin, None, Some(0)),
            (Policy::RoundRobin, Some(0), Some(1)),
            (Policy::RoundRobin, Some(2), Some(4)),
            (Policy::RoundRobin, Some(3), Some(4)),
            (Policy::RoundRobin, Some(4), Some(0)),
            (Policy::AffinityHash, None, Some(1)),
        ];
        for (policy, last, expected) in cases {
            assert_eq!(
                pick(policy, &servers, None, last),
                expected,
                "{policy:?} after {last:?}"
            );
        }
    }

    #[test]
    fn without_candidates_none_is_chosen() {
        for policy in [
            Policy::LeastSessions,
            Policy::RoundRobin,
            Policy::Packed,
            Policy::AffinityHash,
        ] {
            assert_eq!(pick(policy, &[], Some("key"), Some(1)), None);
        }
    }

    #[test]
    fn round_robin_visits_every_server_once_a_round() {
        let servers = [(1, 0), (3, 9), (8, 2)];
        let mut last = None;
        let visited: Vec<_> = (0..6)
            .map(|_| {
                last = pick(Policy::RoundRobin, &servers, None, last);
                last.unwrap()
            })
            .collect();
        assert_eq!(visited, [1, 3, 8, 1, 3, 8]);
    }

    #[test]
    fn affinity_spreads_keys_evenly() {
        let servers: Vec<_> = (0..8).map(|slot| (slot, 0)).collect();
        let mut hits = [0u32; 8];
        for number in 0..8000 {
            let slot = pick(
                Policy::AffinityHash,
                &servers,
                Some(&format!("client-{number}")),
                None,
            );
            hits[slot.unwrap() as usize] += 1;
        }
        assert!(
            hits.iter().all(|&hits| (850..1150).contains(&hits)),
            "{hits:?}"
        );
    }

    proptest! {
        #[test]
        fn affinity_moves_only_the_keys_of_a_server_that_leaves(
            key in ".{0,20}", count in 2u32..40, gone in 0u32..40,
        ) {
            let all: Vec<_> = (0..count).map(|slot| (slot, 0)).collect();
            let rest: Vec<_> = all.iter().copied().filter(|&(slot, _)| slot != gone).collect();
            let before = pick(Policy::AffinityHash, &all, Some(&key), None);
            let after = pick(Policy::AffinityHash, &rest, Some(&key), None);
            prop_assert!(before == after || before == Some(gone));
        }

        #[test]
        fn the_chosen_is_always_a_candidate(
            servers in proptest::collection::btree_map(0u32..50, 0u32..9, 1..20),
            policy in proptest::sample::select(vec![
                Policy::LeastSessions, Policy::RoundRobin, Policy::Packed, Policy::AffinityHash,
            ]),
            last in proptest::option::of(0u32..60),
        ) {
            let list: Vec<_> = servers.iter().map(|(&slot, &sessions)| (slot, sessions)).collect();
            let chosen = pick(policy, &list, Some("k"), last).unwrap();
            prop_assert!(servers.contains_key(&chosen));
        }
    }
}
