//! Which connection ports a slot gets. A slot keeps its ports for as long as their
//! port entry does not change, its offer, admission and replies aside; new ports are the
//! lowest free ones. Those of an entry with mapping Identity are always adjacent,
//! because workloads are given them as a range. An even number of ports begins with an
//! even one where there is room, so that RTP and RTCP find their pairs on every server.

use std::ops::RangeInclusive;

use super::validate::{Entry, Target, ValidPool};
use crate::pool::PortEntry;
use crate::pool::rules::check_beside;
use crate::table::{ListenPort, PortRange, Row, RowState};

/// Gives every active row of `rows` the ports that `pool` asks for. Draining rows
/// keep their ports. A row that would need ports of draining rows is removed; a
/// later plan adds it when those rows are gone. So is one that lacks adjacent ports.
pub(super) fn lay_out(rows: &mut Vec<Row>, pool: &ValidPool) {
    let mut even = rows.clone();
    give_ports(&mut even, pool, First::EvenOfEven);
    if even.len() < rows.len() {
        // The gaps before even ports can be what is missing.
        give_ports(rows, pool, First::Lowest);
    }
    if even.len() >= rows.len() {
        *rows = even;
    }
}

/// The first of several new connection ports.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Lowest,
    /// An even one if the number of ports is even and there is room for that.
    EvenOfEven,
}

fn give_ports(rows: &mut Vec<Row>, pool: &ValidPool, first: First) {
    let mut used = Used::default();
    for row in rows.iter_mut() {
        if row.state == RowState::Active {
            row.ranges.retain(|range| is_wanted(range, pool));
            drop_partial(&mut row.ranges, pool);
        }
        row.ranges.iter().for_each(|range| used.mark(range));
    }
    rows.retain_mut(|row| row.state == RowState::Draining || complete(row, pool, first, &mut used));
}

/// Those of `ranges` that may be in a row and are not in `rows`. `ranges` are the ports
/// that a server carries; they can be anything, because users can change them.
pub(super) fn free_of_conflict(ranges: &[PortRange], rows: &[Row]) -> Vec<PortRange> {
    let mut used = Used::default();
    let others = rows.iter().flat_map(|row| &row.ranges);
    others.for_each(|range| used.mark(range));
    let (mut kept, mut entries) = (Vec::new(), Vec::new());
    for range in ranges {
        let entry = PortEntry::from(range);
        let is_allowed = || range.is_valid() && check_beside(&entry, &entries).is_empty();
        if is_allowed() && !used.has(range) {
            used.mark(range);
            kept.push(range.clone());
            entries.push(entry);
        }
    }
    kept
}

/// Whether `range` matches one of the pool's entries.
fn is_wanted(range: &PortRange, pool: &ValidPool) -> bool {
    let first = u32::from(range.connection_port.get());
    let ports = first..=first + u32::from(range.count) - 1;
    let allowed = &pool.connection_ports;
    let is_inside =
        *ports.start() >= u32::from(*allowed.start()) && *ports.end() <= u32::from(*allowed.end());
    is_inside
        && pool.entries.iter().any(|entry| {
            entry.name == range.name
                && entry.protocol == range.protocol
                && entry.target.mapping() == range.mapping
                && entry.proxy_protocol == range.proxy_protocol
                && match entry.target {
                    Target::Offset(port) | Target::Shared(port) => port <= range.server_port,
                    Target::Identity => true,
                }
        })
}

/// Drops the ranges of every entry whose ports they do not cover exactly.
fn drop_partial(ranges: &mut Vec<PortRange>, pool: &ValidPool) {
    for entry in &pool.entries {
        let pieces: Vec<&PortRange> = ranges
            .iter()
            .filter(|range| range.name == entry.name)
            .collect();
        let mut offset = 0u16;
        let is_whole = pieces.iter().all(|piece| {
            let target = entry.target.server_port(piece.connection_port, offset);
            let is_first = offset == 0;
            offset = offset.saturating_add(piece.count);
            target == Some(piece.server_port) && (is_first || may_be_in_pieces(entry))
        });
        let count: u32 = pieces.iter().map(|piece| u32::from(piece.count)).sum();
        if !is_whole || count != u32::from(entry.count) {
            ranges.retain(|range| range.name != entry.name);
        }
    }
}

/// Whether the connection ports of `entry` on a server need not be adjacent.
fn may_be_in_pieces(entry: &Entry) -> bool {
    entry.target != Target::Identity
}

/// Adds the ranges that `row` lacks. Returns whether there were enough ports.
fn complete(row: &mut Row, pool: &ValidPool, first: First, used: &mut Used) -> bool {
    let mut ranges = Vec::new();
    for entry in &pool.entries {
        let kept = row.ranges.iter().filter(|range| range.name == entry.name);
        let before = ranges.len();
        ranges.extend(kept.map(|range| PortRange {
            offer: entry.offer,
            admission: entry.admission,
            replies: entry.replies,
            ..range.clone()
        }));
        if ranges.len() > before {
            continue;
        }
        let Some(added) = used.take(entry, first, &pool.connection_ports) else {
            for range in &ranges {
                used.clear(range);
            }
            return false;
        };
        ranges.extend(added);
    }
    row.ranges = ranges;
    true
}

/// A run of connection ports that no slot has.
#[derive(Clone, Copy)]
struct FreeRun {
    first: u16,
    length: u16,
}

impl FreeRun {
    /// The part of this run that begins with an even port.
    fn skip_odd(self) -> Option<Self> {
        let skipped = self.first % 2;
        Some(Self {
            first: self.first.checked_add(skipped)?,
            length: self.length.checked_sub(skipped)?,
        })
    }
}

/// The connection ports that are given to slots, by number.
struct Used(Vec<bool>);

impl Default for Used {
    fn default() -> Self {
        Self(vec![false; usize::from(u16::MAX) + 1])
    }
}

impl Used {
    fn mark(&mut self, range: &PortRange) {
        for port in range.connection_ports() {
            self.0[usize::from(port.get())] = true;
        }
    }

    /// Whether a slot has a port of `range`.
    fn has(&self, range: &PortRange) -> bool {
        let mut ports = range.connection_ports();
        ports.any(|port| self.0[usize::from(port.get())])
    }

    fn clear(&mut self, range: &PortRange) {
        for port in range.connection_ports() {
            self.0[usize::from(port.get())] = false;
        }
    }

    /// The lowest run of free ports for `entry`, or, where there is none, the
    /// lowest free ports in pieces if `entry` may have them. `None` when there are
    /// too few.
    fn take(
        &mut self,
        entry: &Entry,
        first: First,
        allowed: &RangeInclusive<u16>,
    ) -> Option<Vec<PortRange>> {
        let runs = self.free_runs(allowed);
        let suffices = |run: &FreeRun| run.length >= entry.count;
        let is_even = first == First::EvenOfEven && entry.count.is_multiple_of(2);
        let even = runs.iter().copied().filter_map(FreeRun::skip_odd);
        let whole = even.filter(|_| is_even).find(suffices);
        let whole = whole.or_else(|| runs.iter().copied().find(suffices));
        let runs = match whole {
            Some(run) => vec![run],
            None if may_be_in_pieces(entry) => runs,
            None => return None,
        };
        let mut pieces = Vec::new();
        let mut given = 0;
        for run in runs {
            let count = run.length.min(entry.count - given);
            if count == 0 {
                break;
            }
            let connection_port = ListenPort::new(run.first)?;
            pieces.push(PortRange {
                name: entry.name.clone(),
                connection_port,
                server_port: entry.target.server_port(connection_port, given)?,
                count,
                protocol: entry.protocol,
                mapping: entry.target.mapping(),
                offer: entry.offer,
                admission: entry.admission,
                proxy_protocol: entry.proxy_protocol,
                replies: entry.replies,
            });
            given += count;
        }
        if given < entry.count {
            return None;
        }
        pieces.iter().for_each(|piece| self.mark(piece));
        Some(pieces)
    }

    /// The longest runs of free ports among `allowed`, ascending.
    fn free_runs(&self, allowed: &RangeInclusive<u16>) -> Vec<FreeRun> {
        let mut runs: Vec<FreeRun> = Vec::new();
        for port in allowed.clone().filter(|port| !self.0[usize::from(*port)]) {
            match runs.last_mut() {
                Some(run) if run.first + run.length == port => run.length += 1,
                _ => runs.push(FreeRun {
                    first: port,
                    length: 1,
                }),
            }
        }
        runs
    }
}
