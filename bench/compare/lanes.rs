//! The lanes: no proxy, portpool, and its rivals in the best configuration known
//! for each. `remarks` gives the reasons for the settings.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use portpool::follow::write_table;
use portpool::pool::{Admission, PortProtocol, Sessions};
use portpool::table::{PortRange, Table};
use rustix::process::Signal;

use crate::probe;
use crate::process::{Tree, unprivileged};
use crate::sink;
use crate::tables;

/// First TCP port, the same at proxies and sink.
pub const FIRST: u16 = 20_000;
/// First UDP port, and how many there are.
pub const UDP_FIRST: u16 = 38_000;
pub const UDP_COUNT: u16 = 32;
/// Sessions that every proxy is set up for when it has a thousand ports.
pub const CAPACITY: usize = 4_500;

/// Longest that a proxy may take to start.
const START_LIMIT: Duration = Duration::from_secs(60);

/// The program between generator and sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    Direct,
    Portpool,
    PortpoolBase,
    Haproxy,
    HaproxySplice,
    Nginx,
}

pub const LANES: [Lane; 6] = [
    Lane::Direct,
    Lane::Portpool,
    Lane::PortpoolBase,
    Lane::Haproxy,
    Lane::HaproxySplice,
    Lane::Nginx,
];

impl Lane {
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Portpool => "portpool",
            Self::PortpoolBase => "portpool-base",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy-splice",
            Self::Nginx => "nginx",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        LANES.into_iter().find(|lane| lane.name() == name)
    }

    pub fn is_rival(self) -> bool {
        matches!(self, Self::Haproxy | Self::HaproxySplice | Self::Nginx)
    }

    /// HAProxy has no generic UDP.
    pub fn has_udp(self) -> bool {
        !matches!(self, Self::Haproxy | Self::HaproxySplice)
    }

    pub fn address(self) -> Ipv4Addr {
        match self {
            Self::Direct => sink::ADDRESS,
            lane => Ipv4Addr::new(127, 0, 1, 1 + lane as u8),
        }
    }

    pub fn at(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address().into(), port)
    }
}

/// The setup of a proxy.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// TCP ports from [`FIRST`] on.
    pub ports: u16,
    /// Sessions at a time.
    pub capacity: usize,
    /// Threads or worker processes.
    pub threads: usize,
    /// Whether there are UDP ports too.
    pub udp: bool,
}

/// Programs and the folder for their files.
pub struct Bench {
    pub folder: PathBuf,
    pub portpool: PathBuf,
    pub base: Option<PathBuf>,
    pub haproxy: PathBuf,
    pub nginx: PathBuf,
    /// Processors of the proxies in the pass at hand.
    pub processors: Vec<usize>,
}

/// A running proxy. Ends when dropped.
pub struct Proxy {
    pub lane: Lane,
    pub setup: Setup,
    pub tree: Tree,
    generation: u64,
    folder: PathBuf,
}

impl Proxy {
    /// Starts without waiting.
    pub fn spawn(bench: &Bench, lane: Lane, setup: Setup) -> io::Result<Self> {
        let folder = bench.folder.join(lane.name());
        fs::create_dir_all(&folder)?;
        if crate::process::is_root() {
            std::os::unix::fs::chown(&folder, Some(65534), Some(65534))?;
        }
        let program = match lane {
            Lane::Direct => unreachable!("the direct lane has no proxy"),
            Lane::Portpool => &bench.portpool,
            Lane::PortpoolBase => bench.base.as_ref().expect("only with a base"),
            Lane::Haproxy | Lane::HaproxySplice => &bench.haproxy,
            Lane::Nginx => &bench.nginx,
        };
        let file = configuration_file(lane, &folder);
        configure(lane, &file, setup, 1)?;
        let mut command = unprivileged(program, &bench.processors);
        command.args(arguments(lane, &folder, setup));
        command.env("PORTPOOL_LOG", "error").current_dir(&folder);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(folder.join("stderr"))?);
        Ok(Self {
            lane,
            setup,
            tree: Tree::spawn(&mut command)?,
            generation: 1,
            folder,
        })
    }

    /// Starts and waits until first and last port answer.
    pub fn start(bench: &Bench, lane: Lane, setup: Setup) -> io::Result<Self> {
        let mut proxy = Self::spawn(bench, lane, setup)?;
        let started = Instant::now();
        for port in [FIRST, FIRST + setup.ports - 1] {
            while probe::echoes(lane.at(port)).is_err() {
                proxy.check(started)?;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(proxy)
    }

    /// An error once the proxy has ended or taken too long since `started`.
    pub fn check(&mut self, started: Instant) -> io::Result<()> {
        let why = if self.tree.has_ended() {
            "has ended"
        } else if started.elapsed() > START_LIMIT {
            "does not answer"
        } else {
            return Ok(());
        };
        // nginx writes there once it has read its configuration.
        let output = ["stderr", "error.log"].map(|file| {
            let text = fs::read_to_string(self.folder.join(file)).unwrap_or_default();
            text.lines().last().unwrap_or_default().to_owned()
        });
        let name = self.lane.name();
        Err(io::Error::other(format!(
            "{name} {why}: {}",
            output.join(" ")
        )))
    }

    /// Changes the running proxy to `ports` ports, in its own way.
    pub fn reload(&mut self, ports: u16) -> io::Result<()> {
        self.setup.ports = ports;
        self.generation += 1;
        let file = configuration_file(self.lane, &self.folder);
        configure(self.lane, &file, self.setup, self.generation)?;
        match self.lane {
            // portpool follows the file.
            Lane::Direct | Lane::Portpool | Lane::PortpoolBase => Ok(()),
            Lane::Haproxy | Lane::HaproxySplice => self.tree.signal(Signal::USR2),
            Lane::Nginx => self.tree.signal(Signal::HUP),
        }
    }
}

/// Writes what makes `lane` serve `setup`.
fn configure(lane: Lane, file: &Path, setup: Setup, generation: u64) -> io::Result<()> {
    match lane {
        Lane::Direct => Ok(()),
        Lane::Portpool | Lane::PortpoolBase => write_table(file, &table(setup, generation)),
        Lane::Haproxy | Lane::HaproxySplice | Lane::Nginx => {
            // Not half a file, should the proxy read it at its own time.
            let draft = file.with_extension("draft");
            fs::write(&draft, configuration(lane, setup))?;
            fs::rename(draft, file)
        }
    }
}

fn configuration_file(lane: Lane, folder: &Path) -> PathBuf {
    folder.join(match lane {
        Lane::Haproxy | Lane::HaproxySplice => "haproxy.cfg",
        Lane::Nginx => "nginx.conf",
        Lane::Direct | Lane::Portpool | Lane::PortpoolBase => "table.json",
    })
}

/// Command line of a lane.
pub fn arguments(lane: Lane, folder: &Path, setup: Setup) -> Vec<String> {
    let file = configuration_file(lane, folder).display().to_string();
    match lane {
        Lane::Direct => Vec::new(),
        Lane::Portpool | Lane::PortpoolBase => {
            let address = lane.address();
            vec![
                "connection-server".to_owned(),
                format!("--table={file}"),
                format!("--listen={address}"),
                format!("--admin={address}:7701"),
                format!("--data-threads={}", setup.threads),
                "--drain-seconds=0".to_owned(),
            ]
        }
        Lane::Haproxy | Lane::HaproxySplice => vec!["-W".to_owned(), "-f".to_owned(), file],
        Lane::Nginx => {
            let folder = folder.display();
            let log = format!("{folder}/error.log");
            ["-p", &folder.to_string(), "-c", &file, "-e", &log]
                .map(str::to_owned)
                .into()
        }
    }
}

/// Configuration file of a rival; portpool's table as text.
pub fn configuration(lane: Lane, setup: Setup) -> String {
    match lane {
        Lane::Direct => String::new(),
        Lane::Portpool | Lane::PortpoolBase => {
            serde_json::to_string_pretty(&table(setup, 1)).unwrap_or_default()
        }
        Lane::Haproxy | Lane::HaproxySplice => haproxy(lane, setup),
        Lane::Nginx => nginx(setup),
    }
}

fn haproxy(lane: Lane, setup: Setup) -> String {
    let (address, sink) = (lane.address(), sink::ADDRESS);
    let (threads, capacity) = (setup.threads, setup.capacity);
    let last = FIRST + setup.ports - 1;
    let (tuning, options) = if lane == Lane::HaproxySplice {
        (
            "    tune.pipesize 262144\n    maxpipes 256\n",
            "    option splice-request\n    option splice-response\n",
        )
    } else {
        ("    nosplice\n    tune.bufsize 131072\n", "")
    };
    format!(
        "global
    nbthread {threads}
    maxconn {capacity}
{tuning}
defaults
    mode tcp
    maxconn {capacity}
    timeout connect 5s
    timeout client 1h
    timeout server 1h
{options}
listen pool
    bind {address}:{FIRST}-{last}
    server sink {sink}
"
    )
}

fn nginx(setup: Setup) -> String {
    let (address, sink) = (Lane::Nginx.address(), sink::ADDRESS);
    let last = FIRST + setup.ports - 1;
    let udp_last = UDP_FIRST + UDP_COUNT - 1;
    // Every listener takes one of them beside two per session.
    let connections = usize::from(setup.ports) + 2 * setup.capacity + 200;
    let threads = setup.threads;
    let mut text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
worker_processes {threads};
pid nginx.pid;
error_log error.log crit;
events {{
    worker_connections {connections};
    multi_accept on;
}}
stream {{
    proxy_connect_timeout 5s;
    server {{
        listen {address}:{FIRST}-{last};
        proxy_pass {sink}:$server_port;
        proxy_buffer_size 256k;
        proxy_half_close on;
        proxy_timeout 1h;
    }}
"
    );
    if setup.udp {
        // Without it several workers answer for one client.
        let reuseport = if threads > 1 { " reuseport" } else { "" };
        let _ = writeln!(
            text,
            "    server {{
        listen {address}:{UDP_FIRST}-{udp_last} udp{reuseport};
        proxy_pass {sink}:$server_port;
        proxy_timeout 1h;
    }}"
        );
    }
    text.push_str("}\n");
    text
}

fn table(setup: Setup, generation: u64) -> Table {
    let range = |name: &str, first, count, protocol| PortRange {
        name: name.to_owned(),
        protocol,
        ..tables::range(first, first, count)
    };
    let sink = Some(sink::ADDRESS.into());
    let mut row = tables::row(
        0,
        sink,
        range("main", FIRST, setup.ports, PortProtocol::TCP),
    );
    if setup.udp {
        row.ranges
            .push(range("udp", UDP_FIRST, UDP_COUNT, PortProtocol::UDP));
    }
    let sessions = Sessions {
        admission: Admission::Open,
        ..Sessions::default()
    };
    Table {
        generation,
        ..tables::table(sessions, vec![row])
    }
}

/// Why the rivals are set up as they are.
pub fn remarks(lane: Lane) -> &'static str {
    match lane {
        Lane::Direct => "generator and sink without a proxy",
        Lane::Portpool => {
            "connection-server of this build; admission Open, as its rivals have none"
        }
        Lane::PortpoolBase => "the same with another build",
        Lane::Haproxy => {
            "copies; buffers of 128 KiB carried twice of what the default of 16 KiB did"
        }
        Lane::HaproxySplice => {
            "splices both ways; pipes of 256 KiB, as the default carried 0.7 times as much"
        }
        Lane::Nginx => {
            "buffers of 256 KiB: 64 KiB carried 0.7 to 0.8 times, 16 KiB 0.4 to 0.5 times as much; proxy_half_close, without which a half-closed upload loses its answer"
        }
    }
}
