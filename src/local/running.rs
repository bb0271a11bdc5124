//! The running pool: the work of the operator in a cluster, in steps of a loop.
//! It owns the processes of the servers and the file of the table, and applies a
//! changed manifest. The plan decides which servers start and stop.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;

use super::addresses::Addresses;
use super::child::{Program, Supervised};
use super::events::Events;
use super::ignored::ignored;
use super::readiness::{Place, ask_kernel, works};
use super::server::{self, Server};
use super::{Options, check};
use crate::client::Client;
use crate::follow::write_table;
use crate::manifest::{self, Manifest};
use crate::plan::{FieldProblem, Observed, ObservedServer, Plan, ValidPool, plan};
use crate::pool::{CONNECTION_ADMIN_PORT, EntryAdmission};
use crate::session::PoolState;
use crate::table::{Slot, Table};

/// Uid of the pool, which a cluster would assign.
const UID: &str = "local";

/// The running pool.
pub(super) struct Running {
    options: Options,
    addresses: Addresses,
    binary: PathBuf,
    folder: PathBuf,
    table_file: PathBuf,
    modified: Option<SystemTime>,
    pool: ValidPool,
    table: Option<Table>,
    servers: BTreeMap<Slot, Server>,
    connection_servers: Vec<Supervised>,
    client: Client,
    events: Events,
    /// The last line about sessions.
    summary: String,
    /// Why the table could not be written the last time, if it could not.
    write_failure: Option<String>,
    /// The fields of the manifest that were reported as ignored.
    ignored: Vec<String>,
}

impl Running {
    /// A pool that does not run yet. `folder` is for its table and its sockets.
    pub(super) fn new(
        options: Options,
        manifest: &Manifest,
        addresses: Addresses,
        (binary, folder): (PathBuf, PathBuf),
    ) -> Self {
        let pool = with_drain_limit(manifest.pool.clone(), &options);
        let load_sharing = SocketAddr::new(addresses.connection(0), pool.load_sharing_port);
        Self {
            modified: modified(&options.file),
            addresses,
            binary,
            table_file: folder.join("table.json"),
            folder,
            pool,
            table: None,
            servers: BTreeMap::new(),
            connection_servers: Vec::new(),
            client: Client::new(&load_sharing.to_string()).expect("the address is well-formed"),
            events: Events::new(!options.no_live),
            summary: String::new(),
            write_failure: None,
            ignored: ignored(manifest.fields()),
            options,
        }
    }

    /// Starts everything.
    pub(super) fn start(&mut self) -> io::Result<()> {
        self.say_ignored();
        if self.addresses.is_further() {
            self.events.say(format!(
                "another pool runs on this machine: the processing servers of this one have addresses from {} on",
                self.addresses.server(Slot(0))
            ));
        }
        self.apply(plan_first(&self.pool))?;
        for index in 0..self.pool.connection_servers {
            let server = self.connection_server(index);
            self.connection_servers.push(server);
        }
        for index in 0..self.pool.connection_servers {
            let (address, port) = (
                self.addresses.connection(index),
                self.pool.load_sharing_port,
            );
            let admin = self.addresses.admin(index);
            self.events.say(format!(
                "load-sharing port: http://{address}:{port}  (admin: http://{admin}:{CONNECTION_ADMIN_PORT})"
            ));
        }
        let (address, port) = (self.addresses.connection(0), self.pool.load_sharing_port);
        if let Some(options) = client_options(&self.pool) {
            self.events
                .say(format!("try: portpool connect {address}:{port}{options}"));
        }
        Ok(())
    }

    /// Names the fields of the manifest that are ignored here.
    fn say_ignored(&self) {
        if let Some(line) = ignored_line(&self.ignored) {
            self.events.say(line);
        }
    }

    fn connection_server(&self, index: u32) -> Supervised {
        let (address, admin) = (
            self.addresses.connection(index),
            self.addresses.admin(index),
        );
        let arguments = [
            "connection-server".to_owned(),
            format!("--table={}", self.table_file.display()),
            format!("--listen={address}"),
            format!("--load-sharing-port={}", self.pool.load_sharing_port),
            format!("--admin={admin}:{CONNECTION_ADMIN_PORT}"),
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
            agent: None,
        };
        Supervised::start(self.binary.clone(), program, self.events.clone())
    }

    /// Replaces the connection servers by this program as it is on disk now.
    pub(super) fn replace_connection_servers(&self) {
        self.events.say("SIGUSR2: connection servers are replaced");
        self.connection_servers.iter().for_each(Supervised::replace);
    }

    /// Observes, plans and applies once. Shows an error; the next step tries again.
    pub(super) async fn step(&mut self) {
        self.reload();
        let state = self.client.pool().await.ok();
        if let Some(state) = &state {
            self.show(state);
        }
        let servers = self.observe(state.as_ref());
        let observed = Observed {
            published: self.table.as_ref(),
            servers: &servers,
            ..Observed::nothing(UID)
        };
        let next = plan(&self.pool, &observed, Timestamp::now());
        // It is tried several times a second, so a failure is said once.
        let failure = self.apply(next).err().map(|error| error.to_string());
        if let Some(error) = &failure
            && failure != self.write_failure
        {
            let file = self.table_file.display();
            self.events.say(format!(
                "failed to write the table {file}: {error}; trying again"
            ));
        }
        self.write_failure = failure;
    }

    /// Applies a changed manifest. A wrong one changes nothing.
    fn reload(&mut self) {
        let modified = modified(&self.options.file);
        if modified == self.modified || modified.is_none() {
            return;
        }
        self.modified = modified;
        let loaded = manifest::load(&self.options.file).and_then(|manifest| {
            let planned = plan_first(&manifest.pool).table;
            let table = self.table.as_ref().unwrap_or(&planned);
            let (current, next) = ((&self.pool, table), (&manifest.pool, &planned));
            check::can_become(current, next, &self.addresses)
                .map_err(|problems| manifest.error(problems))?;
            Ok(manifest)
        });
        match loaded {
            Ok(manifest) => self.change(manifest),
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

    fn change(&mut self, manifest: Manifest) {
        let ignored = ignored(manifest.fields());
        if ignored != self.ignored {
            self.ignored = ignored;
            self.say_ignored();
        }
        let pool = with_drain_limit(manifest.pool, &self.options);
        if pool != self.pool {
            self.events.say(format!(
                "{} changed: {} servers",
                self.options.file.display(),
                pool.replicas
            ));
            self.pool = pool;
        }
    }

    fn show(&mut self, state: &PoolState) {
        let summary = format!(
            "{} sessions, {} ports free, {} requests waiting",
            state.sessions, state.free_ports, state.waiting
        );
        if self.summary != summary {
            self.events.say(&summary);
            self.summary = summary;
        }
        let now = Instant::now();
        for server in &state.servers {
            if let Some(known) = self.servers.get_mut(&server.slot)
                && let Some(table) = &self.table
                && let Some(row) = table.row(server.slot)
                && !known.is_stopping()
            {
                let load_sharing_port = self.pool.load_sharing_port;
                let place = Place {
                    row,
                    address: known.address,
                    is_connection_port: &|port| {
                        port == load_sharing_port || table.has_connection_port(port)
                    },
                };
                let events = known.readiness.observe(server, place, &mut ask_kernel, now);
                events.iter().for_each(|event| self.events.say(event));
            }
        }
        self.events.draw(state);
    }

    fn observe(&mut self, state: Option<&PoolState>) -> Vec<ObservedServer> {
        self.servers.retain(|_, server| !server.has_stopped());
        let pool = &self.pool;
        let observed = self.servers.iter_mut().map(|(&slot, server)| {
            let reported =
                state.and_then(|state| state.servers.iter().find(|reported| reported.slot == slot));
            server.is_spent |= reported.is_some_and(|server| server.spent && server.sessions == 0);
            ObservedServer {
                slot,
                uid: server.uid.clone(),
                address: (!server.is_stopping()).then_some(server.address),
                is_ready: reported.is_some_and(works),
                is_outdated: pool.template.as_ref() != Ok(&server.template)
                    || server.is_too_old(pool),
                is_spent: server.is_spent,
                is_stopping: server.is_stopping(),
                sessions: reported.map(|reported| reported.sessions),
                ranges: server.ranges.clone(),
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
                let reason = server.why_it_stops(&self.pool);
                self.events.say(format!("{} {reason}", server.name));
            }
        }
        Ok(())
    }

    fn start_server(&mut self, slot: Slot) {
        let Some(row) = self.table.as_ref().and_then(|table| table.row(slot)) else {
            return;
        };
        let name = row.server.clone();
        match Server::start(&self.context(), row) {
            Ok(server) => {
                let address = server.address;
                self.events.say(format!("{name} starts at {address}"));
                self.servers.insert(slot, server);
            }
            // The pool was checked before it was applied.
            Err(problems) => {
                for FieldProblem { path, message } in problems {
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
            pool: &self.pool,
            addresses: &self.addresses,
            drain_seconds: self.options.drain_seconds,
            role_log: &self.options.role_log,
            events: &self.events,
        }
    }

    /// Drains and stops all servers, the connection servers last.
    pub(super) async fn stop(mut self) {
        self.events.clear();
        self.events.say(format!(
            "stopping: live sessions may continue for {} s (Ctrl-C again stops at once)",
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
        self.events.flush();
    }
}

/// `pool` with the drain limit of the command line, which replaces that of the
/// manifest.
fn with_drain_limit(pool: ValidPool, options: &Options) -> ValidPool {
    ValidPool {
        drain_limit: Duration::from_secs(options.drain_seconds),
        ..pool
    }
}

/// The options with which `portpool connect` gets a port of `pool`: of the first
/// entry that forwards TCP, else of the first one. No request gets companion ports.
/// `None` while there is no server.
fn client_options(pool: &ValidPool) -> Option<String> {
    if pool.replicas == 0 {
        return None;
    }
    let entries = pool.entries.iter();
    let mut entries = entries.filter(|it| it.admission != Some(EntryAdmission::Companion));
    let is_only = entries.clone().count() == 1;
    let first = entries.clone().next();
    let tcp = entries.find(|entry| entry.protocol.has_tcp());
    let entry = tcp.or(first)?;
    let udp = if tcp.is_some() { "" } else { " --udp" };
    let name = (!is_only).then(|| format!(" --port-name {}", entry.name));
    Some(format!("{udp}{}", name.unwrap_or_default()))
}

/// The first plan for a pool, before anything of it exists.
pub(super) fn plan_first(pool: &ValidPool) -> Plan {
    plan(pool, &Observed::nothing(UID), Timestamp::now())
}

/// A line that names the `ignored` fields of a manifest, if there are any.
pub(super) fn ignored_line(ignored: &[String]) -> Option<String> {
    let fields = ignored.join(", ");
    (!ignored.is_empty()).then(|| format!("ignored here, but not in a cluster: {fields}"))
}

fn modified(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file)
        .and_then(|metadata| metadata.modified())
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_to_try_names_a_port_that_connect_gets() {
        let cases = [
            (1, "{name: a, port: 1000}", Some("")),
            (1, "{name: a, port: 1000, protocol: TCPUDP}", Some("")),
            (1, "{name: a, port: 1000, protocol: UDP}", Some(" --udp")),
            (
                1,
                "{name: a, port: 1000, protocol: UDP}, {name: b, port: 1001}",
                Some(" --port-name b"),
            ),
            (
                1,
                "{name: a, port: 1000, protocol: UDP}, {name: b, port: 1001, protocol: UDP}",
                Some(" --udp --port-name a"),
            ),
            (
                1,
                "{name: a, port: 1000, admission: Companion}, {name: b, port: 1001, protocol: UDP}",
                Some(" --udp"),
            ),
            (0, "{name: a, port: 1000}", None),
        ];
        for (replicas, ports, expected) in cases {
            let text = format!(
                "\
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {{name: t}}
spec:
  replicas: {replicas}
  ports: [{ports}]
  template: {{spec: {{containers: [{{name: a, command: [a]}}]}}}}
"
            );
            let pool = manifest::parse(&text).unwrap();
            assert_eq!(client_options(&pool).as_deref(), expected, "{ports}");
        }
    }
}
