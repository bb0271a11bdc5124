//! How programs end: every command, in every state that may hold it up, ends
//! within a second of SIGINT or SIGTERM or says what it waits for; a second signal
//! ends it at once; nothing is left; and nothing waits for a reader of its output.

use std::fs::File;
use std::io::{PipeReader, Read, Write, pipe};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::cluster::{quick, write_kubeconfig};
use crate::common::faulty::Faulty;
use crate::common::proxy::Fault;
use crate::common::{COUNT, Pool, SOON, turn};
use portpool::session::SessionRequest;

/// How long a program may take to end, or to say what it waits for.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A program under test.
struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    folder: tempfile::TempDir,
}

/// Where a program writes to.
#[derive(Clone, Copy, PartialEq)]
enum Reader {
    Reads,
    /// There is one, but it has stopped, like a pager or a terminal after Ctrl-S.
    HasStopped,
}

/// A pipe that is full, with its reader.
fn full_pipe() -> (PipeReader, Stdio) {
    let (reader, mut writer) = pipe().unwrap();
    let size = rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    writer.write_all(&vec![b'.'; size]).unwrap();
    (reader, writer.into())
}

impl Program {
    fn start(arguments: &[&str]) -> Self {
        Self::with(arguments, &[], Reader::Reads, Reader::Reads).0
    }

    fn with(
        arguments: &[&str],
        environment: &[(&str, &str)],
        stdout: Reader,
        stderr: Reader,
    ) -> (Self, Vec<PipeReader>) {
        let folder = tempfile::tempdir().unwrap();
        let mut readers = Vec::new();
        let mut output = |name: &str, reader| match reader {
            Reader::Reads => Stdio::from(File::create(folder.path().join(name)).unwrap()),
            Reader::HasStopped => {
                let (reader, output) = full_pipe();
                readers.push(reader);
                output
            }
        };
        let temporary = folder.path().join("tmp");
        std::fs::create_dir(&temporary).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_portpool"))
            .args(arguments)
            .env("TMPDIR", &temporary)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(output("stdout", stdout))
            .stderr(output("stderr", stderr))
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let program = Self {
            child,
            stdin,
            folder,
        };
        (program, readers)
    }

    /// What it has written, to both outputs.
    fn said(&self) -> String {
        let read = |name| std::fs::read_to_string(self.folder.path().join(name));
        [read("stdout"), read("stderr")]
            .into_iter()
            .map(Result::unwrap_or_default)
            .collect()
    }

    fn until_said(&self, words: &str) {
        let deadline = Instant::now() + SOON;
        while !self.said().contains(words) {
            assert!(Instant::now() < deadline, "no {words:?}: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it ends; its status and how long that took.
    fn ends(&mut self, within: Duration) -> Option<(ExitStatus, Duration)> {
        let started = Instant::now();
        while started.elapsed() < within {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some((status, started.elapsed()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    /// Sends the signal: it ends at once with `code`.
    fn ends_at(&mut self, signal: Signal, code: i32, state: &str) {
        self.signal(signal);
        let ended = self.ends(AT_ONCE);
        let (status, _) = ended.unwrap_or_else(|| panic!("{state} goes on: {}", self.said()));
        assert_eq!(status.code(), Some(code), "{state}: {}", self.said());
        assert_eq!(left(&self.folder.path().join("tmp")), [""; 0], "{state}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The names in `folder`.
fn left(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The signals, with the code of a command that one of them interrupts.
const SIGNALS: [(Signal, i32); 2] = [(Signal::INT, 130), (Signal::TERM, 143)];

/// A listener whose clients are never answered, and its address.
fn blackhole() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// Waits for a client's first bytes.
fn asked(listener: &TcpListener) -> std::net::TcpStream {
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0]).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn client_commands_end_at_a_signal_whatever_they_wait_for() {
    let _turn = turn().await;
    for (signal, code) in SIGNALS {
        for command in ["request", "connect", "release"] {
            let (listener, address) = blackhole();
            let id = (command == "release").then_some("some");
            let arguments: Vec<&str> = [command, &address].into_iter().chain(id).collect();
            let mut program = Program::start(&arguments);
            let _client = asked(&listener);
            program.ends_at(signal, code, &format!("{command} without an answer"));
        }
        for command in ["request", "connect"] {
            let mut program = Program::start(&[command, "127.0.0.1:9", "--retry-seconds=60"]);
            program.until_said("no session yet");
            program.ends_at(signal, code, &format!("{command} that tries again"));
        }
    }
    for (signal, code) in SIGNALS {
        for command in ["request", "connect"] {
            let pool = Pool::running(1, |_| {}).await;
            for _ in 0..COUNT {
                pool.request().await.unwrap();
            }
            let address = format!("{}:7700", pool.connection_address(0));
            let mut program = Program::start(&[command, &address, "--wait=60"]);
            pool.until(|state| state.waiting == 1).await;
            program.ends_at(signal, code, &format!("{command} in the queue"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connect_ends_at_a_signal_whichever_side_stalls() {
    let _turn = turn().await;
    let pool = Pool::running(1, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    for (signal, code) in SIGNALS {
        for udp in [None, Some("--udp")] {
            let arguments: Vec<&str> = ["connect", &address].into_iter().chain(udp).collect();
            let mut program = Program::start(&arguments);
            program.until_said("connected to");
            program.ends_at(signal, code, "connect without input");
            // It gives its session back.
            pool.until(|state| state.free_ports == u32::from(COUNT))
                .await;
        }
        // Its own reader stalls.
        let (mut program, _readers) = Program::with(
            &["connect", &address],
            &[],
            Reader::HasStopped,
            Reader::Reads,
        );
        program.until_said("connected to");
        let mut stdin = program.stdin.take().unwrap();
        let writing = std::thread::spawn(move || while stdin.write_all(&[b'x'; 4096]).is_ok() {});
        std::thread::sleep(Duration::from_millis(300));
        program.ends_at(signal, code, "connect whose reader has stopped");
        writing.join().unwrap();
        // The connection server stalls, and does not take the session back.
        let mut program = Program::start(&["connect", &address]);
        program.until_said("connected to");
        pool.connection_servers[0].signal(Signal::STOP);
        program.ends_at(signal, code, "connect to a server that has stopped");
        pool.connection_servers[0].signal(Signal::CONT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_print_end_at_a_signal_without_a_reader() {
    let _turn = turn().await;
    let pool = Pool::running(1, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    for (signal, code) in SIGNALS {
        for arguments in [&["crd"] as &[&str], &["request", &address]] {
            let (mut program, _readers) =
                Program::with(arguments, &[], Reader::HasStopped, Reader::Reads);
            std::thread::sleep(Duration::from_millis(300));
            assert!(program.child.try_wait().unwrap().is_none(), "it prints");
            program.ends_at(signal, code, arguments[0]);
        }
        // An error that no one reads.
        let (mut program, _readers) = Program::with(
            &["request", "nowhere"],
            &[],
            Reader::HasStopped,
            Reader::HasStopped,
        );
        let (status, _) = program.ends(SOON).expect("it ends by itself");
        assert_eq!(status.code(), Some(2));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_process_of_a_container_ends_at_a_signal_too() {
    // The kernel ignores signals for it that it has no handler for.
    let unshare = |program: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["--fork", "--pid", "--kill-child"])
            .args(program);
        command
    };
    if !unshare(&["true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("skipped: no namespace of processes here (unshare --pid)");
        return;
    }
    for (signal, code) in SIGNALS {
        let (listener, address) = blackhole();
        let portpool = env!("CARGO_BIN_EXE_portpool");
        let mut outer = unshare(&[portpool, "request", &address]).spawn().unwrap();
        let _client = asked(&listener);
        let pid = outer.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let first: i32 = children.unwrap().trim().parse().unwrap();
        kill_process(Pid::from_raw(first).unwrap(), signal).unwrap();
        let started = Instant::now();
        while started.elapsed() < AT_ONCE && outer.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = outer.try_wait().unwrap();
        outer.kill().unwrap();
        outer.wait().unwrap();
        assert_eq!(status.expect("it ends").code(), Some(code));
    }
}

/// The arguments of the roles: a connection server and an agent at the addresses
/// `index` of `pool`, and a workload beside those that run.
fn roles(pool: &Pool, index: u32) -> [Vec<String>; 3] {
    let (host, server) = (pool.connection_address(index), pool.server_address(index));
    let workload = pool.server_address(9);
    let table = format!("--table={}", pool.table_file().display());
    [
        vec![
            "connection-server".to_owned(),
            table.clone(),
            format!("--listen={host}"),
            format!("--admin={host}:7701"),
            format!("--handover={}", pool.handover_socket(9).display()),
        ],
        vec![
            "processing-server".to_owned(),
            table,
            "--slot=0".to_owned(),
            format!("--address={server}"),
            format!("--admin={server}:7071"),
        ],
        vec!["echo".to_owned(), format!("--listen={workload}")],
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_end_at_a_signal_also_before_they_have_a_table() {
    let _turn = turn().await;
    let pool = Pool::new(1, |_| {});
    for (signal, _) in SIGNALS {
        for arguments in roles(&pool, 9) {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut program = Program::start(&arguments);
            program.until_said("ready");
            program.ends_at(signal, 0, arguments[0]);
            if arguments[0] == "echo" {
                continue;
            }
            let missing = pool.table_file().with_file_name("missing.json");
            let missing = format!("--table={}", missing.display());
            let arguments: Vec<&str> = arguments
                .into_iter()
                .map(|argument| {
                    if argument.starts_with("--table") {
                        &missing
                    } else {
                        argument
                    }
                })
                .collect();
            let mut program = Program::start(&arguments);
            program.until_said("cannot be read now");
            program.ends_at(signal, 0, "a role without a table");
        }
    }
    let socket = pool.handover_socket(9);
    assert!(!socket.exists(), "the socket for a successor is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_drains_says_so_and_a_second_signal_ends_it() {
    let _turn = turn().await;
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.agents.clear();
    for (signal, code) in SIGNALS {
        let [connection_server, agent, _] = roles(&pool, 0);
        let start = |arguments: &[String]| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            Program::start(&arguments)
        };
        let (mut connection_server, mut agent) = (start(&connection_server), start(&agent));
        pool.until(|state| state.free_ports > 0).await;
        let session = pool.request().await.unwrap();
        let mut stream = crate::common::connect(&session);
        crate::common::echo(&mut stream, "busy");
        for (program, name) in [(&mut agent, "agent"), (&mut connection_server, "server")] {
            program.signal(signal);
            program.until_said("draining");
            assert!(
                program.said().contains("a second signal"),
                "{}",
                program.said()
            );
            assert!(
                program.ends(Duration::from_millis(500)).is_none(),
                "{name} drains"
            );
            program.ends_at(signal, code, name);
        }
    }
    assert!(
        !pool.handover_socket(9).exists(),
        "the socket for a successor is left"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_no_one_reads_holds_nothing_up() {
    let _turn = turn().await;
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    let trace = [("PORTPOOL_LOG", "trace")];
    for (signal, _) in SIGNALS {
        let [connection_server, agent, echo] = roles(&pool, 0);
        let start = |arguments: &[String]| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            Program::with(&arguments, &trace, Reader::HasStopped, Reader::HasStopped)
        };
        let mut programs = [start(&agent), start(&connection_server), start(&echo)];
        pool.until(|state| state.free_ports > 0).await;
        for _ in 0..20 {
            let request = SessionRequest {
                wait_seconds: 10,
                ..SessionRequest::default()
            };
            let session = pool.client().request(request).await.unwrap();
            crate::common::echo(&mut crate::common::connect(&session), "served");
            // It may be over already.
            let _ = pool.client().release(&session.id).await;
        }
        for (program, _) in &mut programs {
            program.ends_at(signal, 0, "a role whose log is not read");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_log_lost_is_counted_once_it_is_read_again() {
    let _turn = turn().await;
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.start_agent(0);
    let [mut arguments, _, _] = roles(&pool, 9);
    let host = pool.connection_address(0);
    arguments[2] = format!("--listen={host}");
    arguments[3] = format!("--admin={host}:7701");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let trace = [("PORTPOOL_LOG", "trace")];
    let (mut program, mut readers) =
        Program::with(&arguments, &trace, Reader::Reads, Reader::HasStopped);
    pool.until(|state| state.free_ports > 0).await;
    // More lines than the queue holds.
    let client = pool.client();
    for _ in 0..400 {
        let session = client.request(SessionRequest::default()).await.unwrap();
        client.release(&session.id).await.unwrap();
    }
    let mut reader = readers.remove(0);
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    std::thread::sleep(Duration::from_millis(300));
    program.ends_at(Signal::TERM, 0, "a connection server");
    let text = reading.join().unwrap();
    let dropped = text
        .lines()
        .find(|line| line.contains("log lines were dropped"));
    let lines = dropped.and_then(|line| line.rsplit_once("lines="));
    assert!(
        lines.is_some(),
        "{} lines: {dropped:?}",
        text.lines().count()
    );
}

fn controller(kubeconfig: &Path, more: &[&str]) -> Program {
    let mut arguments = vec!["controller", "--admin=127.0.0.1:0"];
    arguments.extend(more);
    let kubeconfig = kubeconfig.display().to_string();
    let environment = [("KUBECONFIG", kubeconfig.as_str())];
    Program::with(&arguments, &environment, Reader::Reads, Reader::Reads).0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_whose_api_server_never_answered_ends_at_a_signal() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig: PathBuf = folder.path().join("kubeconfig");
    for (signal, _) in SIGNALS {
        for lease in [None, Some("--lease=portpool/portpool")] {
            let more: Vec<&str> = lease.into_iter().collect();
            // It accepts and says nothing.
            let (listener, address) = blackhole();
            write_kubeconfig(&kubeconfig, &format!("http://{address}"));
            let mut program = controller(&kubeconfig, &more);
            let _client = asked(&listener);
            program.ends_at(signal, 0, "a controller without an answer");
        }
        // It refuses connections. With a lease the controller fails by itself.
        write_kubeconfig(&kubeconfig, "http://127.0.0.1:9");
        let mut program = controller(&kubeconfig, &[]);
        program.until_said("controller ready");
        std::thread::sleep(Duration::from_millis(300));
        program.ends_at(signal, 0, "a controller without an API server");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_whose_api_server_stops_answering_says_what_it_waits_for() {
    let faulty = Faulty::new("ending").await;
    for (number, (signal, code)) in SIGNALS.into_iter().enumerate() {
        // One that was ended at once still has its lease.
        let leases = [0, 1].map(|use_| format!("--lease=ending/portpool-{number}-{use_}"));
        let start = |lease: &str| {
            let more = ["--namespace=ending", "--image=portpool:test", lease];
            controller(&faulty.proxy.kubeconfig, &more)
        };
        faulty.proxy.rule(|_| Fault::Pass);
        let mut program = start(&leases[0]);
        program.until_said("controller ready");
        faulty.space.make_ready("games", quick(1)).await;
        program.ends_at(signal, 0, "an idle controller");
        let mut program = start(&leases[1]);
        program.until_said("controller ready");
        faulty.space.make_ready("games", quick(2)).await;
        faulty.proxy.rule(|call| match call.write {
            Some(_) => Fault::Hold,
            None => Fault::Pass,
        });
        faulty.space.apply("games", quick(3)).await.unwrap();
        faulty.proxy.held.notified().await;
        program.signal(signal);
        program.until_said("reconciles under way may finish");
        program.ends_at(signal, code, "a controller that waits");
    }
}

const LOCAL: &str = r#"
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {name: ending}
spec:
  replicas: 1
  sessions: {claimSeconds: 30, lingerSeconds: 0}
  ports: [{name: main, port: 7000}]
  template:
    spec:
      containers:
        - name: work
          command: [sh, -c, "NOISE exec portpool echo --listen $POD_IP --ports 7000"]
          env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
"#;

/// Runs a pool of this text, beside which no other test runs one.
fn local(text: &str, stdout: Reader) -> (Program, Vec<PipeReader>, PathBuf) {
    let bin = Path::new(env!("CARGO_BIN_EXE_portpool")).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    let file = file.into_temp_path().keep().unwrap();
    std::fs::write(&file, text).unwrap();
    let arguments = ["local", "--no-live", "-f", file.to_str().unwrap()];
    let (program, readers) = Program::with(&arguments, &[("PATH", &path)], stdout, Reader::Reads);
    (program, readers, file)
}

/// Waits until the pool has `servers` servers, with a port free on the last one.
fn until_servers(servers: usize) {
    let deadline = Instant::now() + SOON;
    let client = portpool::client::Client::new("127.0.0.1:7700").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    loop {
        if let Ok(state) = runtime.block_on(client.pool())
            && state.servers.len() == servers
            && state.free_ports as usize == servers
        {
            return;
        }
        assert!(Instant::now() < deadline, "no {servers} servers");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn local_ends_at_a_signal_in_every_state_and_leaves_nothing() {
    let _turn = crate::local::one_at_a_time();
    let quiet = LOCAL.replace("NOISE", "");
    for (signal, code) in SIGNALS {
        // The manifest is a pipe into which no one writes.
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let status = Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(status.success());
        let mut program = Program::start(&["local", "-f", fifo.to_str().unwrap()]);
        std::thread::sleep(Duration::from_millis(300));
        program.ends_at(signal, 0, "local without its manifest");
        // It has just started.
        let (mut program, _, file) = local(&quiet, Reader::Reads);
        program.until_said("load-sharing port");
        program.ends_at(signal, 0, "local that starts");
        // It runs, and then has a session that waits for its client.
        let (mut program, _, other) = local(&quiet, Reader::Reads);
        until_servers(1);
        let asked = Command::new(env!("CARGO_BIN_EXE_portpool"))
            .args(["request", "127.0.0.1:7700"])
            .output()
            .unwrap();
        assert!(asked.status.success());
        program.signal(signal);
        program.until_said("stopping: ");
        program.ends_at(signal, code, "local that drains");
        let deadline = Instant::now() + AT_ONCE;
        while std::net::TcpStream::connect("127.0.0.1:7700").is_ok() {
            assert!(Instant::now() < deadline, "its connection server goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::fs::remove_file(file).unwrap();
        std::fs::remove_file(other).unwrap();
    }
}

#[test]
fn local_follows_edits_and_ends_while_no_one_reads_its_output() {
    let _turn = crate::local::one_at_a_time();
    let noise = "(while :; do echo tick tick tick tick tick tick; done) &";
    let noisy = LOCAL.replace("NOISE", noise);
    for (signal, _) in SIGNALS {
        let (mut program, mut readers, file) = local(&noisy, Reader::HasStopped);
        until_servers(1);
        std::fs::write(&file, noisy.replace("replicas: 1", "replicas: 2")).unwrap();
        until_servers(2);
        program.signal(signal);
        assert!(program.ends(Duration::from_secs(3)).is_some(), "it goes on");
        let mut text = String::new();
        readers.remove(0).read_to_string(&mut text).unwrap();
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn local_counts_the_lines_that_it_lost() {
    let _turn = crate::local::one_at_a_time();
    let noise = "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); echo tick; done;";
    let (mut program, mut readers, file) =
        local(&LOCAL.replace("NOISE", noise), Reader::HasStopped);
    until_servers(1);
    let mut reader = readers.remove(0);
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    std::thread::sleep(Duration::from_millis(200));
    program.signal(Signal::TERM);
    assert!(program.ends(SOON).is_some());
    std::fs::remove_file(file).unwrap();
    let text = reading.join().unwrap();
    let ticks = text.lines().filter(|line| line.ends_with("tick")).count();
    let lost = text.lines().find_map(|line| {
        let (count, _) = line.strip_prefix('(')?.split_once(" lines were dropped")?;
        count.parse::<usize>().ok()
    });
    assert!(
        lost.is_some_and(|lost| lost + ticks >= 5000),
        "{lost:?}, {ticks} ticks"
    );
    assert!(text.contains("stopped"), "what it says later is read");
}
