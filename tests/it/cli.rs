//! The client's commands as a user runs them, against a running pool.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use crate::common::{COUNT, Pool, Process, SERVER_PORT, get};
use portpool::pool::PortProtocol;
use portpool::session::{Session, SessionState};
use portpool::table::ListenPort;

/// Runs the command with this standard input.
pub fn portpool(arguments: &[&str], input: impl AsRef<[u8]>) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_portpool"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.as_ref().to_vec();
    // On a thread of its own, because the answer may come while we write.
    let writing = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = writing.join().unwrap();
    output
}

/// Runs the command beside the test's own tasks.
async fn run(arguments: &[&str], input: &[u8]) -> Output {
    let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
    let input = input.to_vec();
    let run = move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        portpool(&arguments, &input)
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn several_ports_are_printed_a_line_each_and_metadata_is_passed_on() {
    let pool = Pool::running(1, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    let ports = ["--port", "main:2", "--port", "*/udp"];
    let printed = run(&[&["request", &address][..], &ports].concat(), b"").await;
    let host = pool.connection_address(0);
    let lines: Vec<&str> = text(&printed.stdout).lines().collect();
    assert_eq!(lines.len(), 3, "{printed:?}");
    let expected = format!("main {host}:2000");
    assert!(
        lines.iter().all(|line| line.starts_with(&expected)),
        "{lines:?}"
    );
    let to = ["connect", &address, "--port", "main", "--to", "main"];
    let piped = run(&to, b"hello").await;
    assert_eq!(
        (piped.status.code(), text(&piped.stdout)),
        (Some(0), "hello")
    );
    for wrong in ["main:0", "main:x", ":2", "main/sctp"] {
        let refused = run(&["request", &address, "--port", wrong], b"").await;
        assert_eq!(refused.status.code(), Some(2), "{wrong}");
    }
    let says = ["--metadata", "map=harbor", "--metadata", "seed=a=b"];
    let ask = ["request", &address, "-o", "wide"];
    let printed = run(&[&ask[..], &says].concat(), b"").await;
    let id = text(&printed.stdout).trim().split(' ').nth(1).unwrap();
    let listed = get(pool.connection_address(0), 7701, "/v1/sessions");
    let shown = r#""metadata":{"map":"harbor","seed":"a=b"}"#;
    assert!(listed.contains(id) && listed.contains(shown), "{listed}");
    let both = ["request", &address, "--port", "main", "--port-name", "main"];
    assert_eq!(run(&both, b"").await.status.code(), Some(2));
}

#[tokio::test]
async fn request_prints_where_to_connect_and_release_gives_it_back() {
    let pool = Pool::running(1, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    let plain = run(&["request", &address], b"").await;
    assert_eq!(plain.status.code(), Some(0));
    let host = pool.connection_address(0);
    assert!(text(&plain.stdout).starts_with(&format!("{host}:2000")));
    assert_eq!(text(&plain.stdout).lines().count(), 1);
    let json = run(
        &["request", &format!("http://{address}"), "-o", "json"],
        b"",
    )
    .await;
    let session: Session = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (session.state, session.port_name.as_str()),
        (SessionState::Held, "main")
    );
    assert!(session.claim_deadline.is_some());
    let wide = run(&["request", &address, "-o", "wide"], b"").await;
    let (place, id) = text(&wide.stdout).trim_end().split_once(' ').unwrap();
    assert!(place.starts_with(&format!("{host}:2000")), "{place}");
    let released = run(&["release", &address, id], b"").await;
    assert_eq!(released.status.code(), Some(0));
    pool.until(|state| state.sessions == 2).await;
    let keyed = ["request", &address, "--idempotency-key", "mine"];
    let (one, other) = (run(&keyed, b"").await, run(&keyed, b"").await);
    assert_eq!(one.stdout, other.stdout);
    let released = run(&["release", &address, &session.id], b"").await;
    assert_eq!(released.status.code(), Some(0));
    pool.until(|state| state.sessions == 2).await;
    let again = run(&["release", &address, &session.id], b"").await;
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("no live session has this id"));
}

#[tokio::test]
async fn connect_passes_the_end_of_input_on_and_reads_the_answer() {
    let mut pool = Pool::new(1, |table| {
        table.rows[0].ranges[0].count = 1;
        table.rows[0].ranges[0].protocol = portpool::pool::PortProtocol::TCP;
    });
    // A workload that answers only once its client has sent everything.
    let listener = TcpListener::bind((pool.server_address(0), SERVER_PORT)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut asked) = (stream.unwrap(), Vec::new());
            stream.read_to_end(&mut asked).unwrap();
            asked.reverse();
            stream.write_all(&asked).unwrap();
        }
    });
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports == 1).await;
    let address = format!("{}:7700", pool.connection_address(0));
    // More than all buffers on the way hold.
    let mut asked: Vec<u8> = (0..8_000_000u32)
        .map(|index| (index * 31 % 251) as u8)
        .collect();
    let output = run(&["connect", &address], &asked).await;
    asked.reverse();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(
        output.stdout == asked,
        "{} bytes came back",
        output.stdout.len()
    );
    assert!(text(&output.stderr).starts_with("connected to test-0 on "));
    pool.until(|state| state.free_ports == 1).await;
}

#[tokio::test]
async fn exit_codes_distinguish_failures() {
    let pool = Pool::running(1, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    let unused = format!("{}:7700", pool.connection_address(1));
    for _ in 0..COUNT {
        pool.request().await.unwrap();
    }
    let large = format!("a={}", "v".repeat(4096));
    let cases: [(&[&str], i32, &str); 16] = [
        (&["request", &address], 3, "all 4 matching ports are in use"),
        (&["connect", &address], 3, "all 4 matching ports are in use"),
        (&["request", &unused], 1, "failed to ask"),
        (&["request", "nowhere"], 2, "give HOST:PORT"),
        (
            &["request", &address, "--port-name", "none"],
            2,
            "the pool has main (TCPUDP)",
        ),
        (
            &["request", &address, "--wait", "301"],
            2,
            "must not exceed 300",
        ),
        (
            &["request", &address, "--protocol", "sctp"],
            2,
            "give TCP, UDP or TCPUDP",
        ),
        (
            &["request", &address, "--metadata", "map"],
            2,
            "give KEY=VALUE",
        ),
        (
            &["connect", &address, "--metadata", "a=1", "--metadata=a=2"],
            2,
            "gives the key \"a\" twice",
        ),
        (
            &["request", &address, "--metadata", &large],
            2,
            "at most 4096 bytes together; these have 4097",
        ),
        (&["release", &address, "none"], 1, "no live session"),
        (
            &["release", &address, "a b"],
            2,
            "is not the id of a session",
        ),
        (
            &["release", &address, "a?b"],
            2,
            "is not the id of a session",
        ),
        (
            &["connect", &address, "--udp", "--protocol", "tcp"],
            2,
            "--udp needs a port that forwards UDP: leave out --udp",
        ),
        // Nothing is asked for: these ask a server that is not there.
        (
            &["connect", &unused, "--udp", "--port", "main/tcp"],
            2,
            "--udp needs a port that forwards UDP: leave out --udp",
        ),
        (
            &["connect", &unused, "--port", "main", "--to", "other"],
            2,
            "no port of the session has the name \"other\"",
        ),
    ];
    for (arguments, code, words) in cases {
        let output = run(arguments, b"").await;
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(words), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

/// A pool with one port for UDP, which comes first, and one for TCP.
async fn mixed() -> Pool {
    let mut pool = Pool::new(1, |table| {
        let mut udp = table.rows[0].ranges[0].clone();
        (udp.count, udp.protocol) = (1, PortProtocol::UDP);
        let mut tcp = udp.clone();
        (tcp.name, tcp.protocol) = ("game".to_owned(), PortProtocol::TCP);
        tcp.connection_port = ListenPort::new(20_001).unwrap();
        table.rows[0].ranges = vec![udp, tcp];
    });
    pool.start_workload(0);
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports == 2).await;
    pool
}

#[tokio::test]
async fn connect_asks_for_what_it_talks() {
    let pool = mixed().await;
    let address = format!("{}:7700", pool.connection_address(0));
    for (options, port) in [
        (&[] as &[&str], 20_001),
        (&["--udp"], 20_000),
        (&["--protocol", "udp"], 20_000),
        (&["--protocol", "tcp"], 20_001),
    ] {
        for _ in 0..2 {
            let arguments = [&["connect", &address], options].concat();
            let output = run(&arguments, b"hello").await;
            let told = text(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "{options:?}: {told}");
            assert_eq!(text(&output.stdout), "hello", "{options:?}: {told}");
            assert!(told.contains(&format!(":{port}\n")), "{options:?}: {told}");
            pool.until(|state| state.free_ports == 2).await;
        }
    }
}

#[tokio::test]
async fn connect_sends_no_datagrams_to_a_port_of_tcp() {
    let pool = mixed().await;
    let address = format!("{}:7700", pool.connection_address(0));
    for (options, words) in [
        (&["--port", "game"] as &[&str], "game (TCP), main (UDP)"),
        (
            &["--port", "main", "--port", "game", "--to", "game"],
            "game (TCP), main (UDP)",
        ),
        // Which entry it gets, only the answer says.
        (&["--port", "*/tcp", "--to", "game"], "leave out --udp"),
    ] {
        let arguments = [&["connect", &address, "--udp"], options].concat();
        let output = run(&arguments, b"hello").await;
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{options:?}: {told}");
        assert!(told.contains(words), "{options:?}: {told}");
        pool.until(|state| state.free_ports == 2).await;
    }
}

#[tokio::test]
async fn connect_says_that_it_is_connected_only_then() {
    let mut pool = Pool::running(1, |_| {}).await;
    // The address in the answers is one where no one listens.
    pool.table.advertised_address = Some(pool.connection_address(7).to_string());
    pool.table.generation += 1;
    pool.publish();
    pool.until(|state| state.generation == pool.table.generation)
        .await;
    let address = format!("{}:7700", pool.connection_address(0));
    let output = run(&["connect", &address], b"hello").await;
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("failed to connect to"), "{told}");
    assert!(!told.contains("connected to"), "{told}");
}

/// A program in a namespace of mounts where `hosts` is the file of names.
fn named(hosts: &std::path::Path, arguments: &[&str]) -> Command {
    let script = r#"mount --bind "$1" /etc/hosts && shift && exec "$@""#;
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(hosts)
        .args(arguments);
    command
}

#[tokio::test]
async fn connect_uses_the_address_of_a_name_at_which_the_pool_answers() {
    let pool = Pool::running(1, |_| {}).await;
    let host = pool.connection_address(0);
    // IPv6 too, on a port of its own, because all tests share its one address.
    let v6 = Process::start(&[
        "connection-server".to_owned(),
        format!("--table={}", pool.table_file().display()),
        "--listen=::1".to_owned(),
        "--load-sharing-port=17700".to_owned(),
        "--admin=[::1]:0".to_owned(),
    ]);
    let hosts = tempfile::NamedTempFile::new().unwrap();
    let names = format!("::1 v6only\n::1 both\n{host} both\n");
    std::fs::write(hosts.path(), names).unwrap();
    if !named(hosts.path(), &["true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("skipped: no namespace of mounts here (unshare --mount)");
        return;
    }
    let program = env!("CARGO_BIN_EXE_portpool");
    for (address, options) in [
        ("v6only:17700", &[] as &[&str]),
        ("v6only:17700", &["--udp"]),
        // A name with addresses of both kinds, of which the pool has one.
        ("both:7700", &[]),
        ("both:7700", &["--udp"]),
        ("both:17700", &["--udp"]),
    ] {
        let script = ["--retry-seconds=10", "--send=hello", "--expect=hello"];
        let arguments = [&[program, "connect", address], &script as &[&str], options].concat();
        let output = named(hosts.path(), &arguments).output().unwrap();
        let told = text(&output.stderr);
        assert!(output.status.success(), "{address} {options:?}: {told}");
    }
    drop(v6);
}

#[tokio::test]
async fn a_request_that_waits_outlasts_an_upgrade() {
    let mut pool = Pool::new(1, |table| table.rows[0].ranges[0].count = 1);
    pool.start_workload(0);
    pool.start_agent(0);
    pool.connection_servers.push(pool.start_successor(0));
    pool.until(|state| state.free_ports == 1).await;
    let session = pool.request().await.unwrap();
    let address = format!("{}:7700", pool.connection_address(0));
    let waiting = tokio::spawn(async move { run(&["request", &address, "--wait=30"], b"").await });
    for _ in 0..2 {
        pool.until(|state| state.waiting == 1).await;
        let successor = pool.start_successor(0);
        assert!(pool.connection_servers[0].ends(), "it is replaced");
        pool.connection_servers[0] = successor;
    }
    pool.until(|state| state.waiting == 1).await;
    pool.client().release(&session.id).await.unwrap();
    let output = waiting.await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    pool.until(|state| state.sessions == 1).await;
}

#[test]
fn help_teaches_with_examples() {
    for command in [
        "local",
        "request",
        "connect",
        "release",
        "connection-server",
        "processing-server",
        "echo",
    ] {
        let help = portpool(&[command, "--help"], b"");
        let example = format!("portpool {command} ");
        assert!(
            text(&help.stdout).contains(&example),
            "{command}: {}",
            text(&help.stdout)
        );
    }
}
