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
//! - `objects`: the Kubernetes objects of a pool; `status`: what its resource tells;
//! - this file: which slots there are.
//!
//! Order: a growing pool has its row first, then the server, then the address.
//! A shrinking one drains a row, stops the server when it is empty, and drops
//! the row when the server is gone.

pub mod objects;
mod ports;
pub mod status;
mod validate;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;

pub use self::validate::{Problem, ValidPool};
use crate::pool::AGENT_PORT;
use crate::table::{FORMAT_VERSION, Row, RowState, Slot, Table, TargetPort};

/// How long a row is `Draining` before its server counts as empty: readers
/// must have seen it, and requests on their way must have arrived.
const SETTLE: Duration = Duration::from_millis(500);

/// One of how many servers may be away at once while a changed template is
/// rolled out, as in a Deployment by default.
const ROLLOUT_SHARE: usize = 4;

/// What there is of a pool.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The uid of the pool's resource.
    pub uid: &'a str,
    /// The table that was published last.
    pub table: Option<&'a Table>,
    /// The highest generation that readers may have seen, where `table` is not
    /// what they see: the next one goes above it, changed or not. Else 0.
    pub generation: u64,
    /// The processing servers, in any order.
    pub servers: &'a [ObservedServer],
}

/// A processing server as observed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedServer {
    /// Its slot.
    pub slot: Slot,
    /// Tells it from a predecessor in the slot.
    pub uid: String,
    /// Where it answers, once known.
    pub address: Option<IpAddr>,
    /// Whether it takes sessions.
    pub is_ready: bool,
    /// Whether it is made from a former template.
    pub is_outdated: bool,
    /// Whether it is being stopped already.
    pub is_stopping: bool,
    /// Whether it has ended for good.
    pub has_failed: bool,
    /// Servers of lower cost go first when a pool shrinks.
    pub deletion_cost: i32,
    /// Its live sessions, when known.
    pub sessions: Option<u32>,
}

/// What to do next. Carrying it out and planning again converges.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// To be published before anything is started or stopped.
    pub table: Table,
    /// Slots that need a server.
    pub start: Vec<Slot>,
    /// Slots whose server is to be stopped.
    pub stop: Vec<Slot>,
}

type Servers<'a> = BTreeMap<Slot, &'a ObservedServer>;

/// Plans the next step for `pool`. `drain_limit`: how long live sessions may
/// keep a server that is to go.
#[must_use]
pub fn plan(
    pool: &ValidPool,
    observed: &Observed<'_>,
    now: Timestamp,
    drain_limit: Duration,
) -> Plan {
    let servers: Servers<'_> = observed
        .servers
        .iter()
        .map(|server| (server.slot, server))
        .collect();
    let previous = observed
        .table
        .filter(|table| table.pool_uid == observed.uid);
    let mut rows: Vec<Row> = previous.map(|table| table.rows.clone()).unwrap_or_default();
    shrink(&mut rows, pool.replicas, &servers);
    replace(&mut rows, pool.replicas, &servers);
    grow(&mut rows, pool, &servers);
    ports::lay_out(&mut rows, pool);
    for row in &mut rows {
        let server = servers.get(&row.slot);
        row.server_uid = server.map(|server| server.uid.clone());
        row.address = server.and_then(|server| server.address);
        row.draining_since = match row.state {
            RowState::Active => None,
            RowState::Draining => row.draining_since.or(Some(now)),
        };
    }
    let is_missing = |row: &&Row| row.state == RowState::Active && !servers.contains_key(&row.slot);
    let start = rows.iter().filter(is_missing).map(|row| row.slot).collect();
    let is_done = |server: &&ObservedServer| {
        let row = rows.iter().find(|row| row.slot == server.slot);
        // A server whose row is gone has nothing to wait for.
        let is_drained = row.is_none_or(|row| is_drained(row, server, now, drain_limit));
        !server.is_stopping && (server.has_failed || is_drained)
    };
    let stop = servers.values().copied().filter(is_done);
    let stop = stop.map(|server| server.slot).collect();
    Plan {
        table: next_table(pool, observed, previous, rows),
        start,
        stop,
    }
}

fn is_drained(row: &Row, server: &ObservedServer, now: Timestamp, drain_limit: Duration) -> bool {
    let Some(since) = row.draining_since else {
        return false;
    };
    // A clock that was set back makes it take longer, not shorter.
    let draining_for = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    let is_empty = match server.sessions {
        Some(sessions) => sessions == 0,
        None => !server.is_ready,
    };
    (is_empty && draining_for >= SETTLE) || draining_for >= drain_limit
}

/// Whether the row's server drains to come back from the new template.
fn is_replaced(row: &Row, servers: &Servers<'_>) -> bool {
    let is_outdated = servers
        .get(&row.slot)
        .is_some_and(|server| server.is_outdated);
    row.state == RowState::Draining && is_outdated
}

/// How many rows stay: active ones, and those whose servers are replaced.
fn staying(rows: &[Row], servers: &Servers<'_>) -> usize {
    let stays = |row: &&Row| row.state == RowState::Active || is_replaced(row, servers);
    rows.iter().filter(stays).count()
}

/// Drains rows that are too many: not-ready servers first, then those of the
/// lowest deletion cost, then those with the fewest sessions, then the highest
/// slots. Servers being replaced go before all: they just do not come back.
fn shrink(rows: &mut [Row], replicas: u32, servers: &Servers<'_>) {
    let surplus = staying(rows, servers).saturating_sub(replicas as usize);
    let replaced = rows.iter().filter(|row| is_replaced(row, servers)).count();
    let mut active: Vec<&mut Row> = rows
        .iter_mut()
        .filter(|row| row.state == RowState::Active)
        .collect();
    active.sort_by_key(|row| {
        let server = servers.get(&row.slot);
        let is_ready = server.is_some_and(|server| server.is_ready);
        let cost = server.map_or(0, |server| server.deletion_cost);
        let sessions = server.and_then(|server| server.sessions).unwrap_or(0);
        (is_ready, cost, sessions, Reverse(row.slot))
    });
    for row in active.into_iter().take(surplus.saturating_sub(replaced)) {
        row.state = RowState::Draining;
    }
}

/// Drains servers of a former template: those that are not ready at once, so
/// that a template that does not work can be mended; of the ready ones so
/// many that [`ROLLOUT_SHARE`] of the pool is away, fewest sessions first.
fn replace(rows: &mut [Row], replicas: u32, servers: &Servers<'_>) {
    let is_up = |row: &Row| {
        let server = servers.get(&row.slot);
        row.state == RowState::Active && server.is_some_and(|server| server.is_ready)
    };
    let up = rows.iter().filter(|row| is_up(row)).count();
    let most_away = (replicas as usize / ROLLOUT_SHARE).max(1);
    let mut may_go = (up + most_away).saturating_sub(replicas as usize);
    let mut outdated: Vec<&mut Row> = rows
        .iter_mut()
        .filter(|row| row.state == RowState::Active)
        .filter(|row| {
            servers
                .get(&row.slot)
                .is_some_and(|server| server.is_outdated)
        })
        .collect();
    outdated.sort_by_key(|row| (servers[&row.slot].sessions.unwrap_or(0), row.slot));
    for row in outdated {
        let is_up = is_up(row);
        if is_up && may_go == 0 {
            continue;
        }
        may_go -= usize::from(is_up);
        row.state = RowState::Draining;
    }
}

/// Adds rows that are missing: draining ones come back first, with their
/// ports, then the lowest slots that are not in use. Drops the rows of servers
/// that have drained and gone.
fn grow(rows: &mut Vec<Row>, pool: &ValidPool, servers: &Servers<'_>) {
    let mut missing = (pool.replicas as usize).saturating_sub(staying(rows, servers));
    let mut candidates: Vec<&mut Row> = rows
        .iter_mut()
        .filter(|row| row.state == RowState::Draining && !is_replaced(row, servers))
        .collect();
    candidates.sort_by_key(|row| !servers.contains_key(&row.slot));
    for row in candidates.into_iter().take(missing) {
        row.state = RowState::Active;
        missing -= 1;
    }
    rows.retain(|row| row.state == RowState::Active || servers.contains_key(&row.slot));
    for slot in (0..).map(Slot) {
        if missing == 0 {
            break;
        }
        if rows.iter().all(|row| row.slot != slot) {
            rows.push(Row {
                slot,
                server: server_name(&pool.name, slot),
                server_uid: None,
                address: None,
                state: RowState::Active,
                draining_since: None,
                ranges: Vec::new(),
            });
            missing -= 1;
        }
    }
    rows.sort_by_key(|row| row.slot);
}

/// Name of the processing server in `slot`.
#[must_use]
pub fn server_name(pool: &str, slot: Slot) -> String {
    format!("{pool}-{slot}")
}

fn next_table(
    pool: &ValidPool,
    observed: &Observed<'_>,
    previous: Option<&Table>,
    rows: Vec<Row>,
) -> Table {
    let mut table = Table {
        format_version: FORMAT_VERSION,
        pool: pool.name.clone(),
        pool_uid: observed.uid.to_owned(),
        generation: previous.map_or(0, |table| table.generation),
        advertised_address: pool.advertised_address.clone(),
        agent_port: TargetPort::new(AGENT_PORT).expect("the constant is not 0"),
        load_sharing: pool.load_sharing.clone(),
        sessions: pool.sessions.clone(),
        rows,
    };
    if previous != Some(&table) || table.generation <= observed.generation {
        table.generation = table.generation.max(observed.generation) + 1;
    }
    table
}

#[cfg(test)]
mod tests;
