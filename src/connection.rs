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
//! - `forward`: the data plane, on its own threads;
//! - `handover`: all of it to a new process, without cutting anything;
//!   `successor`: starts one.

pub mod agents;
pub mod allocation;
pub mod api;
pub mod forward;
pub mod handover;
mod http;
pub mod load_sharing;
pub mod metrics;
pub mod policy;
pub mod problem;
pub mod reservations;
pub mod sessions;
pub mod successor;
pub mod trace;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
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
use self::successor::Starter;
use crate::table::Table;
use crate::{admin, follow};

/// How long a stopping connection server waits for requests being answered.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// How long a successor lets requests queue until its agents are attached.
const ATTACH_LIMIT: Duration = Duration::from_secs(2);

/// How often it looks.
const ATTACH_CHECK: Duration = Duration::from_millis(2);

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

    /// Take over from the connection server that listens on this Unix socket, without cutting anything; then
    /// listen there for the next one. SIGUSR2 starts that: this program again, as it is on disk then
    #[arg(long, value_name = "PATH")]
    pub handover: Option<PathBuf>,
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
    /// The successor that this process stood in for has failed.
    #[error("the successor ended with {status}")]
    Successor {
        /// How.
        status: std::process::ExitStatus,
    },
    /// The running connection server could not be taken over.
    #[error(transparent)]
    Handover(#[from] handover::Error),
}

/// Runs a connection server until `shutdown`, then drains: nothing new is
/// allocated, live sessions go on for up to `drain_seconds`. Ends early when a
/// successor has taken over.
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
    let mut socket = match &options.handover {
        Some(path) => Some(handover::Socket::prepare(path)?),
        None => None,
    };
    let mut starter = match &options.handover {
        Some(_) => Some(Starter::new().map_err(handover::Error::from)?),
        None => None,
    };
    let mut server = Server::start(&options, &first, &follower).await?;
    if let Some(socket) = &mut socket {
        socket.publish()?;
    }
    server.begin().await;
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            () = or_never(starter.as_mut().map(Starter::asked)) => {
                starter.iter_mut().for_each(|starter| starter.start(1));
            }
            Ok(stream) = or_never(socket.as_ref().map(handover::Socket::accept)) => {
                if server.hand_over(stream).await {
                    server.retire();
                    break;
                }
            }
        }
    }
    if !server.has_retired() {
        server
            .stop(Duration::from_secs(options.drain_seconds))
            .await;
        if let Some(socket) = &socket {
            socket.remove();
        }
        return Ok(());
    }
    drop((server, socket, follower));
    match starter {
        Some(starter) => match starter.stand_in(shutdown).await {
            Some(status) if !status.success() => Err(Error::Successor { status }),
            _ => Ok(()),
        },
        None => Ok(()),
    }
}

/// What `future` gives; without one, nothing ever.
async fn or_never<T>(future: Option<impl Future<Output = T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Everything of a running predecessor, if there is one of the pool of `first`.
async fn inherit(options: &Options, first: &Table) -> Result<Option<handover::State>, Error> {
    let Some(path) = options.handover.clone() else {
        return Ok(None);
    };
    let pool_uid = first.pool_uid.clone();
    let inheriting = tokio::task::spawn_blocking(move || {
        let Some(inheritance) = handover::ask(&path)? else {
            return Ok(None);
        };
        if inheritance.state().table.pool_uid != pool_uid {
            return Err(handover::Error::Malformed(
                "the running connection server is another pool's",
            ));
        }
        inheritance.take().map(Some)
    });
    let inherited = inheriting.await.expect("inheriting does not panic")?;
    Ok(inherited)
}

/// The running parts.
struct Server {
    sessions: Arc<Sessions>,
    reservations: Arc<Reservations>,
    forwarder: Arc<Forwarder>,
    agents: Arc<Agents>,
    table: watch::Receiver<Arc<Table>>,
    /// Agents and clients know this connection server already.
    is_successor: bool,
    router: Router,
    load_sharing: std::net::TcpListener,
    admin: OwnedFd,
    /// Serves the load-sharing port, with what stops it.
    serving: Option<(CancellationToken, JoinHandle<()>)>,
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
        let mut followed = follower.watch();
        // From here on a predecessor's streams stand still.
        let inherited = inherit(options, first).await?;
        let is_successor = inherited.is_some();
        let (handed, first, load_sharing, admin) = match inherited {
            Some(mut state) => {
                let (connections, flows) = state.take_over(&sessions, &forwarder);
                info!(connections, flows, "taken over from the former process");
                // A newer table than the predecessor's is applied next.
                followed.mark_changed();
                let admin = TcpListener::from_std(state.admin.into());
                (
                    Some(state.agents),
                    state.table,
                    state.load_sharing.into(),
                    admin,
                )
            }
            None => {
                let load_sharing = listen(options.listen, options.load_sharing_port)?;
                let admin = admin::bind(options.admin).await?;
                (None, first.clone(), load_sharing, Ok(admin))
            }
        };
        let agents = Arc::new(Agents::new(
            handed,
            sessions.clone(),
            reservations.clone(),
            forwarder.clone(),
            metrics.clone(),
        ));
        // Clients may come as soon as the first port is open.
        sessions.set_table(&first);
        apply(&first, &sessions, &reservations, &forwarder, &agents)?;
        let (in_use, table) = watch::channel(first.clone());
        let allocation = Allocation::new(
            agents.clone(),
            reservations.clone(),
            sessions.clone(),
            metrics.clone(),
            table.clone(),
        );
        let api = Api {
            allocation: Arc::new(allocation),
            sessions: sessions.clone(),
            reservations: reservations.clone(),
            agents: agents.clone(),
            table: table.clone(),
            metrics,
            advertise: options.advertise.clone(),
        };
        let admin = admin.map_err(handover::Error::from)?;
        let server = Self {
            sessions,
            reservations,
            forwarder,
            agents,
            table,
            is_successor,
            router: api::router(Arc::new(api)),
            load_sharing,
            admin: admin
                .as_fd()
                .try_clone_to_owned()
                .map_err(handover::Error::from)?,
            serving: None,
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        server.serve_admin(admin, registry);
        server.tasks.spawn(keep_applying(
            followed,
            in_use,
            server.parts(),
            server.stopping.clone(),
        ));
        Ok(server)
    }

    /// Begins to answer requests.
    async fn begin(&mut self) {
        if self.is_successor {
            self.until_attached().await;
        }
        self.serve();
        let table = self.table.borrow();
        info!(
            address = %self.load_sharing.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string()),
            connection_ports = table.connection_port_count(),
            generation = table.generation,
            "connection server ready"
        );
    }

    fn parts(&self) -> Parts {
        (
            self.sessions.clone(),
            self.reservations.clone(),
            self.forwarder.clone(),
            self.agents.clone(),
        )
    }

    /// Waits until the agents are attached, but not for long: what a successor
    /// answers before would be that nothing is free.
    async fn until_attached(&self) {
        let is_attached = || {
            let table = self.table.borrow();
            let mut rows = table.rows.iter().filter(|row| row.address.is_some());
            self.reservations.inspect(|sharing| {
                let servers = sharing.servers();
                rows.all(|row| {
                    let server = servers.get(&row.slot);
                    server.is_some_and(|server| server.attached && !server.ports.is_empty())
                })
            })
        };
        let deadline = Instant::now() + ATTACH_LIMIT;
        while !is_attached() && Instant::now() < deadline {
            tokio::time::sleep(ATTACH_CHECK).await;
        }
    }

    /// Serves the load-sharing port.
    fn serve(&mut self) {
        let listener = self
            .load_sharing
            .try_clone()
            .and_then(TcpListener::from_std);
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => return error!(%error, "failed to serve the load-sharing port"),
        };
        let stop = self.draining.child_token();
        let stopped = stop.clone().cancelled_owned();
        let serving = http::serve(listener, self.router.clone(), stopped, SHUTDOWN_GRACE);
        self.serving = Some((stop, self.tasks.spawn(serving)));
    }

    /// Answers the requests under way and sends waiting ones away. Further ones
    /// queue at the listener.
    async fn stop_serving(&mut self) {
        if let Some((stop, serving)) = self.serving.take() {
            stop.cancel();
            self.reservations.dismiss();
            // It ends by itself; it does not panic.
            let _ = serving.await;
        }
    }

    /// Hands everything over to the process at the other end of `stream`.
    /// Whether it has it now; this one has nothing to do any more then.
    async fn hand_over(&mut self, stream: UnixStream) -> bool {
        let hearing = tokio::task::spawn_blocking(move || handover::Offer::hear(stream));
        let offer = match hearing.await.expect("hearing does not panic") {
            Ok(offer) => offer,
            Err(error) => {
                warn!(%error, "hand-over refused");
                return false;
            }
        };
        info!("a successor asks for a hand-over");
        self.stop_serving().await;
        let paused = self.agents.pause().await;
        let started = Instant::now();
        match self.give(offer).await {
            Ok(()) => {
                info!(paused = ?started.elapsed(), "handed over");
                // For ever: what agents hear from now on comes from the successor.
                std::mem::forget(paused);
                true
            }
            Err(error) => {
                drop(paused);
                self.serve();
                warn!(paused = ?started.elapsed(), %error, "hand-over failed; this connection server goes on");
                false
            }
        }
    }

    /// Ends what is left after everything was handed over, without a word to
    /// anybody.
    fn retire(&self) {
        self.stopping.cancel();
        self.agents.vanish();
        self.forwarder.shutdown();
    }

    fn has_retired(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Pauses the data plane and gives everything away, or goes on.
    async fn give(&self, mut offer: handover::Offer) -> Result<(), handover::Error> {
        let (load_sharing, admin) = (self.load_sharing.try_clone()?, self.admin.try_clone()?);
        let table = self.table.borrow().clone();
        let handed = self.forwarder.hand_over(&table)?;
        let state = handover::State {
            agents: self.agents.hand_over(),
            table,
            load_sharing: load_sharing.into(),
            admin,
            sessions: self.sessions.hand_over(),
            handed,
        };
        let giving = tokio::task::spawn_blocking(move || (offer.give(&state), state));
        let (given, state) = giving.await.expect("giving does not panic");
        if given.is_err() {
            self.forwarder.take_over(state.handed, &state.table);
        }
        given
    }

    fn serve_admin(&self, listener: TcpListener, registry: Registry) {
        let (draining, reservations, table) = (
            self.draining.clone(),
            self.reservations.clone(),
            self.table.clone(),
        );
        let (rows, was_ready) = (table.clone(), AtomicBool::new(self.is_successor));
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
        let stopping = self.stopping.clone().cancelled_owned();
        self.tasks.spawn(admin::serve(listener, state, stopping));
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
        // A predecessor may have had a newer one.
        if generation <= in_use.borrow().generation {
            continue;
        }
        let _step = agents.step().await;
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
fn listen(address: IpAddr, port: u16) -> Result<std::net::TcpListener, Error> {
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
        Ok(socket.into())
    };
    bind().map_err(|source| Error::Listen { address, source })
}
