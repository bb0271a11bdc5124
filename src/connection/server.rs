//! The running parts of a connection server: wired together at the start,
//! served, and stopped in an order that cuts as little as possible. It owns
//! every part and the tasks that drive them; the parent decides when it starts
//! and ends.
//!
//! - `figures`: what the metrics read from the parts;
//! - `handover`: everything from a predecessor, and to a successor;
//! - `tables`: has the parts follow the table.

mod figures;
mod handover;
mod tables;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use self::figures::Figures;
use super::agents::host_identity;
use super::agents::{Agents, AgentsSnapshot};
use super::control::Control;
use super::inspection;
use super::load_sharing::allocation::Allocation;
use super::load_sharing::api::{self, Api};
use super::load_sharing::http;
use super::load_sharing::queue::Queue;
use super::load_sharing::room;
use super::load_sharing::servers::ServerLoad;
use super::metrics::Metrics;
use super::sessions::Sessions;
use super::{Error, Options};
use crate::forward::{self, Forwarder};
use crate::table::Table;
use crate::{admin, follow};

/// How long a stopping connection server waits for requests being answered.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// How long a connection server that has drained may take to close everything: longer
/// than [`SHUTDOWN_GRACE`] and the farewell to the agents take together. The grace
/// period of its pod is for the longest drain, so no one else would end it soon.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// How often a stopping connection server checks whether sessions are left.
const DRAIN_CHECK: Duration = Duration::from_millis(100);

/// What a table is applied to, and what is handed over.
#[derive(Clone)]
struct Parts {
    control: Arc<Control>,
    sessions: Arc<Sessions>,
    allocation: Arc<Allocation>,
    forwarder: Arc<Forwarder>,
    agents: Arc<Agents>,
}

/// What the parts start from: a predecessor's state, or a new one.
struct InitialState {
    agents: AgentsSnapshot,
    table: Arc<Table>,
    load_sharing: std::net::TcpListener,
    admin: TcpListener,
    is_successor: bool,
}

impl InitialState {
    /// A predecessor's state, if there is one. Its streams stand still until the
    /// parts go on with it.
    async fn find(options: &Options, first: &Arc<Table>, control: &Control) -> Result<Self, Error> {
        match handover::import(options, first).await? {
            Some(state) => Ok(Self::imported(state, control)?),
            None => Self::new(options, first).await,
        }
    }

    async fn new(options: &Options, first: &Arc<Table>) -> Result<Self, Error> {
        let load_sharing = listen(options.listen, options.load_sharing_port)?;
        Ok(Self {
            agents: AgentsSnapshot::new(host_identity::of(&load_sharing)),
            table: first.clone(),
            load_sharing,
            admin: admin::bind(options.admin).await?,
            is_successor: false,
        })
    }
}

/// The running parts.
pub(super) struct Server {
    parts: Parts,
    table: watch::Receiver<Arc<Table>>,
    /// Whether agents and clients know this connection server already.
    is_successor: bool,
    router: Router,
    load_sharing: std::net::TcpListener,
    admin: OwnedFd,
    /// The task that serves the load-sharing port, with what stops it.
    serving: Option<(CancellationToken, JoinHandle<()>)>,
    draining: CancellationToken,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    /// Starts everything but the load-sharing port: ports are open, agents are
    /// greeted, `follower`'s tables are applied from now on.
    pub(super) async fn start(
        options: &Options,
        first: &Arc<Table>,
        follower: &follow::Follower,
    ) -> Result<Self, Error> {
        check_host(first)?;
        let mut registry = Registry::default();
        admin::register_build_info(&mut registry);
        follower.rejected().register(&mut registry);
        let metrics = Arc::new(Metrics::new(&mut registry));
        let sessions = Arc::new(Sessions::default());
        let forwarder = Arc::new(Forwarder::start(&forwarding(options), &sessions)?);
        let control = Arc::new(Control::new(sessions.clone(), forwarder.clone()));
        let allocation = Arc::new(Allocation::new(
            control.clone(),
            sessions.clone(),
            metrics.clone(),
            room::most_waiting(),
        ));
        registry.register_collector(Box::new(Figures::new(&forwarder, &sessions, &allocation)));
        let mut followed = follower.watch();
        let initial = InitialState::find(options, first, &control).await?;
        if initial.is_successor {
            // A newer table than the predecessor's is applied next.
            followed.mark_changed();
        }
        let agents = Arc::new(Agents::new(
            initial.agents,
            control.clone(),
            sessions.clone(),
            allocation.clone(),
            metrics.clone(),
        ));
        let parts = Parts {
            control,
            sessions,
            allocation,
            forwarder,
            agents,
        };
        parts.apply(&parts.control.begin_change().await, &initial.table);
        let (in_use, table) = watch::channel(initial.table);
        let api = Arc::new(wire_api(
            &parts,
            metrics,
            table.clone(),
            options.advertise.clone(),
        ));
        let admin = initial.admin.as_fd().try_clone_to_owned();
        let server = Self {
            router: api::router(api.clone()),
            parts,
            table,
            is_successor: initial.is_successor,
            load_sharing: initial.load_sharing,
            admin: admin.map_err(Error::AdminDescriptor)?,
            serving: None,
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        server.serve_admin(initial.admin, registry, api);
        server.keep_time();
        let (parts, stopping) = (server.parts.clone(), server.stopping.clone());
        server
            .tasks
            .spawn(parts.keep_applying(followed, in_use, stopping));
        Ok(server)
    }

    /// Begins to answer requests.
    pub(super) async fn begin(&mut self) {
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

    /// Has the queue do what it has to do in time.
    fn keep_time(&self) {
        let (allocation, stopping) = (self.parts.allocation.clone(), self.stopping.clone());
        self.tasks.spawn(async move {
            let stopping = stopping.cancelled();
            tokio::select! {
                () = allocation.keep_time() => {}
                () = stopping => {}
            }
        });
    }

    /// Serves the load-sharing port.
    fn serve(&mut self) {
        self.parts.allocation.open();
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

    /// Answers the requests under way and refuses waiting ones. Further ones
    /// queue at the listener.
    async fn stop_serving(&mut self) {
        if let Some((stop, serving)) = self.serving.take() {
            stop.cancel();
            self.parts.allocation.close();
            // The task ends by itself and does not panic.
            let _ = serving.await;
        }
    }

    fn serve_admin(&self, listener: TcpListener, registry: Registry, api: Arc<Api>) {
        let (draining, allocation, table) = (
            self.draining.clone(),
            self.parts.allocation.clone(),
            self.table.clone(),
        );
        let (rows, was_ready) = (table.clone(), AtomicBool::new(self.is_successor));
        let state = admin::AdminState {
            registry: Arc::new(registry),
            ready: Box::new(move || {
                if draining.is_cancelled() {
                    return Err("shutting down".to_owned());
                }
                let takes = |queue: &Queue| queue.servers().loads().any(ServerLoad::takes_sessions);
                // Once ready it stays so: without processing servers clients
                // should get that answer, and live flows should keep their way.
                let is_empty = rows.borrow().rows.is_empty();
                if is_empty || allocation.inspect(takes) {
                    was_ready.store(true, Ordering::Relaxed);
                }
                if was_ready.load(Ordering::Relaxed) {
                    Ok(())
                } else {
                    Err("no processing server is attached yet".to_owned())
                }
            }),
            table: Some(Arc::new(move || Some(table.borrow().clone()))),
            pages: inspection::pages(api, self.stopping.clone()),
        };
        let stopping = self.stopping.clone().cancelled_owned();
        self.tasks.spawn(admin::serve(listener, state, stopping));
    }

    /// Lets live sessions go on for up to `asked`, or as the table says, then closes
    /// everything. That time counts from the signal; another table may make it longer
    /// or shorter.
    pub(super) async fn stop(self, asked: Option<Duration>) {
        let limit = || asked.unwrap_or_else(|| self.table.borrow().drain_limit());
        let started = Instant::now();
        self.draining.cancel();
        self.parts.allocation.close();
        info!(
            sessions = self.parts.sessions.open_count(),
            seconds = limit().as_secs(),
            "draining: live sessions may go on; a second signal cuts them at once"
        );
        while self.parts.sessions.open_count() > 0 && started.elapsed() < limit() {
            tokio::time::sleep(DRAIN_CHECK).await;
        }
        info!(
            sessions_cut = self.parts.sessions.open_count(),
            "connection server stops"
        );
        self.stopping.cancel();
        self.tasks.close();
        let closing = async {
            self.tasks.wait().await;
            let forwarder = self.parts.forwarder.clone();
            // It waits for threads, which no timeout could interrupt here.
            let _ = tokio::task::spawn_blocking(move || forwarder.shutdown()).await;
            self.parts.agents.leave().await;
        };
        if timeout(CLOSE_DEADLINE, closing).await.is_err() {
            error!("connection server does not close in time, and exits as it is");
            // Its end would wait for the threads; that of the process closes everything.
            std::mem::forget(self.parts.forwarder.clone());
        }
    }
}

/// Checks that this host can open the connection ports of `table`.
fn check_host(table: &Table) -> Result<(), Error> {
    forward::check_open_files(table.connection_port_count())?;
    if let Some(overlap) = forward::ephemeral_overlap(table) {
        warn!(%overlap, "connection ports lie inside the kernel's ip_local_port_range: outgoing connections may occupy them");
    }
    Ok(())
}

/// How the data plane runs.
fn forwarding(options: &Options) -> forward::Config {
    forward::Config {
        limits: options.limits,
        other_files: room::most_connections() as u64,
        peer_timeout: Duration::from_secs(options.peer_timeout_seconds),
        ..forward::Config::new(options.listen, options.data_threads)
    }
}

/// What answers requests.
fn wire_api(
    parts: &Parts,
    metrics: Arc<Metrics>,
    table: watch::Receiver<Arc<Table>>,
    advertise: Option<String>,
) -> Api {
    Api {
        allocation: parts.allocation.clone(),
        sessions: parts.sessions.clone(),
        control: parts.control.clone(),
        table,
        metrics,
        advertise,
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
        // For connections in TIME_WAIT. Never SO_REUSEPORT: see `host_identity`.
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
