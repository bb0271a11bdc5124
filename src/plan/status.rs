//! What a pool's resource tells about it: counts, conditions, and one plain
//! sentence.
//!
//! Conditions follow the Kubernetes API conventions: each has the generation
//! that it is about, and its time changes only with its status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::objects::{COMPONENT_LABEL, POOL_LABEL, PROCESSING_SERVER};
use super::{ObservedServer, Problem, ValidPool};
use crate::pool::{Exposure, ProcessingPoolStatus};
use crate::table::{RowState, Slot, Table};

/// Something that keeps a pool from being as its spec says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// Why, as one CamelCase word.
    pub reason: &'static str,
    /// The same as a sentence that names the object and the remedy.
    pub message: String,
}

impl Blocker {
    /// A blocker.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }

    /// A spec that cannot be planned.
    #[must_use]
    pub fn invalid(problems: &[Problem]) -> Self {
        let problems = problems.iter();
        let told = problems.map(|problem| format!("{}: {}", problem.path, problem.message));
        Self::new("InvalidSpec", told.collect::<Vec<_>>().join("; "))
    }
}

/// The connection server's Deployment, as observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObservedDeployment {
    /// Connection servers that serve.
    pub available: i32,
    /// Whether all of them are of the present spec.
    pub is_current: bool,
}

/// Live numbers, as a connection server tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// Sessions.
    pub sessions: u32,
    /// Ports that a request could get.
    pub free_ports: u32,
}

/// What a status is made from.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The resource's name and generation.
    pub name: &'a str,
    /// Generation of the spec that was looked at.
    pub generation: i64,
    /// The pool, unless its spec is wrong.
    pub pool: Option<&'a ValidPool>,
    /// The table in force.
    pub table: Option<&'a Table>,
    /// The processing servers.
    pub servers: &'a [ObservedServer],
    /// The connection server.
    pub deployment: ObservedDeployment,
    /// Live numbers, when known.
    pub live: Option<Live>,
    /// Where requests go, once known.
    pub address: Option<String>,
    /// What is in the way, the most important first.
    pub blockers: &'a [Blocker],
}

/// The status that tells `facts`. `former`: the last one, whose times are kept
/// where nothing has changed.
#[must_use]
pub fn status(
    facts: &Facts<'_>,
    former: Option<&ProcessingPoolStatus>,
    now: Timestamp,
) -> ProcessingPoolStatus {
    let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
    let ready = facts
        .servers
        .iter()
        .filter(|server| server.is_ready)
        .count();
    let missing = missing(facts);
    let is_ready = facts.blockers.is_empty() && missing.is_none();
    let (reason, message) = match (facts.blockers.first(), &missing) {
        (Some(blocker), _) => (blocker.reason, blocker.message.clone()),
        (None, Some(missing)) => (missing.reason, missing.message.clone()),
        (None, None) => (
            "Complete",
            format!("all {ready} processing servers are ready"),
        ),
    };
    let progressing = match (&missing, facts.blockers.is_empty()) {
        (Some(missing), true) => (true, missing.reason, missing.message.clone()),
        _ => (false, reason, message.clone()),
    };
    let degraded = match facts.blockers.first() {
        Some(blocker) => (true, blocker.reason, blocker.message.clone()),
        None => (false, "AsExpected", String::new()),
    };
    let available = match facts.deployment.available {
        0 => (
            false,
            "NotAvailable",
            "no connection server is ready".to_owned(),
        ),
        servers => (
            true,
            "Available",
            format!("{servers} connection servers are ready"),
        ),
    };
    let conditions = [
        ("Ready", (is_ready, reason, message.clone())),
        ("Progressing", progressing),
        ("Degraded", degraded),
        ("ConnectionServerAvailable", available),
    ];
    let conditions = conditions
        .into_iter()
        .map(|(kind, (holds, reason, message))| {
            let status = if holds { "True" } else { "False" };
            let last =
                former.and_then(|status| status.conditions.iter().find(|last| last.type_ == kind));
            let unchanged = last.filter(|last| last.status == status);
            Condition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: reason.to_owned(),
                message,
                observed_generation: Some(facts.generation),
                last_transition_time: unchanged
                    .map_or(Time(now), |last| last.last_transition_time.clone()),
            }
        });
    let table = facts.table;
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    ProcessingPoolStatus {
        observed_generation: facts.generation,
        replicas: count(facts.servers.len()),
        ready_replicas: count(ready),
        selector: format!(
            "{POOL_LABEL}={},{COMPONENT_LABEL}={PROCESSING_SERVER}",
            facts.name
        ),
        ports: count(table.map_or(0, Table::connection_port_count)),
        table_generation: table.map_or(
            former.map_or(0, |status| status.table_generation),
            |table| i64::try_from(table.generation).unwrap_or(i64::MAX),
        ),
        sessions: facts.live.map(|live| number(live.sessions)),
        free_ports: facts.live.map(|live| number(live.free_ports)),
        address: facts.address.clone(),
        message,
        conditions: conditions.collect(),
    }
}

/// What is still to come, if anything.
fn missing(facts: &Facts<'_>) -> Option<Blocker> {
    let (pool, table) = (facts.pool?, facts.table?);
    let of = |state: RowState| table.rows.iter().filter(move |row| row.state == state);
    let server = |slot: Slot| facts.servers.iter().find(|server| server.slot == slot);
    let wanted = pool.replicas as usize;
    let up = of(RowState::Active).filter(|row| {
        server(row.slot).is_some_and(|server| {
            server.is_ready && !server.is_stopping && !server.is_outdated && row.address.is_some()
        })
    });
    let up = up.count();
    if up < wanted {
        let waiting = of(RowState::Active)
            .find(|row| server(row.slot).is_none_or(|server| !server.is_ready))
            .map_or_else(String::new, |row| format!("; pod {} is not", row.server));
        let message = format!("{up} of {wanted} processing servers are ready{waiting}");
        return Some(Blocker::new("ServersNotReady", message));
    }
    let draining = of(RowState::Draining).count();
    let leaving = facts.servers.len().saturating_sub(wanted).max(draining);
    if leaving > 0 {
        let message = format!("{leaving} processing servers drain or end");
        return Some(Blocker::new("ServersLeaving", message));
    }
    if pool.exposure == Exposure::LoadBalancer && facts.address.is_none() {
        let message = format!(
            "the load balancer of service {} has no address yet",
            pool.name
        );
        return Some(Blocker::new("AddressPending", message));
    }
    let servers = i32::try_from(pool.connection_servers).unwrap_or(i32::MAX);
    let deployment = facts.deployment;
    if deployment.available < servers || !deployment.is_current {
        let message = format!(
            "{} of {servers} connection servers are ready",
            deployment.available
        );
        return Some(Blocker::new("ConnectionServersNotReady", message));
    }
    None
}
