//! The step report: the status of a pool's resource, and events. Both are written
//! only when they change.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};
use tracing::warn;

use super::apply::Applied;
use super::context::{Context, Reconcile};
use super::observation::Observation;
use super::requests::Error;
use crate::plan::objects::MANAGER;
use crate::plan::status::{Blocker, LiveNumbers, ObservedDeployment, StatusInput, status};
use crate::pool::{ProcessingPool, ProcessingPoolStatus};

/// Failures in a row that the status does not show: most of them pass.
const TOLERATED_FAILURES: u32 = 3;

/// What a reconcile has found to be in the way of a pool.
pub(super) struct Findings {
    /// What the user can do something about, the most important first.
    pub(super) blockers: Vec<Blocker>,
    /// What may pass by itself, and is tried again.
    pub(super) failure: Option<Error>,
}

impl Findings {
    pub(super) fn new(blockers: Vec<Blocker>) -> Self {
        Self {
            blockers,
            failure: None,
        }
    }

    pub(super) fn add(&mut self, error: Error) {
        match error.blocker() {
            Some(blocker) => self.blockers.insert(0, blocker),
            None => self.failure = Some(error),
        }
    }

    /// The blockers that the status shows; `None` while a failure, after
    /// `failures` before it, may still pass unnoticed.
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

impl Reconcile<'_> {
    /// Reports in the status and in events how the pool is. Needs the client.
    ///
    /// # Errors
    /// The status could not be written.
    pub(super) async fn report(
        &self,
        observation: &Observation,
        applied: &Applied,
        findings: &Findings,
    ) -> Result<(), Error> {
        let memory = &self.context.memory;
        let failures = memory.with(self.owner.uid, |memory| memory.failures);
        let Some(blockers) = findings.lasting(failures) else {
            return Ok(());
        };
        let observed = observation.deployment;
        let input = StatusInput {
            name: &self.owner.pool.name,
            generation: self.resource.metadata.generation.unwrap_or(0),
            pool: Some(self.owner.pool),
            table: applied.table.as_ref(),
            servers: &observation.servers,
            deployment: ObservedDeployment {
                is_current: observed.is_current && !applied.has_changed_deployment,
                ..observed
            },
            live: observation.live.as_ref().map(|live| LiveNumbers {
                sessions: live.sessions,
                free_ports: live.free_ports,
            }),
            address: observation.address.clone(),
            hiding_service: observation.hiding_service.as_deref(),
            blockers: &blockers,
        };
        let next = status(&input, self.resource.status.as_ref(), Timestamp::now());
        write(self.resource, self.context, next).await
    }
}

/// Reports a spec that cannot be planned. What runs is not observed then, so the
/// status keeps what it says about it.
pub(super) async fn report_invalid(
    resource: &ProcessingPool,
    context: &Context,
    blockers: &[Blocker],
) -> Result<(), Error> {
    let (former, name) = (resource.status.as_ref(), resource.name_any());
    let input = StatusInput {
        name: &name,
        generation: resource.metadata.generation.unwrap_or(0),
        pool: None,
        table: None,
        servers: &[],
        deployment: ObservedDeployment::default(),
        live: None,
        address: former.and_then(|status| status.address.clone()),
        hiding_service: None,
        blockers,
    };
    let mut next = status(&input, former, Timestamp::now());
    if let Some(former) = former {
        next.replicas = former.replicas;
        next.ready_replicas = former.ready_replicas;
        next.ports = former.ports;
        let is_available = |condition: &&Condition| condition.type_ == "ConnectionServerAvailable";
        let known = former.conditions.iter().find(is_available);
        let mut conditions = next.conditions.iter_mut();
        let replaced = conditions.find(|condition| is_available(&&**condition));
        if let (Some(replaced), Some(known)) = (replaced, known) {
            *replaced = known.clone();
        }
    }
    write(resource, context, next).await
}

/// Writes the status if it has changed, and publishes an event for each condition
/// that has changed.
async fn write(
    resource: &ProcessingPool,
    context: &Context,
    next: ProcessingPoolStatus,
) -> Result<(), Error> {
    if resource.status.as_ref() == Some(&next) {
        return Ok(());
    }
    let (namespace, name) = (
        resource.namespace().unwrap_or_default(),
        resource.name_any(),
    );
    let api: Api<ProcessingPool> = Api::namespaced(context.client.clone(), &namespace);
    let patch = json!({
        "apiVersion": ProcessingPool::api_version(&()),
        "kind": ProcessingPool::kind(&()),
        "metadata": { "name": name, "uid": resource.uid() },
        "status": next,
    });
    context.metrics.wrote("status");
    let parameters = PatchParams::apply(MANAGER).force();
    match api
        .patch_status(&name, &parameters, &Patch::Apply::<Value>(patch))
        .await
    {
        Ok(_) => {}
        // The pool is gone, or another pool has its name.
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {
            return Ok(());
        }
        Err(source) => {
            return Err(Error::Api {
                action: "write the status of",
                object: format!("ProcessingPool {namespace}/{name}"),
                source,
            });
        }
    }
    for event in transitions(resource.status.as_ref(), &next) {
        // The status says the same: a lost event need not be repeated.
        if let Err(error) = context
            .recorder
            .publish(&event, &resource.object_ref(&()))
            .await
        {
            warn!(%error, "failed to publish an event");
        }
    }
    Ok(())
}

/// One event for each condition whose status or reason has changed. Why a pool that is
/// degraded is not ready, its event about that says already.
fn transitions(former: Option<&ProcessingPoolStatus>, next: &ProcessingPoolStatus) -> Vec<Event> {
    let is_news = |kind: &str, status: &str, reason: &str| {
        let known =
            former.and_then(|former| former.conditions.iter().find(|known| known.type_ == kind));
        known.is_none_or(|known| known.status != status || known.reason != reason)
    };
    let is_degraded =
        |condition: &Condition| condition.type_ == "Degraded" && condition.status == "True";
    let is_any_degraded = next.conditions.iter().any(is_degraded);
    let news = next.conditions.iter().filter(|condition| {
        let is_reported = if is_any_degraded {
            is_degraded(condition)
        } else {
            condition.type_ == "Ready"
        };
        is_reported && is_news(&condition.type_, &condition.status, &condition.reason)
    });
    let events = news.map(|condition| Event {
        type_: match condition.type_.as_str() {
            "Degraded" => EventType::Warning,
            _ => EventType::Normal,
        },
        reason: condition.reason.clone(),
        note: Some(condition.message.chars().take(1000).collect()),
        action: "Reconcile".to_owned(),
        secondary: None,
    });
    events.collect()
}
