//! One pool: the steps in their order, and what follows an error.
//!
//! ```text
//! observe ─→ validate ─→ plan ─→ apply ─→ report
//! client     client      pure    client   client
//! ```

use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use tracing::{Instrument, info_span, warn};

use super::context::{Context, Reconcile};
use super::metrics::Outcome;
use super::observation::Observation;
use super::report::{Findings, report_invalid};
use super::requests::Error;
use crate::plan::status::{Blocker, not_listening};
use crate::plan::{Observed, Plan, ValidPool, failing, plan};
use crate::pool::ProcessingPool;
use crate::table::{Row, RowState, Table};

/// When a pool is reconciled again although nothing has changed: while servers
/// drain, are spent, or may be at any time, while connection servers report numbers,
/// while workloads do not listen, while it is blocked. Otherwise the next resync comes first.
const DRAIN_INTERVAL: Duration = Duration::from_secs(1);
const NUMBERS_INTERVAL: Duration = Duration::from_secs(15);
const SILENT_INTERVAL: Duration = Duration::from_secs(5);
const BLOCKED_INTERVAL: Duration = Duration::from_secs(10);

/// Pause for a watch that does not show everything yet.
const WATCH_PAUSE: Duration = Duration::from_millis(500);

/// Pause after the first error, and the longest pause after repeated errors.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// What a reconcile without an error leads to.
struct Progress {
    /// When the pool is reconciled again although nothing has changed.
    next_after: Duration,
    /// Whether the user has to do something first.
    is_blocked: bool,
}

impl Progress {
    /// The watches are behind: nothing was decided.
    const WATCH_IS_BEHIND: Self = Self {
        next_after: WATCH_PAUSE,
        is_blocked: false,
    };
}

/// Brings the pool one step nearer to its spec, and reports its status.
pub(super) async fn reconcile(
    resource: &ProcessingPool,
    context: &Context,
) -> Result<Action, Error> {
    let uid = resource.uid().unwrap_or_default();
    if resource.metadata.deletion_timestamp.is_some() {
        // Owned objects are garbage-collected.
        context.memory.forget(&uid);
        return Ok(Action::await_change());
    }
    let namespace = resource.namespace().unwrap_or_default();
    let span = info_span!("reconcile", namespace, pool = resource.name_any());
    let started = Instant::now();
    let result = step(resource, context).instrument(span).await;
    let metrics = &context.metrics;
    metrics.duration.observe(started.elapsed().as_secs_f64());
    let outcome = match &result {
        Ok(progress) if progress.is_blocked => "blocked",
        Ok(_) => "ok",
        Err(_) => "error",
    };
    metrics.reconciles.get_or_create(&Outcome { outcome }).inc();
    if result.is_ok() {
        context.memory.with(&uid, |memory| memory.failures = 0);
    }
    result.map(|progress| Action::requeue(progress.next_after))
}

/// Schedules another try; the pauses grow.
pub(super) fn after_error(resource: &ProcessingPool, error: &Error, context: &Context) -> Action {
    let uid = resource.uid().unwrap_or_default();
    let failures = context.memory.with(&uid, |memory| {
        memory.failures = memory.failures.saturating_add(1);
        memory.failures
    });
    warn!(namespace = resource.namespace(), pool = resource.name_any(), %error, failures, "reconcile failed; trying again");
    let pause = FIRST_RETRY.saturating_mul(1 << failures.min(10).saturating_sub(1));
    Action::requeue(pause.min(LAST_RETRY))
}

/// The steps of one reconcile.
async fn step(resource: &ProcessingPool, context: &Context) -> Result<Progress, Error> {
    let pool = match ValidPool::new(resource) {
        Ok(pool) => pool,
        Err(problems) => {
            // What runs stays as it is.
            report_invalid(resource, context, &[Blocker::invalid(&problems)]).await?;
            return Ok(Progress {
                next_after: context.memory.resync(),
                is_blocked: true,
            });
        }
    };
    let reconcile = Reconcile::new(resource, &pool, context);

    let Some(observation) = reconcile.observe().await? else {
        return Ok(Progress::WATCH_IS_BEHIND);
    };
    let mut findings = Findings::new(observation.blockers.clone());

    let template = reconcile.validate(&observation).await;
    let may_start = template.map_err(|error| findings.add(error)).is_ok();

    let plan = reconcile.plan(&observation, may_start);
    let published = observation.table.table.as_ref();
    if plan.takes_from_sessions(published) && !reconcile.is_current().await? {
        return Ok(Progress::WATCH_IS_BEHIND);
    }

    let plan_after = plan.next_after;
    let mut applied = reconcile.apply(plan, &observation).await;
    for error in applied.errors.drain(..) {
        findings.add(error);
    }
    let table = applied.table.as_ref();
    let found = table.map(|table| {
        let servers = &observation.servers;
        [failing(table, servers), not_listening(table, servers)]
    });
    findings
        .blockers
        .extend(found.into_iter().flatten().flatten());

    reconcile.report(&observation, &applied, &findings).await?;
    // Another server may have become ready meanwhile.
    let until_marks = context.memory.until_marks(reconcile.owner.uid);
    let until_marks = Some(until_marks).filter(|until| !until.is_zero());
    let is_blocked = !findings.blockers.is_empty();
    match findings.failure {
        Some(failure) => Err(failure),
        None => Ok(Progress {
            next_after: pause(&pool, applied.table.as_ref(), is_blocked, &observation)
                .min(context.memory.resync())
                .min(until_marks.unwrap_or(Duration::MAX))
                .min(plan_after.unwrap_or(Duration::MAX)),
            is_blocked,
        }),
    }
}

impl Reconcile<'_> {
    /// Plans the next step from what was observed. Needs no client: all
    /// decisions are those of [`plan`].
    fn plan(&self, observation: &Observation, may_start: bool) -> Plan {
        let memory = &self.context.memory;
        let last_written = memory.with(self.owner.uid, |memory| memory.table.clone());
        let status = self.resource.status.as_ref();
        let reported = status.map_or(0, |status| status.table_generation);
        let reported = u64::try_from(reported).unwrap_or(0);
        let observed = Observed {
            uid: self.owner.uid,
            published: observation.table.table.as_ref(),
            last_written: last_written.as_ref(),
            seen_generation: reported.max(observation.table.generation),
            may_start,
            may_mark: memory.until_marks(self.owner.uid).is_zero(),
            servers: &observation.servers,
            services: observation.services.as_ref(),
        };
        plan(self.owner.pool, &observed, Timestamp::now())
    }
}

/// When to reconcile again although nothing has changed.
fn pause(
    pool: &ValidPool,
    table: Option<&Table>,
    is_blocked: bool,
    observation: &Observation,
) -> Duration {
    let is_draining = |row: &Row| row.state == RowState::Draining;
    let is_draining = table.is_some_and(|table| table.rows.iter().any(is_draining));
    // Its last session may end at any time, or has ended since this was observed.
    let servers = observation.live.iter().flat_map(|live| &live.servers);
    let is_any_spent = servers.into_iter().any(|server| server.spent);
    let is_recycling = pool.recycle.after_sessions().is_some() || is_any_spent;
    let pause = if is_draining || is_recycling {
        DRAIN_INTERVAL
    } else if observation.is_any_silent {
        SILENT_INTERVAL
    } else if is_blocked {
        BLOCKED_INTERVAL
    } else if observation.deployment.available > 0 {
        NUMBERS_INTERVAL
    } else {
        Duration::MAX
    };
    pause.min(observation.next_too_old.unwrap_or(Duration::MAX))
}
