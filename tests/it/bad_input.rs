//! Wrong input of clients and peers: it is refused with a reason and counted,
//! and nothing breaks.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::{Pool, SOON, get, until_metric};
use portpool::selection::PROTOCOL_VERSION;
use portpool::selection::v1::refused::Cause;
use portpool::selection::v1::selection_client::SelectionClient;
use portpool::selection::v1::{self, FromAgent, ToAgent, from_agent, to_agent};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Sends raw bytes to the load-sharing port and reads to the end.
fn raw(pool: &Pool, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect((pool.connection_address(0), 7700)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    // A server that refuses early may close before all is written.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn post(pool: &Pool, content_type: &str, body: &str) -> String {
    let head = format!(
        "POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    raw(pool, format!("{head}{body}").as_bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_wrong_get_problem_details() {
    let pool = Pool::running(1, |_| {}).await;
    let json = "application/json";
    let long = format!(r#"{{"idempotencyKey":"{}"}}"#, "k".repeat(129));
    let much = format!(r#"{{"metadata":{{"k":"{}"}}}}"#, "v".repeat(4096));
    let keys: Vec<String> = (0..65).map(|key| format!(r#""{key}":"""#)).collect();
    let many = format!(r#"{{"metadata":{{{}}}}}"#, keys.join(","));
    let huge = format!(r#"{{"idempotencyKey":"{}"}}"#, "k".repeat(100_000));
    let cases = [
        (json, "{", 400, "malformed"),
        (json, "[null,null]", 422, "must be a JSON object"),
        (json, r#"{"protocol":"SCTP"}"#, 422, "invalid-field"),
        (json, r#"{"waitSeconds":"soon"}"#, 422, "invalid-field"),
        (json, r#"{"waitSeconds":301}"#, 422, "must not exceed 300"),
        (json, r#"{"waitSeconds":-1}"#, 422, "invalid-field"),
        (
            json,
            r#"{"port":1}"#,
            422,
            "unknown field `port`, expected one of",
        ),
        (
            json,
            r#"{"portName":"other"}"#,
            422,
            "the pool has main (TCPUDP)",
        ),
        (json, r#"{"affinityKey":""}"#, 422, "1 to 128 characters"),
        (
            json,
            r#"{"near":""}"#,
            422,
            "near must have 1 to 64 characters",
        ),
        (json, r#"{"server":"test-9"}"#, 422, "unknown-server"),
        (
            json,
            r#"{"near":"none"}"#,
            422,
            "near: no live session has this id",
        ),
        (
            json,
            r#"{"near":"none","server":"test-0"}"#,
            422,
            "give server or near, not both",
        ),
        (json, &long, 422, "this one has 129"),
        (
            json,
            &much,
            422,
            "metadata: all keys and values must have at most 4096 bytes together; these have 4097",
        ),
        (
            json,
            &many,
            422,
            "metadata: there must be at most 64 keys; these are 65",
        ),
        (
            json,
            r#"{"metadata":{"level":3}}"#,
            422,
            r#"metadata: the value of \"level\" must be a string"#,
        ),
        (
            json,
            r#"{"metadata":"text"}"#,
            422,
            "an object of strings for metadata",
        ),
        (
            json,
            r#"{"metadata":{"a":"1","a":"2"}}"#,
            422,
            "occurs twice",
        ),
        (json, &huge, 413, "too-large"),
        (json, &"[".repeat(8000), 422, "invalid-field"),
        (
            json,
            r#"{"waitSeconds":1,"waitSeconds":2}"#,
            422,
            "duplicate field",
        ),
        (json, "\u{feff}{}", 400, "malformed"),
        ("text/plain", "{}", 415, "application/json"),
    ];
    for (content_type, body, status, words) in cases {
        let answer = post(&pool, content_type, body);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{body:.60}: {answer}"
        );
        assert!(
            answer.contains("application/problem+json") && answer.contains(words),
            "{body:.60}: {answer}"
        );
        assert!(is_documented("/v1/sessions", "post", status), "{status}");
    }
    assert!(is_documented("/v1/sessions/{id}", "get", 404));
    assert!(is_documented("/v1/sessions/{id}", "delete", 404));
    for (line, status) in [
        ("GET /v1/sessions/none", 404),
        ("GET /v1/sessions/%ff", 404),
        ("DELETE /v1/sessions/none", 404),
        ("DELETE /v1/sessions/%ff", 404),
        ("GET /v1/sessions/", 404),
        ("GET /none", 404),
        ("PUT /v1/pool", 405),
        ("GET /v1/sessions", 405),
        ("POST /openapi.json", 405),
    ] {
        let answer = raw(
            &pool,
            format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes(),
        );
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains("problem+json"),
            "{line}: {answer}"
        );
    }
    // Characters are counted, not bytes.
    let longest = format!(r#"{{"idempotencyKey":"{}"}}"#, "\u{e9}".repeat(128));
    let answer = post(&pool, json, &longest);
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    // The largest metadata, written as long as JSON can.
    let escaped = format!(r#"{{"metadata":{{"k":"{}"}}}}"#, "\\u0001".repeat(4095));
    let answer = post(&pool, json, &escaped);
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    let metrics = get(pool.connection_address(0), 7701, "/metrics");
    for cause in [
        "malformed",
        "invalid-field",
        "unknown-port",
        "too-large",
        "not-json",
        "no-session",
        "not-found",
        "method-not-allowed",
    ] {
        let line = format!("portpool_requests_refused_total{{cause=\"{cause}\"}}");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
    assert!(metrics.contains("portpool_allocations_total{outcome=\"unknown-port\"} 1"));
    for word in ["SCTP", "other", "kkkk", "none\""] {
        let labels = metrics
            .lines()
            .filter(|line| !line.starts_with('#') && !line.contains("other_pool"));
        let found: Vec<&str> = labels.filter(|line| line.contains(word)).collect();
        assert!(found.is_empty(), "a client chose {found:?}");
    }
}

/// Whether the OpenAPI document has this answer.
fn is_documented(path: &str, method: &str, status: u16) -> bool {
    let document = portpool::connection::load_sharing::api::openapi()
        .to_json()
        .unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    document["paths"][path][method]["responses"]
        .get(status.to_string())
        .is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_well_formed_http_is_refused() {
    let pool = Pool::running(1, |_| {}).await;
    let post = "POST /v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let headers: String = (0..200).map(|index| format!("h{index}: v\r\n")).collect();
    let cases = [
        // Requests whose end a proxy could see in another place than we do.
        (
            format!("{post}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}"),
            400,
        ),
        (format!("{post}content-length: -1\r\n\r\n{{}}"), 400),
        (format!("{post}content-length : 2\r\n\r\n{{}}"), 400),
        (
            format!("{post}transfer-encoding: xchunked\r\n\r\n0\r\n\r\n"),
            400,
        ),
        (
            format!("{post}transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
            400,
        ),
        (
            format!("{post}transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n{{}}"),
            400,
        ),
        (
            "POST /v1/sessions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET /v1/pool HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET /v1/pool HTTP/1.1\r\nconnection: close\r\n\r\n".to_owned(),
            400,
        ),
        (
            "GET /v1/pool HTTP/1.1\r\nhost: x\r\nhost: y\r\nconnection: close\r\n\r\n".to_owned(),
            400,
        ),
        (
            format!("GET /v1/pool HTTP/1.1\r\nhost: x\r\n{headers}\r\n"),
            431,
        ),
        // A body that is announced as too large is refused before it arrives.
        (
            format!("{post}connection: close\r\ncontent-length: 40000\r\n\r\n{{"),
            413,
        ),
    ];
    for (request, status) in cases {
        let started = Instant::now();
        let answer = raw(&pool, request.as_bytes());
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{request:.200}: {answer}"
        );
        assert!(started.elapsed() < Duration::from_secs(4), "{request:.200}");
    }
    until_metric(
        pool.connection_address(0),
        7701,
        "portpool_requests_refused_total{cause=\"no-host\"} 2",
    );
    // Not HTTP: the connection ends, whatever the client sends, and the server runs on.
    raw(&pool, b"\x16\x03\x01 this is not HTTP\r\n\r\n");
    let header = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(64 * 1024));
    // The answer may be lost in the reset of a connection with unread bytes.
    let answer = raw(&pool, header.as_bytes());
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    pool.request().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_sender_is_given_up() {
    let pool = Pool::running(1, |_| {}).await;
    let started = Instant::now();
    let head = "POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    let answer = raw(&pool, head.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(started.elapsed() < Duration::from_secs(8));
}

/// The stream to the agent of slot 0, once it listens, with first messages.
async fn stream(
    pool: &Pool,
    first: Vec<ToAgent>,
) -> Result<(mpsc::Sender<ToAgent>, Streaming<FromAgent>), Status> {
    let address = format!("http://{}", SocketAddr::new(pool.server_address(0), 7070));
    let deadline = Instant::now() + SOON;
    let mut client = loop {
        match SelectionClient::connect(address.clone()).await {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let (sender, outgoing) = mpsc::channel(64);
    for message in first {
        sender.send(message).await.unwrap();
    }
    let incoming = client
        .attach(ReceiverStream::new(outgoing))
        .await?
        .into_inner();
    Ok((sender, incoming))
}

fn message(message: to_agent::Message) -> ToAgent {
    ToAgent {
        message: Some(message),
    }
}

fn hello(pool: &Pool, change: impl FnOnce(&mut v1::Hello)) -> ToAgent {
    let mut hello = v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        pool_uid: pool.table.pool_uid.clone(),
        connection_server: "ours".to_owned(),
        table: pool.table.encode().unwrap(),
        sessions: Vec::new(),
        host_identity: String::new(),
        unavailable_ports: Vec::new(),
    };
    change(&mut hello);
    message(to_agent::Message::Hello(hello))
}

#[tokio::test]
async fn greetings_that_are_wrong_are_refused() {
    let mut pool = Pool::new(1, |_| {});
    pool.start_agent(0);
    let other_pool =
        |hello: &mut v1::Hello| hello.table = hello.table.replace("\"uid\"", "\"other\"");
    let cases = [
        (
            hello(&pool, |hello| hello.protocol_version = 99),
            Code::FailedPrecondition,
            "99 is not spoken",
        ),
        (
            hello(&pool, |hello| hello.pool_uid = "other".to_owned()),
            Code::FailedPrecondition,
            "another pool's",
        ),
        (
            hello(&pool, other_pool),
            Code::FailedPrecondition,
            "another pool's",
        ),
        (
            hello(&pool, |hello| hello.table = "{".to_owned()),
            Code::InvalidArgument,
            "not valid",
        ),
        (
            hello(&pool, |hello| hello.connection_server = String::new()),
            Code::InvalidArgument,
            "1 to 64 bytes",
        ),
        (
            hello(&pool, |hello| hello.connection_server = "x".repeat(65)),
            Code::InvalidArgument,
            "1 to 64 bytes",
        ),
        (
            message(to_agent::Message::Lookup(v1::Lookup::default())),
            Code::InvalidArgument,
            "must be Hello",
        ),
        (
            ToAgent { message: None },
            Code::InvalidArgument,
            "must be Hello",
        ),
    ];
    for (first, code, words) in cases {
        let refused = stream(&pool, vec![first]).await.err().unwrap();
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(words), "{refused}");
    }
    assert!(stream(&pool, vec![hello(&pool, |_| {})]).await.is_ok());
    let shows = |line: &str| until_metric(pool.server_address(0), 7071, line);
    shows("portpool_refused_greetings_total 8");
    shows("portpool_tables_rejected_total{cause=\"other_pool\"} 1");
    shows("portpool_tables_rejected_total{cause=\"invalid\"} 1");
}

#[tokio::test]
async fn selections_that_are_wrong_are_refused() {
    let mut pool = Pool::new(1, |table| table.generation = 2);
    pool.start_workload(0);
    pool.start_agent(0);
    let (sender, mut incoming) = stream(&pool, vec![hello(&pool, |_| {})]).await.unwrap();
    // Wait until the workload listens.
    loop {
        if let Some(from_agent::Message::Counts(counts)) =
            incoming.message().await.unwrap().unwrap().message
            && counts.ports[0].free > 0
        {
            break;
        }
    }
    let select = |change: fn(&mut v1::Select)| {
        let mut select = v1::Select {
            session_id: "new".to_owned(),
            ..v1::Select::default()
        };
        change(&mut select);
        select
    };
    let cases = [
        (select(|_| {}), None),
        (select(|_| {}), Some(Cause::DuplicateId)),
        (
            select(|select| select.session_id = String::new()),
            Some(Cause::Malformed),
        ),
        (
            select(|select| select.session_id = "x".repeat(65)),
            Some(Cause::Malformed),
        ),
        (
            select(|select| {
                select.session_id = "a".to_owned();
                select.port_name = "none".to_owned();
            }),
            Some(Cause::UnknownPort),
        ),
        (
            select(|select| {
                select.session_id = "b".to_owned();
                select.protocol = "SCTP".to_owned();
            }),
            Some(Cause::Malformed),
        ),
        (
            select(|select| {
                select.session_id = "c".to_owned();
                select.bound_client = "no-address".to_owned();
            }),
            Some(Cause::Malformed),
        ),
        (
            select(|select| {
                select.session_id = "d".to_owned();
                select.idempotency_key = "k".to_owned();
            }),
            None,
        ),
        (
            select(|select| {
                select.session_id = "e".to_owned();
                select.idempotency_key = "k".to_owned();
                select.bound_client = "127.0.0.1".to_owned();
            }),
            Some(Cause::KeyReused),
        ),
    ];
    // Pipelined: all are sent before the first answer is read.
    for (request_id, (select, _)) in (1..).zip(&cases) {
        let select = v1::Select {
            request_id,
            ..select.clone()
        };
        sender
            .send(message(to_agent::Message::Select(select)))
            .await
            .unwrap();
    }
    let mut answers = Vec::new();
    while answers.len() < cases.len() {
        match incoming.message().await.unwrap().unwrap().message {
            Some(from_agent::Message::Selected(selected)) => {
                answers.push((selected.request_id, None))
            }
            Some(from_agent::Message::Refused(refused)) => {
                answers.push((refused.request_id, Some(refused.cause())))
            }
            _ => {}
        }
    }
    let expected: Vec<_> = (1..).zip(cases.iter().map(|(_, cause)| *cause)).collect();
    assert_eq!(answers, expected);
    // Tables that are refused, messages out of order, and a port that no server has.
    let update = |change: fn(&mut portpool::table::Table)| {
        let mut table = pool.table.clone();
        table.rows.clear();
        change(&mut table);
        let table = table.encode().unwrap();
        message(to_agent::Message::TableUpdate(v1::TableUpdate {
            table,
            ..v1::TableUpdate::default()
        }))
    };
    for wrong in [
        update(|table| table.generation = 1),
        update(|table| (table.generation, table.pool_uid) = (9, "other".to_owned())),
        message(to_agent::Message::TableUpdate(v1::TableUpdate::default())),
        hello(&pool, |_| {}),
        ToAgent { message: None },
    ] {
        sender.send(wrong).await.unwrap();
    }
    let lookup = v1::Lookup {
        request_id: 7,
        connection_port: 70_000,
    };
    sender
        .send(message(to_agent::Message::Lookup(lookup)))
        .await
        .unwrap();
    loop {
        if let Some(from_agent::Message::LookedUp(found)) =
            incoming.message().await.unwrap().unwrap().message
        {
            assert_eq!((found.request_id, found.session), (7, None));
            break;
        }
    }
    let shows = |line: &str| until_metric(pool.server_address(0), 7071, line);
    for (outcome, count) in [
        ("SELECTED", 2),
        ("DUPLICATE_ID", 1),
        ("MALFORMED", 4),
        ("UNKNOWN_PORT", 1),
        ("KEY_REUSED", 1),
    ] {
        shows(&format!(
            "portpool_selections_total{{outcome=\"{outcome}\"}} {count}"
        ));
    }
    for cause in ["older", "other_pool", "invalid"] {
        shows(&format!(
            "portpool_tables_rejected_total{{cause=\"{cause}\"}} 1"
        ));
    }
    shows("portpool_unexpected_messages_total 2");
}
