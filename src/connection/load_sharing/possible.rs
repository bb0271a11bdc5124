//! Whether a pool can serve a request at all, once everything is free. One that
//! it cannot is refused at once: waiting would not help.
//!
//! A request passes if and only if the agent of a server whose ports are all free
//! would serve it: both go by [`OneOrMore::arrange`]. One that asks for more
//! combinations than that looks at passes, and may wait as long as it said.

use std::collections::HashSet;

use super::refusal::Refusal;
use crate::pool::PortProtocol;
use crate::session::{Block, OneOrMore, Run};
use crate::table::{PortRange, Row, RowState, Table};

/// Checks that a server of the pool of `table` has the ports for `blocks`. Those of
/// servers that are being removed do not count.
///
/// # Errors
/// The [`Refusal`], which names the field. A pool scaled to nothing has no ports
/// to compare with; then everything passes.
pub(super) fn check(blocks: &OneOrMore<Block>, table: &Table) -> Result<(), Refusal> {
    let rows = || {
        table
            .rows
            .iter()
            .filter(|row| row.state == RowState::Active)
    };
    if rows().next().is_none() || any_could_hold(rows(), blocks) {
        return Ok(());
    }
    let ranges = || rows().flat_map(offered);
    for (index, block) in blocks.iter().enumerate() {
        let field = match blocks.as_single() {
            Some(_) => String::new(),
            None => format!("ports[{index}]: "),
        };
        let usable = || ranges().filter(|range| admits(block, range));
        if usable().next().is_none() {
            let mut entries: Vec<String> = ranges()
                .map(|range| format!("{} ({})", range.name, range.protocol.name()))
                .collect();
            entries.sort();
            entries.dedup();
            let entries = entries.join(", ");
            return Err(match companion(block, rows()) {
                Some(name) => Refusal::CompanionPort {
                    field,
                    name,
                    entries,
                },
                None => Refusal::UnknownPort { field, entries },
            });
        }
        if !usable().any(|range| fits(block, range)) {
            let longest = usable()
                .map(|range| longest(block, range))
                .max()
                .unwrap_or(0);
            let kind = match block.ports() % 2 {
                0 => "adjacent ports that begin with an even one",
                _ => "adjacent ports",
            };
            return Err(Refusal::InvalidPorts(format!(
                "ports[{index}].count is {}, but a processing server has at most {longest} {kind} of an entry with this name and protocol; ask for fewer, or raise count of the entry",
                block.ports()
            )));
        }
    }
    Err(Refusal::InvalidPorts(format!(
        "ports asks for {} ports in blocks that no processing server has together; ask for fewer, or raise count of the port entries",
        blocks.ports()
    )))
}

/// The ranges of `row` that requests get ports of.
fn offered(row: &Row) -> impl Iterator<Item = &PortRange> {
    row.ranges.iter().filter(|range| !range.is_companion())
}

/// The name of the companion entry that `block` asks for, if it names one.
fn companion<'a>(block: &Block, rows: impl Iterator<Item = &'a Row>) -> Option<String> {
    let name = block.filter.port_name.as_ref()?;
    let mut ranges = rows.flat_map(|row| &row.ranges);
    let is_companion = ranges.any(|range| range.is_companion() && range.name == *name);
    is_companion.then(|| name.clone())
}

fn admits(block: &Block, range: &PortRange) -> bool {
    block.filter.admits(&range.name, range.protocol)
}

/// The most adjacent ports of `range` from the first one on that `block` may begin
/// with.
fn longest(block: &Block, range: &PortRange) -> u32 {
    let first = u32::from(range.connection_port.get());
    let end = first + u32::from(range.count);
    end.saturating_sub(block.begins_at(first))
}

fn fits(block: &Block, range: &PortRange) -> bool {
    block.ports() <= longest(block, range)
}

/// Whether one of `rows` could hold `blocks`. Most rows of a pool are alike but for
/// the numbers of their ports, and those that are alike are looked at once.
fn any_could_hold<'a>(rows: impl Iterator<Item = &'a Row>, blocks: &OneOrMore<Block>) -> bool {
    let mut known: HashSet<Vec<(&str, PortProtocol, u16, bool)>> = HashSet::new();
    let mut rows = rows;
    rows.any(|row| {
        if blocks.as_single().is_some() {
            return offered(row).any(|range| admits(&blocks.first, range));
        }
        let likeness = offered(row).map(|range| {
            let is_odd = range.connection_port.get() % 2 == 1;
            (range.name.as_str(), range.protocol, range.count, is_odd)
        });
        known.insert(likeness.collect()) && could_hold(row, blocks)
    })
}

/// Whether the ports of `row`, all of them free, could hold `blocks`, as far as is
/// found out.
fn could_hold(row: &Row, blocks: &OneOrMore<Block>) -> bool {
    let runs = offered(row).map(|range| {
        let first = u32::from(range.connection_port.get());
        Run {
            name: &range.name,
            protocol: range.protocol,
            ports: first..first + u32::from(range.count),
        }
    });
    let runs: Vec<Run<'_>> = runs.collect();
    blocks
        .arrange(&runs)
        .map_or(true, |starts| starts.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(slot: u32, state: RowState, ranges: &[(&str, u16, u16)]) -> Row {
        let mut row = crate::table::tests::row(crate::table::Slot(slot), Vec::new());
        row.state = state;
        row.ranges = ranges
            .iter()
            .map(|(name, first, count)| PortRange {
                name: (*name).to_owned(),
                ..crate::table::tests::range(*first, *count)
            })
            .collect();
        row
    }

    #[test]
    fn a_request_passes_if_the_free_ports_of_a_server_could_hold_it() {
        let rows = vec![
            row(0, RowState::Active, &[("rtp", 20_001, 6)]),
            row(1, RowState::Active, &[("rtp", 20_100, 5)]),
        ];
        let table = crate::table::tests::table(rows);
        for (counts, passes) in [
            (&[2, 2][..], true),
            (&[1, 2, 2, 1], true),
            (&[3, 3], true),
            (&[2, 2, 2], false),
            (&[4, 2], false),
            (&[2, 3], true),
            (&[7], false),
        ] {
            let blocks: Vec<_> = counts.iter().map(|count| ("rtp", *count)).collect();
            let result = check(&OneOrMore::example(&blocks), &table);
            assert_eq!(result.is_ok(), passes, "{counts:?}: {result:?}");
        }
    }

    #[test]
    fn servers_that_are_being_removed_do_not_count() {
        let old = row(
            0,
            RowState::Draining,
            &[("game", 20_000, 2), ("voice", 20_010, 2)],
        );
        let new = row(1, RowState::Active, &[("game", 20_002, 2)]);
        let wanted = OneOrMore::example(&[("voice", 1)]);
        let table = crate::table::tests::table(vec![old.clone(), new]);
        let refusal = check(&wanted, &table).unwrap_err();
        assert_eq!(refusal.name(), "unknown-port");
        assert!(!refusal.to_string().contains("voice"), "{refusal}");
        let table = crate::table::tests::table(vec![old]);
        assert_eq!(
            check(&wanted, &table),
            Ok(()),
            "as in a pool scaled to nothing"
        );
    }
}
