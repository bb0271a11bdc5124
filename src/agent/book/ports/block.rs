//! The choice of the free ports for a request.

use std::collections::BTreeSet;
use std::ops::Range;

use super::Ports;
use super::group::Group;
use crate::pool::PortProtocol;
use crate::session::{Block, OneOrMore, Run};
use crate::table::{ListenPort, PortRange};

impl Ports {
    /// The free ports that a request for `blocks` gets, in their order; `None`
    /// when there are not all of them.
    ///
    /// A single port is the one that has been free for the longest time. A longer
    /// block is the one whose port that was freed last has been free for the
    /// longest time. [`OneOrMore::place`] has the order of the blocks. Where that
    /// leaves a block none, [`OneOrMore::arrange`] finds others: only a request that
    /// the free ports cannot hold in any arrangement gets `None`, or one of more
    /// combinations than that looks at.
    pub(in crate::agent::book) fn choose(
        &self,
        blocks: &OneOrMore<Block>,
    ) -> Option<OneOrMore<ListenPort>> {
        if let Some(filter) = blocks.as_single() {
            return self.longest_free(filter).map(OneOrMore::one);
        }
        self.longest_free_blocks(blocks)
            .or_else(|| self.any_free_blocks(blocks))
    }

    /// As [`Ports::choose`], in the order of the time for which ports have been free.
    fn longest_free_blocks(&self, blocks: &OneOrMore<Block>) -> Option<OneOrMore<ListenPort>> {
        let ranges: &[PortRange] = self.row.as_ref().map_or(&[], |row| &row.ranges);
        let mut groups: Vec<&Group> = self.groups.iter().collect();
        groups.sort_by_key(|group| group.longest_free());
        let entries: Vec<(&str, PortProtocol)> = groups
            .iter()
            .map(|group| (group.name.as_str(), group.protocol))
            .collect();
        let mut taken = BTreeSet::new();
        let placed = blocks.place(&entries, |group, block| {
            let group = groups[group];
            let ranges = ranges.iter().filter(|range| group.includes(range));
            let found = find(group, ranges, block, &taken)?;
            let ports: Vec<ListenPort> = found.filter_map(ListenPort::new).collect();
            taken.extend(ports.iter().copied());
            Some(ports)
        })?;
        OneOrMore::new(placed.into_iter().flatten())
    }

    /// As [`Ports::choose`], wherever all blocks have room.
    fn any_free_blocks(&self, blocks: &OneOrMore<Block>) -> Option<OneOrMore<ListenPort>> {
        let ranges: &[PortRange] = self.row.as_ref().map_or(&[], |row| &row.ranges);
        let mut runs = Vec::new();
        for group in &self.groups {
            let mut free: Vec<u16> = group.free().map(ListenPort::get).collect();
            free.sort_unstable();
            for range in ranges.iter().filter(|range| group.includes(range)) {
                let first = range.connection_port.get();
                let is_before = |last: u32| move |port: &u16| u32::from(*port) < last;
                let begin = free.partition_point(is_before(first.into()));
                let end = u32::from(first) + u32::from(range.count);
                let end = free.partition_point(is_before(end));
                let adjacent = free[begin..end].chunk_by(|one, next| one + 1 == *next);
                runs.extend(adjacent.map(|ports| Run {
                    name: &group.name,
                    protocol: group.protocol,
                    ports: u32::from(ports[0])..u32::from(ports[ports.len() - 1]) + 1,
                }));
            }
        }
        let starts = blocks.arrange(&runs).ok()??;
        let ports = blocks
            .iter()
            .zip(starts)
            .flat_map(|(block, start)| start..start + block.ports());
        OneOrMore::new(ports.filter_map(|port| ListenPort::new(u16::try_from(port).ok()?)))
    }
}

/// The free ports of one range, as lengths of runs of adjacent ones.
struct Runs<'a> {
    range: &'a PortRange,
    /// At the first and the last port of each run: its length. A place before the
    /// first port and one after the last stay 0.
    lengths: Vec<u16>,
}

impl<'a> Runs<'a> {
    fn new(range: &'a PortRange) -> Self {
        let lengths = vec![0; usize::from(range.count) + 2];
        Self { range, lengths }
    }

    /// Adds a free `port` of the range. Returns the run that it is part of now.
    fn add(&mut self, port: ListenPort) -> Range<u16> {
        let index = usize::from(port.get() - self.range.connection_port.get()) + 1;
        let (before, after) = (self.lengths[index - 1], self.lengths[index + 1]);
        let length = before + 1 + after;
        for place in [
            index - usize::from(before),
            index,
            index + usize::from(after),
        ] {
            self.lengths[place] = length;
        }
        let first = port.get() - before;
        first..first + length
    }
}

/// The ports for `block` among the free ones of `group` that are not `taken`.
///
/// It looks at the ports in the order in which they were freed until a block is
/// complete: a few steps for each port, whatever the length of the block.
fn find<'a>(
    group: &Group,
    ranges: impl Iterator<Item = &'a PortRange>,
    block: &Block,
    taken: &BTreeSet<ListenPort>,
) -> Option<Range<u16>> {
    let mut ranges: Vec<Runs<'_>> = ranges.map(Runs::new).collect();
    for port in group.free().filter(|port| !taken.contains(port)) {
        let has_port = |runs: &&mut Runs<'_>| runs.range.target(port).is_some();
        let Some(runs) = ranges.iter_mut().find(has_port) else {
            continue;
        };
        let run = runs.add(port);
        let first = block.begins_at(run.start.into());
        let last = first + block.ports();
        if last <= u32::from(run.end) {
            return u16::try_from(first)
                .ok()
                .zip(u16::try_from(last).ok())
                .map(|(first, last)| first..last);
        }
    }
    None
}
