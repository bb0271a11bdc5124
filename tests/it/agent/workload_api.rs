//! The agent's local API as a workload uses it: where it is, its sessions, and
//! what it decides.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use portpool::session::{MAX_METADATA_BYTES, Metadata, SessionRequest};
use serde_json::{Value, json};

use crate::common::cluster::until;
use crate::common::{COUNT, Pool, SERVER_PORT, SOON, connect, echo, get};

/// A running answer to a request to the local API of the server in `slot`.
pub(super) fn send(pool: &Pool, slot: u32, method: &str, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect((pool.server_address(slot), 7072)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let length = body.len();
    let host = pool.server_address(slot);
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {host}:7072\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    stream
}

/// The status and the JSON body of an answer, `null` without one.
pub(super) fn call(pool: &Pool, slot: u32, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut answer = String::new();
    let mut stream = send(pool, slot, method, path, body);
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = if body.is_empty() { "null" } else { body };
    (status, serde_json::from_str(body).unwrap())
}

/// The slot of the server with this name.
pub(super) fn slot_of(pool: &Pool, server: &str) -> u32 {
    let mut rows = pool.table.rows.iter();
    rows.find(|row| row.server == server).unwrap().slot.0
}

#[tokio::test]
async fn a_workload_learns_its_place_and_its_sessions() {
    let pool = Pool::running(2, |_| {}).await;
    let session = pool.request().await.unwrap();
    let slot = slot_of(&pool, &session.server);
    let (status, server) = call(&pool, slot, "GET", "/v1/server", "");
    assert_eq!(status, 200);
    assert_eq!(server["server"], session.server.as_str());
    assert_eq!(server["slot"], slot);
    assert_eq!(server["ready"], true);
    assert_eq!(server["draining"], false);
    assert_eq!(server["spent"], false);
    assert_eq!(server["sessions"], 1);
    let entry = &server["ports"][0];
    assert_eq!(entry["name"], session.port_name.as_str());
    assert_eq!(entry["serverPort"], SERVER_PORT);
    assert_eq!(entry["count"], COUNT);
    assert_eq!(entry["mapping"], "Offset");

    let (_, list) = call(&pool, slot, "GET", "/v1/sessions", "");
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    let path = format!("/v1/sessions/{}", session.id);
    let (_, found) = call(&pool, slot, "GET", &path, "");
    assert_eq!(found, list["items"][0]);
    assert_eq!(found["port"], session.port);
    assert_eq!(found["state"], "Held");
    assert_eq!(found["claimDeadline"], json!(session.claim_deadline));
    let (_, others) = call(&pool, 1 - slot, "GET", "/v1/sessions", "");
    assert_eq!(others, json!({ "items": [] }));
}

#[tokio::test]
async fn a_workload_lists_its_sessions_a_page_at_a_time() {
    let pool = Pool::running(1, |_| {}).await;
    let mut expected = Vec::new();
    for _ in 0..3 {
        expected.push(pool.request().await.unwrap().id);
    }
    expected.sort_unstable();
    let (mut found, mut path) = (Vec::new(), "/v1/sessions?limit=2".to_owned());
    loop {
        let (status, page) = call(&pool, 0, "GET", &path, "");
        assert_eq!(status, 200, "{page}");
        let items = page["items"].as_array().unwrap().iter();
        found.extend(items.map(|item| item["id"].as_str().unwrap().to_owned()));
        match page["next"].as_str() {
            Some(next) => path = format!("/v1/sessions?limit=2&after={next}"),
            None => break,
        }
    }
    assert_eq!(found, expected);
    for (query, named) in [
        ("limit=0", "limit must be 1 to 100"),
        ("limit=101", "limit must be 1 to 100"),
        ("limit=many", "limit"),
        ("before=1", "before"),
    ] {
        let (status, problem) = call(&pool, 0, "GET", &format!("/v1/sessions?{query}"), "");
        assert_eq!(status, 422, "{query}: {problem}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(named), "{query}: {detail}");
    }
}

/// Also after a restart of its agent, which learns it from the connection server.
#[tokio::test]
async fn a_workload_sees_what_the_client_of_a_session_says() {
    let mut pool = Pool::running(1, |_| {}).await;
    let mut events = BufReader::new(send(&pool, 0, "GET", "/v1/events", "")).lines();
    let head = events.next().unwrap().unwrap();
    assert!(head.contains("200"), "{head}");
    let largest = "v".repeat(MAX_METADATA_BYTES - 3);
    let request = SessionRequest {
        metadata: Metadata::new([("map", largest.as_str())]).unwrap(),
        ..SessionRequest::default()
    };
    let session = pool.client().request(request).await.unwrap();
    let data = events.find_map(|line| Some(line.unwrap().strip_prefix("data: ")?.to_owned()));
    let event: Value = serde_json::from_str(&data.unwrap()).unwrap();
    assert_eq!(event["session"]["metadata"], json!({ "map": largest }));
    let path = format!("/v1/sessions/{}", session.id);
    let seen = |pool: &Pool| call(pool, 0, "GET", &path, "").1["metadata"].clone();
    assert_eq!(seen(&pool), json!({ "map": largest }));

    pool.agents[0].kill();
    pool.until(|state| !state.servers[0].attached).await;
    pool.agents.clear();
    pool.start_agent(0);
    pool.until(|state| state.servers[0].attached && state.sessions == 1)
        .await;
    assert_eq!(seen(&pool), json!({ "map": largest }));

    let plain = pool.client().get(&session.id).await.unwrap();
    assert_eq!(plain.id, session.id);
    pool.client().release(&session.id).await.unwrap();
}

#[tokio::test]
async fn a_workload_ends_a_session() {
    let pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let mut client = connect(&session);
    echo(&mut client, "before");
    let path = format!("/v1/sessions/{}", session.id);
    assert_eq!(call(&pool, 0, "DELETE", &path, ""), (204, Value::Null));
    let mut rest = Vec::new();
    // Reset or closed: it is cut either way.
    let _ = client.read_to_end(&mut rest);
    assert!(rest.is_empty());
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
    assert!(pool.client().get(&session.id).await.is_err());
    for method in ["GET", "DELETE"] {
        let (status, problem) = call(&pool, 0, method, &path, "");
        assert_eq!(status, 404);
        assert_eq!(problem["type"], "urn:portpool:problem:no-session");
    }
}

#[tokio::test]
async fn a_workload_amends_a_session_and_sees_what_others_change() {
    let pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let mut events = BufReader::new(send(&pool, 0, "GET", "/v1/events", "")).lines();
    let head = events.next().unwrap().unwrap();
    assert!(head.contains("200"), "{head}");
    let path = format!("/v1/sessions/{}", session.id);
    let soon = jiff::Timestamp::now() + Duration::from_secs(60);
    let patch = json!({ "expires": soon, "metadata": { "score": "3" } }).to_string();
    let (status, amended) = call(&pool, 0, "PATCH", &path, &patch);
    assert_eq!(status, 200, "{amended}");
    assert_eq!(amended["metadata"], json!({ "score": "3" }));
    let mut lines = events.by_ref().map(Result::unwrap);
    assert_eq!(
        lines.find(|line| line.starts_with("event: ")).unwrap(),
        "event: Amended"
    );
    let data = lines.find_map(|line| Some(line.strip_prefix("data: ")?.to_owned()));
    let event: Value = serde_json::from_str(&data.unwrap()).unwrap();
    assert_eq!(event["session"], amended);
    // Connection servers learn of it, too.
    let deadline = std::time::Instant::now() + SOON;
    let expires = loop {
        let known = pool.client().get(&session.id).await.unwrap();
        if let Some(expires) = known.expires {
            break expires;
        }
        assert!(std::time::Instant::now() < deadline, "{known:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(expires.as_millisecond(), soon.as_millisecond());
    let none = "/v1/sessions/none";
    for (path, body, status, kind, words) in [
        (none, "{}", 404, "no-session", "no live session"),
        (&path, "{", 400, "malformed", "EOF"),
        (&path, "[]", 422, "invalid-field", "must be a JSON object"),
        (
            &path,
            r#"{"expires":null,"expires":null}"#,
            422,
            "invalid-field",
            "duplicate field `expires`",
        ),
        (
            &path,
            r#"{"port":1}"#,
            422,
            "invalid-field",
            "unknown field `port`",
        ),
        (
            &path,
            r#"{"expires":"1999-01-01T00:00:00Z"}"#,
            422,
            "expires-passed",
            "time to come",
        ),
    ] {
        let (found, problem) = call(&pool, 0, "PATCH", path, body);
        assert_eq!(found, status, "{body}: {problem}");
        assert_eq!(problem["type"], format!("urn:portpool:problem:{kind}"));
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(words), "{detail}");
    }
}

#[tokio::test]
async fn a_workload_that_is_not_ready_gets_no_new_sessions_and_keeps_its_own() {
    let pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let mut client = connect(&session);
    echo(&mut client, "before");
    let say = |ready: bool| {
        let body = json!({ "ready": ready }).to_string();
        assert_eq!(call(&pool, 0, "PUT", "/v1/readiness", &body).0, 204);
    };
    say(false);
    pool.until(|state| state.free_ports == 0).await;
    let refusal = pool.request().await.unwrap_err();
    assert!(refusal.is_exhausted(), "{refusal}");
    echo(&mut client, "goes on");
    assert_eq!(call(&pool, 0, "GET", "/v1/server", "").1["ready"], false);
    say(true);
    pool.until(|state| state.free_ports == u32::from(COUNT) - 1)
        .await;
    pool.request().await.unwrap();
    echo(&mut client, "goes on");
}

/// The controller and `portpool local` replace servers that are spent.
#[tokio::test]
async fn a_workload_that_drains_is_spent_when_its_sessions_are_over() {
    let pool = Pool::running(2, |_| {}).await;
    let session = pool.request().await.unwrap();
    let slot = slot_of(&pool, &session.server);
    assert_eq!(call(&pool, slot, "POST", "/v1/drain", "").0, 204);
    let is_spent = |state: &portpool::session::PoolState, sessions: u32| {
        let server = state.servers.iter().find(|of| of.slot.0 == slot).unwrap();
        server.spent && server.sessions == sessions
    };
    pool.until(|state| is_spent(state, 1)).await;
    for _ in 0..COUNT {
        assert_ne!(pool.request().await.unwrap().server, session.server);
    }
    pool.client().release(&session.id).await.unwrap();
    pool.until(|state| is_spent(state, 0)).await;
}

#[tokio::test]
async fn a_workload_watches_its_sessions() {
    let pool = Pool::running(1, |_| {}).await;
    let mut events = BufReader::new(send(&pool, 0, "GET", "/v1/events", "")).lines();
    // The head is there: the agent watches from now on.
    let head = events.next().unwrap().unwrap();
    assert!(head.contains("200"), "{head}");
    let session = pool.request().await.unwrap();
    echo(&mut connect(&session), "busy now");
    pool.until(|state| state.servers[0].ports[0].lingering == 1 || state.sessions == 0)
        .await;
    let _ = pool.client().release(&session.id).await;
    let mut names = Vec::new();
    while names.last().is_none_or(|name| name != "Ended") {
        let line = events.next().unwrap().unwrap();
        if let Some(name) = line.strip_prefix("event: ") {
            names.push(name.to_owned());
        } else if let Some(data) = line.strip_prefix("data: ") {
            let event: Value = serde_json::from_str(data).unwrap();
            assert_eq!(event["id"], session.id.as_str());
            assert_eq!(event["cause"].is_null(), event["session"].is_object());
        }
    }
    assert_eq!(names[..2], ["Held", "Busy"]);

    let watching: Vec<_> = (0..8)
        .map(|_| send(&pool, 0, "GET", "/v1/events", ""))
        .collect();
    let is_refused = |stream: &TcpStream| {
        let mut head = String::new();
        BufReader::new(stream).read_line(&mut head).unwrap();
        head.contains("503")
    };
    assert!(watching.iter().any(is_refused), "nine watch");
}

#[tokio::test]
async fn what_a_workload_says_wrongly_is_refused_with_the_reason() {
    let pool = Pool::running(1, |_| {}).await;
    let long = format!(r#"{{"ready": true, "x": "{}"}}"#, "x".repeat(40_000));
    for (method, path, body, status, kind, named) in [
        ("PUT", "/v1/readiness", "{", 400, "malformed", "EOF"),
        ("PUT", "/v1/readiness", "{}", 422, "invalid-field", "ready"),
        (
            "PUT",
            "/v1/readiness",
            r#"{"ready":1}"#,
            422,
            "invalid-field",
            r#"must be {"ready": true}"#,
        ),
        (
            "PUT",
            "/v1/readiness",
            r#"{"ready":true,"a":1}"#,
            422,
            "invalid-field",
            "unknown field `a`",
        ),
        (
            "PUT",
            "/v1/readiness",
            r#"{"ready":false,"ready":false}"#,
            422,
            "invalid-field",
            "duplicate field `ready`",
        ),
        (
            "PUT",
            "/v1/readiness",
            "[false]",
            422,
            "invalid-field",
            "JSON object",
        ),
        ("PUT", "/v1/readiness", &long, 413, "body", "length limit"),
        ("GET", "/v1/nothing", "", 404, "not-found", "/openapi.json"),
        (
            "PATCH",
            "/v1/server",
            "",
            405,
            "method-not-allowed",
            "/openapi.json",
        ),
        (
            "DELETE",
            "/v1/sessions/none",
            "",
            404,
            "no-session",
            "no live session",
        ),
    ] {
        let (found, problem) = call(&pool, 0, method, path, body);
        assert_eq!(found, status, "{method} {path}: {problem}");
        assert_eq!(problem["status"], status);
        assert_eq!(problem["type"], format!("urn:portpool:problem:{kind}"));
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(named), "{detail}");
    }
    // Nothing of it has changed anything.
    assert_eq!(call(&pool, 0, "GET", "/v1/server", "").1["ready"], true);
}

/// A browser in the pod shows pages of strangers, which must not decide here.
#[tokio::test]
async fn web_pages_are_refused() {
    let pool = Pool::running(1, |_| {}).await;
    let ask = |headers: &str| {
        let mut stream = TcpStream::connect((pool.server_address(0), 7072)).unwrap();
        write!(
            stream,
            "POST /v1/drain HTTP/1.1\r\n{headers}connection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    for headers in [
        "host: 127.0.0.1:7072\r\norigin: http://example.org\r\n",
        "host: 127.0.0.1:7072\r\norigin: null\r\n",
        "host: rebound.example.org:7072\r\n",
        "host: 192.0.2.1\r\n",
    ] {
        let answer = ask(headers);
        assert!(answer.contains(" 403 "), "{headers}: {answer}");
        assert!(answer.contains("problem:web-page"), "{answer}");
    }
    assert_eq!(call(&pool, 0, "GET", "/v1/server", "").1["spent"], false);
    for headers in ["host: localhost\r\n", "host: [::1]:7072\r\n"] {
        assert!(ask(headers).contains(" 204 "), "{headers}");
    }
    assert_eq!(refused(&pool, "web-page"), 4);
}

/// How often the agent of the first server has refused something because of `cause`.
fn refused(pool: &Pool, cause: &str) -> u32 {
    let page = get(pool.server_address(0), 7071, "/metrics");
    let name = format!("portpool_requests_refused_total{{cause=\"{cause}\"}} ");
    let mut counts = page.lines().filter_map(|line| line.strip_prefix(&name));
    counts
        .next()
        .map_or(0, |count| count.trim().parse().unwrap())
}

#[tokio::test]
async fn what_the_api_refuses_is_counted_by_cause() {
    let pool = Pool::running(1, |_| {}).await;
    for (method, path, body, status) in [
        ("GET", "/v1/sessions/none", "", 404),
        ("GET", "/v1/nothing", "", 404),
        ("PUT", "/v1/drain", "", 405),
        ("PUT", "/v1/readiness", "{", 400),
    ] {
        assert_eq!(call(&pool, 0, method, path, body).0, status, "{path}");
    }
    let mut garbage = TcpStream::connect((pool.server_address(0), 7072)).unwrap();
    garbage.write_all(b"\0\x01garbage\r\n\r\n").unwrap();
    let _ = garbage.read_to_end(&mut Vec::new());
    for cause in [
        "no-session",
        "not-found",
        "method-not-allowed",
        "malformed",
        "not-http",
    ] {
        assert_eq!(refused(&pool, cause), 1, "{cause}");
    }
}

/// Connections that say nothing take all places of the API, and nothing else. Those
/// beyond the places wait in the kernel, which has room for 128.
#[tokio::test]
async fn a_workload_that_floods_the_api_does_not_disturb_its_sessions() {
    let pool = Pool::running(1, |_| {}).await;
    let address = (pool.server_address(0), 7072);
    let connect_to = |count: usize| -> Vec<_> {
        let connections = (0..count).map(|_| TcpStream::connect(address).unwrap());
        connections.collect()
    };
    let before = pool.agents[0].descriptors();
    let mut flood = connect_to(64);
    let are_open = async || pool.agents[0].descriptors() >= before + 64;
    until("64 connections are open", are_open).await;
    assert_eq!(refused(&pool, "too-many-connections"), 0, "none waits");
    flood.extend(connect_to(1));
    let is_counted = async || refused(&pool, "too-many-connections") == 1;
    until("the next one waits", is_counted).await;
    flood.extend(connect_to(85));
    let session = pool.request().await.unwrap();
    echo(&mut connect(&session), "served");
    assert!(pool.agents[0].descriptors() < 120);
    drop(flood);
    let (status, _) = call(&pool, 0, "GET", "/v1/server", "");
    assert_eq!(status, 200);
}

#[test]
fn an_address_that_cannot_be_is_named_with_the_remedy() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap();
    errors_with(&taken.to_string(), "choose another with --api");
    errors_with("0.0.0.0:7072", "it must be a loopback address");
    errors_with("7072", "give IP:PORT");
}

/// An agent that is to serve the API at `address` fails and says this.
fn errors_with(address: &str, expected: &str) {
    let api = format!("--api={address}");
    let pool = Pool::new(1, |_| {});
    let arguments = pool.agent_arguments(0);
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    arguments.retain(|argument| !argument.starts_with("--api"));
    arguments.push(&api);
    let output = crate::cli::portpool(&arguments, "");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(errors.contains(expected), "{errors}");
}
