//! The connection server role: a plurality of connection ports in front of
//! the pool's processing servers, and the load-sharing port that gives them
//! to clients.
//!
//! ```text
//! client ─POST /v1/sessions→ api → allocation ─reserve→ load sharing (policy)
//!                                      └─select→ agents ⇄ processing servers
//! client ─bytes→ forward ⇄ processing server       forward ─admit?→ sessions
//! ```
//!
//! - `api`, `http`, `problem`: the load-sharing port; `allocation`: from request
//!   to session;
//! - `policy`, `load_sharing`: pure: who gets a request, who waits;
//!   `reservations` shares them between requests;
//! - `agents`: one stream of the selection protocol per processing server;
//! - `sessions`: what agents told, and the gate of the data plane; `trace`:
//!   what is logged of a session;
//! - `forward`: the data plane, on its own threads.

pub mod agents;
pub mod allocation;
pub mod api;
pub mod forward;
mod http;
pub mod load_sharing;
pub mod metrics;
pub mod policy;
pub mod problem;
pub mod reservations;
pub mod sessions;
pub mod trace;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use self::agents::Agents;
use self::allocation::Allocation;
use self::api::Api;
use self::forward::Forwarder;
use self::load_sharing::LoadSharing;
use self::metrics::Metrics;
use self::reservations::Reservations;
use self::sessions::Sessions;
use crate::table::Table;
use crate::{admin, follow};

/// How long a stopping connection server waits for requests being answered.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// How often a stopping connection server looks whether sessions are left.
const DRAIN_CHECK: Duration = Duration::from_millis(100);

/// Runs a connection server: gives clients connection ports and forwards them
/// to the processing servers.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  portpool connection-server --table table.json
  portpool connection-server --table /etc/portpool/table.json --config-map default/small-port-table

portpool local and the controller start it for you.")]
pub struct Options {
    /// The pool's port-relationship table (JSON); followed while running
    #[arg(long, value_name = "FILE")]
    pub table: PathBuf,

    /// Follow the table in this ConfigMap of the cluster; --table is its mounted copy, read once at the start
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub config_map: Option<String>,

    /// Address that clients are told unless the table has one; default: the one that they reached this server by
    #[arg(long, value_name = "HOST")]
    pub advertise: Option<String>,

    /// Address that the load-sharing port and the connection ports listen on; `::` takes IPv6 and IPv4
    #[arg(long, value_name = "IP", default_value = "::")]
    pub listen: IpAddr,

    /// Port that requests go to (HTTP)
    #[arg(long, value_name = "PORT", default_value_t = 7700)]
    pub load_sharing_port: u16,

    /// Where /livez, /readyz, /metrics and /v1/port-table are served
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7701")]
    pub admin: SocketAddr,

    /// Threads that forward; default: one per processor
    #[arg(long, value_name = "N")]
    pub data_threads: Option<usize>,

    /// Seconds after which a TCP client or server that shows no sign of life, or takes nothing of what waits for it, is given up; 0: the system's default
    #[arg(long, value_name = "SECONDS", default_value_t = forward::Config::PEER_TIMEOUT.as_secs())]
    pub peer_timeout_seconds: u64,

    /// How many clients there may be
    #[command(flatten)]
    pub limits: forward::Limits,

    /// Seconds that live sessions may go on after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_seconds: u64,
}

/// Why a connection server could not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The load-sharing port is not to be had.
    #[error(
        "failed to listen on load-sharing port {address}: {source}; is another program using it?"
    )]
    Listen {
        /// What was to be bound.
        address: SocketAddr,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The data plane could not start.
    #[error(transparent)]
    Forward(#[from] forward::ForwardError),
    /// The connection ports could not be opened.
    #[error(transparent)]
    Apply(#[from] forward::ApplyError),
    /// The table needs more descriptors than the process may have.
    #[error(transparent)]
    OpenFiles(#[from] forward::OpenFilesError),
    /// No cluster to follow the ConfigMap in.
    #[error("failed to reach the cluster of ConfigMap {name}: {source}")]
    Cluster {
        /// The ConfigMap.
        name: String,
        /// Why.
        source: Box<kube::Error>,
    },
    /// The table cannot be followed.
    #[error(transparent)]
    Follow(#[from] follow::FollowError),
    /// The admin port could not be served.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
}

/// Runs a connection server until `shutdown`, then drains: nothing new is
/// allocated, live sessions go on for up to `drain_seconds`.
///
/// # Errors
/// [`Error`] when it could not start; once it runs, faults are logged, counted
/// and survived.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    tokio::pin!(shutdown);
    let options = Options {
        listen: without_ipv6(options.listen),
        ..options
    };
    let mut follower = follower(&options).await?;
    let first = tokio::select! {
        first = follower.first() => first?,
        () = &mut shutdown => return Ok(()),
    };
    let server = Server::start(&options, &first, &follower).await?;
    shutdown.await;
    server
        .stop(Duration::from_secs(options.drain_seconds))
        .await;
    Ok(())
}

/// The running parts.
struct Server {
    sessions: Arc<Sessions>,
    forwarder: Arc<Forwarder>,
    agents: Arc<Agents>,
    draining: CancellationToken,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    async fn start(
        options: &Options,
        first: &Arc<Table>,
        follower: &follow::Follower,
    ) -> Result<Self, Error> {
        forward::check_open_files(first.connection_port_count())?;
        if let Some(overlap) = forward::ephemeral_overlap(first) {
            warn!(%overlap, "connection ports lie inside the kernel's ip_local_port_range: outgoing connections may occupy them");
        }
        let listener = listen(options.listen, options.load_sharing_port)?;
        let mut registry = Registry::default();
        admin::register_build_info(&mut registry);
        follower.rejected().register(&mut registry);
        let metrics = Arc::new(Metrics::new(&mut registry));
        let sessions = Arc::new(Sessions::default());
        let reservations = Arc::new(Reservations::default());
        let config = forward::Config {
            limits: options.limits,
            peer_timeout: Duration::from_secs(options.peer_timeout_seconds),
            ..forward::Config::new(options.listen, options.data_threads)
        };
        let forwarder = Arc::new(Forwarder::start(&config, &sessions)?);
        registry.register_collector(Box::new(metrics::Live::new(
            &forwarder,
            &sessions,
            &reservations,
        )));
        let agents = Arc::new(Agents::new(
            sessions.clone(),
            reservations.clone(),
            forwarder.clone(),
            metrics.clone(),
        ));
        // Clients may come as soon as the first port is open.
        sessions.set_table(first);
        apply(first, &sessions, &reservations, &forwarder, &agents)?;
        let (in_use, table) = watch::channel(first.clone());
        let server = Self {
            sessions: sessions.clone(),
            forwarder: forwarder.clone(),
            agents: agents.clone(),
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        server
            .serve_admin(options.admin, registry, &reservations, &table)
            .await?;
        let parts = (
            sessions.clone(),
            reservations.clone(),
            forwarder,
            agents.clone(),
        );
        server.tasks.spawn(keep_applying(
            follower.watch(),
            in_use,
            parts,
            server.stopping.clone(),
        ));
        let allocation = Allocation::new(
            agents.clone(),
            reservations.clone(),
            sessions.clone(),
            metrics.clone(),
            table.clone(),
        );
        let api = Api {
            allocation: Arc::new(allocation),
            sessions,
            reservations,
            agents,
            metrics,
            table,
            advertise: options.advertise.clone(),
        };
        info!(
            address = %listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string()),
            connection_ports = first.connection_port_count(),
            generation = first.generation,
            "connection server ready"
        );
        let draining = server.draining.clone();
        let serving = http::serve(
            listener,
            api::router(Arc::new(api)),
            async move { draining.cancelled().await },
            SHUTDOWN_GRACE,
        );
        server.tasks.spawn(serving);
        Ok(server)
    }

    async fn serve_admin(
        &self,
        address: SocketAddr,
        registry: Registry,
        reservations: &Arc<Reservations>,
        table: &watch::Receiver<Arc<Table>>,
    ) -> Result<(), Error> {
        let (draining, reservations, table) =
            (self.draining.clone(), reservations.clone(), table.clone());
        let (rows, was_ready) = (table.clone(), AtomicBool::new(false));
        let state = admin::AdminState {
            registry: Arc::new(registry),
            ready: Box::new(move || {
                if draining.is_cancelled() {
                    return Err("shutting down".to_owned());
                }
                let takes = |sharing: &LoadSharing| {
                    sharing
                        .servers()
                        .values()
                        .any(load_sharing::Server::takes_sessions)
                };
                // Once ready it stays so: without processing servers clients
                // should hear that, and live flows should keep their way here.
                let is_empty = rows.borrow().rows.is_empty();
                if is_empty || reservations.inspect(takes) {
                    was_ready.store(true, Ordering::Relaxed);
                }
                if was_ready.load(Ordering::Relaxed) {
                    Ok(())
                } else {
                    Err("no processing server is attached yet".to_owned())
                }
            }),
            table: Box::new(move || Some(table.borrow().clone())),
        };
        let listener = admin::bind(address).await?;
        let stopping = self.stopping.clone();
        self.tasks.spawn(admin::serve(listener, state, async move {
            stopping.cancelled().await
        }));
        Ok(())
    }

    /// Lets live sessions go on for up to `drain`, then closes everything.
    async fn stop(self, drain: Duration) {
        self.draining.cancel();
        let deadline = Instant::now() + drain;
        while self.sessions.open_count() > 0 && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_CHECK).await;
        }
        info!(
            sessions_cut = self.sessions.open_count(),
            "connection server stops"
        );
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.forwarder.shutdown();
        self.agents.leave().await;
    }
}

type Parts = (
    Arc<Sessions>,
    Arc<Reservations>,
    Arc<Forwarder>,
    Arc<Agents>,
);

/// Applies every newer table that is followed, then has it used. One that
/// cannot be applied is logged and leaves the last one in force.
async fn keep_applying(
    mut followed: watch::Receiver<Option<Arc<Table>>>,
    in_use: watch::Sender<Arc<Table>>,
    (sessions, reservations, forwarder, agents): Parts,
    stopping: CancellationToken,
) {
    loop {
        tokio::select! {
            changed = followed.changed() => if changed.is_err() { return },
            () = stopping.cancelled() => return,
        }
        let Some(current) = followed.borrow_and_update().clone() else {
            continue;
        };
        let generation = current.generation;
        match apply(&current, &sessions, &reservations, &forwarder, &agents) {
            Ok(()) => {
                in_use.send_replace(current);
                info!(generation, "table applied");
            }
            Err(error) => {
                error!(generation, %error, "failed to apply the table; the last one stays in force")
            }
        }
    }
}

/// Ports first: nobody is told of a port that is not open.
fn apply(
    table: &Arc<Table>,
    sessions: &Arc<Sessions>,
    reservations: &Arc<Reservations>,
    forwarder: &Arc<Forwarder>,
    agents: &Arc<Agents>,
) -> Result<(), forward::ApplyError> {
    forwarder.apply(table)?;
    sessions.set_table(table);
    reservations.set_policy(table.load_sharing.policy);
    agents.set_table(table);
    Ok(())
}

/// Follows the ConfigMap if there is one, else the file.
async fn follower(options: &Options) -> Result<follow::Follower, Error> {
    let Some(config_map) = &options.config_map else {
        return Ok(follow::follow_file(&options.table)?);
    };
    let client = follow::cluster().await.map_err(|source| Error::Cluster {
        name: config_map.clone(),
        source: Box::new(source),
    })?;
    let (namespace, name) = config_map
        .split_once('/')
        .unwrap_or(("default", config_map));
    Ok(follow::follow_config_map(
        client,
        namespace,
        name,
        &options.table,
    ))
}

/// `0.0.0.0` for `::` where the kernel has no IPv6; else `listen` itself.
fn without_ipv6(listen: IpAddr) -> IpAddr {
    let has_ipv6 = || socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None);
    match listen {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) if has_ipv6().is_err() => Ipv4Addr::UNSPECIFIED.into(),
        listen => listen,
    }
}

/// Listens on the load-sharing port; `::` takes IPv4 too.
fn listen(address: IpAddr, port: u16) -> Result<TcpListener, Error> {
    let address = SocketAddr::new(address, port);
    let bind = || {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM,
            None,
        )?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        // The kernel lowers it to net.core.somaxconn.
        socket.listen(i32::MAX)?;
        TcpListener::from_std(socket.into())
    };
    bind().map_err(|source| Error::Listen { address, source })
}
