//! Looks connection ports up in a table.

use std::sync::Arc;

use super::{ListenPort, PortRange, Row, Table};

/// A table in which the row of a connection port can be found. It takes 12 bytes for
/// each range beside the table, whatever the number of ports in it.
#[derive(Clone, Debug)]
pub struct PortIndex {
    table: Arc<Table>,
    /// All ranges, sorted by their first connection port.
    starts: Box<[Start]>,
}

/// A range in a table.
#[derive(Clone, Copy, Debug)]
struct Start {
    /// First connection port of the range.
    port: ListenPort,
    /// Index of the row.
    row: u32,
    /// Index of the range in the row.
    range: u32,
}

impl PortIndex {
    /// Indexes `table`, in which no connection port occurs twice.
    #[must_use]
    pub fn new(table: Arc<Table>) -> Self {
        let rows = (0u32..).zip(&table.rows);
        let starts = rows.flat_map(|(row, content)| {
            let ranges = (0u32..).zip(&content.ranges);
            ranges.map(move |(range, run)| Start {
                port: run.connection_port,
                row,
                range,
            })
        });
        let mut starts: Vec<_> = starts.collect();
        starts.sort_unstable_by_key(|start| start.port);
        let starts = starts.into_boxed_slice();
        Self { table, starts }
    }

    /// The table.
    #[must_use]
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// The row and range that `port` belongs to.
    #[must_use]
    pub fn find(&self, port: ListenPort) -> Option<(&Row, &PortRange)> {
        let after = self.starts.partition_point(|start| start.port <= port);
        let start = self.starts[after.checked_sub(1)?];
        let row = &self.table.rows[start.row as usize];
        let range = &row.ranges[start.range as usize];
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
