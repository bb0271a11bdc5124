//! The steps validate and apply: asks the API server about the template, and
//! carries a plan out, the table first.

use std::time::Instant;

use serde_json::Value;
use tracing::info;

use super::context::Reconcile;
use super::observation::Observation;
use super::requests::{Error, PodToDelete};
use crate::plan::objects;
use crate::plan::{Plan, server_name, unready_may_go};
use crate::table::{Row, Slot, Table};

/// What became of a plan.
pub(super) struct Applied {
    /// The table that is published now, if any.
    pub(super) table: Option<Table>,
    /// Whether the Deployment was changed: what was observed of it is outdated.
    pub(super) has_changed_deployment: bool,
    /// Everything that failed.
    pub(super) errors: Vec<Error>,
}

/// What became of the objects beside the table and the pods.
#[derive(Default)]
struct AppliedObjects {
    has_changed_deployment: bool,
    errors: Vec<Error>,
}

/// Whether `table` says of a server that was there already that it is ready, and
/// `former` the opposite. What is said of a new server costs no table of its own.
fn marks_anew(former: &Table, table: &Table) -> bool {
    let is_other = |row: &Row| {
        let former = former.row(row.slot);
        former.is_some_and(|former| {
            former.server_uid == row.server_uid && former.not_ready != row.not_ready
        })
    };
    table.rows.iter().any(is_other)
}

impl Reconcile<'_> {
    /// Asks the API server whether it accepts a pod of the template, unless a
    /// pod of it exists. Needs the client, for a dry run; changes nothing.
    ///
    /// # Errors
    /// Why no pod can be created of the template. No server is given up for it.
    pub(super) async fn validate(&self, observation: &Observation) -> Result<(), Error> {
        if let Err(problem) = &self.owner.pool.template {
            return Err(Error::Template(problem.clone()));
        }
        let (memory, hash) = (&self.context.memory, &self.template_hash);
        let is_known = observation.servers.iter().any(|server| !server.is_outdated);
        let is_checked = memory.with(self.owner.uid, |memory| {
            memory.checked_template.as_ref() == Some(hash)
        });
        if is_known || is_checked {
            return Ok(());
        }
        let pod = objects::pod(self.owner, &self.context.settings, Slot(0));
        self.check_pod(pod).await?;
        memory.with(self.owner.uid, |memory| {
            memory.checked_template = Some(hash.clone());
        });
        Ok(())
    }

    /// Carries `plan` out: the table first, other objects beside new pods, then
    /// the removal of pods. Needs the client.
    pub(super) async fn apply(&self, plan: Plan, observation: &Observation) -> Applied {
        let Plan {
            table, start, stop, ..
        } = plan;
        if let Err(error) = self.apply_table(observation, &table).await {
            // Nothing else may go ahead of the table.
            return Applied {
                table: observation.table.table.clone(),
                has_changed_deployment: false,
                errors: vec![error],
            };
        }
        let settings = &self.context.settings;
        let desired = objects::objects(
            self.owner,
            &table,
            settings,
            unready_may_go(&observation.servers, observation.live.is_some()),
        );
        let starting = table.rows.iter().filter(|row| start.contains(&row.slot));
        let pods = objects::pods(self.owner, settings, starting);
        // Neither waits for the other: a pod needs its row only.
        let (objects, failed) =
            futures::join!(self.apply_objects(&desired), self.create_pods(pods));
        let mut errors = objects.errors;
        errors.extend(failed);
        let to_delete = |slot: &Slot| {
            let mut servers = observation.servers.iter();
            let server = servers.find(|server| server.slot == *slot)?;
            Some(PodToDelete {
                name: server_name(&self.owner.pool.name, *slot),
                uid: server.uid.clone(),
            })
        };
        let stopped: Vec<_> = stop.iter().filter_map(to_delete).collect();
        errors.extend(self.delete_pods(&stopped).await);
        if !start.is_empty() || !stop.is_empty() {
            let error = errors.first().map(tracing::field::display);
            info!(?start, ?stop, errors = errors.len(), error, "pods changed");
        }
        Applied {
            table: Some(table),
            has_changed_deployment: objects.has_changed_deployment,
            errors,
        }
    }

    /// Writes `table` unless it is published already, and remembers it.
    async fn apply_table(&self, observation: &Observation, table: &Table) -> Result<(), Error> {
        let text = table.encode()?;
        let observed = &observation.table;
        let (mut version, mut is_marked) = (None, false);
        if observed.text.as_ref() != Some(&text) || observed.table.is_none() {
            let replaced = observed.resource_version.as_deref();
            let map = objects::config_map(self.owner, &text, replaced);
            let written = self.apply_object(&map).await?;
            version = written.and_then(|version| version.parse().ok());
            let (generation, servers) = (table.generation, table.rows.len());
            info!(generation, servers, "table written");
            let former = observed.table.as_ref();
            is_marked = former.is_some_and(|former| marks_anew(former, table));
        }
        self.context.memory.with(self.owner.uid, |memory| {
            if is_marked {
                memory.marked = Some(Instant::now());
            }
            memory.table_version = version.unwrap_or(memory.table_version);
            memory.table = Some(table.clone());
        });
        Ok(())
    }

    /// Applies `desired`, all objects beside the table and the pods, one after
    /// another, and removes those that are no longer desired.
    async fn apply_objects(&self, desired: &[Value]) -> AppliedObjects {
        let mut applied = AppliedObjects::default();
        for object in desired {
            match self.apply_object(object).await {
                Ok(Some(_)) => applied.has_changed_deployment |= object["kind"] == "Deployment",
                Ok(None) => {}
                Err(error) => applied.errors.push(error),
            }
        }
        applied.errors.extend(self.prune(desired).await.err());
        applied
    }
}
