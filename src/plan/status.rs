//! The status of a pool's resource: counts, conditions, and one plain sentence.
//!
//! Conditions follow the Kubernetes API conventions: each has the generation
//! that it is about, and its time changes only with its status. `client_addresses`
//! decides whether the pool sees the addresses of its clients.

mod client_addresses;
mod listening;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

pub use self::listening::{NOT_LISTENING, NotListening, PARTLY_LISTENING, not_listening};
use super::objects::{COMPONENT_LABEL, POOL_LABEL, PROCESSING_SERVER};
use super::{FieldProblem, ObservedServer, ValidPool};
use crate::pool::{Exposure, ProcessingPoolStatus};
use crate::table::{RowState, Slot, Table};

/// Something that keeps a pool from being as its spec says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// The reason as one CamelCase word.
    pub reason: &'static str,
    /// The reason as a sentence that names the object and the remedy.
    pub message: String,
}

impl Blocker {
    /// The blocker with `reason`, explained by `message`.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }

    /// The blocker of a spec that cannot be planned, because of `problems`.
    #[must_use]
    pub fn invalid(problems: &[FieldProblem]) -> Self {
        let problems = problems.iter();
        let listed = problems.map(|problem| format!("{}: {}", problem.path, problem.message));
        Self::new("InvalidSpec", listed.collect::<Vec<_>>().join("; "))
    }
}

/// The connection server's Deployment, as observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObservedDeployment {
    /// Number of connection servers that serve.
    pub available: i32,
    /// Whether all connection servers were created from the present spec.
    pub is_current: bool,
}

/// Live numbers, as a connection server reports them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveNumbers {
    /// Number of live sessions.
    pub sessions: u32,
    /// Number of ports that a request could get.
    pub free_ports: u32,
}

/// What a status is derived from.
#[derive(Clone, Debug)]
pub struct StatusInput<'a> {
    /// Name of the resource.
    pub name: &'a str,
    /// Generation of the spec that the status is about.
    pub generation: i64,
    /// The pool, unless its spec is wrong.
    pub pool: Option<&'a ValidPool>,
    /// The table that is published, if any.
    pub table: Option<&'a Table>,
    /// The processing servers.
    pub servers: &'a [ObservedServer],
    /// The Deployment of the connection servers.
    pub deployment: ObservedDeployment,
    /// Live numbers, when known.
    pub live: Option<LiveNumbers>,
    /// The address that requests go to, once known.
    pub address: Option<String>,
    /// A Service of the pool whose clients come with the addresses of nodes, if there
    /// is one.
    pub hiding_service: Option<&'a str>,
    /// What is in the way of the pool, the most important first.
    pub blockers: &'a [Blocker],
}

/// The content of a condition, without its generation and time.
struct Statement {
    kind: &'static str,
    holds: bool,
    reason: &'static str,
    message: String,
}

/// The status that `input` leads to. `former` is the last status: its times are
/// kept where nothing has changed.
#[must_use]
pub fn status(
    input: &StatusInput<'_>,
    former: Option<&ProcessingPoolStatus>,
    now: Timestamp,
) -> ProcessingPoolStatus {
    let statements = statements(input);
    let message = statements[0].message.clone();
    let conditions = statements
        .into_iter()
        .map(|statement| condition(statement, input.generation, former, now));
    let table_generation = match input.table {
        Some(table) => i64::try_from(table.generation).unwrap_or(i64::MAX),
        None => former.map_or(0, |status| status.table_generation),
    };
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    ProcessingPoolStatus {
        observed_generation: input.generation,
        replicas: count(input.servers.len()),
        ready_replicas: count(ready(input.servers)),
        selector: format!(
            "{POOL_LABEL}={},{COMPONENT_LABEL}={PROCESSING_SERVER}",
            input.name
        ),
        ports: count(input.table.map_or(0, Table::connection_port_count)),
        table_generation,
        sessions: input.live.map(|live| number(live.sessions)),
        free_ports: input.live.map(|live| number(live.free_ports)),
        address: input.address.clone(),
        message,
        conditions: conditions.collect(),
    }
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Number of servers that are ready.
fn ready(servers: &[ObservedServer]) -> usize {
    servers.iter().filter(|server| server.is_ready).count()
}

/// The conditions. The message of the first one, Ready, sums the pool up.
fn statements(input: &StatusInput<'_>) -> Vec<Statement> {
    let blocker = input.blockers.first();
    let missing = missing(input);
    let is_missing = missing.is_some();
    let summary = blocker.cloned().or(missing).unwrap_or_else(|| {
        let ready = format!("all {} processing servers are ready", ready(input.servers));
        let partly = input.table;
        let partly = partly.and_then(|table| listening::partly_listening(table, input.servers));
        match partly {
            None => Blocker::new("Complete", ready),
            Some(partly) => Blocker::new(PARTLY_LISTENING, format!("{ready}; {partly}")),
        }
    });
    let degraded = blocker
        .cloned()
        .unwrap_or_else(|| Blocker::new("AsExpected", ""));
    let available = match input.deployment.available {
        0 => Blocker::new("NotAvailable", "no connection server is ready"),
        servers => Blocker::new(
            "Available",
            format!("{servers} connection servers are ready"),
        ),
    };
    let statement = |kind, holds, Blocker { reason, message }| Statement {
        kind,
        holds,
        reason,
        message,
    };
    let mut statements = vec![
        statement("Ready", blocker.is_none() && !is_missing, summary.clone()),
        statement("Progressing", blocker.is_none() && is_missing, summary),
        statement("Degraded", blocker.is_some(), degraded),
        statement(
            "ConnectionServerAvailable",
            input.deployment.available > 0,
            available,
        ),
    ];
    let pool = input.pool;
    statements
        .extend(pool.and_then(|pool| client_addresses::statement(pool, input.hiding_service)));
    statements
}

/// The condition that makes `statement`. It keeps its time while its status is
/// that in `former`.
fn condition(
    statement: Statement,
    generation: i64,
    former: Option<&ProcessingPoolStatus>,
    now: Timestamp,
) -> Condition {
    let status = if statement.holds { "True" } else { "False" };
    let mut known = former.iter().flat_map(|status| &status.conditions);
    let last = known.find(|last| last.type_ == statement.kind);
    let unchanged = last.filter(|last| last.status == status);
    Condition {
        type_: statement.kind.to_owned(),
        status: status.to_owned(),
        reason: statement.reason.to_owned(),
        message: statement.message,
        observed_generation: Some(generation),
        last_transition_time: unchanged.map_or(Time(now), |last| last.last_transition_time.clone()),
    }
}

/// Which server is not ready, and why, as far as that is known.
fn waiting(name: &str, server: Option<&ObservedServer>) -> String {
    match server.map(|server| server.waits_for.as_deref()) {
        None => format!("; pod {name} does not exist yet"),
        Some(None) => format!("; pod {name} is not"),
        Some(Some(why)) => format!("; pod {name} is not: {why}"),
    }
}

/// What the pool waits for, if anything.
fn missing(input: &StatusInput<'_>) -> Option<Blocker> {
    let (pool, table) = (input.pool?, input.table?);
    let of = |state: RowState| table.rows.iter().filter(move |row| row.state == state);
    let draining = of(RowState::Draining).count();
    let server = |slot: Slot| input.servers.iter().find(|server| server.slot == slot);
    let wanted = pool.replicas as usize;
    let planned = of(RowState::Active).count();
    if planned < wanted && draining == 0 {
        let message = format!(
            "{planned} of {wanted} processing servers have connection ports: the free ones are not adjacent enough for another; widen connectionServer.connectionPorts"
        );
        return Some(Blocker::new("PortsNotAdjacent", message));
    }
    let up = of(RowState::Active).filter(|row| {
        server(row.slot).is_some_and(|server| {
            let is_good = server.is_ready && !server.is_stopping && !server.is_outdated;
            is_good && row.address.is_some() && !row.not_ready
        })
    });
    let up = up.count();
    if up < wanted {
        let waiting = of(RowState::Active)
            .find(|row| row.not_ready || server(row.slot).is_none_or(|server| !server.is_ready))
            .map_or_else(String::new, |row| waiting(&row.server, server(row.slot)));
        let is_outdated = |server: &ObservedServer| server.is_outdated;
        if input.servers.iter().any(is_outdated) {
            let ready = ready(input.servers);
            let message = format!(
                "{up} of {wanted} processing servers are ready with the present template, {ready} in all{waiting}"
            );
            return Some(Blocker::new("ServersOutdated", message));
        }
        let message = format!("{up} of {wanted} processing servers are ready{waiting}");
        return Some(Blocker::new("ServersNotReady", message));
    }
    let leaving = input.servers.len().saturating_sub(wanted).max(draining);
    if leaving > 0 {
        let message = format!("{leaving} processing servers drain or end");
        return Some(Blocker::new("ServersLeaving", message));
    }
    if pool.exposure == Exposure::LoadBalancer && input.address.is_none() {
        let message = format!(
            "the load balancer of service {} has no address yet",
            pool.name
        );
        return Some(Blocker::new("AddressPending", message));
    }
    let servers = i32::try_from(pool.connection_servers).unwrap_or(i32::MAX);
    let deployment = input.deployment;
    if deployment.available < servers || !deployment.is_current {
        let message = format!(
            "{} of {servers} connection servers are ready",
            deployment.available
        );
        return Some(Blocker::new("ConnectionServersNotReady", message));
    }
    None
}
