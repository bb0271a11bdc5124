//! The admin port's pages about sessions: which is where, and what happens to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use portpool::session::{Metadata, SessionRequest};
use serde_json::{Value, json};

use crate::common::{Pool, SOON, connect, echo, get, is_cut};

/// The status and the JSON body of the answer to `PATCH /v1/sessions/id` on the admin
/// port of the connection server of this index.
fn amend(pool: &Pool, index: u32, id: &str, content_type: &str, body: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect((pool.connection_address(index), 7701)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(
        stream,
        "PATCH /v1/sessions/{id} HTTP/1.0\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap())
}

const MERGE_PATCH: &str = "application/merge-patch+json";

/// The status and the JSON body of the answer to `GET path` on an admin port.
fn ask(pool: &Pool, path: &str) -> (u16, Value) {
    let answer = get(pool.connection_address(0), 7701, path);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap())
}

fn ids(page: &Value) -> Vec<&str> {
    let items = page["items"].as_array().unwrap().iter();
    items.map(|item| item["id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn sessions_are_listed_by_server_port_name_and_state() {
    let pool = Pool::running(2, |_| {}).await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(pool.request().await.unwrap());
    }
    let mut client = connect(&sessions[0]);
    echo(&mut client, "busy now");
    pool.until(|state| state.servers.iter().any(|server| server.ports[0].busy == 1))
        .await;

    let (_, all) = ask(&pool, "/v1/sessions");
    let mut expected: Vec<&str> = sessions.iter().map(|session| session.id.as_str()).collect();
    expected.sort_unstable();
    assert_eq!(ids(&all), expected);
    assert!(all.get("next").is_none());

    let (_, busy) = ask(&pool, "/v1/sessions?state=Busy");
    assert_eq!(ids(&busy), [sessions[0].id.as_str()]);
    let busy = &busy["items"][0];
    assert_eq!(busy["port"], sessions[0].port);
    assert_eq!(busy["server"], sessions[0].server.as_str());
    assert_eq!(busy["connections"], 1);
    assert_eq!(
        busy["requester"],
        client.local_addr().unwrap().ip().to_string()
    );

    let (server, name) = (&sessions[1].server, &sessions[1].port_name);
    let (_, there) = ask(
        &pool,
        &format!("/v1/sessions?server={server}&portName={name}"),
    );
    assert_eq!(ids(&there).len(), 2, "of two servers");
    let (_, none) = ask(&pool, "/v1/sessions?portName=other");
    assert!(ids(&none).is_empty());

    let mut paged = Vec::new();
    let mut path = "/v1/sessions?limit=3".to_owned();
    loop {
        let (_, page) = ask(&pool, &path);
        paged.extend(ids(&page).iter().map(|&id| id.to_owned()));
        match page["next"].as_str() {
            Some(next) => path = format!("/v1/sessions?limit=3&after={next}"),
            None => break,
        }
    }
    assert_eq!(paged, expected);
}

#[tokio::test]
async fn what_clients_say_is_listed_and_reported() {
    let mut pool = Pool::running(1, |_| {}).await;
    pool.start_connection_server(1);
    pool.until_of(1, |state| state.free_ports > 0).await;
    let (_, mut watcher) = watch(&pool);
    let request = SessionRequest {
        metadata: Metadata::new([("map", "harbor"), ("player", "ada")]).unwrap(),
        ..SessionRequest::default()
    };
    // Through the one that is not asked.
    let said = pool.client_of(1).request(request).await.unwrap();
    let (_, event) = next_event(&mut watcher);
    let expected = json!({ "map": "harbor", "player": "ada" });
    assert_eq!(event["session"]["metadata"], expected);
    let silent = pool.request().await.unwrap();
    let (_, page) = ask(&pool, "/v1/sessions");
    let items = page["items"].as_array().unwrap();
    let of = |id: &str| items.iter().find(|item| item["id"] == id).unwrap();
    assert_eq!(of(&said.id)["metadata"], expected);
    assert_eq!(of(&silent.id).get("metadata"), None);
}

/// All connection servers learn of it, whichever is asked.
#[tokio::test]
async fn a_live_session_is_amended_and_ends_when_that_says() {
    let mut pool = Pool::running(1, |table| table.sessions.max_duration_seconds = 3600).await;
    pool.start_connection_server(1);
    pool.until_of(1, |state| state.free_ports > 0).await;
    let session = pool.request().await.unwrap();
    let mut client = connect(&session);
    echo(&mut client, "busy");
    let lasts = session.expires.unwrap().duration_since(session.created);
    assert_eq!(lasts.as_secs(), 3600);
    pool.until(|state| state.servers[0].ports[0].busy == 1)
        .await;
    let (_, mut watcher) = watch(&pool);
    let says = r#"{"metadata": {"map": "harbor", "seed": "7"}}"#;
    let (status, amended) = amend(&pool, 1, &session.id, MERGE_PATCH, says);
    assert_eq!(status, 200, "{amended}");
    let expected = json!({ "map": "harbor", "seed": "7" });
    assert_eq!(amended["metadata"], expected);
    let (name, event) = next_event(&mut watcher);
    assert_eq!(
        (name.as_str(), &event["session"]["metadata"]),
        ("Amended", &expected)
    );
    assert_eq!(event["session"]["state"], "Busy");

    let soon = jiff::Timestamp::now() + Duration::from_secs(7200);
    let patch = json!({ "expires": soon, "metadata": { "seed": null } }).to_string();
    let (status, amended) = amend(&pool, 0, &session.id, "application/json", &patch);
    assert_eq!(status, 200, "{amended}");
    assert_eq!(amended["metadata"], json!({ "map": "harbor" }));
    let (_, shown) = ask(&pool, &format!("/v1/sessions/{}", session.id));
    let expires: jiff::Timestamp = shown["expires"].as_str().unwrap().parse().unwrap();
    assert_eq!(expires.as_millisecond(), soon.as_millisecond());
    let (_, unlimited) = amend(
        &pool,
        0,
        &session.id,
        MERGE_PATCH,
        r#"{"expires": null, "metadata": null}"#,
    );
    assert_eq!(
        (unlimited.get("expires"), unlimited.get("metadata")),
        (None, None)
    );

    let at_once = jiff::Timestamp::now() + Duration::from_secs(2);
    let patch = json!({ "expires": at_once }).to_string();
    let (status, amended) = amend(&pool, 0, &session.id, MERGE_PATCH, &patch);
    assert_eq!(status, 200, "{amended}");
    echo(&mut client, "still here");
    assert!(is_cut(&mut client));
    assert!(jiff::Timestamp::now() >= at_once);
    assert_eq!(ask(&pool, &format!("/v1/sessions/{}", session.id)).0, 404);
}

const PORT: &str = r#"{"port":1}"#;
const NUMBER: &str = r#"{"expires":60}"#;
const PASSED: &str = r#"{"expires":"2020-01-01T00:00:00Z"}"#;
const EPOCH: &str = r#"{"expires":"1970-01-01T00:00:00Z"}"#;
/// The time that Go has for none.
const ZERO: &str = r#"{"expires":"0001-01-01T00:00:00Z"}"#;
const FAR: &str = r#"{"expires":"9020-01-01T00:00:00Z"}"#;
const MORE: &str = r#"{"metadata":{"a":""}}"#;

/// `session::amendment` tests what else a body may have wrong.
#[tokio::test]
async fn a_wrong_amendment_is_refused_with_the_reason() {
    let mut pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let mut largest = serde_json::Map::new();
    largest.insert("k".to_owned(), "v".repeat(4095).into());
    let largest = json!({ "metadata": largest }).to_string();
    assert_eq!(amend(&pool, 0, &session.id, MERGE_PATCH, &largest).0, 200);
    let huge = json!({ "metadata": { "k": "v".repeat(40_000) } }).to_string();
    let is = session.id.as_str();
    let refused = |id: &str, content_type: &str, body: &str, expected: (u16, &str, &str)| {
        let (found, problem) = amend(&pool, 0, id, content_type, body);
        let (status, kind, words) = expected;
        assert_eq!(found, status, "{body:.60}: {problem}");
        let kind = format!("urn:portpool:problem:{kind}");
        assert_eq!(problem["type"], kind, "{body:.60}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(words), "{body:.60}: {detail}");
    };
    let no_session = (404, "no-session", "no live session");
    refused("none", MERGE_PATCH, "{}", no_session);
    refused("%ff", MERGE_PATCH, "{}", no_session);
    refused(&"x".repeat(65), MERGE_PATCH, "{}", no_session);
    refused(is, "text/plain", "{}", (415, "not-json", MERGE_PATCH));
    // What a browser adds for a web page.
    let page = format!("{MERGE_PATCH}\r\norigin: http://example.org");
    refused(is, &page, "{}", (403, "web-page", "without Origin"));
    for (body, status, kind, words) in [
        ("{", 400, "malformed", "EOF"),
        (&huge, 413, "too-large", "32768 bytes"),
        (
            PORT,
            422,
            "invalid-field",
            "expected `expires` or `metadata`",
        ),
        (NUMBER, 422, "invalid-field", "must be null, or a time like"),
        (PASSED, 422, "expires-passed", "must be a time to come"),
        (EPOCH, 422, "expires-passed", "must be a time to come"),
        (ZERO, 422, "expires-passed", "must be a time to come"),
        (FAR, 422, "expires-too-far", "at most 30 days ahead"),
        (MORE, 422, "invalid-field", "more than 4096 bytes together"),
    ] {
        refused(is, MERGE_PATCH, body, (status, kind, words));
    }
    let (_, shown) = ask(&pool, &format!("/v1/sessions/{}", session.id));
    assert_eq!(shown["metadata"]["k"].as_str().unwrap().len(), 4095);
    assert_eq!(shown.get("expires"), None);
    pool.agents[0].kill();
    pool.until(|state| !state.servers[0].attached).await;
    let (status, problem) = amend(&pool, 0, is, MERGE_PATCH, "{}");
    assert_eq!(status, 503, "{problem}");
    assert_eq!(problem["type"], "urn:portpool:problem:server-out-of-reach");
    let page = get(pool.connection_address(0), 7701, "/metrics");
    for (cause, count) in [("no-session", 3), ("web-page", 1), ("expires-passed", 3)] {
        let line = format!("portpool_requests_refused_total{{cause=\"{cause}\"}} {count}\n");
        assert!(page.contains(&line), "{line}{page}");
    }
}

#[tokio::test]
async fn a_wrong_question_about_sessions_names_the_parameter() {
    let pool = Pool::running(1, |_| {}).await;
    for (query, named) in [
        ("limit=0", "limit must be 1 to 1000"),
        ("limit=1001", "limit must be 1 to 1000"),
        ("limit=many", "limit"),
        ("state=Asleep", "Asleep"),
        ("servers=one", "servers"),
    ] {
        let (status, problem) = ask(&pool, &format!("/v1/sessions?{query}"));
        let detail = problem["detail"].as_str().unwrap();
        assert_eq!(status, 422, "{query}: {problem}");
        assert!(detail.contains(named), "{query}: {detail}");
    }
}

/// A client that watches events, after the head of the answer.
fn watch(pool: &Pool) -> (u16, BufReader<TcpStream>) {
    let mut stream = TcpStream::connect((pool.connection_address(0), 7701)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(stream, "GET /v1/events HTTP/1.0\r\n\r\n").unwrap();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    while line != "\r\n" {
        line.clear();
        stream.read_line(&mut line).unwrap();
    }
    (status, stream)
}

/// The name and the data of the next event.
fn next_event(watcher: &mut BufReader<TcpStream>) -> (String, Value) {
    let (mut name, mut data) = (None, None);
    loop {
        let mut line = String::new();
        watcher.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            Some(("event", value)) => name = Some(value.to_owned()),
            Some(("data", value)) => data = Some(serde_json::from_str(value).unwrap()),
            _ if name.is_some() => return (name.unwrap(), data.unwrap()),
            _ => assert!(!line.is_empty(), "the stream has ended"),
        }
    }
}

#[tokio::test]
async fn who_watches_learns_of_every_change_of_a_session() {
    let mut pool = Pool::running(1, |table| table.sessions.linger_seconds = 60).await;
    let (status, mut watcher) = watch(&pool);
    assert_eq!(status, 200);
    let session = pool.request().await.unwrap();
    let mut client = connect(&session);
    echo(&mut client, "watched");
    drop(client);
    pool.until(|state| state.servers[0].ports[0].lingering == 1)
        .await;
    pool.client().release(&session.id).await.unwrap();
    for expected in ["Held", "Busy", "Lingering", "Ended"] {
        let (name, event) = next_event(&mut watcher);
        assert_eq!(name, expected, "{event}");
        assert_eq!(event["session"]["id"], session.id.as_str());
        let cause = event.get("cause").and_then(Value::as_str);
        assert_eq!(cause, (name == "Ended").then_some("RELEASED"));
    }
    // Nobody has to leave for the connection server to end.
    pool.connection_servers[0].terminate();
    pool.connection_servers[0].wait();
    let mut rest = String::new();
    watcher.read_to_string(&mut rest).unwrap();
}

#[tokio::test]
async fn watchers_beyond_the_bound_are_refused_until_one_leaves() {
    let pool = Pool::running(1, |_| {}).await;
    let mut watchers: Vec<_> = (0..32).map(|_| watch(&pool)).collect();
    assert!(watchers.iter().all(|(status, _)| *status == 200));
    let (status, mut refused) = watch(&pool);
    let mut problem = String::new();
    refused.read_to_string(&mut problem).unwrap();
    assert_eq!(status, 503, "{problem}");
    assert!(problem.contains("too-many-watchers"), "{problem}");
    watchers.pop();
    let deadline = std::time::Instant::now() + SOON;
    // Its leaving is noticed when something is written to it.
    while watch(&pool).0 != 200 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
