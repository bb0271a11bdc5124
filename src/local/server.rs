//! One processing server: the agent and the containers of its slot.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::PodTemplateSpec;
use tokio::task::JoinHandle;

use super::addresses::Addresses;
use super::child::{Program, Supervised};
use super::container::{self, Pod};
use super::events::Events;
use super::readiness::Readiness;
use crate::plan::{FieldProblem, ValidPool};
use crate::pool::{AGENT_ADMIN_PORT, AGENT_API_PORT};
use crate::table::{PortRange, Row};

/// Values that all servers of a pool start with.
pub(super) struct Context<'a> {
    pub(super) binary: &'a Path,
    pub(super) folder: &'a Path,
    pub(super) table_file: &'a Path,
    pub(super) pool: &'a ValidPool,
    pub(super) addresses: &'a Addresses,
    pub(super) drain_seconds: u64,
    pub(super) role_log: &'a str,
    pub(super) events: &'a Events,
}

/// The processes of a processing server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) address: IpAddr,
    pub(super) template: PodTemplateSpec,
    /// Ports of the slot when the server was started.
    pub(super) ranges: Vec<PortRange>,
    pub(super) readiness: Readiness,
    started: Instant,
    /// Whether it has had all the sessions that it takes.
    pub(super) is_spent: bool,
    /// `None` once it stops.
    running: Option<Processes>,
    stopping: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Processes {
    agent: Supervised,
    containers: Vec<Supervised>,
}

impl Server {
    /// Starts the containers and the agent of `row`.
    pub(super) fn start(context: &Context<'_>, row: &Row) -> Result<Self, Vec<FieldProblem>> {
        let uid = uuid::Uuid::new_v4().to_string();
        let (slot, name) = (row.slot, row.server.clone());
        let pod = Pod::new(context.pool, row, uid.clone(), context.addresses);
        let address = pod.address;
        let template = context
            .pool
            .template
            .as_ref()
            .map_err(|problem| vec![problem.clone()])?;
        let containers = container::processes(template, &pod)?;
        let start =
            |program| Supervised::start(context.binary.to_owned(), program, context.events.clone());
        let admin = SocketAddr::new(address, AGENT_ADMIN_PORT);
        let containers = containers.into_iter().map(|container| {
            let mut program = container.arguments;
            // `portpool` in the manifest is this program.
            if program[0] == "portpool" {
                program[0] = context.binary.display().to_string();
            }
            let grace = format!("--grace-seconds={}", container.grace.as_secs());
            let mut arguments = vec!["run-program".to_owned(), grace, "--".to_owned()];
            arguments.extend(program);
            start(Program {
                name: format!("{name}/{}", container.name),
                arguments,
                environment: container.environment,
                folder: container.folder,
                grace: container.grace,
                agent: Some(admin),
            })
        });
        let containers = containers.collect();
        let agent = start(Program {
            name: format!("{name}/agent"),
            arguments: vec![
                "processing-server".to_owned(),
                format!("--table={}", context.table_file.display()),
                format!("--slot={slot}"),
                format!("--address={address}"),
                "--listen-scope=address".to_owned(),
                format!("--admin={admin}"),
                format!("--api={address}:{AGENT_API_PORT}"),
                format!("--advertise={}", context.addresses.connection(0)),
                format!("--state-file={}", context.folder.join(&uid).display()),
                format!("--drain-seconds={}", context.drain_seconds),
            ],
            environment: vec![("PORTPOOL_LOG".to_owned(), context.role_log.to_owned())],
            folder: None,
            grace: Duration::from_secs(context.drain_seconds + 3),
            agent: None,
        });
        Ok(Self {
            name,
            uid,
            address,
            template: template.clone(),
            ranges: row.ranges.clone(),
            readiness: Readiness::new(Instant::now()),
            started: Instant::now(),
            is_spent: false,
            running: Some(Processes { agent, containers }),
            stopping: None,
        })
    }

    /// Whether the server has reached the age at which `pool` replaces it.
    pub(super) fn is_too_old(&self, pool: &ValidPool) -> bool {
        pool.recycle.until_too_old(self.started.elapsed()) == Some(Duration::ZERO)
    }

    /// What happens to the server when it is stopped, and why.
    pub(super) fn why_it_stops(&self, pool: &ValidPool) -> &'static str {
        if pool.template.as_ref() != Ok(&self.template) {
            "is replaced: the template has changed"
        } else if self.is_spent && pool.recycle.after_sessions().is_none() {
            "is replaced: its workload asked for that"
        } else if self.is_spent {
            "is replaced: it has had recycle.afterSessions sessions, or its workload asked for that"
        } else if self.is_too_old(pool) {
            "is replaced: it has run for recycle.afterSeconds"
        } else {
            "stops"
        }
    }

    /// Begins to stop: the agent drains, then the containers end. Returns whether
    /// the server was not stopping before.
    pub(super) fn stop(&mut self) -> bool {
        let Some(Processes { agent, containers }) = self.running.take() else {
            return false;
        };
        self.stopping = Some(tokio::spawn(async move {
            agent.stop().await;
            futures::future::join_all(containers.into_iter().map(Supervised::stop)).await;
        }));
        true
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    pub(super) fn has_stopped(&self) -> bool {
        self.stopping.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits until the processes have ended.
    pub(super) async fn stopped(self) {
        if let Some(stopping) = self.stopping {
            // The task ends with the processes; it does not panic.
            let _ = stopping.await;
        }
    }
}
