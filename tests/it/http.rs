//! HTTP as clients really speak it to the load-sharing port: requests whose
//! sender has ended its side, clients that leave, habits of old libraries, and
//! the usual programs and languages.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use portpool::pool::Mapping;

use crate::common::{COUNT, Pool, SOON, turn};

/// A request without a body.
const WHOLE: &str = "POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

/// A pool with `ports` ports, all of which lead to the same server port.
async fn wide(ports: u16) -> Pool {
    let mut pool = Pool::new(1, |table| {
        let range = &mut table.rows[0].ranges[0];
        (range.count, range.mapping) = (ports, Mapping::Shared);
        // Some programs are compiled first.
        table.sessions.claim_seconds = 600;
    });
    pool.start_workload(0);
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports == u32::from(ports))
        .await;
    pool
}

/// A pool without a free port, and the sessions that have them.
async fn full() -> (Pool, Vec<portpool::session::Session>) {
    let pool = Pool::running(1, |_| {}).await;
    let mut sessions = Vec::new();
    for _ in 0..COUNT {
        sessions.push(pool.request().await.unwrap());
    }
    (pool, sessions)
}

fn open(pool: &Pool) -> TcpStream {
    let stream = TcpStream::connect((pool.connection_address(0), 7700)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// A request in `version` that waits for a port.
fn waiting(version: &str) -> String {
    let body = r#"{"waitSeconds":60}"#;
    format!(
        "POST /v1/sessions {version}\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// The status of the final answer; interim ones are skipped.
fn status(stream: TcpStream) -> String {
    let mut lines = BufReader::new(stream).lines();
    loop {
        let line = lines.next().expect("an answer").unwrap();
        match line.strip_prefix("HTTP/1.") {
            Some(rest) if !rest.contains(" 100 ") => return rest[2..5].to_owned(),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_request_whose_sender_has_ended_its_side_is_answered() {
    let pool = wide(40).await;
    for _ in 0..40 {
        let mut stream = open(&pool);
        stream.write_all(WHOLE.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        // As such clients read: the first line is that of the answer.
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
    let state = pool.client().pool().await.unwrap();
    assert_eq!((state.sessions, state.free_ports), (40, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_client_that_has_ended_its_side_gets_its_port() {
    let (pool, sessions) = full().await;
    let mut stream = open(&pool);
    stream.write_all(waiting("HTTP/1.1").as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    pool.until(|state| state.waiting == 1).await;
    // It has been asked whether it is there.
    tokio::time::sleep(Duration::from_secs(1)).await;
    pool.client().release(&sessions[0].id).await.unwrap();
    assert_eq!(status(stream), "201");
}

fn leave(mut stream: TcpStream, how: &str) {
    match how {
        "ends its side, then closes" => {
            stream.shutdown(Shutdown::Write).unwrap();
            std::thread::sleep(Duration::from_millis(100));
        }
        "has sent a next request" => stream.write_all(WHOLE.as_bytes()).unwrap(),
        "resets" => socket2::SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap(),
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_client_that_leaves_is_not_served() {
    let (pool, sessions) = full().await;
    for version in ["HTTP/1.1", "HTTP/1.0"] {
        for how in [
            "closes",
            "ends its side, then closes",
            "has sent a next request",
            "resets",
        ] {
            let mut stream = open(&pool);
            stream.write_all(waiting(version).as_bytes()).unwrap();
            pool.until(|state| state.waiting == 1).await;
            leave(stream, how);
            let took = pool.until(|state| state.waiting == 0).await;
            assert!(took < Duration::from_secs(1), "{version}, {how}: {took:?}");
        }
    }
    pool.client().release(&sessions[0].id).await.unwrap();
    pool.until(|state| state.free_ports == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_http_1_0_that_ended_its_side_is_told_that_nothing_is_free() {
    let (pool, _sessions) = full().await;
    let mut stream = open(&pool);
    stream.write_all(waiting("HTTP/1.0").as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(status(stream), "503");
}

#[tokio::test(flavor = "multi_thread")]
async fn habits_of_old_libraries_are_understood() {
    let json = "content-type: application/json\r\n";
    let habits = [
        ("HTTP/1.0 without Host", "POST /v1/sessions HTTP/1.0\r\n\r\n".to_owned()),
        ("HTTP/1.0 with keep-alive", "POST /v1/sessions HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n".to_owned()),
        ("an empty line first", format!("\r\n{WHOLE}")),
        ("an empty line after the body", format!("POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{json}content-length: 2\r\n\r\n{{}}\r\n")),
        ("a bare line feed at the ends of lines", WHOLE.replace("\r\n", "\n")),
        ("no space after the colon", WHOLE.replace(": ", ":")),
        ("capitals", WHOLE.replace("host", "HOST").replace("close", "Close")),
        ("the whole URL, as to a proxy", WHOLE.replace("/v1", "http://x:7700/v1")),
        ("a chunked body", format!("POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{json}transfer-encoding: chunked\r\n\r\n1\r\n{{\r\n1\r\n}}\r\n0\r\n\r\n")),
        ("an empty chunked body", "POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned()),
        ("an expectation that it does not wait for", format!("POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{json}expect: 100-continue\r\ncontent-length: 2\r\n\r\n{{}}")),
        ("an offer to go over to HTTP/2", WHOLE.replace("connection: close", "connection: close, upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk")),
        ("the type of a form without a body", WHOLE.replace("close\r\n", "close\r\ncontent-type: application/x-www-form-urlencoded\r\ncontent-length: 0\r\n")),
    ];
    let pool = wide(60).await;
    for (habit, request) in &habits {
        for ends_its_side in [false, true] {
            let mut stream = open(&pool);
            stream.write_all(request.as_bytes()).unwrap();
            if ends_its_side {
                stream.shutdown(Shutdown::Write).unwrap();
            }
            assert_eq!(status(stream), "201", "{habit}, {ends_its_side}");
        }
    }
    // One byte after another, and then the end.
    let mut stream = open(&pool);
    stream.set_nodelay(true).unwrap();
    for byte in WHOLE.bytes() {
        stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(status(stream), "201");
    let state = pool.client().pool().await.unwrap();
    assert_eq!(state.sessions as usize, habits.len() * 2 + 1);
}

/// Many clients send all before they read. A server that closes while bytes
/// arrive resets the connection, and the answer is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_a_client_that_still_sends() {
    let pool = Pool::running(1, |_| {}).await;
    let (head, body) = (WHOLE.trim_end(), vec![b' '; 400_000]);
    for _ in 0..10 {
        let mut stream = open(&pool);
        let head = format!("{head}\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        for part in body.chunks(40_000) {
            stream.write_all(part).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(status(stream), "413");
    }
}

/// The command that runs a client, and the number of sessions that it gets.
fn programs(host: &str) -> Vec<(Vec<String>, usize)> {
    let url = format!("http://{host}:7700/v1/sessions");
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let curl = |options: &str| {
        let mut command = words("curl -s -S -w %{http_code} -o /dev/null -X POST");
        command.extend(words(options));
        command.push(url.clone());
        (command, 1)
    };
    let script = |runs: &str, file: &str, sessions| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");
        let mut command = words(runs);
        command.push(format!("{folder}/{file}"));
        command.extend([host.to_owned(), "7700".to_owned()]);
        (command, sessions)
    };
    let nc = format!("printf '{}' | nc -N {host} 7700", WHOLE.escape_default());
    vec![
        curl("--http1.1"),
        curl("--http1.0"),
        curl("--http2-prior-knowledge"),
        curl("--http2"),
        curl("-H content-type:application/json -H expect:100-continue -d {}"),
        (
            words("wget -S -O /dev/null --post-data= ")
                .into_iter()
                .filter(|word| !word.is_empty())
                .chain([url.clone()])
                .collect(),
            1,
        ),
        (vec!["nc".to_owned(), nc], 1),
        script("python3", "client.py", 4),
        script("go run", "client.go", 3),
        script("node", "client.js", 3),
        script("java", "Client.java", 4),
        script("perl", "client.pl", 2),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_usual_programs_and_languages_get_sessions() {
    let _turn = turn().await;
    let pool = wide(60).await;
    let mut expected = 0;
    for (command, sessions) in programs(&pool.connection_address(0).to_string()) {
        let name = &command[0];
        if Command::new("which")
            .arg(name)
            .output()
            .is_ok_and(|found| !found.status.success())
        {
            eprintln!("skipped: no {name} here");
            continue;
        }
        let started = Instant::now();
        let mut run = match name.as_str() {
            "nc" => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &command[1]]);
                shell
            }
            _ => {
                let mut program = Command::new(name);
                program.args(&command[1..]);
                program
            }
        };
        let output = tokio::task::spawn_blocking(move || run.output())
            .await
            .unwrap()
            .unwrap();
        let told = [output.stdout, output.stderr].concat();
        let told = String::from_utf8_lossy(&told);
        assert_eq!(told.matches("201").count(), sessions, "{command:?}: {told}");
        eprintln!("{name}: {:?}", started.elapsed());
        expected += u32::try_from(sessions).unwrap();
    }
    let state = pool.client().pool().await.unwrap();
    assert_eq!(state.sessions, expected, "no session is lost");
}
