//! A whole pool on one machine: the parts that a cluster runs, from the same
//! manifest, with processes instead of pods, one loopback address per
//! processing server, and a file instead of the ConfigMap.
//!
//! ```text
//! manifest ─plan→ table file → connection servers, agents
//!            └──→ start, stop: agent + containers of a slot
//! ```
//!
//! The loop is an operator's: observe, plan, apply.
//!
//! - `container`: pure: containers as processes;
//! - `server`: one processing server's processes;
//! - `check`: what must hold before anything starts;
//! - `child`, `supervise`: processes that are restarted, and do not outlive us;
//! - `events`: what is shown.

mod check;
mod child;
mod container;
mod events;
mod server;
pub mod supervise;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};

use self::child::{Program, Supervised};
use self::events::Events;
use self::server::Server;
use crate::client::Client;
use crate::follow::write_table;
use crate::manifest::{self, ManifestError};
use crate::plan::{Observed, ObservedServer, Plan, Problem, ValidPool, plan, server_name};
use crate::pool::CONNECTION_ADMIN_PORT;
use crate::session::PoolState;
use crate::table::Table;

/// How often the world is observed and the plan carried on.
const STEP: Duration = Duration::from_millis(250);

/// Stands for the uid that a cluster gives a pool.
const UID: &str = "local";

/// Runs a whole pool on this machine, without Kubernetes: the containers'
/// commands as processes, one loopback address per processing server.
///
/// A changed FILE is applied while running. Ctrl-C drains and stops; a second
/// one stops at once. SIGUSR2 replaces the connection servers by this program
/// as it is on disk then, and cuts nothing.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  portpool local -f examples/echo.yaml
  portpool local -f pool.yaml --no-live --role-log info > events.log

Exit codes: 0 stopped, 1 failed, 2 wrong manifest or a machine that cannot run it (nothing was started).")]
pub struct Options {
    /// The ProcessingPool manifest (YAML)
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,

    /// Seconds that live sessions may go on when servers or the pool stop
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub drain_seconds: u64,

    /// Show events only, also on a terminal
    #[arg(long)]
    pub no_live: bool,

    /// What the roles log, as in PORTPOOL_LOG
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    pub role_log: String,
}

/// Why a pool cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The manifest is wrong, or cannot run on this machine.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The system refused something.
    #[error("failed to {action}: {source}")]
    System {
        /// What was tried.
        action: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// Whether what was given is at fault.
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
    let manifest = manifest::load(&options.file)?;
    let first = plan_first(&manifest.pool);
    check::can_run(&manifest.pool, &first.table).map_err(|problems| manifest.error(problems))?;
    let pool = manifest.pool;
    let system = |action: &str| {
        let action = action.to_owned();
        move |source| Error::System { action, source }
    };
    let binary = std::env::current_exe().map_err(system("find this program"))?;
    let folder = TemporaryFolder::new().map_err(system("make a folder for the table"))?;
    let events = Events::new(!options.no_live);
    let mut local = Local {
        modified: modified(&options.file),
        binary,
        table_file: folder.0.join("table.json"),
        folder: folder.0.clone(),
        options,
        pool,
        table: None,
        servers: BTreeMap::new(),
        connection_servers: Vec::new(),
        client: Client::new("127.0.0.1:1").expect("the address is well-formed"),
        events,
        said: String::new(),
    };
    local.start().await.map_err(system("write the table"))?;
    let mut upgrades = signal(SignalKind::user_defined2()).map_err(system("wait for SIGUSR2"))?;
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = tokio::time::sleep(STEP) => {}
            () = &mut shutdown => break,
            Some(()) = upgrades.recv() => {
                local.events.say("SIGUSR2: connection servers are replaced");
                local.connection_servers.iter().for_each(Supervised::replace);
            }
        }
        if let Err(error) = local.step().await {
            local
                .events
                .say(format!("failed to write the table: {error}; trying again"));
        }
    }
    local.stop().await;
    Ok(())
}

/// The running pool.
struct Local {
    options: Options,
    binary: PathBuf,
    folder: PathBuf,
    table_file: PathBuf,
    modified: Option<SystemTime>,
    pool: ValidPool,
    table: Option<Table>,
    servers: BTreeMap<u32, Server>,
    connection_servers: Vec<Supervised>,
    client: Client,
    events: Events,
    /// The last sentence about sessions.
    said: String,
}

impl Local {
    async fn start(&mut self) -> io::Result<()> {
        let address = format!("127.0.0.1:{}", self.pool.load_sharing_port);
        self.client = Client::new(&address).expect("the address is well-formed");
        self.apply(plan_first(&self.pool))?;
        for index in 0..self.pool.connection_servers {
            let server = self.connection_server(index);
            self.connection_servers.push(server);
        }
        self.events.say(format!(
            "load-sharing port: http://{address}  (admin: http://127.0.0.1:{CONNECTION_ADMIN_PORT})"
        ));
        for index in 1..self.pool.connection_servers {
            let port = self.pool.load_sharing_port;
            self.events.say(format!(
                "load-sharing port: http://{}:{port}",
                connection_address(index)
            ));
        }
        self.events.say(format!("try: portpool connect {address}"));
        Ok(())
    }

    fn connection_server(&self, index: u32) -> Supervised {
        let address = connection_address(index);
        let arguments = [
            "connection-server".to_owned(),
            format!("--table={}", self.table_file.display()),
            format!("--listen={address}"),
            format!("--load-sharing-port={}", self.pool.load_sharing_port),
            format!("--admin={address}:{CONNECTION_ADMIN_PORT}"),
            format!(
                "--handover={}",
                self.folder.join(format!("handover-{index}")).display()
            ),
            "--drain-seconds=0".to_owned(),
        ];
        let program = Program {
            name: format!("connection-server-{index}"),
            arguments: arguments.to_vec(),
            environment: vec![("PORTPOOL_LOG".to_owned(), self.options.role_log.clone())],
            folder: None,
            grace: Duration::from_secs(5),
        };
        Supervised::start(self.binary.clone(), program, self.events.clone())
    }

    /// Observes, plans and applies once.
    async fn step(&mut self) -> io::Result<()> {
        self.reload();
        let state = self.client.pool().await.ok();
        if let Some(state) = &state {
            self.show(state);
        }
        let servers = self.observe(state.as_ref());
        let observed = Observed {
            uid: UID,
            table: self.table.as_ref(),
            generation: 0,
            servers: &servers,
        };
        let next = plan(&self.pool, &observed, Timestamp::now(), self.drain_limit());
        self.apply(next)?;
        Ok(())
    }

    fn drain_limit(&self) -> Duration {
        Duration::from_secs(self.options.drain_seconds)
    }

    /// Takes up a changed manifest; a wrong one leaves the last in force.
    fn reload(&mut self) {
        let modified = modified(&self.options.file);
        if modified == self.modified || modified.is_none() {
            return;
        }
        self.modified = modified;
        let loaded = manifest::load(&self.options.file).and_then(|manifest| {
            let planned = plan_first(&manifest.pool).table;
            let table = self.table.as_ref().unwrap_or(&planned);
            check::can_become((&self.pool, table), (&manifest.pool, &planned))
                .map_err(|problems| manifest.error(problems))?;
            Ok(manifest.pool)
        });
        match loaded {
            Ok(pool) if pool == self.pool => {}
            Ok(pool) => {
                self.events.say(format!(
                    "{} changed: {} servers",
                    self.options.file.display(),
                    pool.replicas
                ));
                self.pool = pool;
            }
            Err(error) => {
                self.events.say(format!(
                    "{} not applied; the pool stays as it is:",
                    self.options.file.display()
                ));
                for line in error.to_string().lines() {
                    self.events.say(line);
                }
            }
        }
    }

    fn show(&mut self, state: &PoolState) {
        let said = format!(
            "{} sessions, {} ports free, {} requests waiting",
            state.sessions, state.free_ports, state.waiting
        );
        if self.said != said {
            self.events.say(&said);
            self.said = said;
        }
        for server in &state.servers {
            if let Some(known) = self.servers.get_mut(&server.slot)
                && server.attached
                && known.say_ready()
            {
                self.events
                    .say(format!("{} is ready at {}", server.server, known.address));
            }
        }
        self.events.draw(state);
    }

    fn observe(&mut self, state: Option<&PoolState>) -> Vec<ObservedServer> {
        self.servers.retain(|_, server| !server.has_stopped());
        let template = &self.pool.template;
        let observed = self.servers.iter().map(|(&slot, server)| {
            let reported =
                state.and_then(|state| state.servers.iter().find(|reported| reported.slot == slot));
            ObservedServer {
                slot,
                uid: server.uid.clone(),
                address: (!server.is_stopping()).then_some(server.address),
                is_ready: reported.is_some_and(|reported| reported.attached),
                is_outdated: server.template != *template,
                is_stopping: server.is_stopping(),
                sessions: reported.map(|reported| reported.sessions),
                ..ObservedServer::default()
            }
        });
        observed.collect()
    }

    fn apply(&mut self, plan: Plan) -> io::Result<()> {
        if self.table.as_ref() != Some(&plan.table) {
            write_table(&self.table_file, &plan.table)?;
            let (generation, ports) = (plan.table.generation, plan.table.connection_port_count());
            self.events.say(format!(
                "table generation {generation}: {} servers, {ports} connection ports",
                plan.table.rows.len()
            ));
            self.table = Some(plan.table);
        }
        for slot in plan.start {
            self.start_server(slot);
        }
        for slot in plan.stop {
            if let Some(server) = self.servers.get_mut(&slot)
                && server.stop()
            {
                let reason = match server.template == self.pool.template {
                    true => "stops",
                    false => "is replaced: the template has changed",
                };
                self.events.say(format!("{} {reason}", server.name));
            }
        }
        Ok(())
    }

    fn start_server(&mut self, slot: u32) {
        let name = server_name(&self.pool.name, slot);
        let address = server_address(slot);
        match Server::start(&self.context(), slot, name.clone(), address) {
            Ok(server) => {
                self.events.say(format!("{name} starts at {address}"));
                self.servers.insert(slot, server);
            }
            // Checked before the pool was taken up.
            Err(problems) => {
                for Problem { path, message } in problems {
                    self.events
                        .say(format!("{name} cannot start: {path}: {message}"));
                }
            }
        }
    }

    fn context(&self) -> server::Context<'_> {
        server::Context {
            binary: &self.binary,
            folder: &self.folder,
            table_file: &self.table_file,
            template: &self.pool.template,
            drain_seconds: self.options.drain_seconds,
            role_log: &self.options.role_log,
            events: &self.events,
        }
    }

    /// Drains and stops everything; connection servers last.
    async fn stop(mut self) {
        self.events.clear();
        self.events.say(format!(
            "stopping: live sessions may go on for {} s (Ctrl-C again: at once)",
            self.options.drain_seconds
        ));
        for server in self.servers.values_mut() {
            server.stop();
        }
        for server in std::mem::take(&mut self.servers).into_values() {
            server.stopped().await;
        }
        for server in std::mem::take(&mut self.connection_servers) {
            server.stop().await;
        }
        self.events.say("stopped");
    }
}

/// The plan for a pool of which there is nothing yet.
fn plan_first(pool: &ValidPool) -> Plan {
    let nothing = Observed {
        uid: UID,
        table: None,
        generation: 0,
        servers: &[],
    };
    plan(pool, &nothing, Timestamp::now(), Duration::ZERO)
}

/// Address of the processing server in `slot`: 127.0.0.2 and up.
fn server_address(slot: u32) -> IpAddr {
    Ipv4Addr::from(u32::from(Ipv4Addr::LOCALHOST) + 1 + slot).into()
}

/// Address of a connection server: 127.0.0.1, then 127.0.255.1 and up.
fn connection_address(index: u32) -> IpAddr {
    match index {
        0 => Ipv4Addr::LOCALHOST.into(),
        _ => Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 0, 255, 0)) + index).into(),
    }
}

fn modified(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file)
        .and_then(|metadata| metadata.modified())
        .ok()
}

/// A folder that is removed at the end.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("portpool-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // What cannot be removed is a few kilobytes in the temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
