//! Which faults are announced, and what they excuse.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fastrand::Rng;
use portpool::table::{RowState, Slot};

use crate::pool::{CONNECTION_SERVERS, Pool, SERVERS};

/// The sessions that a fault may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Sessions on this slot.
    Server(u32),
    /// Sessions through this connection server.
    ConnectionServer(u32),
}

struct Window {
    scope: Scope,
    from: Instant,
    until: Instant,
}

/// Faults so far. A failure counts as lost unless its session lived during the
/// recovery from a fault of its own server or connection server.
#[derive(Default)]
pub struct Announced {
    windows: Mutex<Vec<Window>>,
}

impl Announced {
    fn announce(&self, scope: Scope, lasts: Duration) {
        let from = Instant::now();
        let window = Window {
            scope,
            from,
            until: from + lasts,
        };
        self.windows.lock().expect("no panic in it").push(window);
    }

    /// Whether a fault of one of `scopes` excuses a failure now of something that
    /// began at `begun`.
    pub fn excuse(&self, begun: Instant, scopes: &[Scope]) -> bool {
        let windows = self.windows.lock().expect("no panic in it");
        windows.iter().any(|window| {
            scopes.contains(&window.scope) && window.until >= begun && window.from <= Instant::now()
        })
    }

    /// Whether a recovery is going on, or was since `begun`.
    pub fn any_since(&self, begun: Instant) -> bool {
        let windows = self.windows.lock().expect("no panic in it");
        windows.iter().any(|window| window.until >= begun)
    }
}

/// A workload's restart; its ports are offered again within seconds.
const WORKLOAD: Duration = Duration::from_secs(5);
/// README, "When something dies": sessions of a broken stream are cut after
/// 10 s, and capacity is back after 15 s.
const AGENT: Duration = Duration::from_secs(20);

/// Longest duration of a session: the time of a slow reader, with a margin.
const LONGEST_SESSION: Duration = Duration::from_secs(8);

/// Carries out one fault or change. The first of each role is left alone: its memory
/// and descriptors are watched from start to end.
pub fn next(
    pool: &mut Pool,
    announced: &Announced,
    random: &mut Rng,
    counts: &mut BTreeMap<&'static str, u64>,
) -> io::Result<()> {
    let slot = random.u32(1..SERVERS);
    let what = match random.u32(..5) {
        0 => {
            pool.note(&format!("workload {slot} killed"))?;
            announced.announce(Scope::Server(slot), WORKLOAD);
            pool.workloads[slot as usize] = None;
            std::thread::sleep(Duration::from_millis(200));
            pool.start_workload(slot)?;
            "workload killed"
        }
        1 => {
            pool.note(&format!("agent {slot} killed"))?;
            announced.announce(Scope::Server(slot), AGENT);
            pool.agents[slot as usize] = None;
            std::thread::sleep(Duration::from_millis(500));
            pool.start_agent(slot)?;
            "agent killed"
        }
        2 => {
            let index = CONNECTION_SERVERS - 1;
            pool.note(&format!("connection server {index} killed"))?;
            announced.announce(Scope::ConnectionServer(index), AGENT);
            pool.connection_servers[index as usize] = None;
            std::thread::sleep(Duration::from_millis(500));
            pool.start_connection_server(index)?;
            "connection server killed"
        }
        3 => {
            pool.change(|table| table.sessions.idle_timeout_seconds ^= 1)?;
            "table settings changed"
        }
        _ => guest(pool)?,
    };
    *counts.entry(what).or_default() += 1;
    Ok(())
}

/// Takes the guest server one step further: it is added, drains, and is removed
/// after enough time to become idle. No session may notice.
fn guest(pool: &mut Pool) -> io::Result<&'static str> {
    match pool.table.row(Slot(SERVERS)).map(|row| row.state) {
        None => {
            let row = pool.row(SERVERS);
            pool.change(|table| table.rows.push(row))?;
            pool.start_workload(SERVERS)?;
            pool.start_agent(SERVERS)?;
            Ok("server added")
        }
        Some(RowState::Active) => {
            pool.change(|table| table.rows[SERVERS as usize].state = RowState::Draining)?;
            Ok("server draining")
        }
        Some(RowState::Draining) => {
            std::thread::sleep(LONGEST_SESSION);
            remove_guest(pool)?;
            Ok("server removed")
        }
    }
}

/// Removes the guest from the table and ends its processes.
pub fn remove_guest(pool: &mut Pool) -> io::Result<()> {
    pool.change(|table| table.rows.truncate(SERVERS as usize))?;
    pool.agents[SERVERS as usize] = None;
    pool.workloads[SERVERS as usize] = None;
    Ok(())
}
