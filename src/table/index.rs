//! Looks connection ports up in a table.

use std::sync::Arc;

use super::{ListenPort, PortRange, Row, Table};

/// A table that finds the row of a connection port. Takes 12 bytes for each
/// range beside the table, however many ports that has.
#[derive(Clone, Debug)]
pub struct PortIndex {
    table: Arc<Table>,
    /// First connection port, index of the row, index of the range in it;
    /// sorted.
    starts: Box<[(ListenPort, u32, u32)]>,
}

impl PortIndex {
    /// Indexes `table`, in which no connection port occurs twice.
    #[must_use]
    pub fn new(table: Arc<Table>) -> Self {
        let mut starts: Vec<_> = (0u32..)
            .zip(&table.rows)
            .flat_map(|(row, content)| {
                (0u32..)
                    .zip(&content.ranges)
                    .map(move |(range, run)| (run.connection_port, row, range))
            })
            .collect();
        starts.sort_unstable();
        let starts = starts.into_boxed_slice();
        Self { table, starts }
    }

    /// The row and range that `port` belongs to.
    #[must_use]
    pub fn find(&self, port: ListenPort) -> Option<(&Row, &PortRange)> {
        let after = self.starts.partition_point(|(first, ..)| *first <= port);
        let (_, row, range) = self.starts[after.checked_sub(1)?];
        let row = &self.table.rows[row as usize];
        let range = &row.ranges[range as usize];
        range.target(port).map(|_| (row, range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Slot;
    use crate::table::tests::{range, row, table};

    #[test]
    fn finds_what_the_rows_say() {
        let rows = vec![
            row(Slot(0), vec![range(30_000, 10), range(20_000, 4)]),
            row(Slot(7), vec![range(20_004, 1)]),
        ];
        let table = Arc::new(table(rows));
        let index = PortIndex::new(table.clone());
        for port in (1..=u16::MAX).filter_map(ListenPort::new) {
            let expected = table
                .rows
                .iter()
                .find_map(|row| Some((row.slot, row.find(port)?.0)));
            let found = index.find(port).map(|(row, range)| (row.slot, range));
            assert_eq!(found, expected, "{port}");
        }
    }
}
