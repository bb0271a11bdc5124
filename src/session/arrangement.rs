//! Whether given ports can hold the blocks of a request, in any arrangement.
//!
//! [`OneOrMore::place`] gives each block what suits it best, one after another,
//! and may leave nothing for the last. What is here finds an arrangement whenever
//! there is one. The load-sharing part refuses requests by it that no server can
//! ever serve, and the agent falls back on it: so a server whose ports are all free
//! serves whatever is not refused so.

use std::collections::BTreeMap;
use std::ops::Range;

use super::ports::{Block, OneOrMore};
use crate::pool::PortProtocol;

/// Most combinations of blocks that are looked at, which takes a fraction of a
/// millisecond. 12 different elements have as many, 16 equal ones have 17.
const MOST_COMBINATIONS: usize = 4096;

/// Adjacent ports of one entry that blocks may be placed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// The name of the entry.
    pub name: &'a str,
    /// What it forwards.
    pub protocol: PortProtocol,
    /// The numbers of the ports.
    pub ports: Range<u32>,
}

/// A request has more combinations of blocks than are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request has more than {MOST_COMBINATIONS} combinations of blocks")]
pub struct TooManyCombinations;

impl Run<'_> {
    fn length(&self) -> u32 {
        self.ports.end - self.ports.start
    }

    fn serves(&self, block: &Block) -> bool {
        block.filter.admits(self.name, self.protocol)
    }

    /// Where `block` begins on the ports from `first` on; `None` when it does not
    /// fit.
    fn start(&self, block: &Block, first: u32) -> Option<u32> {
        let start = block.begins_at(first);
        (self.serves(block) && start + block.ports() <= self.ports.end).then_some(start)
    }
}

/// Equal blocks of a request, with their places in it.
struct Kind<'a> {
    block: &'a Block,
    indexes: Vec<usize>,
    /// What one more of them adds to the number of a combination.
    stride: usize,
    /// For each run, and for the place after the last: the first run from there on
    /// that holds one.
    next: Vec<usize>,
}

/// The earliest place at which a combination of blocks can end, with its last block.
#[derive(Clone, Copy)]
struct Reached {
    run: usize,
    /// The first port after it.
    port: u32,
    kind: usize,
    start: u32,
}

impl OneOrMore<Block> {
    /// Whether `entries`, with their numbers of ports, have enough ports for the
    /// blocks, wherever on them these would be.
    #[must_use]
    pub fn may_fit(&self, entries: &[(&str, PortProtocol, u32)]) -> bool {
        let admits = |block: &Block, entry: &(&str, PortProtocol, u32)| {
            block.filter.admits(entry.0, entry.1)
        };
        let is_met = |demand: &Block| {
            let is_within = |block: &&Block| {
                let mut entries = entries.iter();
                entries.all(|entry| !admits(block, entry) || admits(demand, entry))
            };
            let wanted: u32 = self.iter().filter(is_within).map(Block::ports).sum();
            let usable = || entries.iter().filter(|entry| admits(demand, entry));
            let most = usable().map(|entry| entry.2).max().unwrap_or(0);
            demand.ports() <= most && wanted <= usable().map(|entry| entry.2).sum()
        };
        self.iter().all(is_met)
    }

    /// The first port of each block if all of them can be placed on `runs`, each on
    /// one, without overlap; `None` if there is no such arrangement.
    ///
    /// It looks at every combination of blocks once, smaller ones first: of all its
    /// arrangements, the one that ends first leaves the most to the other blocks.
    ///
    /// # Errors
    /// The combinations are too many.
    pub fn arrange(&self, runs: &[Run<'_>]) -> Result<Option<Vec<u32>>, TooManyCombinations> {
        let runs = self.longest(runs);
        let mut kinds = self.kinds(&runs);
        let mut combinations = 1;
        for kind in &mut kinds {
            kind.stride = combinations;
            combinations *= kind.indexes.len() + 1;
            if combinations > MOST_COMBINATIONS {
                return Err(TooManyCombinations);
            }
        }
        let mut reached: Vec<Option<Reached>> = vec![None; combinations];
        for combination in 0..combinations {
            let (run, port) = match reached[combination] {
                Some(reached) => (reached.run, reached.port),
                None if combination == 0 => (0, runs.first().map_or(0, |run| run.ports.start)),
                None => continue,
            };
            for (index, kind) in kinds.iter().enumerate() {
                if kind.placed(combination) == kind.indexes.len() {
                    continue;
                }
                let Some(next) = kind.after(&runs, run, port, index) else {
                    continue;
                };
                let known = &mut reached[combination + kind.stride];
                if known.is_none_or(|known| (next.run, next.port) < (known.run, known.port)) {
                    *known = Some(next);
                }
            }
        }
        let mut starts = vec![0; self.iter().count()];
        let mut combination = combinations - 1;
        while combination > 0 {
            let Some(last) = reached[combination] else {
                return Ok(None);
            };
            let kind = &kinds[last.kind];
            starts[kind.indexes[kind.placed(combination) - 1]] = last.start;
            combination -= kind.stride;
        }
        Ok(Some(starts))
    }

    /// The runs that an arrangement may need, shortest first: of the runs of an entry that
    /// begin alike, as many of the longest ones as there are blocks.
    fn longest<'a>(&self, runs: &[Run<'a>]) -> Vec<Run<'a>> {
        let mut by_length: Vec<&Run<'a>> = runs
            .iter()
            .filter(|run| self.iter().any(|block| run.serves(block)))
            .collect();
        by_length.sort_by_key(|run| std::cmp::Reverse(run.length()));
        let mut kept = BTreeMap::new();
        by_length.retain(|run| {
            let alike = (run.name, run.protocol, run.ports.start % 2);
            let number: &mut usize = kept.entry(alike).or_default();
            *number += 1;
            *number <= self.iter().count()
        });
        by_length.into_iter().rev().cloned().collect()
    }

    fn kinds(&self, runs: &[Run<'_>]) -> Vec<Kind<'_>> {
        let mut kinds: BTreeMap<&Block, Vec<usize>> = BTreeMap::new();
        for (index, block) in self.iter().enumerate() {
            kinds.entry(block).or_default().push(index);
        }
        let kinds = kinds.into_iter();
        kinds
            .map(|(block, indexes)| {
                let mut next = vec![runs.len(); runs.len() + 1];
                for (index, run) in runs.iter().enumerate().rev() {
                    let holds_one = run.start(block, run.ports.start).is_some();
                    next[index] = if holds_one { index } else { next[index + 1] };
                }
                Kind {
                    block,
                    indexes,
                    stride: 0,
                    next,
                }
            })
            .collect()
    }
}

impl Kind<'_> {
    /// How many of them are in `combination`.
    fn placed(&self, combination: usize) -> usize {
        combination / self.stride % (self.indexes.len() + 1)
    }

    /// The place after one of them, the kind of this `index`, that comes after `port`
    /// of `run`.
    fn after(&self, runs: &[Run<'_>], run: usize, port: u32, index: usize) -> Option<Reached> {
        let here = runs.get(run)?.start(self.block, port);
        let (run, start) = match here {
            Some(start) => (run, start),
            None => {
                let run = self.next[run + 1];
                let first = runs.get(run)?.ports.start;
                (run, self.block.begins_at(first))
            }
        };
        Some(Reached {
            run,
            port: start + self.block.ports(),
            kind: index,
            start,
        })
    }
}

#[cfg(test)]
impl OneOrMore<Block> {
    /// Whether they can be placed on `runs`: tries all places of each.
    pub(crate) fn has_arrangement(&self, runs: &[Run<'_>]) -> bool {
        let blocks: Vec<&Block> = self.iter().collect();
        let free = runs.iter().enumerate();
        let free = free.flat_map(|(index, run)| run.ports.clone().map(move |it| (index, it)));
        try_all(&blocks, runs, &mut free.collect())
    }
}

#[cfg(test)]
fn try_all(
    blocks: &[&Block],
    runs: &[Run<'_>],
    free: &mut std::collections::BTreeSet<(usize, u32)>,
) -> bool {
    let Some((block, others)) = blocks.split_first() else {
        return true;
    };
    for (index, run) in runs.iter().enumerate().filter(|(_, run)| run.serves(block)) {
        for start in run.ports.clone() {
            let ports: Vec<_> = (start..start + block.ports())
                .map(|it| (index, it))
                .collect();
            if block.begins_at(start) != start || !ports.iter().all(|it| free.contains(it)) {
                continue;
            }
            free.retain(|it| !ports.contains(it));
            if try_all(others, runs, free) {
                return true;
            }
            free.extend(ports);
        }
    }
    false
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;

    use super::*;

    fn run(name: &str, ports: Range<u32>) -> Run<'_> {
        Run {
            name,
            protocol: PortProtocol::TCP,
            ports,
        }
    }

    #[test]
    fn a_request_of_too_many_different_elements_is_not_searched() {
        let names: Vec<String> = (0..16).map(|index| index.to_string()).collect();
        let wanted: Vec<(&str, u8)> = names.iter().map(|name| (name.as_str(), 1)).collect();
        let runs: Vec<Run<'_>> = names.iter().map(|name| run(name, 0..1)).collect();
        assert_eq!(
            OneOrMore::example(&wanted).arrange(&runs),
            Err(TooManyCombinations)
        );
        let starts = OneOrMore::example(&wanted[..12]).arrange(&runs);
        assert_eq!(starts, Ok(Some(vec![0; 12])));
    }

    #[test]
    fn the_search_takes_a_fraction_of_a_millisecond() {
        let wanted: Vec<(&str, u8)> = (1..=9).map(|count| ("", count)).collect();
        let wanted = OneOrMore::example(&[&wanted[..], &[("a", 1), ("a", 2), ("a", 3)]].concat());
        let names: Vec<String> = (0..32).map(|index| format!("a{index}")).collect();
        let others = names.iter().map(|name| run(name, 1..2));
        let runs: Vec<Run<'_>> = others.chain([run("a", 1..32), run("b", 1..19)]).collect();
        let started = std::time::Instant::now();
        for _ in 0..10 {
            assert_eq!(wanted.arrange(&runs), Ok(None));
        }
        // 2 ms each without optimization.
        let took = started.elapsed();
        assert!(took < std::time::Duration::from_secs(1), "{took:?}");
    }

    proptest! {
        #[test]
        fn an_arrangement_is_found_if_and_only_if_there_is_one(
            wanted in proptest::collection::vec((0usize..3, 1u8..6), 1..6),
            runs in proptest::collection::vec((0usize..2, 0u32..2, 1u32..9), 1..5),
        ) {
            let names = ["a", "b", ""];
            let wanted: Vec<(&str, u8)> =
                wanted.into_iter().map(|(name, count)| (names[name], count)).collect();
            let wanted = OneOrMore::example(&wanted);
            let runs: Vec<Run<'_>> = (10..)
                .step_by(10)
                .zip(runs)
                .map(|(at, (name, odd, length))| run(names[name], at + odd..at + odd + length))
                .collect();
            let entries: Vec<_> =
                runs.iter().map(|run| (run.name, run.protocol, run.length())).collect();
            let found = wanted.arrange(&runs).unwrap();
            prop_assert_eq!(found.is_some(), wanted.has_arrangement(&runs));
            prop_assert!(found.is_none() || wanted.may_fit(&entries));
            let mut taken = Vec::new();
            for (block, start) in wanted.iter().zip(found.into_iter().flatten()) {
                let is_on = |run: &Run<'_>| run.start(block, start) == Some(start)
                    && run.ports.contains(&start);
                prop_assert!(runs.iter().any(is_on));
                taken.extend(start..start + block.ports());
            }
            taken.sort_unstable();
            prop_assert!(taken.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
