//! Pools whose workloads confirm each session.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use portpool::client::ClientError;
use portpool::pool::Confirm;
use portpool::session::{Metadata, Session, SessionRequest};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::workload_api::{call, send, slot_of};
use crate::common::{COUNT, Pool, SOON, connect, echo, is_cut, until_metric};

/// A pool of `servers` whose workloads have so many seconds to confirm a session.
pub(super) async fn asking(servers: u32, seconds: i32) -> Pool {
    Pool::running(servers, |table| {
        table.sessions.confirm = Confirm::Workload;
        table.sessions.confirm_seconds = seconds;
    })
    .await
}

/// A request under way, for which a workload has all its time.
pub(super) fn request(pool: &Pool) -> JoinHandle<Result<Session, ClientError>> {
    let client = pool.client();
    let request = SessionRequest {
        metadata: Metadata::new([("map", "harbor")]).unwrap(),
        wait_seconds: 60,
        ..SessionRequest::default()
    };
    tokio::spawn(async move { client.request(request).await })
}

/// The slot and the session that a workload has to decide about, once there is one.
pub(super) async fn offered(pool: &Pool) -> (u32, Value) {
    let started = Instant::now();
    while started.elapsed() < SOON {
        for row in &pool.table.rows {
            let (_, list) = call(pool, row.slot.0, "GET", "/v1/sessions", "");
            let items = list["items"].as_array().unwrap();
            if let Some(session) = items.iter().find(|it| it["state"] == "Offered") {
                return (row.slot.0, session.clone());
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("no workload is asked");
}

/// The path where the workload confirms or refuses `session`.
pub(super) fn path(session: &Value, decision: &str) -> String {
    format!(
        "/v1/sessions/{}/{decision}",
        session["id"].as_str().unwrap()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_gets_its_port_once_the_workload_has_confirmed() {
    let pool = asking(1, 10).await;
    let mut events = BufReader::new(send(&pool, 0, "GET", "/v1/events", "")).lines();
    assert!(events.next().unwrap().unwrap().contains("200"));
    let answer = request(&pool);
    let (slot, session) = offered(&pool).await;
    assert_eq!(session["metadata"], json!({ "map": "harbor" }));
    assert!(session["confirmDeadline"].is_string() && session["claimDeadline"].is_null());
    let mut names =
        events.filter_map(|line| Some(line.unwrap().strip_prefix("event: ")?.to_owned()));
    assert_eq!(names.next().unwrap(), "Offered");
    // It is taken, and no one else's either.
    let port = u16::try_from(session["port"].as_u64().unwrap()).unwrap();
    let early = std::net::TcpStream::connect((pool.connection_address(0), port));
    assert!(
        is_cut(&mut early.unwrap()),
        "no client before the confirmation"
    );
    assert!(!answer.is_finished());
    pool.until(|state| state.free_ports == u32::from(COUNT) - 1)
        .await;

    let body = r#"{"metadata": {"seat": "4"}}"#;
    let (status, confirmed) = call(&pool, slot, "POST", &path(&session, "confirm"), body);
    assert_eq!((status, &confirmed["state"]), (200, &json!("Held")));
    let got = answer.await.unwrap().unwrap();
    assert_eq!(got.workload_metadata.get("seat"), Some("4"));
    assert_eq!(got.port, port);
    assert_eq!(json!(got.claim_deadline), confirmed["claimDeadline"]);
    assert_eq!(names.next().unwrap(), "Held");
    // The same again is no matter; otherwise, it is too late.
    let (status, again) = call(&pool, slot, "POST", &path(&session, "confirm"), body);
    assert_eq!((status, &again), (200, &confirmed));
    for decision in ["confirm", "refuse"] {
        let (status, problem) = call(&pool, slot, "POST", &path(&session, decision), "{}");
        let kind = "urn:portpool:problem:confirmed";
        assert_eq!((status, &problem["type"]), (409, &json!(kind)));
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("was confirmed before"), "{detail}");
    }
    let mut client = connect(&got);
    echo(&mut client, "served");
    let shown = pool.client().get(&got.id).await.unwrap();
    assert_eq!(shown.workload_metadata.get("seat"), Some("4"));
    until_metric(
        pool.server_address(0),
        7071,
        "portpool_selections_total{outcome=\"SELECTED\"} 1",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_server_is_asked_when_a_workload_refuses() {
    let pool = asking(2, 10).await;
    let answer = request(&pool);
    let (first, session) = offered(&pool).await;
    let reason = r#"{"reason": "the harbor is closed"}"#;
    let (status, _) = call(&pool, first, "POST", &path(&session, "refuse"), reason);
    assert_eq!(status, 204);
    let (second, session) = offered(&pool).await;
    assert_ne!(first, second);
    let (status, _) = call(&pool, second, "POST", &path(&session, "confirm"), "");
    assert_eq!(status, 200);
    let got = answer.await.unwrap().unwrap();
    assert_eq!(slot_of(&pool, &got.server), second);
    pool.until(|state| state.free_ports == 2 * u32::from(COUNT) - 1)
        .await;

    // Both refuse: the client sees why.
    let answer = request(&pool);
    for _ in 0..2 {
        let (slot, session) = offered(&pool).await;
        call(&pool, slot, "POST", &path(&session, "refuse"), reason);
    }
    let refusal = answer.await.unwrap().unwrap_err();
    assert!(refusal.is_exhausted());
    let text = refusal.to_string();
    assert!(
        text.contains("2 refused it (the harbor is closed)"),
        "{text}"
    );
    until_metric(
        pool.connection_address(0),
        7701,
        "portpool_selections_failed_total{cause=\"REFUSED_BY_WORKLOAD\"} 3",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_that_never_decides_costs_its_deadline_and_no_port() {
    let pool = asking(2, 1).await;
    let started = Instant::now();
    let answer = request(&pool);
    let (slot, session) = offered(&pool).await;
    let refusal = answer.await.unwrap().unwrap_err();
    let took = started.elapsed();
    assert!(
        took >= Duration::from_secs(2),
        "both have their second: {took:?}"
    );
    let ClientError::Refused(problem) = &refusal else {
        panic!("{refusal}");
    };
    assert_eq!(problem.kind, "urn:portpool:problem:not-confirmed");
    let words = "no workload has taken the session: 2 did not confirm it in time";
    assert!(problem.detail.contains(words), "{refusal}");
    for (address, port, line) in [
        (
            pool.server_address(0),
            7071,
            "portpool_selections_total{outcome=\"NOT_CONFIRMED\"} 1",
        ),
        (
            pool.server_address(1),
            7071,
            "portpool_selections_total{outcome=\"NOT_CONFIRMED\"} 1",
        ),
        (
            pool.connection_address(0),
            7701,
            "portpool_selections_failed_total{cause=\"NOT_CONFIRMED\"} 2",
        ),
        (
            pool.connection_address(0),
            7701,
            "portpool_allocations_total{outcome=\"not-confirmed\"} 1",
        ),
    ] {
        until_metric(address, port, line);
    }
    pool.until(|state| state.free_ports == 2 * u32::from(COUNT))
        .await;
    for decision in ["confirm", "refuse"] {
        let (status, problem) = call(&pool, slot, "POST", &path(&session, decision), "");
        assert_eq!(
            (status, &problem["type"]),
            (404, &json!("urn:portpool:problem:no-session"))
        );
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("within confirmSeconds"), "{detail}");
    }
}

#[tokio::test]
async fn a_workload_that_is_not_asked_confirms_nothing() {
    let pool = Pool::running(1, |_| {}).await;
    let session = json!(pool.request().await.unwrap());
    for decision in ["confirm", "refuse"] {
        let (status, problem) = call(&pool, 0, "POST", &path(&session, decision), "");
        let kind = "urn:portpool:problem:not-offered";
        assert_eq!((status, &problem["type"]), (409, &json!(kind)));
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("sessions.confirm"), "{detail}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_decides_nothing_and_does_not_hinder_the_decision() {
    let pool = asking(1, 10).await;
    let answer = request(&pool);
    let (slot, session) = offered(&pool).await;
    let (confirm, refuse) = (path(&session, "confirm"), path(&session, "refuse"));
    let large = json!({ "metadata": { "k": "v".repeat(4096) } }).to_string();
    let huge = json!({ "metadata": { "k": "v".repeat(40_000) } }).to_string();
    let long = json!({ "reason": "r".repeat(257) }).to_string();
    let none = "/v1/sessions/none/confirm";
    for (method, path, body, status, words) in [
        ("POST", confirm.as_str(), "{", 400, "EOF"),
        ("POST", &confirm, "[]", 422, "must be a JSON object"),
        (
            "POST",
            &confirm,
            r#"{"metadata":{"a":1}}"#,
            422,
            "must be a string",
        ),
        (
            "POST",
            &confirm,
            r#"{"seat":"4"}"#,
            422,
            "unknown field `seat`",
        ),
        ("POST", &confirm, &large, 422, "these have 4097"),
        ("POST", &confirm, &huge, 413, "length limit"),
        ("POST", &refuse, &long, 422, "1 to 256 characters"),
        (
            "POST",
            &refuse,
            r#"{"reason":""}"#,
            422,
            "1 to 256 characters",
        ),
        (
            "POST",
            &refuse,
            r#"{"reason":"a\nb"}"#,
            422,
            "no control characters",
        ),
        ("POST", &refuse, r#"{"reason":1}"#, 422, "string"),
        ("PUT", &confirm, "{}", 405, "/openapi.json"),
        ("POST", none, "{}", 404, "no live session"),
    ] {
        let (found, problem) = call(&pool, slot, method, path, body);
        assert_eq!(found, status, "{path} {body:.60}: {problem}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(words), "{body:.60}: {detail}");
    }
    // As many at once as the API takes, and more that wait.
    let flood: Vec<_> = (0..100)
        .map(|_| send(&pool, slot, "POST", none, "{}"))
        .collect();
    let refused = flood.into_iter().filter(|stream| {
        let mut head = String::new();
        BufReader::new(stream).read_line(&mut head).unwrap();
        head.contains(" 404 ")
    });
    assert_eq!(refused.count(), 100);
    assert!(!answer.is_finished());
    assert_eq!(call(&pool, slot, "POST", &confirm, "").0, 200);
    echo(&mut connect(&answer.await.unwrap().unwrap()), "served");
}
