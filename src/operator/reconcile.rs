//! One pool: the steps observe, plan, apply, report, and what follows an error.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::events::Recorder;
use kube::runtime::reflector::Store;
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use tracing::{Instrument, info, info_span, warn};

use super::apply::{Error, Writer};
use super::memory::Memory;
use super::metrics::{Metrics, Outcome};
use super::observe::{Observation, Stores, observe};
use super::report::{report, report_invalid};
use crate::plan::objects::{self, Owner, Settings};
use crate::plan::status::{Blocker, Facts, Live, status};
use crate::plan::{Observed, Plan, ValidPool, plan, server_name};
use crate::pool::ProcessingPool;
use crate::table::{RowState, Table};

/// When a pool is looked at again although nothing has changed: while servers
/// drain, for numbers, when blocked. Else with the next resync.
const DRAIN_INTERVAL: Duration = Duration::from_secs(1);
const NUMBERS_INTERVAL: Duration = Duration::from_secs(15);
const BLOCKED_INTERVAL: Duration = Duration::from_secs(10);

/// Pause for a watch that does not show all pods yet.
const WATCH_PAUSE: Duration = Duration::from_millis(500);

/// Pause after the first error, and the longest after repeated ones.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// What all reconciles share.
pub(super) struct Context {
    pub(super) client: Client,
    pub(super) pools: Store<ProcessingPool>,
    pub(super) stores: Stores,
    pub(super) settings: Settings,
    pub(super) recorder: Recorder,
    pub(super) metrics: Arc<Metrics>,
    pub(super) memory: Memory,
}

/// Brings the pool one step nearer to its spec, and tells in its status.
pub(super) async fn reconcile(pool: &ProcessingPool, context: &Context) -> Result<Action, Error> {
    let namespace = pool.namespace().unwrap_or_default();
    let uid = pool.uid().unwrap_or_default();
    if pool.metadata.deletion_timestamp.is_some() {
        // Owned objects are garbage-collected.
        context.memory.forget(&uid);
        return Ok(Action::await_change());
    }
    let span = info_span!("reconcile", namespace, pool = pool.name_any());
    let started = Instant::now();
    let result = step(pool, &namespace, &uid, context).instrument(span).await;
    context
        .metrics
        .duration
        .observe(started.elapsed().as_secs_f64());
    let outcome = match &result {
        Ok((_, true)) => "blocked",
        Ok((_, false)) => "ok",
        Err(_) => "error",
    };
    context
        .metrics
        .reconciles
        .get_or_create(&Outcome { outcome })
        .inc();
    if result.is_ok() {
        context.memory.with(&uid, |memory| memory.failures = 0);
    }
    result.map(|(after, _)| Action::requeue(after))
}

/// Tries again, ever more seldom.
pub(super) fn after_error(pool: &ProcessingPool, error: &Error, context: &Context) -> Action {
    let uid = pool.uid().unwrap_or_default();
    let failures = context.memory.with(&uid, |memory| {
        memory.failures = memory.failures.saturating_add(1);
        memory.failures
    });
    warn!(namespace = pool.namespace(), pool = pool.name_any(), %error, failures, "reconcile failed; trying again");
    let pause = FIRST_RETRY.saturating_mul(1 << failures.min(10).saturating_sub(1));
    Action::requeue(pause.min(LAST_RETRY))
}

/// Observe, plan, apply, report. When to look again, and whether something is
/// in the way.
async fn step(
    resource: &ProcessingPool,
    namespace: &str,
    uid: &str,
    context: &Context,
) -> Result<(Duration, bool), Error> {
    let pool = match ValidPool::new(resource) {
        Ok(pool) => pool,
        Err(problems) => {
            // What runs goes on as it is.
            let blockers = [Blocker::invalid(&problems)];
            report_invalid(resource, context, &blockers).await?;
            return Ok((context.memory.resync(), true));
        }
    };
    let owner = Owner {
        pool: &pool,
        namespace,
        uid,
    };
    let writer = Writer {
        client: &context.client,
        stores: &context.stores,
        metrics: &context.metrics,
        namespace,
        uid,
    };
    let hash = objects::template_hash(owner, &context.settings);
    let mut observation = observe(&context.stores, namespace, uid, &pool, &hash).await;
    if context.memory.is_due_for_listing(uid) {
        let pods = writer.list_pods(&pool.name).await?;
        if context.memory.is_behind(uid, &observation, &pods) {
            return Ok((WATCH_PAUSE, false));
        }
        context.memory.forget_deleted(&context.pools);
    }
    context.memory.correct(uid, &mut observation);
    let mut blockers = std::mem::take(&mut observation.blockers);
    let mut failure = None;
    let mut table = observation.table.table.clone();
    let applied = match check_template(&writer, owner, &hash, &observation, context).await {
        Ok(()) => apply(resource, &writer, owner, &observation, context).await,
        Err(error) => Err(error),
    };
    match applied {
        Ok((applied, errors)) => {
            table = Some(applied);
            for error in errors {
                match error.blocker() {
                    Some(blocker) => blockers.insert(0, blocker),
                    None => failure = Some(error),
                }
            }
        }
        Err(error) => match error.blocker() {
            Some(blocker) => blockers.insert(0, blocker),
            None => failure = Some(error),
        },
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    let name = resource.name_any();
    let facts = Facts {
        name: &name,
        generation: resource.metadata.generation.unwrap_or(0),
        pool: Some(&pool),
        table: table.as_ref(),
        servers: &observation.servers,
        deployment: observation.deployment,
        live: observation.live.as_ref().map(|live| Live {
            sessions: live.sessions,
            free_ports: live.free_ports,
        }),
        address: observation.address.clone(),
        blockers: &blockers,
    };
    let next = status(&facts, resource.status.as_ref(), Timestamp::now());
    report(resource, context, next).await?;
    let drains =
        table.is_some_and(|table| table.rows.iter().any(|row| row.state == RowState::Draining));
    let after = match (
        drains,
        blockers.is_empty(),
        observation.deployment.available,
    ) {
        (true, ..) => DRAIN_INTERVAL,
        (_, false, _) => BLOCKED_INTERVAL,
        (_, _, 1..) => NUMBERS_INTERVAL,
        _ => context.memory.resync(),
    };
    let after = after.min(context.memory.resync());
    Ok((after, !blockers.is_empty()))
}

/// Asks the API server about a template of which no pod exists yet, before
/// anything is given up for it.
async fn check_template(
    writer: &Writer<'_>,
    owner: Owner<'_>,
    hash: &str,
    observation: &Observation,
    context: &Context,
) -> Result<(), Error> {
    let is_known = observation.servers.iter().any(|server| !server.is_outdated);
    let is_checked = context.memory.with(owner.uid, |memory| {
        memory.checked_template.as_deref() == Some(hash)
    });
    if is_known || is_checked {
        return Ok(());
    }
    writer
        .check_pod(objects::pod(owner, &context.settings, 0))
        .await?;
    context.memory.with(owner.uid, |memory| {
        memory.checked_template = Some(hash.to_owned())
    });
    Ok(())
}

/// Carries the next step out: the table first, pods last. The table in force
/// then, and what did not work beside it.
async fn apply(
    resource: &ProcessingPool,
    writer: &Writer<'_>,
    owner: Owner<'_>,
    observation: &Observation,
    context: &Context,
) -> Result<(Table, Vec<Error>), Error> {
    let Plan { table, start, stop } = next(resource, owner, observation, context);
    if takes_away(&table, observation, &stop) && !is_current(resource, context).await? {
        // The watch is behind: what is wanted now comes with the next event.
        let table = observation.table.table.clone().unwrap_or(table);
        return Ok((table, Vec::new()));
    }
    let text = table.encode()?;
    if observation.table.text.as_ref() != Some(&text) || observation.table.table.is_none() {
        let version = observation.table.resource_version.as_deref();
        let written = writer
            .apply(&objects::config_map(owner, &text, version))
            .await?;
        let written = written.and_then(|version| version.parse().ok());
        context.memory.with(owner.uid, |memory| {
            memory.table_version = written.unwrap_or(memory.table_version);
        });
        info!(
            generation = table.generation,
            servers = table.rows.len(),
            "table written"
        );
    }
    context
        .memory
        .with(owner.uid, |memory| memory.table = Some(table.clone()));
    let desired = objects::objects(owner, &table, &context.settings);
    let pods = objects::pods(owner, &context.settings, start.clone().into_iter());
    // Neither waits for the other: a pod needs its row only.
    let (mut errors, failed) = futures::join!(
        apply_objects(writer, owner, &desired),
        writer.create_pods(pods)
    );
    errors.extend(failed);
    let uid_of = |slot: &u32| {
        let server = observation
            .servers
            .iter()
            .find(|server| server.slot == *slot)?;
        Some((server_name(&owner.pool.name, *slot), server.uid.clone()))
    };
    errors.extend(
        writer
            .delete_pods(stop.iter().filter_map(uid_of).collect())
            .await,
    );
    if !start.is_empty() || !stop.is_empty() {
        info!(?start, ?stop, errors = errors.len(), "pods changed");
    }
    Ok((table, errors))
}

/// Applies what is desired beside the table and the pods, one object after
/// another, and removes what is no longer.
async fn apply_objects(writer: &Writer<'_>, owner: Owner<'_>, desired: &[Value]) -> Vec<Error> {
    let mut errors = Vec::new();
    for object in desired {
        errors.extend(writer.apply(object).await.err());
    }
    errors.extend(writer.prune(&owner.pool.name, desired).await.err());
    errors
}

/// The plan. A table that somebody has changed or removed is planned from
/// the one that was written last, and goes above whatever readers have seen.
fn next(
    resource: &ProcessingPool,
    owner: Owner<'_>,
    observation: &Observation,
    context: &Context,
) -> Plan {
    let remembered = context
        .memory
        .with(owner.uid, |memory| memory.table.clone());
    let told = resource
        .status
        .as_ref()
        .map_or(0, |status| status.table_generation);
    let seen = u64::try_from(told)
        .unwrap_or(0)
        .max(observation.table.generation);
    let is_lost = observation.table.table.is_none();
    let observed = Observed {
        uid: owner.uid,
        table: observation.table.table.as_ref().or(remembered.as_ref()),
        generation: if is_lost { seen } else { 0 },
        servers: &observation.servers,
    };
    plan(
        owner.pool,
        &observed,
        Timestamp::now(),
        owner.pool.drain_limit,
    )
}

/// Whether carrying out takes something from sessions.
fn takes_away(table: &Table, observation: &Observation, stop: &[u32]) -> bool {
    let draining = |table: &Table| {
        table
            .rows
            .iter()
            .filter(|row| row.state == RowState::Draining)
            .count()
    };
    let before = observation.table.table.as_ref().map_or(0, draining);
    !stop.is_empty() || draining(table) > before
}

/// Whether `resource` is what the API server has now.
async fn is_current(resource: &ProcessingPool, context: &Context) -> Result<bool, Error> {
    let (namespace, name) = (
        resource.namespace().unwrap_or_default(),
        resource.name_any(),
    );
    let api: Api<ProcessingPool> = Api::namespaced(context.client.clone(), &namespace);
    let live = api
        .get_metadata_opt(&name)
        .await
        .map_err(|source| Error::Api {
            action: "read",
            object: format!("ProcessingPool {namespace}/{name}"),
            source,
        })?;
    Ok(live.is_some_and(|live| {
        live.metadata.uid == resource.metadata.uid
            && live.metadata.generation == resource.metadata.generation
            && live.metadata.deletion_timestamp.is_none()
    }))
}
