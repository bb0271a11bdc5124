//! Carries a plan out: the table, then everything else; which template may be
//! tried.

use serde_json::Value;
use tracing::info;

use super::observe::Observation;
use super::reconcile::Context;
use super::write::{Error, Writer};
use crate::plan::objects::{self, Owner};
use crate::plan::{Plan, server_name};
use crate::table::{Slot, Table};

/// Asks the API server about a template of which no pod exists yet, before
/// anything is given up for it.
pub(super) async fn check_template(
    writer: &Writer<'_>,
    owner: Owner<'_>,
    hash: &str,
    observation: &Observation,
    context: &Context,
) -> Result<(), Error> {
    if let Some(problem) = &owner.pool.template_problem {
        return Err(Error::Template(problem.clone()));
    }
    let is_known = observation.servers.iter().any(|server| !server.is_outdated);
    let is_checked = context.memory.with(owner.uid, |memory| {
        memory.checked_template.as_deref() == Some(hash)
    });
    if is_known || is_checked {
        return Ok(());
    }
    writer
        .check_pod(objects::pod(owner, &context.settings, Slot(0)))
        .await?;
    context.memory.with(owner.uid, |memory| {
        memory.checked_template = Some(hash.to_owned())
    });
    Ok(())
}

/// Carries the plan out: the table first, pods last. The table in force then,
/// and what did not work.
pub(super) async fn apply(
    writer: &Writer<'_>,
    owner: Owner<'_>,
    plan: Plan,
    observation: &mut Observation,
    context: &Context,
) -> (Option<Table>, Vec<Error>) {
    let Plan { table, start, stop } = plan;
    if let Err(error) = write_table(writer, owner, observation, &table, context).await {
        // Nothing else goes ahead of it.
        return (observation.table.table.clone(), vec![error]);
    }
    let desired = objects::objects(owner, &table, &context.settings);
    let starting = table.rows.iter().filter(|row| start.contains(&row.slot));
    let pods = objects::pods(owner, &context.settings, starting);
    // Neither waits for the other: a pod needs its row only.
    let ((changed, mut errors), failed) = futures::join!(
        apply_objects(writer, owner, &desired),
        writer.create_pods(pods)
    );
    errors.extend(failed);
    if changed.contains(&"Deployment") {
        // What was observed of it is about a former one.
        observation.deployment.is_current = false;
    }
    let uid_of = |slot: &Slot| {
        let mut servers = observation.servers.iter();
        let server = servers.find(|server| server.slot == *slot)?;
        Some((server_name(&owner.pool.name, *slot), server.uid.clone()))
    };
    let stopped: Vec<_> = stop.iter().filter_map(uid_of).collect();
    errors.extend(writer.delete_pods(&stopped).await);
    if !start.is_empty() || !stop.is_empty() {
        info!(?start, ?stop, errors = errors.len(), "pods changed");
    }
    (Some(table), errors)
}

/// Writes `table` where it is not what is there, and remembers it.
async fn write_table(
    writer: &Writer<'_>,
    owner: Owner<'_>,
    observation: &Observation,
    table: &Table,
    context: &Context,
) -> Result<(), Error> {
    let text = table.encode()?;
    let observed = &observation.table;
    let mut version = None;
    if observed.text.as_ref() != Some(&text) || observed.table.is_none() {
        let replaced = observed.resource_version.as_deref();
        let map = objects::config_map(owner, &text, replaced);
        let written = writer.apply(&map).await?;
        version = written.and_then(|version| version.parse().ok());
        let (generation, servers) = (table.generation, table.rows.len());
        info!(generation, servers, "table written");
    }
    context.memory.with(owner.uid, |memory| {
        memory.table_version = version.unwrap_or(memory.table_version);
        memory.table = Some(table.clone());
    });
    Ok(())
}

/// Applies what is desired beside the table and the pods, one object after
/// another, and removes what is no longer. The kinds that were changed, and
/// what did not work.
async fn apply_objects<'a>(
    writer: &Writer<'_>,
    owner: Owner<'_>,
    desired: &'a [Value],
) -> (Vec<&'a str>, Vec<Error>) {
    let (mut changed, mut errors) = (Vec::new(), Vec::new());
    for object in desired {
        match writer.apply(object).await {
            Ok(Some(_)) => changed.extend(object["kind"].as_str()),
            Ok(None) => {}
            Err(error) => errors.push(error),
        }
    }
    errors.extend(writer.prune(&owner.pool.name, desired).await.err());
    (changed, errors)
}
