//! The client's commands as a user runs them, against a running pool.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use crate::common::{COUNT, Pool, SERVER_PORT};
use portpool::session::{Session, SessionState};

fn portpool(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_portpool"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
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
    let cases: [(&[&str], i32, &str); 8] = [
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
        (&["release", &address, "none"], 1, "no live session"),
    ];
    for (arguments, code, words) in cases {
        let output = run(arguments, b"").await;
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(words), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
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
