//! Whether a pool can serve a request at all, once everything is free. One that
//! it cannot is refused at once: waiting would not help.
//!
//! What is checked is necessary, not sufficient. A request may pass that no
//! server's ports can hold in any arrangement; it waits as long as it said then.

use super::refusal::Refusal;
use crate::session::{Block, OneOrMore};
use crate::table::{PortRange, Row, Table};

/// Checks that a server of the pool of `table` has the ports for `blocks`.
///
/// # Errors
/// The [`Refusal`], which names the field. A pool scaled to nothing has no ports
/// to compare with; then everything passes.
pub(super) fn check(blocks: &OneOrMore<Block>, table: &Table) -> Result<(), Refusal> {
    if table.rows.is_empty() || table.rows.iter().any(|row| could_hold(row, blocks)) {
        return Ok(());
    }
    let ranges = || table.rows.iter().flat_map(offered);
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
            return Err(match companion(block, table) {
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
        "ports asks for {} ports, which no processing server has together; ask for fewer, or raise count of the port entries",
        blocks.ports()
    )))
}

/// The ranges of `row` that requests get ports of.
fn offered(row: &Row) -> impl Iterator<Item = &PortRange> {
    row.ranges.iter().filter(|range| !range.is_companion())
}

/// The name of the companion entry that `block` asks for, if it names one.
fn companion(block: &Block, table: &Table) -> Option<String> {
    let name = block.filter.port_name.as_ref()?;
    let mut ranges = table.rows.iter().flat_map(|row| &row.ranges);
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

/// Whether each block fits into a range of `row`, and no entries are to serve more
/// ports than they have.
fn could_hold(row: &Row, blocks: &OneOrMore<Block>) -> bool {
    let fits_somewhere = |block: &Block| {
        let mut ranges = offered(row);
        ranges.any(|range| admits(block, range) && fits(block, range))
    };
    let can_be_met = |demand: &Block| {
        let is_within = |block: &&Block| {
            let mut ranges = offered(row);
            ranges.all(|range| !admits(block, range) || admits(demand, range))
        };
        let wanted: u32 = blocks.iter().filter(is_within).map(Block::ports).sum();
        let ranges = offered(row).filter(|range| admits(demand, range));
        wanted <= ranges.map(|range| u32::from(range.count)).sum()
    };
    blocks.iter().all(fits_somewhere) && blocks.iter().all(can_be_met)
}
