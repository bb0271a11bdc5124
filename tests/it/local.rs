//! `portpool local` as a user runs it. One test at a time: pools share the
//! loopback addresses from 127.0.0.1 on.

mod entries;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::cli::portpool;
use crate::common::{SOON, echo};

const PORTPOOL: &str = env!("CARGO_BIN_EXE_portpool");
const ASK: &str = "127.0.0.1:7700";

mod daemons;
mod media;
mod programs;
mod workload;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The turn of a test that runs a pool.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A running `portpool local`.
struct Local {
    child: Child,
    lines: Receiver<String>,
    /// Where a killed pool leaves its table.
    folder: tempfile::TempDir,
    /// None of a pool that runs beside another.
    turn: Option<MutexGuard<'static, ()>>,
}

impl Local {
    fn start(file: &Path) -> Self {
        Self::start_with(file, &["--drain-seconds", "2"])
    }

    fn start_with(file: &Path, options: &[&str]) -> Self {
        let turn = one_at_a_time();
        Self::spawn(tempfile::tempdir().unwrap(), file, options, Some(turn))
    }

    fn start_beside(_other: &Self, file: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::spawn(folder, file, &["--drain-seconds", "2"], None)
    }

    /// With `folder` for temporary files.
    fn start_in(folder: tempfile::TempDir, file: &Path) -> Self {
        let turn = one_at_a_time();
        Self::spawn(folder, file, &["--drain-seconds", "2"], Some(turn))
    }

    fn spawn(
        folder: tempfile::TempDir,
        file: &Path,
        options: &[&str],
        turn: Option<MutexGuard<'static, ()>>,
    ) -> Self {
        let mut child = Command::new(PORTPOOL)
            .env("TMPDIR", folder.path())
            .args(["local", "-f"])
            .arg(file)
            .args(options)
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
            folder,
            turn,
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

    /// The beginning of the arguments of `role` in this pool.
    fn marker(&self, role: &str) -> String {
        format!(" {role} --table={}/", self.folder.path().display())
    }

    /// The id of this pool's only process of `role`.
    fn pid_of(&self, role: &str) -> String {
        let mut found = pids(&self.marker(role));
        assert_eq!(found.len(), 1, "{role}");
        found.remove(0)
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
        if self.turn.is_some() {
            until(|| TcpStream::connect(ASK).is_err());
        }
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

/// The same for several ports in one session, in the order of `ports`.
fn request_ports<const N: usize>(ports: &[&str]) -> [(String, String); N] {
    let mut arguments = vec!["request", ASK, "--wait", "20"];
    ports
        .iter()
        .for_each(|port| arguments.extend(["--port", port]));
    let output = portpool(&arguments, "");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let text = String::from_utf8(output.stdout).unwrap();
    let endpoints = text.lines().map(|line| {
        let (_, endpoint) = line.split_once(' ').unwrap();
        let (host, port) = endpoint.rsplit_once(':').unwrap();
        (host.to_owned(), port.to_owned())
    });
    endpoints.collect::<Vec<_>>().try_into().unwrap()
}

/// Connects to the address that `portpool request` printed.
fn connect((host, port): &(String, String)) -> TcpStream {
    let stream = TcpStream::connect(format!("{host}:{port}")).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// What `portpool connect` prints after sending `message` on a session of its own.
fn echoed(message: &str, further: &[&str]) -> String {
    let output = portpool(&[&["connect", ASK], further].concat(), message);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Processes whose command line has `marker`.
fn processes(marker: &str) -> usize {
    pids(marker).len()
}

fn pids(marker: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let found = entries.filter(|entry| {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command)
            .replace('\0', " ")
            .contains(marker)
    });
    found
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

#[test]
fn sigusr2_replaces_the_connection_server_and_cuts_nothing() {
    let local = Local::start(&example("echo.yaml"));
    local.until("8 ports free");
    let mut live = connect(&request());
    echo(&mut live, "before");
    for _ in 0..3 {
        local.signal("-USR2");
        local.until("connection-server-0 was replaced");
        echo(&mut live, "after");
        assert_eq!(echoed("a new session\n", &[]), "a new session\n");
    }
    let ours = format!(
        "connection-server --table={}",
        local.folder.path().display()
    );
    assert_eq!(processes(&ours), 1);
    local.stop();
    assert_eq!(processes(&ours), 0);
}

#[test]
fn the_echo_example_serves_scales_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.yaml");
    let manifest = fs::read_to_string(example("echo.yaml")).unwrap();
    fs::write(&file, &manifest).unwrap();
    let local = Local::start(&file);
    local.until("8 ports free");
    assert_eq!(echoed("hello over TCP\n", &[]), "hello over TCP\n");
    assert_eq!(echoed("hello over UDP\n", &["--udp"]), "hello over UDP\n");

    let mut live = connect(&request());
    echo(&mut live, "before");
    fs::write(&file, manifest.replace("replicas: 2", "replicas: 5")).unwrap();
    local.until("19 ports free");
    echo(&mut live, "scaled up");
    fs::write(&file, manifest.replace("replicas: 2", "replicas: many")).unwrap();
    assert!(
        local
            .until("spec.replicas")
            .contains("must be a whole number, not text")
    );
    echo(&mut live, "a wrong manifest changes nothing");
    fs::write(&file, manifest.replace("replicas: 2", "replicas: 1")).unwrap();
    local.until("3 ports free");
    echo(&mut live, "the server with the session stays");
    local.stop();
    assert_eq!(processes(&format!("{PORTPOOL} echo --listen 127.0.0.")), 0);
}

#[test]
fn the_fresh_example_gives_every_session_a_new_server() {
    let local = Local::start(&example("fresh.yaml"));
    local.until("3 ports free");
    let mut gone: Vec<String> = Vec::new();
    for _ in 0..4 {
        let before = pids("echo --listen 127.0.0.");
        let mut client = connect(&request());
        echo(&mut client, "mine alone");
        drop(client);
        let event = local.until("is replaced");
        assert!(event.contains("recycle.afterSessions"), "{event}");
        local.until("3 ports free");
        let after = pids("echo --listen 127.0.0.");
        assert!(after.iter().all(|pid| !gone.contains(pid)));
        gone.extend(before.into_iter().filter(|pid| !after.contains(pid)));
    }
    // Each server has as many processes.
    let of_three = pids("echo --listen 127.0.0.").len();
    assert_eq!(gone.len() * 3, of_three * 4, "four servers are gone");
    local.stop();
}

#[test]
fn a_workload_that_drains_itself_is_replaced() {
    let local = Local::start(&example("echo.yaml"));
    local.until("8 ports free");
    let before = pids("echo --listen 127.0.0.");
    let environments = before.iter().map(|pid| {
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        let variables = environment.split('\0');
        let mut apis = variables.filter_map(|text| text.strip_prefix("PORTPOOL_API=http://"));
        apis.next().map(str::to_owned)
    });
    let api = environments.flatten().next().unwrap();
    let mut stream = TcpStream::connect(&api).unwrap();
    write!(stream, "GET /v1/server HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    // As in PORTPOOL_ADDRESS.
    assert!(answer.contains(r#""address":"127.0.0.1""#), "{answer}");
    let mut stream = TcpStream::connect(&api).unwrap();
    write!(stream, "POST /v1/drain HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 204 "), "{answer}");
    local.until("is replaced: its workload asked for that");
    local.until("8 ports free");
    let after = pids("echo --listen 127.0.0.");
    let stayed = before.iter().filter(|pid| after.contains(pid)).count();
    assert_eq!((stayed, after.len()), (before.len() / 2, before.len()));
    local.stop();
}

/// Writes `manifest` into a file of a folder.
fn write(manifest: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.yaml");
    fs::write(&file, manifest).unwrap();
    (folder, file)
}

/// A pool of one server that runs `command` in a shell.
fn pool_of(command: &str) -> (tempfile::TempDir, PathBuf) {
    write(&format!(
        "\
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {{name: one}}
spec:
  replicas: 1
  ports: [{{name: main, port: 7000, count: 4}}]
  template:
    spec:
      containers:
        - name: main
          command: [sh, -c, {command:?}]
          env: [{{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}]
"
    ))
}

fn echo_command() -> String {
    format!("exec {PORTPOOL} echo --ports 7000-7003")
}

#[test]
fn a_program_that_ends_is_restarted_after_growing_pauses() {
    let (_folder, file) = pool_of("exit 3");
    let local = Local::start(&file);
    local.until("exit status: 3");
    let first = Instant::now();
    // After pauses of 0.2, 0.4 and 0.8 s.
    for _ in 0..3 {
        local.until("exit status: 3");
    }
    let took = first.elapsed();
    assert!(took >= Duration::from_millis(1400), "{took:?}");
    local.stop();
}

#[test]
fn roles_that_are_killed_are_started_again() {
    let (_folder, file) = pool_of(&echo_command());
    let local = Local::start(&file);
    local.until("4 ports free");
    for role in ["connection-server", "processing-server"] {
        let pid = local.pid_of(role);
        let status = Command::new("kill").args(["-KILL", &pid]).status();
        assert!(status.unwrap().success());
        local.until("signal: 9");
        // A restarted agent offers its ports after 15 s.
        until(|| portpool(&["connect", ASK, "--wait", "20"], "again").stdout == b"again");
    }
    local.stop();
}

#[test]
fn a_stopping_pool_lets_sessions_go_on_for_its_drain_time() {
    let (_folder, file) = pool_of(&echo_command());
    let mut local = Local::start(&file);
    local.until("4 ports free");
    let mut stream = connect(&request());
    let mut echo = |message: &[u8]| {
        stream.write_all(message)?;
        let mut answer = vec![0; message.len()];
        stream.read_exact(&mut answer)
    };
    echo(b"before").unwrap();
    local.signal("-INT");
    let stopping = Instant::now();
    while echo(b"during").is_ok() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let cut = stopping.elapsed();
    assert!(
        cut > Duration::from_millis(1500) && cut < Duration::from_secs(4),
        "2 s to drain; cut after {cut:?}"
    );
    assert!(local.child.wait().unwrap().success());
    assert_eq!(processes("echo --ports 7000-7003"), 0);
}

#[test]
fn wrong_edits_leave_the_running_pool_as_it_is() {
    let (_folder, file) = pool_of(&echo_command());
    let good = fs::read_to_string(&file).unwrap();
    let local = Local::start(&file);
    local.until("4 ports free");
    let taken = std::net::TcpListener::bind("127.0.0.1:20005").unwrap();
    let spec =
        |more: &str| good.replace("spec:\n  replicas", &format!("spec:\n  {more}\n  replicas"));
    for (edit, words) in [
        (
            good.replace("metadata: {name: one}", "metadata: {name: two}"),
            ":3:12: metadata.name: cannot change",
        ),
        (
            spec("connectionServer: {loadSharingPort: 7777}"),
            ":5:22: spec.connectionServer.loadSharingPort: cannot change",
        ),
        (
            spec("connectionServer: {connectionPorts: {first: 40000, last: 40100}}"),
            ":5:22: spec.connectionServer.connectionPorts: ports 40000-40003 lie inside",
        ),
        (
            good.replace("[sh,", "[no-such-shell,"),
            ":11:11: spec.template.spec.containers[0].command: program \"no-such-shell\"",
        ),
        (
            good.replace("replicas: 1", "replicas: 2"),
            "TCP 127.0.0.1:20005 cannot be listened on",
        ),
        ("{".to_owned(), "pool.yaml:1:"),
    ] {
        fs::write(&file, edit).unwrap();
        local.until("not applied; the pool stays as it is");
        let line = local.until("pool.yaml:");
        assert!(line.contains(words), "{words}: {line}");
        assert_eq!(echoed("still here", &[]), "still here");
    }
    drop(taken);
    fs::write(&file, good.replace("replicas: 1", "replicas: 2")).unwrap();
    local.until("8 ports free");
    local.stop();
}

#[test]
fn a_terminal_shows_the_pool_alive() {
    let _turn = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let (_folder, file) = pool_of(&echo_command());
    let local = format!(
        "timeout --foreground --signal=INT 6 {PORTPOOL} local --drain-seconds 1 -f {}",
        file.display()
    );
    let output = Command::new("script")
        .args(["--quiet", "--return", "--command", &local, "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    let last_drawn = shown.rfind("SERVER").expect("the head of the table");
    assert!(shown[last_drawn..].contains("ready"), "{shown}");
    assert!(shown.contains("\x1b[J"), "drawn anew in place: {shown}");
    assert!(shown.trim_end().ends_with("stopped"), "{shown}");
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
    let roles = ["connection-server", "processing-server"];
    until(|| roles.iter().all(|role| processes(&local.marker(role)) == 0));
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
            ":21:11: spec.template.spec.containers[0].command: program \"no-such-program\" of container \"echo\" is not in PATH",
        ),
        (
            good.replacen("spec:", &format!("{server} {{loadSharingPort: 7701}}"), 1),
            ":10:22: spec.connectionServer.loadSharingPort: must not include 7701",
        ),
        (
            good.replacen(
                "        - name: echo\n",
                "        - {name: echo, command: [portpool]}\n        - name: echo\n",
                1,
            ),
            "spec.template.spec.containers[1].name: \"echo\" occurs twice",
        ),
        (
            good.replacen(
                "        - name: echo\n",
                "        - name: echo\n          workingDir: /no/such/folder\n",
                1,
            ),
            "workingDir: \"/no/such/folder\" is not a folder",
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
    // The port of an agent cannot be chosen.
    for (address, has_choice) in [("127.0.0.1:20003", true), ("127.0.0.2:7070", false)] {
        let taken = std::net::TcpListener::bind(address).unwrap();
        let output = portpool(&["local", "-f", example("echo.yaml").to_str().unwrap()], "");
        drop(taken);
        assert_eq!(output.status.code(), Some(2));
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(
            message.contains(&format!("{address} cannot be listened on")),
            "{message}"
        );
        assert!(message.contains("stop what uses it"), "{message}");
        assert_eq!(
            message.contains("choose another port"),
            has_choice,
            "{message}"
        );
    }
    let script = format!(
        "ulimit -n 64; exec {PORTPOOL} local -f {}",
        example("echo.yaml").display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("raise the hard limit"), "{message}");
    let missing = portpool(&["local", "-f", "/none.yaml"], "");
    assert_eq!(missing.status.code(), Some(2));
}
