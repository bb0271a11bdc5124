//! What a pool should look like next, as pure functions of the pool, the
//! previous table and what was observed. No client, clock or randomness: the
//! operator and `portpool local` carry a plan out.
//!
//! ```text
//! ProcessingPool ─validate→ ValidPool ┐
//! previous table ─────────────────────┼─plan→ next table, slots to start, slots to stop
//! observed slots ─────────────────────┘
//! ```
//!
//! - `validate`: a spec becomes a pool that can be planned;
//! - `ports`: which connection ports a slot gets;
//! - this file: which slots there are.
//!
//! Order: a growing pool has its row first, then the server, then the address.
//! A shrinking one drains a row, stops the server when it is empty, and drops
//! the row when the server is gone.

mod ports;
mod validate;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

pub use self::validate::{Problem, ValidPool};
use crate::pool::AGENT_PORT;
use crate::table::{FORMAT_VERSION, Row, RowState, Table, TargetPort};

/// How long a row is `Draining` before its server counts as empty: readers
/// must have seen it, and requests on their way must have arrived.
const SETTLE: Duration = Duration::from_millis(500);

/// A processing server as observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedSlot {
    /// Its slot.
    pub slot: u32,
    /// Tells it from a predecessor in the slot.
    pub uid: String,
    /// Where it answers, once known.
    pub address: Option<IpAddr>,
    /// Whether it takes sessions.
    pub is_ready: bool,
    /// Its live sessions, when known.
    pub sessions: Option<u32>,
    /// For how long its row has been `Draining`.
    pub draining_for: Option<Duration>,
}

/// What to do next. Carrying it out and planning again converges.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// To be published before anything is started or stopped.
    pub table: Table,
    /// Slots that need a server.
    pub start: Vec<u32>,
    /// Slots whose server is to be stopped.
    pub stop: Vec<u32>,
}

/// Plans the next step for `pool`, whose resource has `uid`. `drain_limit`:
/// how long live sessions may keep a server that is to go.
#[must_use]
pub fn plan(
    pool: &ValidPool,
    uid: &str,
    previous: Option<&Table>,
    observed: &[ObservedSlot],
    drain_limit: Duration,
) -> Plan {
    let observed: BTreeMap<u32, &ObservedSlot> = observed
        .iter()
        .map(|server| (server.slot, server))
        .collect();
    let previous = previous.filter(|table| table.pool_uid == uid);
    let mut rows: Vec<Row> = previous.map(|table| table.rows.clone()).unwrap_or_default();
    rows.retain(|row| row.state == RowState::Active || observed.contains_key(&row.slot));
    shrink(&mut rows, pool.replicas, &observed);
    grow(&mut rows, pool);
    ports::lay_out(&mut rows, pool);
    for row in &mut rows {
        let server = observed.get(&row.slot);
        row.server_uid = server.map(|server| server.uid.clone());
        row.address = server.and_then(|server| server.address);
    }
    let is_missing =
        |row: &&Row| row.state == RowState::Active && !observed.contains_key(&row.slot);
    let start = rows.iter().filter(is_missing).map(|row| row.slot).collect();
    let is_drained = |row: &&Row| {
        row.state == RowState::Draining
            && observed.get(&row.slot).is_some_and(|server| {
                let draining_for = server.draining_for.unwrap_or_default();
                let is_empty = server.sessions == Some(0) && draining_for >= SETTLE;
                is_empty || draining_for >= drain_limit
            })
    };
    let mut stop: Vec<u32> = rows.iter().filter(is_drained).map(|row| row.slot).collect();
    // A server whose row is gone has nothing to wait for.
    stop.extend(
        observed
            .keys()
            .filter(|slot| !rows.iter().any(|row| row.slot == **slot)),
    );
    stop.sort_unstable();
    Plan {
        table: next_table(pool, uid, previous, rows),
        start,
        stop,
    }
}

/// Drains rows that are too many: not-ready servers first, then those with the
/// fewest sessions, then the highest slots.
fn shrink(rows: &mut [Row], replicas: u32, observed: &BTreeMap<u32, &ObservedSlot>) {
    let mut active: Vec<&mut Row> = rows
        .iter_mut()
        .filter(|row| row.state == RowState::Active)
        .collect();
    let surplus = active.len().saturating_sub(replicas as usize);
    active.sort_by_key(|row| {
        let server = observed.get(&row.slot);
        let is_ready = server.is_some_and(|server| server.is_ready);
        let sessions = server.and_then(|server| server.sessions).unwrap_or(0);
        (is_ready, sessions, Reverse(row.slot))
    });
    for row in active.into_iter().take(surplus) {
        row.state = RowState::Draining;
    }
}

/// Adds rows that are missing: draining ones come back first, then the lowest
/// slots that are not in use.
fn grow(rows: &mut Vec<Row>, pool: &ValidPool) {
    let active = rows
        .iter()
        .filter(|row| row.state == RowState::Active)
        .count();
    let mut missing = (pool.replicas as usize).saturating_sub(active);
    for row in rows
        .iter_mut()
        .filter(|row| row.state == RowState::Draining)
    {
        if missing > 0 {
            row.state = RowState::Active;
            missing -= 1;
        }
    }
    for slot in 0.. {
        if missing == 0 {
            break;
        }
        if rows.iter().all(|row| row.slot != slot) {
            rows.push(Row {
                slot,
                server: format!("{}-{slot}", pool.name),
                server_uid: None,
                address: None,
                state: RowState::Active,
                ranges: Vec::new(),
            });
            missing -= 1;
        }
    }
    rows.sort_by_key(|row| row.slot);
}

fn next_table(pool: &ValidPool, uid: &str, previous: Option<&Table>, rows: Vec<Row>) -> Table {
    let mut table = Table {
        format_version: FORMAT_VERSION,
        pool: pool.name.clone(),
        pool_uid: uid.to_owned(),
        generation: previous.map_or(1, |table| table.generation),
        advertised_address: pool.advertised_address.clone(),
        agent_port: TargetPort::new(AGENT_PORT).expect("the constant is not 0"),
        load_sharing: pool.load_sharing.clone(),
        sessions: pool.sessions.clone(),
        rows,
    };
    if previous.is_some_and(|previous| *previous != table) {
        table.generation += 1;
    }
    table
}

#[cfg(test)]
mod tests;
