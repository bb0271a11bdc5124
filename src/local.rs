//! A whole pool on one machine: the parts that a cluster runs, from the same
//! manifest, with processes instead of pods, one loopback address per
//! processing server, and a file instead of the ConfigMap.
//!
//! ```text
//! manifest ─plan→ table file → connection servers, agents
//!            └──→ start, stop: agent + containers of a slot
//! ```
//!
//! - `running`: the loop, as in the operator: observe, plan, apply;
//! - `container`: containers as processes, `ignored`: what a manifest asks for in
//!   vain, `readiness`: why a server is not ready; without side effects;
//! - `addresses`: the loopback addresses of a pool;
//! - `server`: the processes of one processing server;
//! - `check`: conditions that must hold before anything starts;
//! - `child`: processes that are restarted when they end; `served`: whether a
//!   session was the reason;
//! - `supervise`: processes that do not outlive their parent; `orphans`: those
//!   whose supervisor was killed;
//! - `events`: the output for the user;
//! - this file: the options, the start and the end.

mod addresses;
mod check;
mod child;
mod container;
mod events;
mod ignored;
mod orphans;
mod readiness;
mod running;
mod served;
mod server;
pub mod supervise;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use self::addresses::Addresses;
use self::running::{Running, ignored_line, plan_first};
use crate::manifest::{self, ManifestError};

/// Longest path of a folder for temporary files that is used, in bytes. The path of a
/// Unix socket has at most 107, and those in our folder are 53 longer than this.
const LONGEST_PLACE: usize = 54;

/// How often the pool is observed and a plan applied.
const STEP: Duration = Duration::from_millis(250);

/// How often the removal of the folder is tried while children make files there.
/// Each makes three at most.
const REMOVALS: usize = 20;
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);

/// Runs a whole pool on this machine, without Kubernetes: the containers'
/// commands as processes, one loopback address per processing server.
///
/// A change of FILE is applied while the pool runs. Ctrl-C drains and stops it;
/// a second Ctrl-C stops it at once. SIGUSR2 replaces the connection servers by
/// this program as it is on disk then, without cutting connections.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  portpool local -f examples/echo.yaml
  portpool local -f pool.yaml --no-live --role-log info > events.log

Exit codes: 0 stopped, 1 failed, 2 wrong manifest or a machine that cannot run it (nothing was started).")]
pub struct Options {
    /// The ProcessingPool manifest (YAML); - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,

    /// Only check whether the pool can run here, and name the fields that are ignored
    #[arg(long)]
    pub check: bool,

    /// Seconds that live sessions may continue when servers or the pool stop
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub drain_seconds: u64,

    /// Show only events, without the table of servers, even on a terminal
    #[arg(long)]
    pub no_live: bool,

    /// Log filter of the roles, as in PORTPOOL_LOG
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    pub role_log: String,
}

/// Why a pool cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The manifest is wrong, or cannot run on this machine.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The operating system refused an action.
    #[error("failed to {action}: {source}")]
    System {
        /// Refused action.
        action: String,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    /// Whether the manifest is at fault.
    #[must_use]
    pub fn is_bad_input(&self) -> bool {
        !matches!(self, Self::System { .. })
    }
}

/// Runs the pool until `shutdown`.
///
/// # Errors
/// [`Error`]; nothing was started then.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    tokio::pin!(shutdown);
    let system = |action: &str| {
        let action = action.to_owned();
        move |source| Error::System { action, source }
    };
    let file = options.file.clone();
    // A pipe may be opened without anyone who writes into it.
    let loading = tokio::task::spawn_blocking(move || manifest::load(&file));
    let manifest = tokio::select! {
        loaded = loading => loaded.expect("loading does not panic")?,
        () = &mut shutdown => return Ok(()),
    };
    let first = plan_first(&manifest.pool);
    let mut addresses = Addresses::reserve().map_err(system("reserve loopback addresses"))?;
    check::can_run(&manifest.pool, &first.table, &mut addresses)
        .map_err(|problems| manifest.error(problems))?;
    if options.check {
        let ignored = ignored_line(&ignored::ignored(manifest.fields()));
        ignored.iter().for_each(|line| println!("{line}"));
        println!("{} can run here", manifest.pool.name);
        return Ok(());
    }
    orphans::adopt().map_err(system("become the parent of orphans"))?;
    let binary = std::env::current_exe().map_err(system("find this program"))?;
    let folder = Folder::new().map_err(system("make a folder for the table"))?;
    let paths = (binary, folder.0.clone());
    let mut running = Running::new(options, &manifest, addresses, paths);
    running.start().map_err(system("write the table"))?;
    let mut upgrades = signal(SignalKind::user_defined2()).map_err(system("wait for SIGUSR2"))?;
    loop {
        tokio::select! {
            () = tokio::time::sleep(STEP) => {}
            () = &mut shutdown => break,
            Some(()) = upgrades.recv() => running.replace_connection_servers(),
        }
        tokio::select! {
            () = running.step() => {}
            // The connection server may not answer.
            () = &mut shutdown => break,
        }
    }
    running.stop().await;
    // All children that were started have ended.
    supervise::kill_descendants();
    Ok(())
}

/// The folder of the table and the sockets. It is removed at the end, also at one
/// that does not wait for the children.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        let mut place = std::env::temp_dir();
        if place.as_os_str().len() > LONGEST_PLACE {
            place = PathBuf::from("/tmp");
        }
        let folder = tempfile::Builder::new()
            .prefix("portpool-")
            .tempdir_in(place)?;
        Ok(Self(folder.keep()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for _ in 0..REMOVALS {
            if std::fs::remove_dir_all(&self.0).is_ok() {
                return;
            }
            // A child has just made a file there.
            std::thread::sleep(REMOVAL_PAUSE);
        }
    }
}
