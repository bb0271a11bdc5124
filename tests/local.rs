//! `portpool local` as a user runs it. One test at a time: pools share the
//! loopback addresses from 127.0.0.1 on.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

const PORTPOOL: &str = env!("CARGO_BIN_EXE_portpool");
const ASK: &str = "127.0.0.1:7700";
const SOON: Duration = Duration::from_secs(20);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A running `portpool local`.
struct Local {
    child: Child,
    lines: Receiver<String>,
    /// Where a killed pool leaves its table.
    _folder: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Local {
    fn start(file: &Path) -> Self {
        let turn = ONE_AT_A_TIME
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(PORTPOOL)
            .env("TMPDIR", folder.path())
            .args(["local", "--drain-seconds", "2", "-f"])
            .arg(file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            output
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self {
            child,
            lines,
            _folder: folder,
            _turn: turn,
        }
    }

    /// Reads events until one contains `words`.
    fn until(&self, words: &str) -> String {
        let (deadline, mut seen) = (Instant::now() + SOON, String::new());
        while let Ok(line) = self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if line.contains(words) {
                return line;
            }
            seen = format!("{seen}{line}\n");
        }
        panic!("no event with {words:?}:\n{seen}");
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Ctrl-C, and waits for the end.
    fn stop(mut self) {
        self.signal("-INT");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The kernel ends the children with it, but not at once.
        until(|| TcpStream::connect(ASK).is_err());
    }
}

fn until(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        if Instant::now() > deadline {
            assert!(std::thread::panicking(), "did not come to pass");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(name)
}

fn portpool(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(PORTPOOL)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

/// `portpool request`, with time for the pool to come up.
fn request() -> (String, String) {
    let output = portpool(&["request", ASK, "--wait", "20"], "");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let endpoint = String::from_utf8(output.stdout).unwrap();
    let (host, port) = endpoint.trim().rsplit_once(':').unwrap();
    (host.to_owned(), port.to_owned())
}

/// Processes whose command line has `marker`.
fn processes(marker: &str) -> usize {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let commands = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    commands
        .filter(|command| {
            String::from_utf8_lossy(command)
                .replace('\0', " ")
                .contains(marker)
        })
        .count()
}

#[test]
fn the_echo_example_serves_scales_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.yaml");
    let manifest = fs::read_to_string(example("echo.yaml")).unwrap();
    fs::write(&file, &manifest).unwrap();
    let local = Local::start(&file);
    local.until("8 ports free");
    let echoed = portpool(&["connect", ASK], "hello over TCP\n");
    assert_eq!(String::from_utf8_lossy(&echoed.stdout), "hello over TCP\n");
    let echoed = portpool(&["connect", ASK, "--udp"], "hello over UDP\n");
    assert_eq!(String::from_utf8_lossy(&echoed.stdout), "hello over UDP\n");

    let (host, port) = request();
    let mut live = TcpStream::connect(format!("{host}:{port}")).unwrap();
    live.set_read_timeout(Some(SOON)).unwrap();
    let mut echo = |message: &[u8]| {
        live.write_all(message).unwrap();
        let mut answer = vec![0; message.len()];
        live.read_exact(&mut answer).unwrap();
        assert_eq!(answer, message);
    };
    echo(b"before");
    fs::write(&file, manifest.replace("replicas: 2", "replicas: 5")).unwrap();
    local.until("19 ports free");
    echo(b"scaled up");
    fs::write(&file, manifest.replace("replicas: 2", "replicas: many")).unwrap();
    assert!(
        local
            .until("spec.replicas")
            .contains("must be a whole number, not text")
    );
    echo(b"a wrong manifest changes nothing");
    fs::write(&file, manifest.replace("replicas: 2", "replicas: 1")).unwrap();
    local.until("3 ports free");
    echo(b"the server with the session stays");
    local.stop();
    assert_eq!(processes("echo --listen 127.0.0."), 0);
}

#[test]
fn the_iperf3_example_measures() {
    let local = Local::start(&example("iperf3.yaml"));
    let (host, port) = request();
    let measured = Command::new("iperf3")
        .args(["-c", &host, "-p", &port, "-n", "64M", "-J"])
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&measured.stdout);
    assert!(
        measured.status.success() && report.contains("sum_received"),
        "{report}"
    );
    local.stop();
}

#[test]
fn the_redis_example_answers_two_clients_on_ports_of_their_own() {
    let local = Local::start(&example("redis.yaml"));
    let endpoints = [request(), request()];
    assert_ne!(endpoints[0], endpoints[1]);
    for (host, port) in endpoints {
        let mut stream = TcpStream::connect(format!("{host}:{port}")).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"PING\r\n").unwrap();
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+PONG\r\n");
    }
    local.stop();
}

#[test]
fn nothing_survives_a_killed_local_pool() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.yaml");
    let marker = format!("{}", 100_000 + std::process::id());
    fs::write(&file, format!("\
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {{name: orphans}}
spec:
  ports: [{{name: main, port: 7000}}]
  template:
    spec:
      containers:
        - {{name: a, command: [sh, -c, 'trap \"\" TERM; (setsid sleep {marker} &) ; sleep {marker} & wait']}}
")).unwrap();
    let local = Local::start(&file);
    until(|| processes(&format!("sleep {marker}")) >= 4 + 2);
    local.signal("-KILL");
    until(|| processes(&marker) == 0);
    until(|| {
        processes("connection-server --table=") == 0 && processes("processing-server --table=") == 0
    });
}

#[test]
fn wrong_input_is_named_and_nothing_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.yaml");
    let _turn = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let good = fs::read_to_string(example("echo.yaml")).unwrap();
    let server = "spec:\n  connectionServer:";
    let cases = [
        (
            good.replace("count: 4", "cuont: 4"),
            ":14:7: spec.ports[0].cuont: unknown field; did you mean count?",
        ),
        (
            good.replace("[portpool,", "[no-such-program,"),
            "program \"no-such-program\" of container \"echo\" is not in PATH",
        ),
        (
            good.replacen(
                "spec:",
                &format!("{server} {{connectionPorts: {{first: 40000, last: 40100}}}}"),
                1,
            ),
            "ip_local_port_range",
        ),
        (
            good.replacen(
                "spec:",
                &format!("{server} {{connectionPorts: {{first: 20000, last: 20006}}}}"),
                1,
            ),
            "need 8 connection ports",
        ),
    ];
    for (manifest, words) in cases {
        fs::write(&file, manifest).unwrap();
        let output = portpool(&["local", "-f", file.to_str().unwrap()], "");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(words), "{words}: {message}");
        assert!(output.stdout.is_empty(), "nothing started");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:20003").unwrap();
    let output = portpool(&["local", "-f", example("echo.yaml").to_str().unwrap()], "");
    drop(taken);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("127.0.0.1:20003 cannot be listened on")
    );
    let missing = portpool(&["local", "-f", "/none.yaml"], "");
    assert_eq!(missing.status.code(), Some(2));
}
