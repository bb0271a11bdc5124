//! The processing server role: the agent beside a workload, which selects the
//! connection port for each request.
//!
//! - `book`: pure: which ports are free, who has the others, and when to look
//!   whether the workload listens;
//! - `sockets`: looking at the workload's sockets;
//! - `server`: the server side of the selection protocol;
//! - `workload_api`: the local API for the workload; `workload_view`: what it shows;
//!   `pace`: how often the workload may change something;
//! - `metrics`: what is counted; `gauges`: the states of ports.

pub mod book;
mod gauges;
pub mod metrics;
mod pace;
pub mod server;
pub mod sockets;
pub mod workload_api;
mod workload_view;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::TcpIncoming;
use tracing::{info, warn};

use self::gauges::Gauges;
use self::metrics::Metrics;
use self::server::Agent;
use self::sockets::ListenScope;
use crate::pool::rules::parse_address;
use crate::selection::v1::selection_server::SelectionServer;
use crate::selection::{GONE_AFTER, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, MAX_MESSAGE_BYTES};
use crate::table::{Slot, Table};
use crate::{admin, follow};

/// How often a stopping agent looks whether sessions are left.
const DRAIN_CHECK: Duration = Duration::from_millis(50);

/// How long connection servers have to acknowledge sessions that the drain
/// deadline ended.
const END_GRACE: Duration = Duration::from_secs(1);

/// How long an agent that has drained may take to close what it serves.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);

/// Runs the agent of one processing server: selects connection ports for the
/// workload beside it.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Example:
  portpool processing-server --table table.json --slot 0 --address 127.0.0.2

portpool local and the controller start it for you.")]
pub struct Options {
    /// The pool's port-relationship table (JSON); followed while running
    #[arg(long, value_name = "FILE")]
    pub table: PathBuf,

    /// This server's slot in the table
    #[arg(long, value_name = "N")]
    pub slot: Slot,

    /// This server's address: the agent listens here, and so does the workload
    #[arg(long, value_name = "IP", env = "POD_IP")]
    pub address: IpAddr,

    /// Which listening sockets are the workload's: those on our address only, or those on all addresses too
    #[arg(long, value_name = "SCOPE", default_value = "any")]
    pub listen_scope: ListenScope,

    /// Where /livez, /readyz, /metrics and /v1/port-table are served
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7071")]
    pub admin: SocketAddr,

    /// Where the workload may ask who it is and which sessions it has: a loopback address, because it asks for no credentials; not served without it
    #[arg(long, value_name = "IP:PORT", value_parser = loopback)]
    pub api: Option<SocketAddr>,

    /// The address that clients connect to where the table has none, for the workload to know
    #[arg(long, value_name = "HOST", value_parser = parse_address)]
    pub advertise: Option<String>,

    /// Remembers across restarts of the agent that it ran before; put it where it lives as long as the workload
    #[arg(long, value_name = "FILE")]
    pub state_file: Option<PathBuf>,

    /// Seconds that sessions may go on after SIGTERM; those that no client has claimed end at once. Default: as the table says, else 600
    #[arg(long, value_name = "SECONDS")]
    pub drain_seconds: Option<u64>,
}

/// A loopback address with its port.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| "give IP:PORT".to_owned())?;
    let is_loopback = address.ip().is_loopback();
    is_loopback.then_some(address).ok_or_else(|| {
        "it asks for no credentials, so it must be a loopback address, as 127.0.0.1".to_owned()
    })
}

/// Why an agent could not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent's port is not to be had.
    #[error(
        "failed to listen for connection servers on {address}: {source}; is another agent running there?"
    )]
    Listen {
        /// What was to be bound.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The state file cannot be written.
    #[error("failed to write state file {path}: {source}")]
    State {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The table cannot be followed.
    #[error(transparent)]
    Follow(#[from] follow::FollowError),
    /// The port of the local API is not to be had.
    #[error("failed to listen for the workload on {address}: {source}; choose another with --api")]
    Api {
        /// What was to be bound.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The admin port could not be served.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
    /// Serving failed.
    #[error("selection protocol server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs the agent until `shutdown`, then drains: nothing new is selected, sessions
/// that no client has claimed end, and the others go on for up to `drain_seconds` or the table's.
///
/// # Errors
/// [`Error`] when it could not start.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    tokio::pin!(shutdown);
    let mut follower = follow::follow_file(&options.table)?;
    let first = tokio::select! {
        first = follower.first() => first?,
        () = &mut shutdown => return Ok(()),
    };
    let recovering = ran_before(options.state_file.as_deref())?.then_some(GONE_AFTER);
    if recovering.is_some() {
        info!(
            seconds = GONE_AFTER.as_secs(),
            "restarted: connection servers report their sessions first"
        );
    }
    let mut registry = Registry::default();
    admin::register_build_info(&mut registry);
    let metrics = Arc::new(Metrics::new(&mut registry, follower.rejected()));
    let sockets = sockets::Reader::new(options.address, options.listen_scope);
    let agent = Agent::new(options.slot, sockets, recovering, metrics.clone());
    registry.register_collector(Box::new(Gauges::new(&agent)));
    follow_table(&agent, &first);

    let address = SocketAddr::new(options.address, first.agent_port.get());
    let incoming = TcpIncoming::bind(address)
        .map_err(|source| Error::Listen { address, source })?
        .with_nodelay(Some(true));
    let admin_listener = admin::bind(options.admin).await?;
    let api_listener = match options.api {
        Some(address) => Some(bind_api(address).await?),
        None => None,
    };
    let stopping = CancellationToken::new();
    let tasks = TaskTracker::new();
    let until = |token: &CancellationToken| token.clone().cancelled_owned();
    tasks.spawn(admin::serve(
        admin_listener,
        admin_state(&agent, registry),
        until(&stopping),
    ));
    if let Some(listener) = api_listener {
        let (agent, advertise) = (agent.clone(), options.advertise);
        let stopping = stopping.clone();
        tasks.spawn(workload_api::serve(
            listener, agent, advertise, metrics, stopping,
        ));
    }
    let timing = agent.clone();
    tasks.spawn(
        stopping
            .clone()
            .run_until_cancelled_owned(async move { timing.keep_time().await }),
    );
    let (following, mut tables) = (agent.clone(), follower.watch());
    tasks.spawn(stopping.clone().run_until_cancelled_owned(async move {
        while tables.changed().await.is_ok() {
            if let Some(table) = tables.borrow_and_update().clone() {
                follow_table(&following, &table);
            }
        }
    }));
    let serving = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .add_service(
            SelectionServer::new(agent.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .serve_with_incoming(incoming);
    info!(%address, slot = %options.slot, "agent ready");
    tokio::select! {
        served = serving => served?,
        () = async { shutdown.await; drain(&agent, options.drain_seconds).await } => {}
    }
    stopping.cancel();
    tasks.close();
    if timeout(CLOSE_DEADLINE, tasks.wait()).await.is_err() {
        warn!("agent does not close in time, and exits as it is");
    }
    Ok(())
}

async fn bind_api(address: SocketAddr) -> Result<TcpListener, Error> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| Error::Api { address, source })
}

/// Whether the state file says that an agent ran here before; says so from now
/// on.
fn ran_before(state_file: Option<&Path>) -> Result<bool, Error> {
    let Some(path) = state_file else {
        return Ok(false);
    };
    let ran_before = path.exists();
    std::fs::write(path, "an agent has run here\n").map_err(|source| Error::State {
        path: path.to_owned(),
        source,
    })?;
    Ok(ran_before)
}

fn follow_table(agent: &Agent, table: &Table) {
    if let Err(reason) = agent.follow(table) {
        warn!(%reason, "table not accepted");
    }
}

fn admin_state(agent: &Agent, registry: Registry) -> admin::AdminState {
    let (ready, table) = (agent.clone(), agent.clone());
    admin::AdminState {
        registry: Arc::new(registry),
        ready: Box::new(move || match ready.counts() {
            counts if counts.draining => Err("draining".to_owned()),
            counts
                if counts
                    .ports
                    .iter()
                    .all(|ports| ports.not_listening > 0 && ports.offered() == 0) =>
            {
                Err("the workload does not listen on any of its ports yet".to_owned())
            }
            _ => Ok(()),
        }),
        table: Some(Arc::new(move || table.table())),
        pages: admin::Pages::default(),
    }
}

/// Lets sessions go on for `seconds`, or as the table says, then ends them. That time
/// counts from the signal; another table may make it longer or shorter.
async fn drain(agent: &Agent, seconds: Option<u64>) {
    let limit = || {
        let asked = seconds.map(Duration::from_secs);
        let told = || agent.table().map(|table| table.drain_limit());
        asked.or_else(told).unwrap_or_default()
    };
    agent.stop();
    info!(
        sessions = agent.session_count(),
        seconds = limit().as_secs(),
        "draining: live sessions may go on; a second signal cuts them at once"
    );
    empty(agent, limit).await;
    agent.end_all();
    empty(agent, || END_GRACE).await;
}

/// Waits until the agent has no session, for as long as `limit` says from now on.
async fn empty(agent: &Agent, limit: impl Fn() -> Duration) {
    let started = Instant::now();
    while agent.session_count() > 0 && started.elapsed() < limit() {
        sleep(DRAIN_CHECK).await;
    }
}
