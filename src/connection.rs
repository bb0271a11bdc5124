//! The connection server role: a plurality of connection ports in front of
//! the pool's processing servers, and the load-sharing port that gives them
//! to clients.
//!
//! ```text
//! client ─POST /v1/sessions→ load_sharing ─select→ agents ⇄ processing servers
//! agents ─sessions, ends→ control ─→ sessions ─cut→ forward
//! client ─bytes→ forward ⇄ processing server       forward ─admit?→ sessions
//! ```
//!
//! This file has the role's arguments and its life. What runs is in `server`.
//!
//! # The modules
//!
//! ```text
//! server        → agents, control, handover, inspection, load_sharing, metrics, sessions  wires all parts, from start to stop
//! handover      → agents, control, sessions             all of it to a new process, without cutting anything
//! inspection    → load_sharing, sessions                the admin port's own pages: which session is where
//! load_sharing  → control, metrics, sessions            the load-sharing port: from a request to a session
//! agents        → control, load_sharing, metrics, sessions  a stream of the selection protocol per processing server
//! metrics       what is counted
//! control       → sessions                              changes sessions, then has the data plane follow
//! sessions      the sessions that agents reported; the gate of the data plane (`crate::forward`)
//! ```

// A cut that is forgotten does not compile.
#![deny(unused_must_use)]

pub mod agents;
pub mod control;
pub mod handover;
pub mod inspection;
pub mod load_sharing;
pub mod metrics;
mod server;
pub mod sessions;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tracing::info;

use self::handover::successor::Starter;
use self::server::Server;
use crate::pool::rules::parse_address;
use crate::{admin, cluster, follow, forward};

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

    /// Address that clients are given unless the table has one; default: the one that they reached this server by
    #[arg(long, value_name = "HOST", value_parser = parse_address)]
    pub advertise: Option<String>,

    /// Address that the load-sharing port and the connection ports listen on; `::` takes IPv6 and IPv4
    #[arg(long, value_name = "IP", default_value = "::")]
    pub listen: IpAddr,

    /// Port that requests go to (HTTP)
    #[arg(long, value_name = "PORT", default_value_t = 7700)]
    pub load_sharing_port: u16,

    /// Where /livez, /readyz, /metrics, /v1/port-table, /v1/sessions and /v1/events are served
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7701")]
    pub admin: SocketAddr,

    /// Threads that forward; default: one per processor
    #[arg(long, value_name = "N")]
    pub data_threads: Option<usize>,

    /// Seconds after which a TCP client or server is given up that shows no sign of life, or takes no data; 0: the system's default
    #[arg(long, value_name = "SECONDS", default_value_t = forward::Config::PEER_TIMEOUT.as_secs())]
    pub peer_timeout_seconds: u64,

    /// How many clients there may be
    #[command(flatten)]
    pub limits: forward::Limits,

    /// Seconds that live sessions may go on after SIGTERM. Default: as the table says, else 600
    #[arg(long, value_name = "SECONDS")]
    pub drain_seconds: Option<u64>,

    /// Take over from the connection server that listens on this Unix socket, without cutting anything; then
    /// listen there for the next one. SIGUSR2 starts that: this program again, as it is on disk then
    #[arg(long, value_name = "PATH")]
    pub handover: Option<PathBuf>,
}

/// Why a connection server could not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The load-sharing port cannot be opened.
    #[error(
        "failed to listen on load-sharing port {address}: {source}; {}",
        match .source.kind() {
            std::io::ErrorKind::PermissionDenied => "ports so low need a privilege, or a lower net.ipv4.ip_unprivileged_port_start",
            _ => "is another program using it?",
        }
    )]
    Listen {
        /// The address of the port.
        address: SocketAddr,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The data plane could not start.
    #[error(transparent)]
    Forward(#[from] forward::ForwardError),
    /// The table needs more descriptors than the process may have.
    #[error(transparent)]
    OpenFiles(#[from] forward::OpenFilesError),
    /// The cluster of the ConfigMap cannot be reached.
    #[error("failed to reach the cluster of ConfigMap {name}: {source}")]
    Cluster {
        /// The ConfigMap's name.
        name: String,
        /// The client's error.
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
        /// The successor's exit status.
        status: std::process::ExitStatus,
    },
    /// The admin port's listener cannot be kept for a successor.
    #[error(
        "failed to duplicate the descriptor of the admin port: {0}; is the limit of open files reached (ulimit -n)?"
    )]
    AdminDescriptor(#[source] std::io::Error),
    /// Upgrades by signal cannot be offered.
    #[error("failed to prepare for upgrades by SIGUSR2: {0}")]
    Upgrades(#[source] std::io::Error),
    /// The running connection server could not be taken over.
    #[error(transparent)]
    Handover(#[from] handover::Error),
}

/// Runs a connection server until `shutdown`, then drains: nothing new is
/// allocated, live sessions go on for up to `drain_seconds` or the table's. Ends early when a
/// successor has taken over. With `is_supervised`, `portpool local` runs this
/// process and starts its successors; without it, SIGUSR2 does.
///
/// # Errors
/// [`Error`] when it could not start; once it runs, faults are logged, counted
/// and survived.
pub async fn run(
    options: Options,
    is_supervised: bool,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    tokio::pin!(shutdown);
    let options = Options {
        listen: without_ipv6(options.listen),
        ..options
    };
    let following = async {
        let mut follower = follower(&options).await?;
        let first = follower.first().await?;
        Ok::<_, Error>((follower, first))
    };
    let (follower, first) = tokio::select! {
        following = following => following?,
        () = &mut shutdown => return Ok(()),
    };
    let mut socket = match &options.handover {
        Some(path) => Some(handover::Socket::prepare(path)?),
        None => None,
    };
    let mut starter = match &options.handover {
        Some(_) => Some(Starter::new(is_supervised).map_err(Error::Upgrades)?),
        None => None,
    };
    let (mut server, is_asked_to_stop) = {
        let starting = async {
            let mut server = Server::start(&options, &first, &follower).await?;
            if let Some(socket) = &mut socket {
                socket.publish()?;
            }
            server.begin().await;
            Ok::<_, Error>(server)
        };
        tokio::pin!(starting);
        tokio::select! {
            server = &mut starting => (server?, false),
            () = &mut shutdown => {
                // A hand-over that is cut would cut what was handed over.
                info!("stopping once the start is complete, which includes a hand-over to this process");
                (starting.await?, true)
            }
        }
    };
    if !is_asked_to_stop {
        serve(&mut server, &mut starter, socket.as_ref(), &mut shutdown).await;
    }
    if !server.has_retired() {
        let asked = options.drain_seconds.map(Duration::from_secs);
        server.stop(asked).await;
        return Ok(());
    }
    if let Some(socket) = socket {
        socket.leave();
    }
    drop((server, follower));
    match starter {
        Some(starter) => match starter.stand_in(shutdown).await {
            Some(status) if !status.success() => Err(Error::Successor { status }),
            _ => Ok(()),
        },
        None => Ok(()),
    }
}

/// Serves until `shutdown`, or until a successor has taken over.
async fn serve(
    server: &mut Server,
    starter: &mut Option<Starter>,
    socket: Option<&handover::Socket>,
    mut shutdown: impl Future<Output = ()> + Unpin,
) {
    loop {
        tokio::select! {
            () = &mut shutdown => return,
            () = or_never(starter.as_mut().map(Starter::requested)) => {
                starter.iter_mut().for_each(|starter| starter.start(1));
            }
            Ok(stream) = or_never(socket.map(handover::Socket::accept)) => {
                if server.hand_over(stream).await {
                    server.retire();
                    return;
                }
            }
        }
    }
}

/// The output of `future`; without one it never completes.
async fn or_never<T>(future: Option<impl Future<Output = T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Follows the ConfigMap if there is one, else the file.
async fn follower(options: &Options) -> Result<follow::Follower, Error> {
    let Some(config_map) = &options.config_map else {
        return Ok(follow::follow_file(&options.table)?);
    };
    let client = cluster::connect().await.map_err(|source| Error::Cluster {
        name: config_map.clone(),
        source: Box::new(source),
    })?;
    let Ok(config_map) = config_map.parse();
    Ok(follow::follow_config_map(
        client,
        config_map,
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
