//! Leader election: of several controllers, the one that holds the Lease leads.
//!
//! A lease is no fence: a controller that was frozen until its lease ran out may
//! write once more. That is why every write is safe by itself.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, Result as LeaseResult};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::Error;

/// How long a lease is valid without being renewed, and how much earlier it
/// is renewed: a successor takes over within about 20 s of a crash.
const VALID_SECONDS: u64 = 15;
const GRACE_SECONDS: u64 = 5;

/// How long to wait for the release of the lease before trying to take it: it may
/// have run out instead.
const WATCH_TIME: Duration = Duration::from_secs(5);

/// How long one attempt to take the lease may last.
const TAKE_TIME: Duration = Duration::from_secs(5);

/// The lease while it is held.
pub(super) struct Held {
    leads: watch::Receiver<bool>,
    task: JoinHandle<LeaseResult<LeaseManager>>,
}

/// Waits for the lease `name`, `NAMESPACE/NAME`, and takes it.
pub(super) async fn hold(client: &Client, name: &str) -> Result<Held, Error> {
    let (namespace, name) = name
        .split_once('/')
        .ok_or_else(|| Error::LeaseName(name.to_owned()))?;
    let identity = format!("portpool-{}", uuid::Uuid::new_v4().simple());
    let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
    info!(namespace, name, identity, "waiting for the lease");
    loop {
        // The manager sleeps until the lease runs out; this watch sees an earlier
        // release.
        let free = await_condition(leases.clone(), name, is_free);
        if let Ok(Err(error)) = timeout(WATCH_TIME, free).await {
            debug!(%error, "failed to watch the lease");
        }
        let manager = LeaseManagerBuilder::new(client.clone(), name)
            .with_namespace(namespace)
            .with_identity(identity.clone())
            .with_duration(VALID_SECONDS)
            .with_grace(GRACE_SECONDS)
            .build()
            .await?;
        let (mut leads, task) = manager.watch().await;
        if matches!(
            timeout(TAKE_TIME, leads.wait_for(|leads| *leads)).await,
            Ok(Ok(_))
        ) {
            return Ok(Held { leads, task });
        }
        Held { leads, task }.release().await;
    }
}

fn is_free(lease: Option<&Lease>) -> bool {
    let spec = lease.and_then(|lease| lease.spec.as_ref());
    spec.and_then(|spec| spec.holder_identity.as_ref())
        .is_none()
}

impl Held {
    /// Completes when another controller has the lease, or may have it.
    pub(super) async fn lost(&self) {
        // This completes also when the manager has ended.
        let _ = self.leads.clone().wait_for(|leads| !*leads).await;
    }

    /// Releases the lease, so that a successor need not wait until it runs out.
    pub(super) async fn release(self) {
        // The manager sees that the channel is closed.
        drop(self.leads);
        if let Ok(Err(error)) = self.task.await {
            warn!(%error, "failed to release the lease");
        }
    }
}
