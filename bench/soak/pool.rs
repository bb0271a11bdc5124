//! A pool of real processes on loopback addresses of its own.

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use portpool::follow::write_table;
use portpool::pool::Sessions;
use portpool::table::{Row, Table};

use crate::tables;

/// Servers that exist from start to end.
pub const SERVERS: u32 = 4;
pub const CONNECTION_SERVERS: u32 = 2;
/// Ports of each server.
pub const PORTS: u16 = 8;
const SERVER_PORT: u16 = 7_000;

/// A program that is killed with the pool.
pub struct Process(Child);

impl Process {
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The table and every process. Slot `SERVERS` comes and goes.
pub struct Pool {
    program: PathBuf,
    /// Log filter of the processes.
    log: String,
    folder: tempfile::TempDir,
    network: u8,
    pub table: Table,
    pub connection_servers: Vec<Option<Process>>,
    pub agents: Vec<Option<Process>>,
    pub workloads: Vec<Option<Process>>,
}

impl Pool {
    pub fn start(program: &Path, log: &str) -> io::Result<Self> {
        let sessions = Sessions {
            linger_seconds: 0,
            udp_idle_timeout_seconds: 2,
            ..Sessions::default()
        };
        let mut pool = Self {
            program: program.to_owned(),
            log: log.to_owned(),
            folder: tempfile::Builder::new()
                .prefix("portpool-soak-")
                .tempdir()?,
            network: (std::process::id() % 250) as u8,
            table: tables::table(sessions, Vec::new()),
            connection_servers: Vec::new(),
            agents: Vec::new(),
            workloads: Vec::new(),
        };
        pool.table.rows = (0..SERVERS).map(|slot| pool.row(slot)).collect();
        pool.publish()?;
        for slot in 0..=SERVERS {
            pool.workloads.push(None);
            pool.agents.push(None);
            if slot < SERVERS {
                pool.start_workload(slot)?;
                pool.start_agent(slot)?;
            }
        }
        for index in 0..CONNECTION_SERVERS {
            pool.connection_servers.push(None);
            pool.start_connection_server(index)?;
        }
        Ok(pool)
    }

    pub fn row(&self, slot: u32) -> Row {
        let first = 20_000 + slot as u16 * PORTS;
        let range = tables::range(first, SERVER_PORT, PORTS);
        tables::row(slot, Some(self.server_address(slot)), range)
    }

    /// The next generation of the table.
    pub fn change(&mut self, change: impl FnOnce(&mut Table)) -> io::Result<()> {
        change(&mut self.table);
        self.table.generation += 1;
        self.publish()
    }

    fn publish(&self) -> io::Result<()> {
        write_table(&self.table_file(), &self.table)
    }

    fn table_file(&self) -> PathBuf {
        self.folder.path().join("table.json")
    }

    fn address(&self, host: u32) -> IpAddr {
        Ipv4Addr::new(127, 77, self.network, host as u8).into()
    }

    fn server_address(&self, slot: u32) -> IpAddr {
        self.address(10 + slot)
    }

    /// Load-sharing port of a connection server.
    pub fn load_sharing(&self, index: u32) -> String {
        format!("{}:7700", self.address(1 + index))
    }

    pub fn start_workload(&mut self, slot: u32) -> io::Result<()> {
        let ports = format!("--ports={SERVER_PORT}-{}", SERVER_PORT + PORTS - 1);
        let listen = format!("--listen={}", self.server_address(slot));
        let process = self.spawn(
            &format!("workload-{slot}"),
            &["echo".to_owned(), listen, ports],
        )?;
        self.workloads[slot as usize] = Some(process);
        Ok(())
    }

    pub fn start_agent(&mut self, slot: u32) -> io::Result<()> {
        let address = self.server_address(slot);
        let name = format!("agent-{slot}");
        let state = self.folder.path().join(format!("{name}.state"));
        let process = self.spawn(
            &name,
            &[
                "processing-server".to_owned(),
                format!("--table={}", self.table_file().display()),
                format!("--slot={slot}"),
                format!("--address={address}"),
                "--listen-scope=address".to_owned(),
                format!("--admin={address}:7071"),
                format!("--state-file={}", state.display()),
            ],
        )?;
        self.agents[slot as usize] = Some(process);
        Ok(())
    }

    pub fn start_connection_server(&mut self, index: u32) -> io::Result<()> {
        let address = self.address(1 + index);
        let process = self.spawn(
            &format!("connection-server-{index}"),
            &[
                "connection-server".to_owned(),
                format!("--table={}", self.table_file().display()),
                format!("--listen={address}"),
                format!("--admin={address}:7701"),
            ],
        )?;
        self.connection_servers[index as usize] = Some(process);
        Ok(())
    }

    /// Notes a fault in a log beside those of the processes.
    pub fn note(&self, what: &str) -> io::Result<()> {
        let mut file = self.log_file("faults")?;
        writeln!(file, "{} {what}", jiff::Timestamp::now())
    }

    /// Keeps the logs; returns their folder.
    pub fn keep_logs(&mut self) -> &Path {
        self.folder.disable_cleanup(true);
        self.folder.path()
    }

    fn log_file(&self, name: &str) -> io::Result<fs::File> {
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("{name}.log")))
    }

    /// Starts a process. Processes of the same `name` log to the same file.
    fn spawn(&self, name: &str, arguments: &[String]) -> io::Result<Process> {
        let log = self.log_file(name)?;
        let mut command = Command::new(&self.program);
        command.args(arguments).env("PORTPOOL_LOG", &self.log);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // Ctrl-C is for the soak itself, which ends them.
        command.process_group(0);
        command.spawn().map(Process).map_err(|error| {
            io::Error::other(format!(
                "failed to start {}: {error}",
                self.program.display()
            ))
        })
    }
}
