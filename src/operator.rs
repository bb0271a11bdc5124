//! The controller role: makes a cluster match its ProcessingPools.
//!
//! ```text
//! watches ─→ stores ─observe→ plan ─apply→ ConfigMap, Deployment, Services, …, pods
//!    ↑                                                   └─report→ status, events
//!    └──────────── every change triggers its pool ─────────┘
//! ```
//!
//! Level-triggered: a reconcile observes what there is, decides with `plan`, and
//! carries the decision out. The next reconcile needs nothing that is in memory.
//! Decisions that are based on an old state do no harm, because
//! - a pod's name contains its slot, so that it cannot be created twice;
//! - the table is written only over the version that was read;
//! - pods are deleted by uid, after the pool was read from the API server;
//! - objects of others are never taken over: the owner's uid counts, not the
//!   name.
//!
//! - `reconcile`: the steps in their order, and what follows an error;
//! - `observe`, `apply` (with validate), `report`: the steps that need a client;
//! - `context`: what the steps share;
//! - `stores`: what the watches keep; `observation`: what it means for a pool, with
//!   `pod_problems`: why a pod does not run;
//! - `requests`: one function for each kind of request to the API server;
//! - `memory`: what saves work; `silence`: workloads that do not listen;
//! - `lease`: one of several controllers leads; `metrics`: what is counted;
//! - this file: options and wiring.

mod apply;
mod context;
mod lease;
mod memory;
mod metrics;
mod observation;
mod observe;
mod pod_problems;
mod reconcile;
mod report;
mod requests;
mod silence;
mod stores;

use std::future::{pending, ready};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{FutureExt, join_all};
use kube::api::ListParams;
use kube::runtime::controller::{Action, Config};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::utils::Backoff;
use kube::runtime::{Controller, WatchStreamExt, reflector, watcher};
use kube::{Api, Client};
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use self::context::Context;
use self::lease::Held;
use self::memory::Memory;
use self::metrics::Metrics;
use self::stores::Stores;
use crate::plan::objects::{MANAGER, Settings};
use crate::pool::ProcessingPool;
use crate::{admin, cluster};

/// How long a reconcile waits after the change that caused it, so that it sees what
/// follows, too. It does not wait anew for each further change: changes that never
/// pause, as those of many servers, must not keep a pool from being reconciled.
const COALESCE: Duration = Duration::from_millis(100);

/// How long the reconciles under way may go on at the end. Each is safe to cut:
/// the next controller observes what there is.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

/// How long the release of the lease may take. It runs out by itself.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);

/// Runs the controller, which makes a Kubernetes cluster match its ProcessingPools.
///
/// Finds the cluster as kubectl does (KUBECONFIG), or uses the one it runs in.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Watch only this namespace; may be given several times. Default: all namespaces
    #[arg(
        long = "namespace",
        value_name = "NAMESPACE",
        env = "PORTPOOL_NAMESPACES",
        value_delimiter = ','
    )]
    pub namespaces: Vec<String>,

    /// Image that contains this program, for agents and connection servers
    #[arg(long, value_name = "IMAGE", env = "PORTPOOL_IMAGE", default_value = concat!("ghcr.io/portpool/portpool:", env!("CARGO_PKG_VERSION")))]
    pub image: String,

    /// When to pull that image: Always, IfNotPresent or Never
    #[arg(long, value_name = "POLICY", env = "PORTPOOL_IMAGE_PULL_POLICY", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub image_pull_policy: String,

    /// Secret for pulling that image, in the namespace of each pool; may be given several times
    #[arg(
        long = "image-pull-secret",
        value_name = "NAME",
        env = "PORTPOOL_IMAGE_PULL_SECRETS",
        value_delimiter = ','
    )]
    pub image_pull_secrets: Vec<String>,

    /// Lease that only one of several controllers holds; without it, this must be the only controller
    #[arg(long, value_name = "NAMESPACE/NAME", env = "PORTPOOL_LEASE")]
    pub lease: Option<String>,

    /// Number of pools that are reconciled at the same time, per watched namespace
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub concurrency: u16,

    /// Interval in seconds at which the pods of a pool are listed, whatever the watches show
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub resync_seconds: u64,

    /// Address that serves /livez, /readyz and /metrics
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7702")]
    pub admin: SocketAddr,
}

/// Why the controller could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cluster was found.
    #[error("failed to find the cluster: {0}; set KUBECONFIG, or run in a pod")]
    Cluster(#[source] kube::Error),
    /// The cluster has no definition of ProcessingPools.
    #[error(
        "the cluster has no ProcessingPool resource; install it: portpool crd | kubectl apply -f -"
    )]
    NoResource,
    /// The cluster refuses to list ProcessingPools.
    #[error("failed to list ProcessingPools: {0}")]
    List(#[source] kube::Error),
    /// The name of the lease is malformed.
    #[error("--lease {0:?} is not NAMESPACE/NAME")]
    LeaseName(String),
    /// The API server refuses to let the lease be read or written.
    #[error("failed to use the lease: {0}")]
    Lease(#[source] kube::Error),
    /// Another controller has taken over.
    #[error("the lease was lost to another controller; this one exits, so that it is restarted")]
    LeaseLost,
    /// The admin port could not be served.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
}

/// Runs the controller until `shutdown`. It then finishes the reconciles under way
/// and releases the lease, if the API server lets it do so in time.
///
/// # Errors
/// The cluster or the admin port cannot be used, or the lease was lost.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    let end = End::default();
    tokio::pin!(shutdown);
    // The API server may never answer.
    let Started {
        client,
        metrics,
        held,
    } = tokio::select! {
        started = start(&options, &end) => started?,
        () = &mut shutdown => return Ok(()),
    };
    let lost = async {
        match &held {
            Some(held) => held.lost().await,
            None => pending().await,
        }
    };
    let controllers = controllers(&client, &options, &metrics, &end);
    tokio::pin!(controllers);
    let result = tokio::select! {
        () = &mut controllers => Ok(()),
        () = lost => Err(Error::LeaseLost),
        () = shutdown => {
            end.finish(controllers).await;
            Ok(())
        }
    };
    end.stopping.cancel();
    if let Some(held) = held
        && timeout(RELEASE_LIMIT, held.release()).await.is_err()
    {
        warn!("the lease was not released in time; it runs out by itself");
    }
    result
}

/// How the controller ends.
#[derive(Clone, Default)]
struct End {
    /// Nothing new begins after that.
    stopping: CancellationToken,
    under_way: TaskTracker,
}

impl End {
    /// Lets the reconciles under way finish. The `controllers` themselves would
    /// also wait for lists that the API server has never answered.
    async fn finish(&self, controllers: impl Future<Output = ()>) {
        self.stopping.cancel();
        self.under_way.close();
        if !self.under_way.is_empty() {
            info!(
                reconciles = self.under_way.len(),
                seconds = FINISH_LIMIT.as_secs(),
                "stopping: reconciles under way may finish; a second signal cuts them at once"
            );
        }
        tokio::select! {
            () = controllers => {}
            () = self.under_way.wait() => {}
            () = sleep(FINISH_LIMIT) => {
                warn!("reconciles under way are cut: the API server does not answer in time");
            }
        }
    }
}

/// What a controller runs with.
struct Started {
    client: Client,
    metrics: Arc<Metrics>,
    held: Option<Held>,
}

/// Reaches the cluster, serves the admin port until the `end`, and waits for the
/// lease.
async fn start(options: &Options, end: &End) -> Result<Started, Error> {
    let client = cluster::connect().await.map_err(Error::Cluster)?;
    check_resource(&client, options).await?;
    let mut registry = Registry::default();
    admin::register_build_info(&mut registry);
    let metrics = Arc::new(Metrics::new(&mut registry));
    serve_admin(options.admin, registry, &end.stopping).await?;
    let held = match &options.lease {
        Some(lease) => Some(lease::hold(&client, lease).await?),
        None => None,
    };
    metrics.leader.set(1);
    Ok(Started {
        // The lease itself is renewed through the client that is not fenced.
        client: match &held {
            Some(held) => held.term.fence(client),
            None => client,
        },
        metrics,
        held,
    })
}

/// Checks that ProcessingPools can be listed. Of several namespaces, one suffices:
/// the rights in a deleted namespace are gone with it, and the pools of the other
/// namespaces must still be reconciled.
async fn check_resource(client: &Client, options: &Options) -> Result<(), Error> {
    let mut failed = None;
    for scope in scopes(options) {
        let api = within(client, scope.as_deref());
        match api.list_metadata(&ListParams::default().limit(1)).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => {
                return Err(Error::NoResource);
            }
            // Where the API server has not answered, the watches keep trying.
            Ok(_) | Err(kube::Error::Service(_) | kube::Error::HyperError(_)) => return Ok(()),
            Err(error) => {
                warn!(namespace = scope, %error, "failed to list ProcessingPools");
                failed = Some(error);
            }
        }
    }
    failed.map_or(Ok(()), |error| Err(Error::List(error)))
}

/// The namespaces that are watched; `None` stands for all.
fn scopes(options: &Options) -> Vec<Option<String>> {
    match options.namespaces.as_slice() {
        [] => vec![None],
        namespaces => namespaces.iter().cloned().map(Some).collect(),
    }
}

fn within(client: &Client, scope: Option<&str>) -> Api<ProcessingPool> {
    match scope {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

async fn serve_admin(
    address: SocketAddr,
    registry: Registry,
    stopping: &CancellationToken,
) -> Result<(), Error> {
    let listener = admin::bind(address).await?;
    let state = admin::AdminState {
        registry: Arc::new(registry),
        // A controller that waits for the lease is ready to take over.
        ready: Box::new(|| Ok(())),
        table: None,
        pages: admin::Pages::default(),
    };
    tokio::spawn(admin::serve(
        listener,
        state,
        stopping.clone().cancelled_owned(),
    ));
    Ok(())
}

/// No pause of the controller's own after an error of a watch: such a pause would
/// delay all watches, and each has its own backoff.
struct OwnBackoff;

impl Iterator for OwnBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

impl Backoff for OwnBackoff {
    fn reset(&mut self) {}
}

/// One controller per watched namespace, or one for all.
async fn controllers(client: &Client, options: &Options, metrics: &Arc<Metrics>, end: &End) {
    info!(namespaces = ?options.namespaces, image = options.image, "controller ready");
    let controllers = scopes(options)
        .into_iter()
        .map(|scope| controller(client.clone(), scope, options, metrics.clone(), end.clone()));
    join_all(controllers).await;
}

/// Reconciles the pool as it is a moment after the change of `changed`. What changes
/// after that is one more reconcile.
async fn coalesced(changed: &ProcessingPool, context: &Context) -> Result<Action, requests::Error> {
    sleep(COALESCE).await;
    let _one = context.at_once.acquire().await;
    match context.pools.get(&ObjectRef::from_obj(changed)) {
        Some(pool) => reconcile::reconcile(&pool, context).await,
        None => Ok(Action::await_change()),
    }
}

async fn controller(
    client: Client,
    scope: Option<String>,
    options: &Options,
    metrics: Arc<Metrics>,
    end: End,
) {
    let pools = within(&client, scope.as_deref());
    let (pool_store, writer) = reflector::store();
    let pool_changes = watcher(pools, watcher::Config::default())
        .backoff(cluster::watch_backoff())
        .modify(|pool| pool.metadata.managed_fields = None)
        .reflect(writer)
        .applied_objects();
    // Not bounded here: a reconcile that waits for further changes costs nothing.
    let mut controller = Controller::for_stream(pool_changes, pool_store.clone())
        .with_config(Config::default().concurrency(0))
        .trigger_backoff(OwnBackoff)
        .graceful_shutdown_on(end.stopping.cancelled_owned());
    let (stores, changes) = Stores::watch(&client, scope.as_deref());
    for (resource, changes) in changes {
        controller =
            controller.watches_stream_with(changes, |object| stores::pool_of(&object), resource);
    }
    let reporter = Reporter {
        controller: "portpool.dev/controller".to_owned(),
        instance: std::env::var("HOSTNAME").ok(),
    };
    let context = Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        pools: pool_store,
        stores,
        settings: Settings {
            image: options.image.clone(),
            image_pull_policy: options.image_pull_policy.clone(),
            image_pull_secrets: options.image_pull_secrets.clone(),
        },
        metrics,
        memory: Memory::new(Duration::from_secs(options.resync_seconds)),
        at_once: Semaphore::new(options.concurrency.into()),
    };
    controller
        .run(
            move |pool, context: Arc<Context>| {
                end.under_way
                    .track_future(async move { coalesced(&pool, &context).await })
            },
            |pool, error, context| reconcile::after_error(&pool, error, &context),
            Arc::new(context),
        )
        .for_each(|result| {
            if let Err(error) = result {
                tracing::debug!(%error, manager = MANAGER, "reconcile ended with an error");
            }
            ready(())
        })
        .boxed()
        .await;
}
