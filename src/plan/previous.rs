//! Which table the next one continues. It also knows what to do when the table
//! was lost: when someone removed, changed or set back what was published.
//!
//! - The newest known table counts, published or not.
//! - The next generation is above every generation that readers may have seen,
//!   because they refuse older tables.
//! - Servers that the newest known table does not have keep running: they get a
//!   row for their slot, with the ports that they carry (`ObservedServer::ranges`).

use super::{Observed, ValidPool, empty_row, ports};
use crate::table::{Row, Slot, Table};

/// The table that the next one continues.
pub(super) struct Previous<'a> {
    /// The newest known table of the pool, if any.
    pub(super) table: Option<&'a Table>,
    /// The highest generation that readers may have seen; 0 without a table.
    pub(super) seen_generation: u64,
    /// Whether readers see a table of that generation.
    pub(super) is_published: bool,
}

impl<'a> Previous<'a> {
    pub(super) fn new(observed: &Observed<'a>) -> Self {
        let is_ours = |table: &&Table| table.pool_uid == observed.uid;
        let published = observed.published.filter(is_ours);
        let last_written = observed.last_written.filter(is_ours);
        let known = published.into_iter().chain(last_written);
        let table = known.max_by_key(|table| table.generation);
        let generation = |table: Option<&Table>| table.map_or(0, |table| table.generation);
        let seen_generation = observed.seen_generation.max(generation(table));
        Self {
            table,
            seen_generation,
            // A late write of a former leader may have put an old table back.
            is_published: published.is_some() && generation(published) == seen_generation,
        }
    }

    /// The rows to continue.
    pub(super) fn rows(&self, pool: &ValidPool, observed: &Observed<'_>) -> Vec<Row> {
        let known = self.table.map_or(0, |table| table.generation);
        let mut rows = self.table.map_or_else(Vec::new, |table| table.rows.clone());
        if known == self.seen_generation && self.table.is_some() {
            // A server without a row is one that the table has let go.
            return rows;
        }
        let is_missing = |slot: Slot| rows.iter().all(|row| row.slot != slot);
        let mut lost: Vec<_> = observed.servers.iter().collect();
        lost.retain(|server| is_missing(server.slot));
        lost.sort_by_key(|server| server.slot);
        for server in lost {
            let ranges = ports::free_of_conflict(&server.ranges, &rows);
            rows.push(Row {
                ranges,
                ..empty_row(pool, server.slot)
            });
        }
        rows.sort_by_key(|row| row.slot);
        rows
    }
}
