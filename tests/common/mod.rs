//! What tests share: pools whose roles are processes on their own loopback
//! addresses, tables, and a real API server.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

pub mod cluster;
pub mod faulty;
pub mod helm;
pub mod network;
pub mod proxy;
pub mod table;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use portpool::client::{Client, ClientError};
use portpool::follow::write_table;
use portpool::pool::Sessions;
use portpool::session::{PoolState, Session, SessionRequest};
use portpool::table::{Row, Table};

/// Longest that anything may take here.
pub const SOON: Duration = Duration::from_secs(20);

/// The number of ports of each server, and the first of them.
pub const COUNT: u16 = 4;
pub const SERVER_PORT: u16 = 7000;

/// Compares the committed file `path` with `expected`, or writes it when
/// `BLESS` is set.
pub fn agree(path: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all(path.parent().expect("has a parent")).unwrap();
        std::fs::write(&path, expected).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "{} is out of date: run `make generate` and review the diff",
        path.display()
    );
}

/// The turn of a test that loads the machine or measures short times. Such
/// tests run one after another, whichever parts they belong to.
pub async fn turn() -> tokio::sync::MutexGuard<'static, ()> {
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    TURN.lock().await
}

/// A program that is killed with the test.
pub struct Process(Child);

impl Process {
    pub fn start(arguments: &[String]) -> Self {
        Self::start_with(arguments, &[])
    }

    pub fn start_with(arguments: &[String], environment: &[(&str, &str)]) -> Self {
        Self::spawn(arguments, environment, Stdio::inherit())
    }

    pub fn spawn(arguments: &[String], environment: &[(&str, &str)], log_to: Stdio) -> Self {
        let log = std::env::var("PORTPOOL_TEST_LOG")
            .unwrap_or_else(|_| "warn,kube_client=error".to_owned());
        let child = Command::new(env!("CARGO_BIN_EXE_portpool"))
            .args(arguments)
            .env("PORTPOOL_LOG", log)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(log_to)
            .spawn()
            .unwrap();
        Self(child)
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) {
        self.0.wait().unwrap();
    }

    /// Waits until the process ends by itself; returns whether it succeeded.
    pub fn ends(&mut self) -> bool {
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("process {} does not end", self.id());
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// The number of open descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id()))
            .unwrap()
            .count()
    }

    /// Sends SIGKILL and waits for the end of the process.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl From<Command> for Process {
    fn from(mut command: Command) -> Self {
        Self(command.spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pool of real processes.
pub struct Pool {
    folder: tempfile::TempDir,
    network: [u8; 3],
    pub table: Table,
    pub connection_servers: Vec<Process>,
    pub agents: Vec<Process>,
    pub workloads: Vec<Process>,
}

impl Pool {
    /// Writes a table for `servers` servers, which `change` may alter. No process
    /// runs yet.
    pub fn new(servers: u32, change: impl FnOnce(&mut Table)) -> Self {
        let network = network::network();
        let mut pool = Self {
            folder: tempfile::tempdir().unwrap(),
            network,
            table: table::table(
                Sessions {
                    linger_seconds: 0,
                    ..Sessions::default()
                },
                Vec::new(),
            ),
            connection_servers: Vec::new(),
            agents: Vec::new(),
            workloads: Vec::new(),
        };
        pool.table.rows = (0..servers).map(|slot| pool.row(slot)).collect();
        change(&mut pool.table);
        pool.publish();
        pool
    }

    /// Starts everything and waits until every port is free.
    pub async fn running(servers: u32, change: impl FnOnce(&mut Table)) -> Self {
        let mut pool = Self::new(servers, change);
        for slot in 0..servers {
            pool.start_workload(slot);
            pool.start_agent(slot);
        }
        pool.start_connection_server(0);
        let ports = servers * u32::from(COUNT);
        pool.until(|state| state.free_ports == ports).await;
        pool
    }

    pub fn row(&self, slot: u32) -> Row {
        let first = 20_000 + u16::try_from(slot).unwrap() * COUNT;
        let range = table::range(first, SERVER_PORT, COUNT);
        table::row(slot, Some(self.server_address(slot)), range)
    }

    pub fn publish(&self) {
        write_table(&self.table_file(), &self.table).unwrap();
    }

    pub fn table_file(&self) -> PathBuf {
        self.folder.path().join("table.json")
    }

    fn address(&self, host: u32) -> IpAddr {
        network::address(self.network, u8::try_from(host).unwrap())
    }

    pub fn server_address(&self, slot: u32) -> IpAddr {
        self.address(10 + slot)
    }

    pub fn connection_address(&self, index: u32) -> IpAddr {
        self.address(1 + index)
    }

    pub fn start_workload(&mut self, slot: u32) {
        // Two more are for a second entry.
        let last = SERVER_PORT + COUNT + 1;
        self.workloads.push(Process::start(&[
            "echo".to_owned(),
            format!("--listen={}", self.server_address(slot)),
            format!("--ports={SERVER_PORT}-{last}"),
        ]));
    }

    pub fn start_agent(&mut self, slot: u32) {
        let agent = Process::start(&self.agent_arguments(slot));
        self.agents.push(agent);
    }

    pub fn agent_arguments(&self, slot: u32) -> Vec<String> {
        let address = self.server_address(slot);
        vec![
            "processing-server".to_owned(),
            format!("--table={}", self.table_file().display()),
            format!("--slot={slot}"),
            format!("--address={address}"),
            "--listen-scope=address".to_owned(),
            format!("--admin={address}:7071"),
            format!("--api={address}:7072"),
            format!(
                "--state-file={}",
                self.folder.path().join(format!("agent-{slot}")).display()
            ),
        ]
    }

    pub fn start_connection_server(&mut self, index: u32) {
        let arguments = self.connection_server_arguments(index);
        self.connection_servers.push(Process::start(&arguments));
    }

    fn connection_server_arguments(&self, index: u32) -> Vec<String> {
        let address = self.connection_address(index);
        vec![
            "connection-server".to_owned(),
            format!("--table={}", self.table_file().display()),
            format!("--listen={address}"),
            format!("--admin={address}:7701"),
        ]
    }

    /// Starts a connection server that logs at level info to the returned file.
    pub fn start_logging_connection_server(&mut self, index: u32, format: &str) -> PathBuf {
        let mut arguments = self.connection_server_arguments(index);
        arguments.push(format!("--log-format={format}"));
        let path = self.folder.path().join(format!("log-{index}"));
        let file = std::fs::File::create(&path).unwrap();
        let process = Process::spawn(&arguments, &[("PORTPOOL_LOG", "info")], file.into());
        self.connection_servers.push(process);
        path
    }

    /// Starts a connection server that takes over from the one before it.
    pub fn start_successor(&self, index: u32) -> Process {
        self.start_successor_with(index, &[])
    }

    /// Starts a successor with further arguments.
    pub fn start_successor_with(&self, index: u32, further: &[&str]) -> Process {
        let mut arguments = self.connection_server_arguments(index);
        arguments.extend(further.iter().map(|&argument| argument.to_owned()));
        arguments.push(format!(
            "--handover={}",
            self.handover_socket(index).display()
        ));
        Process::start(&arguments)
    }

    pub fn handover_socket(&self, index: u32) -> PathBuf {
        self.folder.path().join(format!("handover-{index}"))
    }

    pub fn client(&self) -> Client {
        self.client_of(0)
    }

    pub fn client_of(&self, index: u32) -> Client {
        Client::new(&format!("{}:7700", self.connection_address(index))).unwrap()
    }

    pub async fn request(&self) -> Result<Session, ClientError> {
        self.client().request(SessionRequest::default()).await
    }

    /// Waits until the state that the first connection server reports `holds`;
    /// returns how long that took.
    pub async fn until(&self, holds: impl Fn(&PoolState) -> bool) -> Duration {
        self.until_of(0, holds).await
    }

    pub async fn until_of(&self, index: u32, holds: impl Fn(&PoolState) -> bool) -> Duration {
        let (started, client) = (Instant::now(), self.client_of(index));
        let mut last = None;
        while started.elapsed() < SOON {
            if let Ok(state) = client.pool().await {
                if holds(&state) {
                    return started.elapsed();
                }
                last = Some(state);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the pool is not as expected in time; last seen: {last:#?}");
    }
}

/// Connects to a session's port.
pub fn connect(session: &Session) -> TcpStream {
    let stream = TcpStream::connect((session.address.as_str(), session.port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// The whole answer to `GET path` on an admin port or a load-sharing port.
pub fn get(address: IpAddr, port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect((address, port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Waits until the metrics of the admin port have `line`.
pub fn until_metric(address: IpAddr, port: u16, line: &str) {
    let deadline = Instant::now() + SOON;
    loop {
        let metrics = get(address, port, "/metrics");
        if metrics.lines().any(|found| found == line) {
            return;
        }
        assert!(Instant::now() < deadline, "no {line}: {metrics}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a message and expects it back.
pub fn echo(stream: &mut TcpStream, message: &str) {
    stream.write_all(message.as_bytes()).unwrap();
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, message.as_bytes());
}

/// Whether the peer ends or resets the connection soon. `false` if it sends
/// bytes or does nothing.
pub fn is_cut(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(SOON)).unwrap();
    match stream.read(&mut [0]) {
        Ok(length) => length == 0,
        Err(error) => match error.kind() {
            ErrorKind::ConnectionReset => true,
            // A time-out is one of these, depending on the system.
            ErrorKind::WouldBlock | ErrorKind::TimedOut => false,
            _ => panic!("neither an end nor a time-out: {error}"),
        },
    }
}
