//! The proxy under test: portpool, HAProxy or nginx as a process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use portpool::follow::write_table;
use portpool::pool::{Admission, PortProtocol, Sessions};
use portpool::table::Table;

use crate::network::{address, network};
use crate::{SOON, tables, until};

/// First connection port, and the server port that it leads to; further ones
/// go in step.
pub const FIRST: u16 = 20_000;
pub const SERVER: u16 = 7000;

/// An address block for every test of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Portpool,
    Haproxy,
    Nginx,
}

impl Target {
    pub fn chosen() -> Self {
        match std::env::var("PORTPOOL_TEST_TARGET").as_deref() {
            Err(_) | Ok("portpool") => Self::Portpool,
            Ok("haproxy") => Self::Haproxy,
            Ok("nginx") => Self::Nginx,
            Ok(other) => panic!("PORTPOOL_TEST_TARGET is {other}: portpool, haproxy or nginx"),
        }
    }
}

/// Says that a test does not apply; `make robustness` collects it.
pub fn not_applicable(test: &str, reason: &str) {
    eprintln!("SKIPPED {test}: {reason}");
    if let Ok(file) = std::env::var("PORTPOOL_TEST_SKIPPED") {
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(file)
            .unwrap();
        writeln!(file, "{test}\t{reason}").unwrap();
    }
}

/// Settings of the proxy. A target ignores those that it does not have.
#[derive(Clone, Debug)]
pub struct Setup {
    pub listen: IpAddr,
    pub server: IpAddr,
    pub ports: u16,
    pub has_udp: bool,
    pub connections: Option<u32>,
    pub per_source: Option<u32>,
    pub per_port: Option<u32>,
    pub flows: Option<u32>,
    pub flows_per_source: Option<u32>,
    pub idle_seconds: i32,
    pub udp_idle_seconds: i32,
    pub peer_timeout_seconds: u64,
    /// Data threads; portpool only, the others have one.
    pub threads: usize,
}

impl Setup {
    /// No limits, and long time-outs.
    pub fn plain(listen: IpAddr, server: IpAddr) -> Self {
        Self {
            listen,
            server,
            ports: 4,
            has_udp: false,
            connections: None,
            per_source: None,
            per_port: None,
            flows: None,
            flows_per_source: None,
            idle_seconds: 3600,
            udp_idle_seconds: 60,
            peer_timeout_seconds: 300,
            threads: 1,
        }
    }
}

/// A running proxy. Killed when dropped.
pub struct Proxy {
    pub target: Target,
    pub listen: IpAddr,
    pub server: IpAddr,
    pub table: Arc<Table>,
    child: Child,
    folder: tempfile::TempDir,
    before: Census,
    network: [u8; 3],
}

/// Descriptors by kind, and memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    pub sockets: usize,
    pub pipes: usize,
    pub others: usize,
    pub memory_bytes: u64,
}

/// How much more memory a proxy may have after a test than before: pools and
/// tables that are kept for reuse.
const MEMORY_KEPT: u64 = 24 << 20;

/// Most ends of pipes that portpool keeps for splicing.
const PIPE_ENDS_KEPT: usize = 128;

impl Proxy {
    /// Starts it, ready to forward.
    pub fn start(change: impl FnOnce(&mut Setup)) -> Self {
        let network = network();
        let mut setup = Setup::plain(address(network, 1), address(network, 2));
        change(&mut setup);
        let target = Target::chosen();
        let folder = tempfile::tempdir().unwrap();
        let table = Arc::new(table(&setup));
        let mut command = match target {
            Target::Portpool => portpool(&setup, folder.path(), &table),
            Target::Haproxy => haproxy(&setup, folder.path()),
            Target::Nginx => nginx(&setup, folder.path()),
        };
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut proxy = Self {
            target,
            listen: setup.listen,
            server: setup.server,
            table,
            child,
            folder,
            before: Census {
                sockets: 0,
                pipes: 0,
                others: 0,
                memory_bytes: 0,
            },
            network,
        };
        proxy.warm_up();
        proxy
    }

    /// Makes one connection, so that the proxy allocates what it needs only once.
    fn warm_up(&mut self) {
        let listener = self.listener(0);
        listener.set_nonblocking(true).unwrap();
        until("the proxy forwards", || {
            assert!(self.child.try_wait().unwrap().is_none(), "it has stopped");
            // It may be refused: ports are open before their sessions are known.
            let client = TcpStream::connect(self.port(0));
            std::thread::sleep(Duration::from_millis(20));
            client.is_ok() && listener.accept().is_ok()
        });
        drop(listener);
        self.settle();
        self.before = self.census();
    }

    /// Waits until the number of sockets stays the same for a while.
    fn settle(&self) {
        let (mut last, mut same) = (0, 0);
        until("descriptors settle", || {
            let now = self.census().sockets;
            same = if now == last { same + 1 } else { 0 };
            last = now;
            std::thread::sleep(Duration::from_millis(20));
            same >= 15
        });
    }

    pub fn port(&self, index: u16) -> SocketAddr {
        SocketAddr::new(self.listen, FIRST + index)
    }

    /// Another address of this test's network.
    pub fn address(&self, host: u8) -> IpAddr {
        address(self.network, host)
    }

    pub fn id(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.id(), signal).unwrap();
    }

    pub fn listener(&self, index: u16) -> TcpListener {
        let listener = TcpListener::bind((self.server, SERVER + index)).unwrap();
        // Accepting waits no longer either.
        let socket = socket2::SockRef::from(&listener);
        socket.set_read_timeout(Some(SOON)).unwrap();
        listener
    }

    pub fn connect(&self, index: u16) -> TcpStream {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(self.port(index)),
            socket2::Type::STREAM,
            None,
        )
        .unwrap();
        self.finish_connecting(&socket, index);
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.into()
    }

    /// A connection from an address of this test's network.
    pub fn connect_from(&self, host: u8, index: u16) -> TcpStream {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let from = SocketAddr::new(self.address(host), 0);
        socket.bind(&from.into()).unwrap();
        self.finish_connecting(&socket, index);
        socket.into()
    }

    /// A client may be refused while it still connects; it is returned as one
    /// that was reset.
    fn finish_connecting(&self, socket: &socket2::Socket, index: u16) {
        match socket.connect(&self.port(index).into()) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("connection port {index}: {error}"),
        }
    }

    /// The same, not connected yet.
    pub fn start_connecting(&self, host: u8, index: u16) -> TcpStream {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let from = SocketAddr::new(self.address(host), 0);
        socket.bind(&from.into()).unwrap();
        socket.set_nonblocking(true).unwrap();
        // It is in progress.
        let _ = socket.connect(&self.port(index).into());
        socket.into()
    }

    /// A client and its server's end, through port `index`.
    pub fn pair(&self, index: u16) -> (TcpStream, TcpStream) {
        let listener = self.listener(index);
        let client = self.connect(index);
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(SOON)).unwrap();
        (client, server)
    }

    pub fn udp_client(&self, host: u8, index: u16) -> UdpSocket {
        let socket = UdpSocket::bind((self.address(host), 0)).unwrap();
        socket.connect(self.port(index)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket
    }

    pub fn udp_server(&self, index: u16) -> UdpSocket {
        let socket = UdpSocket::bind((self.server, SERVER + index)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket
    }

    pub fn census(&self) -> Census {
        let id = self.id().as_raw_nonzero();
        let mut census = Census {
            sockets: 0,
            pipes: 0,
            others: 0,
            memory_bytes: 0,
        };
        for entry in fs::read_dir(format!("/proc/{id}/fd")).unwrap().flatten() {
            // It may be closed by now.
            let kind = fs::read_link(entry.path()).unwrap_or_default();
            match kind.to_string_lossy() {
                kind if kind.starts_with("socket:") => census.sockets += 1,
                kind if kind.starts_with("pipe:") => census.pipes += 1,
                kind if kind.is_empty() => {}
                _ => census.others += 1,
            }
        }
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = memory.unwrap().trim().trim_end_matches(" kB");
        census.memory_bytes = 1024 * kilobytes.parse::<u64>().unwrap();
        census
    }

    /// Processor time so far.
    pub fn processor_time(&self) -> Duration {
        let id = self.id().as_raw_nonzero();
        let tasks = fs::read_dir(format!("/proc/{id}/task")).unwrap().flatten();
        let times = tasks.filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok());
        let nanoseconds = times.map(|text| {
            let first = text.split_whitespace().next().unwrap();
            first.parse::<u64>().unwrap()
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    /// The least processor time of a few rounds: other programs disturb some.
    pub fn least_cost(&self, mut round: impl FnMut()) -> Duration {
        let costs = (0..4).map(|_| {
            let before = self.processor_time();
            round();
            self.processor_time() - before
        });
        costs.min().unwrap()
    }

    /// Asserts that rounds of `count` clients cost as much at the end as before.
    /// A cost that grows with each client would be seven times as high by then;
    /// one wake-up for each client costs up to three times as much as a batch.
    pub fn expect_constant_cost(&self, count: u32, mut round: impl FnMut()) {
        round();
        let first = self.least_cost(&mut round);
        for _ in 0..20 {
            round();
        }
        let last = self.least_cost(&mut round);
        println!("{:?} each, {:?} at the end", first / count, last / count);
        assert!(last < first * 5, "{first:?}, then {last:?}");
    }

    /// All metrics by name with labels; portpool only.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let mut stream = TcpStream::connect((self.listen, 7701)).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let sample = |line: &str| {
            let (name, value) = line.trim().rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        text.lines().filter_map(sample).collect()
    }

    /// Clients refused or not connected for `cause`; portpool only.
    pub fn refused(&self, cause: &str) -> f64 {
        self.metric(&format!("portpool_refused_total{{cause=\"{cause}\"}}"))
    }

    pub fn metric(&self, name: &str) -> f64 {
        let metrics = self.metrics();
        *metrics
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in {metrics:#?}"))
    }

    /// Asserts `cause` to count at least `least`; true of other targets.
    pub fn counts(&self, cause: &str, least: f64) {
        if self.target == Target::Portpool {
            until(cause, || self.refused(cause) >= least);
        }
    }

    /// Ends a test: all its clients and servers are gone, and the proxy must
    /// hold no more than before.
    pub fn expect_clean(self) {
        self.expect_clean_within(MEMORY_KEPT);
    }

    pub fn expect_clean_within(mut self, memory: u64) {
        let before = self.before.clone();
        until("descriptors are as before", || {
            let now = self.census();
            now.sockets <= before.sockets && now.others <= before.others
        });
        let now = self.census();
        let grown = now.memory_bytes.saturating_sub(before.memory_bytes);
        assert!(grown <= memory, "memory has grown by {grown} bytes");
        assert!(self.child.try_wait().unwrap().is_none(), "it has stopped");
        if self.target == Target::Portpool {
            assert!(now.pipes <= before.pipes + PIPE_ENDS_KEPT, "{now:?}");
            for transport in ["tcp", "udp"] {
                let live = format!("portpool_flows{{transport=\"{transport}\"}}");
                until("no flow is left", || self.metric(&live) == 0.0);
            }
            let metrics = self.metrics();
            let opened: f64 = ["tcp", "udp"]
                .map(|transport| {
                    metrics[&format!("portpool_flows_opened_total{{transport=\"{transport}\"}}")]
                })
                .iter()
                .sum();
            let ended = metrics["portpool_flows_ended_total{cause=\"all\"}"];
            assert_eq!(opened, ended, "every flow is reported as ended, once");
        }
    }

    /// Has portpool follow another table.
    pub fn publish(&mut self, change: impl FnOnce(&mut Table)) {
        let mut table = (*self.table).clone();
        change(&mut table);
        table.generation += 1;
        write_table(&self.folder.path().join("table.json"), &table).unwrap();
        self.table = Arc::new(table);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn table(setup: &Setup) -> Table {
    let sessions = Sessions {
        admission: Admission::Open,
        idle_timeout_seconds: setup.idle_seconds,
        udp_idle_timeout_seconds: setup.udp_idle_seconds,
        ..Sessions::default()
    };
    let mut range = tables::range(FIRST, SERVER, setup.ports);
    if !setup.has_udp {
        range.protocol = PortProtocol::TCP;
    }
    tables::table(sessions, vec![tables::row(0, Some(setup.server), range)])
}

pub fn portpool(setup: &Setup, folder: &std::path::Path, table: &Table) -> Command {
    let file = folder.join("table.json");
    write_table(&file, table).unwrap();
    let admin = SocketAddr::new(setup.listen, 7701);
    let mut command = Command::new(env!("CARGO_BIN_EXE_portpool"));
    let log = std::env::var("PORTPOOL_TEST_LOG").unwrap_or_else(|_| "error".to_owned());
    command
        .env("PORTPOOL_LOG", log)
        .arg("connection-server")
        .arg(format!("--table={}", file.display()))
        .arg(format!("--listen={}", setup.listen))
        .arg(format!("--admin={admin}"))
        .arg(format!("--data-threads={}", setup.threads))
        .arg(format!(
            "--peer-timeout-seconds={}",
            setup.peer_timeout_seconds
        ));
    for (flag, value) in [
        ("max-connections", setup.connections),
        ("max-connections-per-source", setup.per_source),
        ("max-connections-per-port", setup.per_port),
        ("max-udp-flows", setup.flows),
        ("max-udp-flows-per-source", setup.flows_per_source),
    ] {
        if let Some(value) = value {
            command.arg(format!("--{flag}={value}"));
        }
    }
    command
}

/// Splicing is on: it is what moves most bytes.
fn haproxy(setup: &Setup, folder: &std::path::Path) -> Command {
    let (listen, server, last) = (setup.listen, setup.server, FIRST + setup.ports - 1);
    let (idle, peer) = (setup.idle_seconds, setup.peer_timeout_seconds);
    let probe = (peer / 2).max(1);
    let maximum = setup.connections.unwrap_or(4000);
    let mut frontend = format!("  bind {listen}:{FIRST}-{last} tcp-ut {peer}s\n");
    let mut tables = String::new();
    for (number, name, key, most) in [
        (0, "source", "src", setup.per_source),
        (1, "port", "dst_port", setup.per_port),
    ] {
        if let Some(most) = most {
            let kind = if name == "source" { "ip" } else { "integer" };
            writeln!(
                frontend,
                "  tcp-request connection track-sc{number} {key} table {name}\n  tcp-request connection reject if {{ sc{number}_conn_cur gt {most} }}"
            )
            .unwrap();
            writeln!(
                tables,
                "backend {name}\n  stick-table type {kind} size 100k store conn_cur"
            )
            .unwrap();
        }
    }
    let text = format!(
        "global\n  maxconn {maximum}\n  nbthread 1\n\
         defaults\n  mode tcp\n  retries 0\n  timeout connect 3s\n  timeout client {idle}s\n  timeout server {idle}s\n\
         \x20 option splice-request\n  option splice-response\n\
         \x20 option clitcpka\n  clitcpka-idle {probe}s\n  clitcpka-intvl 1s\n  clitcpka-cnt 2\n\
         \x20 option srvtcpka\n  srvtcpka-idle {probe}s\n  srvtcpka-intvl 1s\n  srvtcpka-cnt 2\n\
         frontend in\n{frontend}  default_backend out\n\
         backend out\n  server one {server}:-{} tcp-ut {peer}s\n{tables}",
        FIRST - SERVER
    );
    let file = folder.join("haproxy.cfg");
    fs::write(&file, text).unwrap();
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-q").arg("-f").arg(file);
    command
}

/// Half-closing is on: it is off by default and loses answers.
fn nginx(setup: &Setup, folder: &std::path::Path) -> Command {
    let (listen, server, last) = (setup.listen, setup.server, FIRST + setup.ports - 1);
    let probe = (setup.peer_timeout_seconds / 2).max(1);
    let mut text = String::new();
    // It counts listeners and both sides of a connection.
    let connections = setup
        .connections
        .or(setup.flows)
        .map_or(8000, |most| 2 * most);
    let connections = connections + 2 * u32::from(setup.ports) + 8;
    let folder = folder.display();
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    writeln!(
        text,
        "load_module {module};\ndaemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/log error;\n\
         worker_rlimit_nofile 20000;\nevents {{ worker_connections {connections}; multi_accept on; }}\nstream {{\n\
         proxy_connect_timeout 3s;\nproxy_half_close on;\nproxy_socket_keepalive on;\nproxy_buffer_size 64k;\ntcp_nodelay on;\n\
         map $server_port $target {{"
    )
    .unwrap();
    for index in 0..setup.ports {
        writeln!(text, "{} {server}:{};", FIRST + index, SERVER + index).unwrap();
    }
    writeln!(text, "}}").unwrap();
    let mut limits = [String::new(), String::new()];
    for (name, key, most) in [
        (
            "source",
            "$binary_remote_addr",
            [setup.per_source, setup.flows_per_source],
        ),
        ("port", "$server_port", [setup.per_port, None]),
    ] {
        writeln!(text, "limit_conn_zone {key} zone={name}:1m;").unwrap();
        for (limits, most) in limits.iter_mut().zip(most) {
            if let Some(most) = most {
                write!(limits, "limit_conn {name} {most};").unwrap();
            }
        }
    }
    let [tcp, udp] = limits;
    let (idle, udp_idle) = (setup.idle_seconds, setup.udp_idle_seconds);
    writeln!(
        text,
        "server {{ listen {listen}:{FIRST}-{last} backlog=4096 so_keepalive={probe}s:1s:2; proxy_timeout {idle}s; {tcp} proxy_pass $target; }}"
    )
    .unwrap();
    if setup.has_udp {
        writeln!(
            text,
            "server {{ listen {listen}:{FIRST}-{last} udp; proxy_timeout {udp_idle}s; {udp} proxy_pass $target; }}"
        )
        .unwrap();
    }
    writeln!(text, "}}").unwrap();
    let file = format!("{folder}/nginx.conf");
    fs::write(&file, text).unwrap();
    let mut command = Command::new("nginx");
    command
        .arg("-e")
        .arg(format!("{folder}/log"))
        .arg("-c")
        .arg(file);
    command
}
