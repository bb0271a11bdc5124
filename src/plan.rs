//! What a pool should look like next, as pure functions of the pool, the
//! previous table and what was observed. No client, clock or randomness: the
//! operator and `portpool local` carry a plan out.
//!
//! ```text
//! ProcessingPool ─validate→ ValidPool ┐
//! known tables ───────────────────────┼─plan→ next table, slots to start, slots to stop
//! observed servers ───────────────────┘
//! ```
//!
//! - `validate`: a spec becomes a pool that can be planned;
//! - `previous`: which table the next one continues, also when it is lost;
//! - `ports`: which connection ports a slot gets;
//! - `attempts`: how long a slot whose servers fail waits for the next one;
//! - `observed`: what a plan is made from;
//! - `environment`: what a workload learns about its place;
//! - `objects`: the Kubernetes objects of a pool; `status`: the status of its
//!   resource;
//! - this file: which slots there are.
//!
//! Order: a growing pool gets its row first, then the server, then the address.
//! A shrinking one drains a row, stops the server when it is empty, and drops
//! the row when the server is gone.
//!
//! Where clients come through Services, a row gets no sessions before these lead to
//! all of its connection ports: the row is published first, and marked as not ready.
//!
//! A server drains for `drainSeconds` at most. That counts from when its row
//! became `Draining`, which the table remembers, so no restart of the controller
//! renews it. Only a row that becomes `Active` again begins anew when it drains the
//! next time. A longer or shorter `drainSeconds` applies to what drains already.

mod attempts;
mod environment;
pub mod objects;
mod observed;
mod ports;
mod previous;
pub mod status;
mod validate;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

pub use self::attempts::blocker as failing;
pub use self::environment::environment;
pub use self::observed::{End, Observed, ObservedServer, ServicePorts};
use self::previous::Previous;
pub use self::validate::{FieldProblem, ValidPool};
use crate::pool::{AGENT_PORT, Mapping};
use crate::table::{Attempts, FORMAT_VERSION, PortRange, Row, RowState, Slot, Table, TargetPort};

/// How long a row is at least `Draining` before its server counts as empty:
/// readers must have seen the row, and requests under way must have arrived.
const SETTLE: Duration = Duration::from_millis(500);

/// A rollout of a changed template takes away one server in this many at once,
/// as a Deployment does by default.
const ROLLOUT_SHARE: usize = 4;

/// What to do next. Carrying it out and planning again converges.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The table, which must be published before a server is started or stopped.
    pub table: Table,
    /// Slots that need a server.
    pub start: Vec<Slot>,
    /// Slots whose server must be stopped.
    pub stop: Vec<Slot>,
    /// When to plan again although nothing else has changed, if ever.
    pub next_after: Option<Duration>,
}

impl Plan {
    /// Whether the plan takes a server or a port from sessions, compared with
    /// the table that is `published`.
    #[must_use]
    pub fn takes_from_sessions(&self, published: Option<&Table>) -> bool {
        let draining = |table: &Table| {
            let rows = table.rows.iter();
            rows.filter(|row| row.state == RowState::Draining).count()
        };
        let loses_ports = |former: &Row| {
            let row = self.table.row(former.slot);
            let mut ranges = former.ranges.iter();
            row.is_none_or(|row| ranges.any(|range| !row.ranges.contains(range)))
        };
        !self.stop.is_empty()
            || draining(&self.table) > published.map_or(0, draining)
            || published.is_some_and(|former| former.rows.iter().any(loses_ports))
    }
}

/// The observed servers by slot.
struct Servers<'a> {
    by_slot: BTreeMap<Slot, &'a ObservedServer>,
    may_start: bool,
}

impl<'a> Servers<'a> {
    fn new(observed: &Observed<'a>) -> Self {
        let servers = observed.servers.iter();
        Self {
            by_slot: servers.map(|server| (server.slot, server)).collect(),
            may_start: observed.may_start,
        }
    }

    fn get(&self, slot: Slot) -> Option<&'a ObservedServer> {
        self.by_slot.get(&slot).copied()
    }

    fn is_occupied(&self, slot: Slot) -> bool {
        self.by_slot.contains_key(&slot)
    }

    fn is_ready(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|server| server.is_ready)
    }

    fn is_spent(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|server| server.is_spent)
    }

    /// What it costs to drain the server in `slot`: its deletion cost, then the
    /// number of its sessions.
    fn cost(&self, slot: Slot) -> (i32, u32) {
        let cost = |server: &ObservedServer| (server.deletion_cost, server.sessions.unwrap_or(0));
        self.get(slot).map_or((0, 0), cost)
    }

    /// Whether a new server must replace the one in the slot of `row`: it is
    /// outdated or spent, or has other ports.
    fn is_outdated(&self, row: &Row) -> bool {
        // A server that could not be replaced is better than none.
        let server = self.get(row.slot).filter(|_| self.may_start);
        server.is_some_and(|server| {
            server.is_outdated || server.is_spent || listens_elsewhere(server, row)
        })
    }
}

/// Whether `server` was started with other ports than those in `row` for an entry
/// with mapping Identity. Its workload listens where it was told to at the start.
fn listens_elsewhere(server: &ObservedServer, row: &Row) -> bool {
    let is_there = |range: &PortRange| {
        let mut started = server.ranges.iter();
        started.any(|former| {
            (
                &former.name,
                former.connection_port,
                former.count,
                former.mapping,
            ) == (
                &range.name,
                range.connection_port,
                range.count,
                range.mapping,
            )
        })
    };
    let mut ranges = row.ranges.iter();
    // Of a server that was started with unknown ports, nothing can be said.
    !server.ranges.is_empty()
        && ranges.any(|range| range.mapping == Mapping::Identity && !is_there(range))
}

/// Plans the next step for `pool` at the time `now`.
#[must_use]
pub fn plan(pool: &ValidPool, observed: &Observed<'_>, now: Timestamp) -> Plan {
    let servers = Servers::new(observed);
    let previous = Previous::new(observed);
    let mut rows = previous.rows(pool, observed);
    for row in &mut rows {
        row.attempts = attempts::next(row, servers.get(row.slot), observed.may_mark, now);
    }
    shrink(&mut rows, pool.replicas, &servers);
    replace(&mut rows, pool.replicas, &servers);
    grow(&mut rows, pool, &servers);
    ports::lay_out(&mut rows, pool);
    for row in &mut rows {
        let server = servers.get(row.slot);
        let uid = server.map(|server| server.uid.clone());
        // Without the pool's own Service, the port of a node may lead to others.
        let is_hidden = observed.services.is_some_and(|ports| !ports.lead_to(row));
        let may_mark = observed.may_mark || row.server_uid != uid;
        if may_mark || is_hidden {
            row.not_ready = is_hidden || server.is_some_and(|server| server.not_ready);
        }
        row.server_uid = uid;
        row.address = server.and_then(|server| server.address);
        row.draining_since = match row.state {
            RowState::Active => None,
            RowState::Draining => row.draining_since.or(Some(now)),
        };
    }
    let start = rows
        .iter()
        .filter(|row| row.state == RowState::Active && !servers.is_occupied(row.slot))
        .filter(|row| observed.may_start && attempts::pause(row, now).is_zero())
        .map(|row| row.slot)
        .collect();
    let is_done = |server: &&ObservedServer| {
        let row = rows.iter().find(|row| row.slot == server.slot);
        // No port leads to a server without a row, so nothing keeps it.
        let is_drained = row.is_none_or(|row| is_drained(row, server, now, pool.drain_limit));
        // One that failed stays until its successor may come: it shows why it failed.
        let is_over = server.end.is_some() && row.is_none_or(|row| !is_kept(row, now));
        !server.is_stopping && (is_over || is_drained)
    };
    let stop = servers.by_slot.values().copied().filter(is_done);
    let stop = stop.map(|server| server.slot).collect();
    let next_after = rows.iter().filter_map(|row| {
        let server = servers.get(row.slot);
        attempts::next_after(row, server, now)
    });
    Plan {
        next_after: next_after.min(),
        table: next_table(pool, observed.uid, &previous, rows),
        start,
        stop,
    }
}

/// The time from `since` to `now`; zero where a clock was set back.
#[must_use]
pub fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(since)).unwrap_or_default()
}

/// Whether the server of `row`, which has failed, stays for now.
fn is_kept(row: &Row, now: Timestamp) -> bool {
    row.state == RowState::Active && !attempts::pause(row, now).is_zero()
}

fn is_drained(row: &Row, server: &ObservedServer, now: Timestamp, drain_limit: Duration) -> bool {
    let Some(since) = row.draining_since else {
        return false;
    };
    // A clock that was set back makes draining longer, not shorter.
    let draining_for = elapsed(since, now);
    let is_empty = match server.sessions {
        Some(sessions) => sessions == 0,
        None => !server.is_ready,
    };
    (is_empty && draining_for >= SETTLE) || draining_for >= drain_limit
}

/// Whether `servers` that are not ready may be evicted without regard to how many are
/// ready: several are not, and none has a session. Otherwise two that crash again and
/// again would keep a node from being drained for ever. One whose sessions are not
/// known has none only if nothing of it runs, and `is_counted`: a connection server has
/// reported numbers of the others, so that it is not the whole that cannot be reached.
#[must_use]
pub fn unready_may_go(servers: &[ObservedServer], is_counted: bool) -> bool {
    let mut unready = servers.iter().filter(|server| !server.is_ready);
    let has_none = |server: &ObservedServer| match server.sessions {
        Some(sessions) => sessions == 0,
        None => is_counted && !server.is_running,
    };
    unready.clone().count() > 1 && unready.all(has_none)
}

/// Whether the row's server drains so that one of the new template replaces it.
fn is_replaced(row: &Row, servers: &Servers<'_>) -> bool {
    row.state == RowState::Draining && servers.is_outdated(row)
}

/// Number of rows that stay: active ones, and those whose servers are replaced.
fn count_staying(rows: &[Row], servers: &Servers<'_>) -> usize {
    let stays = |row: &&Row| row.state == RowState::Active || is_replaced(row, servers);
    rows.iter().filter(stays).count()
}

/// Drains surplus rows: not-ready servers first, then those of the lowest
/// deletion cost, then those with the fewest sessions, then the highest slots.
/// Servers that are being replaced go before all others: no new server follows.
fn shrink(rows: &mut [Row], replicas: u32, servers: &Servers<'_>) {
    let surplus = count_staying(rows, servers).saturating_sub(replicas as usize);
    let replaced = rows.iter().filter(|row| is_replaced(row, servers)).count();
    let mut active: Vec<&mut Row> = rows
        .iter_mut()
        .filter(|row| row.state == RowState::Active)
        .collect();
    active.sort_by_key(|row| {
        let is_ready = servers.is_ready(row.slot);
        (is_ready, servers.cost(row.slot), Reverse(row.slot))
    });
    for row in active.into_iter().take(surplus.saturating_sub(replaced)) {
        row.state = RowState::Draining;
    }
}

/// Drains servers of a former template, or that are too old or spent. Those that
/// are not ready drain at once, so that a template that does not work can be
/// corrected; so do spent ones, which have no sessions. Ready ones drain, those
/// of the lowest deletion cost first, then those with the fewest sessions, until
/// one in [`ROLLOUT_SHARE`] of the pool is away.
fn replace(rows: &mut [Row], replicas: u32, servers: &Servers<'_>) {
    let is_up = |row: &Row| {
        row.state == RowState::Active && servers.is_ready(row.slot) && !servers.is_spent(row.slot)
    };
    let up = rows.iter().filter(|row| is_up(row)).count();
    let most_away = (replicas as usize / ROLLOUT_SHARE).max(1);
    let mut may_go = (up + most_away).saturating_sub(replicas as usize);
    let mut outdated: Vec<&mut Row> = rows
        .iter_mut()
        .filter(|row| row.state == RowState::Active && servers.is_outdated(row))
        .collect();
    outdated.sort_by_key(|row| (servers.cost(row.slot), row.slot));
    for row in outdated {
        let is_up = is_up(row);
        if is_up && may_go == 0 {
            continue;
        }
        may_go -= usize::from(is_up);
        row.state = RowState::Draining;
    }
}

/// Adds missing rows: draining ones become active again first, with their
/// ports, then the lowest unused slots follow. Drops the rows of servers that
/// have drained and are gone.
fn grow(rows: &mut Vec<Row>, pool: &ValidPool, servers: &Servers<'_>) {
    let mut missing = (pool.replicas as usize).saturating_sub(count_staying(rows, servers));
    let mut candidates: Vec<&mut Row> = rows
        .iter_mut()
        .filter(|row| row.state == RowState::Draining && !is_replaced(row, servers))
        .collect();
    candidates.sort_by_key(|row| !servers.is_occupied(row.slot));
    for row in candidates.into_iter().take(missing) {
        row.state = RowState::Active;
        missing -= 1;
    }
    rows.retain(|row| row.state == RowState::Active || servers.is_occupied(row.slot));
    for slot in (0..).map(Slot) {
        if missing == 0 {
            break;
        }
        if rows.iter().all(|row| row.slot != slot) {
            rows.push(empty_row(pool, slot));
            missing -= 1;
        }
    }
    rows.sort_by_key(|row| row.slot);
}

/// An active row of `slot` without ports.
#[must_use]
pub fn empty_row(pool: &ValidPool, slot: Slot) -> Row {
    Row {
        slot,
        server: server_name(&pool.name, slot),
        server_uid: None,
        address: None,
        state: RowState::Active,
        not_ready: false,
        draining_since: None,
        attempts: Attempts::default(),
        ranges: Vec::new(),
    }
}

/// Name of the processing server in `slot`.
#[must_use]
pub fn server_name(pool: &str, slot: Slot) -> String {
    format!("{pool}-{slot}")
}

/// The table with `rows`. Its generation grows when the table differs from the
/// previous one, or when readers do not see that one.
fn next_table(pool: &ValidPool, uid: &str, previous: &Previous<'_>, rows: Vec<Row>) -> Table {
    let mut table = Table {
        format_version: FORMAT_VERSION,
        pool: pool.name.clone(),
        pool_uid: uid.to_owned(),
        generation: previous.table.map_or(0, |table| table.generation),
        advertised_address: pool.advertised_address.clone(),
        agent_port: TargetPort::new(AGENT_PORT).expect("the constant is not 0"),
        load_sharing: pool.load_sharing.clone(),
        sessions: pool.sessions.clone(),
        recycle: pool.recycle,
        drain_seconds: u32::try_from(pool.drain_limit.as_secs()).ok(),
        rows,
    };
    if previous.table != Some(&table) || !previous.is_published {
        table.generation = previous.seen_generation + 1;
    }
    table
}

#[cfg(test)]
mod tests;
