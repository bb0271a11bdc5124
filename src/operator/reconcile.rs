//! One pool: the steps observe, plan, apply, report, and what follows an error.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::events::Recorder;
use kube::runtime::reflector::Store;
use kube::{Api, Client, ResourceExt};
use tracing::{Instrument, info_span, warn};

use super::apply::{apply, check_template};
use super::memory::Memory;
use super::metrics::{Metrics, Outcome};
use super::observe::{Observation, observe};
use super::report::{report, report_invalid};
use super::stores::Stores;
use super::write::{Error, Writer};
use crate::plan::objects::{self, Owner, Settings};
use crate::plan::status::{Blocker, Facts, Live, status};
use crate::plan::{Observed, Plan, ValidPool, plan};
use crate::pool::ProcessingPool;
use crate::table::{Row, RowState, Table};

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

/// Failures in a row that the status does not tell: they mostly pass.
const TOLERATED_FAILURES: u32 = 3;

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

/// The steps. When to look again, and whether something is in the way.
async fn step(
    resource: &ProcessingPool,
    namespace: &str,
    uid: &str,
    context: &Context,
) -> Result<(Duration, bool), Error> {
    // Validate.
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

    // Observe.
    let hash = objects::template_hash(owner, &context.settings);
    let Some(mut observation) = look(&writer, owner, &hash, context).await? else {
        return Ok((WATCH_PAUSE, false));
    };
    let mut trouble = Trouble::new(std::mem::take(&mut observation.blockers));
    let refusal = check_template(&writer, owner, &hash, &observation, context).await;
    let may_start = refusal.map_err(|error| trouble.add(error)).is_ok();

    // Plan.
    let plan = next(resource, owner, &observation, may_start, context);
    let published = observation.table.table.as_ref();
    if plan.takes_from_sessions(published) && !is_current(resource, context).await? {
        return Ok((WATCH_PAUSE, false));
    }

    // Apply.
    let applied = apply(&writer, owner, plan, &mut observation, context).await;
    let table = trouble.take(applied);

    // Report.
    tell(
        resource,
        &pool,
        table.as_ref(),
        &observation,
        &trouble,
        context,
    )
    .await?;
    match trouble.failure {
        Some(failure) => Err(failure),
        None => {
            let is_blocked = !trouble.blockers.is_empty();
            let after = pause(table.as_ref(), is_blocked, &observation);
            Ok((after.min(context.memory.resync()), is_blocked))
        }
    }
}

/// What is in the way of a pool.
struct Trouble {
    /// What the user can do something about, the most important first.
    blockers: Vec<Blocker>,
    /// What may pass by itself, and is tried again.
    failure: Option<Error>,
}

impl Trouble {
    fn new(blockers: Vec<Blocker>) -> Self {
        Self {
            blockers,
            failure: None,
        }
    }

    fn add(&mut self, error: Error) {
        match error.blocker() {
            Some(blocker) => self.blockers.insert(0, blocker),
            None => self.failure = Some(error),
        }
    }

    /// The table in force, with what did not work noted.
    fn take(&mut self, (table, errors): (Option<Table>, Vec<Error>)) -> Option<Table> {
        errors.into_iter().for_each(|error| self.add(error));
        table
    }

    /// What the status should tell; `None` while a failure, after `failures`
    /// before it, may still pass unnoticed.
    fn lasting(&self, failures: u32) -> Option<Vec<Blocker>> {
        let mut blockers = self.blockers.clone();
        if let Some(failure) = &self.failure {
            if failures < TOLERATED_FAILURES {
                return None;
            }
            blockers.push(Blocker::new("Failing", format!("{failure}; trying again")));
        }
        Some(blockers)
    }
}

/// What there is of the pool. `None` while the watches are behind.
async fn look(
    writer: &Writer<'_>,
    owner: Owner<'_>,
    hash: &str,
    context: &Context,
) -> Result<Option<Observation>, Error> {
    let (stores, memory) = (&context.stores, &context.memory);
    let mut observation = observe(stores, owner.namespace, owner.uid, owner.pool, hash).await;
    if memory.is_due_for_listing(owner.uid) {
        let pods = writer.list_pods(&owner.pool.name).await?;
        if memory.is_behind(owner.uid, &observation, &pods) {
            return Ok(None);
        }
        memory.forget_deleted(&context.pools);
    }
    memory.correct(owner.uid, &mut observation);
    Ok(Some(observation))
}

/// Tells in the status and in events how the pool is.
async fn tell(
    resource: &ProcessingPool,
    pool: &ValidPool,
    table: Option<&Table>,
    observation: &Observation,
    trouble: &Trouble,
    context: &Context,
) -> Result<(), Error> {
    let uid = resource.uid().unwrap_or_default();
    let failures = context.memory.with(&uid, |memory| memory.failures);
    let Some(blockers) = trouble.lasting(failures) else {
        return Ok(());
    };
    let facts = Facts {
        name: &pool.name,
        generation: resource.metadata.generation.unwrap_or(0),
        pool: Some(pool),
        table,
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
    report(resource, context, next).await
}

/// When to look again although nothing has changed.
fn pause(table: Option<&Table>, is_blocked: bool, observation: &Observation) -> Duration {
    let is_draining = |row: &Row| row.state == RowState::Draining;
    if table.is_some_and(|table| table.rows.iter().any(is_draining)) {
        DRAIN_INTERVAL
    } else if is_blocked {
        BLOCKED_INTERVAL
    } else if observation.deployment.available > 0 {
        NUMBERS_INTERVAL
    } else {
        Duration::MAX
    }
}

/// The plan for what was observed.
fn next(
    resource: &ProcessingPool,
    owner: Owner<'_>,
    observation: &Observation,
    may_start: bool,
    context: &Context,
) -> Plan {
    let last_written = context
        .memory
        .with(owner.uid, |memory| memory.table.clone());
    let reported = resource
        .status
        .as_ref()
        .map_or(0, |status| status.table_generation);
    let observed = Observed {
        uid: owner.uid,
        published: observation.table.table.as_ref(),
        last_written: last_written.as_ref(),
        seen_generation: u64::try_from(reported)
            .unwrap_or(0)
            .max(observation.table.generation),
        may_start,
        servers: &observation.servers,
    };
    plan(owner.pool, &observed, Timestamp::now())
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
