//! Leader election: of several controllers, the one that holds the Lease leads,
//! and only the leader writes.
//!
//! ```text
//!  waits ──the lease is free──→ leads ──another one has it──→ the process ends
//!                               │   ↑
//!               the term is over│   │renewed: no one has taken it meanwhile
//!                               ↓   │
//!                         leads, but may not write
//! ```
//!
//! - A lease is free when no one holds it, or when it has not changed for its
//!   duration by the clock of the controller that waits. Clocks are not compared.
//! - Every write to the Lease replaces the version that was read, so that one of
//!   several wins.
//! - A leader may write during its [`Term`]: until [`TERM`] after it asked for its
//!   last renewal. That is before anyone else may take the lease, and each write is
//!   checked as it is sent, so that one that was frozen does not write on.
//! - What is sent in the term may arrive late. That is why every write is also safe
//!   by itself: a table replaces the version that was read.
//!
//! Source: client-go, `tools/leaderelection`. Its terms end a process; here they
//! may begin again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::Method;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::client::Body;
use kube::{Api, Client, ResourceExt};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::Error;

/// How long a lease is valid without being renewed: a successor takes over within
/// 20 s of a crash.
const VALID: Duration = Duration::from_secs(15);

/// How long after a renewal its holder may write: so much shorter that a write has
/// arrived before the lease runs out.
const TERM: Duration = Duration::from_secs(10);

/// When a lease is renewed, and pause after a renewal that failed. One that hangs
/// and one that fails still leave a term without a gap.
const RENEWAL: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(1);

/// Pause between two looks of a controller that waits.
const LOOK: Duration = Duration::from_secs(2);

/// How long a request about the lease may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// The time since boot, with the time in which the machine was suspended.
fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::try_from(time).unwrap_or_default()
}

/// The time in which this controller may write. All clones are the same term.
#[derive(Clone, Debug, Default)]
pub(super) struct Term {
    /// Milliseconds since boot.
    ends: Arc<AtomicU64>,
}

/// Why a write was not sent.
#[derive(Debug, thiserror::Error)]
#[error("this controller does not have the lease at present")]
struct NotLeading;

impl Term {
    fn end_at(&self, time: Duration) {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.ends.store(millis, Ordering::Release);
    }

    fn is_over(&self, now: Duration) -> bool {
        now.as_millis() >= u128::from(self.ends.load(Ordering::Acquire))
    }

    /// A client that sends what writes only in the term.
    pub(super) fn fence(&self, client: Client) -> Client {
        let (term, namespace) = (self.clone(), client.default_namespace().to_owned());
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (term, client) = (term.clone(), client.clone());
            async move {
                if request.method() != Method::GET && term.is_over(now()) {
                    return Err(kube::Error::Service(Box::new(NotLeading)));
                }
                client.send(request).await
            }
        });
        Client::new(service, namespace)
    }
}

/// What a controller that waits has seen of the Lease.
struct Seen {
    spec: Option<LeaseSpec>,
    /// When the Lease was first seen with this spec.
    since: Duration,
}

/// Whether the Lease, whose spec was `seen`, may be taken now.
fn is_free(seen: &Seen, now: Duration) -> bool {
    let spec = seen.spec.clone().unwrap_or_default();
    let is_held = spec
        .holder_identity
        .is_some_and(|holder| !holder.is_empty());
    let seconds = spec.lease_duration_seconds.unwrap_or(0);
    let valid = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    !is_held || now.saturating_sub(seen.since) > valid
}

/// The Lease that controllers compete for, and the name of this one in it.
#[derive(Clone)]
struct Contest {
    leases: Api<Lease>,
    name: String,
    identity: String,
}

impl Contest {
    /// The Lease, with its version.
    async fn get(&self) -> kube::Result<Option<Lease>> {
        limited(self.leases.get_opt(&self.name)).await
    }

    /// Makes the Lease of this controller where there is none.
    async fn create(&self) -> kube::Result<Lease> {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                acquire_time: Some(MicroTime(Timestamp::now())),
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: Some(seconds(VALID)),
                lease_transitions: Some(0),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            }),
        };
        let parameters = PostParams::default();
        limited(self.leases.create(&parameters, &lease)).await
    }

    /// Takes the Lease in place of its present holder.
    async fn take(&self, lease: &Lease) -> kube::Result<Lease> {
        let spec = lease.spec.as_ref();
        let transitions = spec.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        let now = MicroTime(Timestamp::now());
        self.replace(
            &lease.resource_version().unwrap_or_default(),
            json!({
                "holderIdentity": self.identity,
                "leaseDurationSeconds": seconds(VALID),
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": transitions.saturating_add(1),
            }),
        )
        .await
    }

    async fn renew(&self, version: &str) -> kube::Result<Lease> {
        self.replace(version, json!({ "renewTime": MicroTime(Timestamp::now()) }))
            .await
    }

    async fn give_back(&self, version: &str) -> kube::Result<Lease> {
        self.replace(
            version,
            json!({ "holderIdentity": null, "renewTime": null, "acquireTime": null }),
        )
        .await
    }

    /// Changes the spec of that version of the Lease, or fails with a conflict.
    async fn replace(&self, version: &str, spec: serde_json::Value) -> kube::Result<Lease> {
        let change = json!({ "metadata": { "resourceVersion": version }, "spec": spec });
        let (parameters, change) = (PatchParams::default(), Patch::Merge(&change));
        limited(self.leases.patch(&self.name, &parameters, &change)).await
    }

    /// The version of the Lease, if this controller holds it.
    async fn own_version(&self) -> kube::Result<Option<String>> {
        let lease = self.get().await?;
        Ok(lease
            .filter(|lease| self.holds(lease))
            .and_then(|lease| lease.resource_version()))
    }

    fn holds(&self, lease: &Lease) -> bool {
        let holder = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.holder_identity.as_ref());
        holder == Some(&self.identity)
    }
}

fn seconds(time: Duration) -> i32 {
    i32::try_from(time.as_secs()).unwrap_or(i32::MAX)
}

async fn limited<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    let late = |_| kube::Error::Service("the API server did not answer in time".into());
    timeout(ANSWER_LIMIT, request).await.map_err(late)?
}

/// Whether another controller was faster.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

/// Whether the API server refuses, as it will the next time.
fn is_refusal(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 400 | 401 | 403 | 404 | 422))
}

/// The lease while it is held.
pub(super) struct Held {
    pub(super) term: Term,
    lost: watch::Receiver<bool>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// The name of a controller on `host`, which is called as its pod. It is another one
/// after a restart.
///
/// Source: client-go, whose leaders are called alike.
fn identity(host: Option<&str>) -> String {
    let process = uuid::Uuid::new_v4();
    format!("{}_{process}", host.unwrap_or("portpool"))
}

/// Waits for the lease `name`, `NAMESPACE/NAME`, and takes it.
///
/// # Errors
/// The name is malformed, or the API server refuses to let the lease be used.
pub(super) async fn hold(client: &Client, name: &str) -> Result<Held, Error> {
    let (namespace, name) = name
        .split_once('/')
        .ok_or_else(|| Error::LeaseName(name.to_owned()))?;
    let contest = Contest {
        leases: Api::namespaced(client.clone(), namespace),
        name: name.to_owned(),
        identity: identity(std::env::var("HOSTNAME").ok().as_deref()),
    };
    let identity = &contest.identity;
    info!(namespace, name, identity, "waiting for the lease");
    let mut seen = None;
    loop {
        let asked = now();
        match try_to_take(&contest, &mut seen).await {
            Ok(Some(version)) => return Ok(Held::begin(contest, version, asked)),
            Ok(None) => {}
            Err(error) if is_conflict(&error) => debug!("another controller was faster"),
            Err(error) if is_refusal(&error) => return Err(Error::Lease(error)),
            Err(error) => warn!(%error, "failed to ask for the lease; trying again"),
        }
        sleep(LOOK).await;
    }
}

/// Takes the lease if it is free; returns the version that was written.
async fn try_to_take(contest: &Contest, seen: &mut Option<Seen>) -> kube::Result<Option<String>> {
    let Some(lease) = contest.get().await? else {
        return Ok(contest.create().await?.resource_version());
    };
    let present = match seen.take() {
        Some(known) if known.spec == lease.spec => known,
        _ => Seen {
            spec: lease.spec.clone(),
            since: now(),
        },
    };
    let is_free = is_free(seen.insert(present), now());
    if !is_free {
        return Ok(None);
    }
    Ok(contest.take(&lease).await?.resource_version())
}

impl Held {
    /// Leads from now on, with the lease that was `asked` for at that time.
    fn begin(contest: Contest, version: String, asked: Duration) -> Self {
        let (term, stop) = (Term::default(), CancellationToken::new());
        term.end_at(asked + TERM);
        let (report_lost, lost) = watch::channel(false);
        let keeping = keep(contest, version, term.clone(), stop.clone());
        let task = tokio::spawn(async move {
            keeping.await;
            report_lost.send_replace(true);
        });
        Self {
            term,
            lost,
            stop,
            task,
        }
    }

    /// Completes when another controller has the lease.
    pub(super) async fn lost(&self) {
        // This completes also when the task has ended.
        let _ = self.lost.clone().wait_for(|lost| *lost).await;
    }

    /// Gives the lease back, so that a successor need not wait until it runs out.
    /// Nothing is written after that.
    pub(super) async fn release(self) {
        self.term.end_at(Duration::ZERO);
        self.stop.cancel();
        if let Err(error) = self.task.await {
            warn!(%error, "failed to release the lease");
        }
    }
}

/// Renews the lease until another controller has it, or until `stop`, which gives
/// it back.
async fn keep(contest: Contest, mut version: String, term: Term, stop: CancellationToken) {
    let mut pause = RENEWAL;
    loop {
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => break,
        }
        let asked = now();
        pause = RETRY;
        match contest.renew(&version).await {
            Ok(lease) => {
                pause = RENEWAL;
                version = lease.resource_version().unwrap_or_default();
                if !stop.is_cancelled() {
                    term.end_at(asked + TERM);
                }
            }
            // Also when someone else has annotated it, or when an answer was lost.
            Err(error) if is_conflict(&error) || is_refusal(&error) => {
                match contest.own_version().await {
                    Ok(Some(current)) => version = current,
                    Ok(None) => return term.end_at(Duration::ZERO),
                    Err(error) => warn!(%error, "failed to read the lease; trying again"),
                }
            }
            Err(error) => warn!(%error, "failed to renew the lease; trying again"),
        }
    }
    if let Err(error) = contest.give_back(&version).await {
        warn!(%error, "failed to release the lease; it runs out by itself");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(holder: Option<&str>, seconds: i32) -> Seen {
        Seen {
            spec: Some(LeaseSpec {
                holder_identity: holder.map(str::to_owned),
                lease_duration_seconds: Some(seconds),
                ..LeaseSpec::default()
            }),
            since: Duration::from_secs(100),
        }
    }

    #[test]
    fn a_lease_is_free_without_a_holder_or_unchanged_for_its_duration() {
        let is_free_after = |seen, seconds: u64| is_free(&seen, Duration::from_secs(100 + seconds));
        assert!(is_free_after(seen(None, 15), 0));
        assert!(is_free_after(seen(Some(""), 15), 0));
        assert!(!is_free_after(seen(Some("a"), 15), 0));
        assert!(!is_free_after(seen(Some("a"), 15), 15));
        assert!(is_free_after(seen(Some("a"), 15), 16));
        // The holder says for how long.
        assert!(!is_free_after(seen(Some("a"), 60), 59));
        let empty = Seen {
            spec: None,
            since: Duration::ZERO,
        };
        assert!(is_free(&empty, Duration::ZERO));
    }

    #[test]
    fn a_term_is_over_before_it_begins_and_at_its_end() {
        let term = Term::default();
        assert!(term.is_over(Duration::ZERO));
        term.end_at(Duration::from_secs(10));
        assert!(!term.clone().is_over(Duration::from_millis(9_999)));
        assert!(term.is_over(Duration::from_secs(10)));
    }

    #[test]
    fn the_holder_of_a_lease_is_called_as_its_pod() {
        let holder = identity(Some("portpool-6f9f-abcde"));
        assert!(holder.starts_with("portpool-6f9f-abcde_"), "{holder}");
        assert_ne!(holder, identity(Some("portpool-6f9f-abcde")));
    }

    /// The latest write of a term is sent long before anyone else may lead.
    #[test]
    fn terms_end_before_leases() {
        assert!(TERM + ANSWER_LIMIT <= VALID);
        assert!(TERM >= RENEWAL + ANSWER_LIMIT + RETRY);
    }
}
