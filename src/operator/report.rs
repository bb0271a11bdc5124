//! The status of a pool's resource, and events: written when they change.

use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};
use tracing::warn;

use super::reconcile::Context;
use super::write::Error;
use crate::plan::objects::MANAGER;
use crate::plan::status::{Blocker, Facts, ObservedDeployment, status};
use crate::pool::{ProcessingPool, ProcessingPoolStatus};

/// Reports a spec that cannot be planned. What runs goes on, and stays told.
pub(super) async fn report_invalid(
    resource: &ProcessingPool,
    context: &Context,
    blockers: &[Blocker],
) -> Result<(), Error> {
    let (former, name) = (resource.status.as_ref(), resource.name_any());
    let facts = Facts {
        name: &name,
        generation: resource.metadata.generation.unwrap_or(0),
        pool: None,
        table: None,
        servers: &[],
        deployment: ObservedDeployment::default(),
        live: None,
        address: former.and_then(|status| status.address.clone()),
        blockers,
    };
    let mut next = status(&facts, former, Timestamp::now());
    // Not looked at, so not known to have changed.
    if let Some(former) = former {
        next.replicas = former.replicas;
        next.ready_replicas = former.ready_replicas;
        next.ports = former.ports;
        let kept = |kind: &str| {
            former
                .conditions
                .iter()
                .find(|condition| condition.type_ == kind)
                .cloned()
        };
        if let (Some(slot), Some(kept)) = (
            next.conditions
                .iter_mut()
                .find(|condition| condition.type_ == "ConnectionServerAvailable"),
            kept("ConnectionServerAvailable"),
        ) {
            *slot = kept;
        }
    }
    report(resource, context, next).await
}

/// Writes the status if it has changed, and an event for each condition that
/// has.
pub(super) async fn report(
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
        // The pool is gone, or another of the name has come.
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
        // The status has said it; an event that is lost is no reason to repeat.
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

/// One event for each condition that has changed its status or reason.
fn transitions(former: Option<&ProcessingPoolStatus>, next: &ProcessingPoolStatus) -> Vec<Event> {
    let is_news = |kind: &str, status: &str, reason: &str| {
        let known =
            former.and_then(|former| former.conditions.iter().find(|known| known.type_ == kind));
        known.is_none_or(|known| known.status != status || known.reason != reason)
    };
    let news = next.conditions.iter().filter(|condition| {
        let is_told = condition.type_ == "Ready"
            || (condition.type_ == "Degraded" && condition.status == "True");
        is_told && is_news(&condition.type_, &condition.status, &condition.reason)
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
