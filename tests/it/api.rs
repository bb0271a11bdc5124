//! The load-sharing port and the admin port, as programs use them.

use std::io::Read;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;

use crate::common::{Pool, SOON, connect, echo, get, until_metric};
use bytes::Bytes;
use http::{Request, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::rt::TokioExecutor;
use portpool::client::Client;
use portpool::follow::write_table;
use portpool::session::{Session, SessionRequest};
use portpool::table::Table;

#[tokio::test]
async fn http_2_is_spoken_too() {
    let pool = Pool::running(1, |_| {}).await;
    let http: HttpClient<_, Full<Bytes>> = HttpClient::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let uri = format!("http://{}:7700/v1/sessions", pool.connection_address(0));
    let ask = || {
        let request = Request::post(&uri).header("content-type", "application/json");
        http.request(request.body(Full::from("{}")).unwrap())
    };
    // Three requests at once, on one connection.
    let (one, two, three) = tokio::join!(ask(), ask(), ask());
    for answer in [one, two, three] {
        let answer = answer.unwrap();
        assert_eq!(
            (answer.status().as_u16(), answer.version()),
            (201, Version::HTTP_2)
        );
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let session: Session = serde_json::from_slice(&body).unwrap();
        echo(&mut connect(&session), "over HTTP/2");
    }
}

#[tokio::test]
async fn the_admin_ports_serve_health_metrics_and_the_table() {
    let mut pool = Pool::running(1, |_| {}).await;
    let connection_server = pool.connection_address(0);
    let agent = pool.server_address(0);
    let session = pool.request().await.unwrap();
    echo(&mut connect(&session), "counted");
    for (address, port) in [(connection_server, 7701), (agent, 7071)] {
        assert!(get(address, port, "/livez").starts_with("HTTP/1.0 200"));
        assert!(get(address, port, "/readyz").starts_with("HTTP/1.0 200"));
        assert!(get(address, port, "/metrics").contains("portpool_build_info"));
        let answer = get(address, port, "/v1/port-table");
        let table = Table::decode(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!((table.pool_uid.as_str(), table.rows.len()), ("uid", 1));
    }
    let metrics = get(connection_server, 7701, "/metrics");
    assert!(
        metrics.contains("portpool_flows_opened_total{transport=\"tcp\"} 1\n"),
        "{metrics}"
    );
    // A connection server that has never had an agent is not ready. One that had
    // an agent stays ready, so that it can answer clients what is missing.
    pool.agents[0].kill();
    pool.until(|state| !state.servers[0].attached).await;
    assert!(get(connection_server, 7701, "/readyz").starts_with("HTTP/1.0 200"));
    pool.start_connection_server(1);
    pool.until_of(1, |_| true).await;
    let answer = get(pool.connection_address(1), 7701, "/readyz");
    assert!(answer.starts_with("HTTP/1.0 503"), "{answer}");
    assert!(
        answer.contains("no processing server is attached yet"),
        "{answer}"
    );
}

/// Passes one connection after another on to `target`, and swallows the answer
/// of the first.
fn lose_first_answer(target: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (index, client) in listener.incoming().enumerate() {
            let (mut client, mut server) = (client.unwrap(), TcpStream::connect(target).unwrap());
            let (mut from_client, mut to_server) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
            if index == 0 {
                // The session is made when the answer begins.
                server.read_exact(&mut [0; 1]).unwrap();
                let _ = client.shutdown(Shutdown::Both);
                continue;
            }
            std::thread::spawn(move || std::io::copy(&mut server, &mut client));
        }
    });
    address
}

#[tokio::test]
async fn a_lost_answer_costs_no_port() {
    let pool = Pool::running(1, |_| {}).await;
    let proxy = lose_first_answer((pool.connection_address(0), 7700).into());
    let client = Client::new(&proxy.to_string()).unwrap();
    let session = client.request(SessionRequest::default()).await.unwrap();
    pool.until(|state| {
        state.sessions == 1 && state.free_ports == u32::from(crate::common::COUNT) - 1
    })
    .await;
    let mut stream = TcpStream::connect((pool.connection_address(0), session.port)).unwrap();
    echo(&mut stream, "served");
}

#[tokio::test]
async fn sessions_and_ports_are_shown_by_state() {
    let pool = Pool::running(1, |_| {}).await;
    let shows = |line: &str| until_metric(pool.connection_address(0), 7701, line);
    let (_held, busy) = (pool.request().await.unwrap(), pool.request().await.unwrap());
    let mut stream = connect(&busy);
    echo(&mut stream, "busy");
    for state in ["held", "busy"] {
        shows(&format!("portpool_sessions{{state=\"{state}\"}} 1"));
        shows(&format!("portpool_ports{{state=\"{state}\"}} 1"));
    }
    shows("portpool_ports{state=\"free\"} 2");
    shows("portpool_allocations_total{outcome=\"allocated\"} 2");
    shows("portpool_allocation_duration_seconds_count 2");
    until_metric(
        pool.server_address(0),
        7071,
        "portpool_ports{state=\"busy\"} 1",
    );
    until_metric(
        pool.server_address(0),
        7071,
        "portpool_selections_total{outcome=\"SELECTED\"} 2",
    );
    drop(stream);
    shows("portpool_forwarded_bytes_total{direction=\"upstream\"} 4");
    shows("portpool_sessions{state=\"busy\"} 0");
    shows("portpool_sessions_ended_total{cause=\"FINISHED\"} 1");
}

#[tokio::test]
async fn refused_tables_are_counted_by_every_reader() {
    let mut pool = Pool::new(1, |table| table.generation = 7);
    pool.start_workload(0);
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports > 0).await;
    let counted = |cause: &str| {
        let line = format!("portpool_tables_rejected_total{{cause=\"{cause}\"}} 1");
        until_metric(pool.connection_address(0), 7701, &line);
        until_metric(pool.server_address(0), 7071, &line);
    };
    // By a rename: while a file is being written, readers see it empty first.
    let draft = pool.table_file().with_extension("draft");
    std::fs::write(&draft, "{").unwrap();
    std::fs::rename(draft, pool.table_file()).unwrap();
    counted("invalid");
    let mut older = pool.table.clone();
    older.generation = 6;
    write_table(&pool.table_file(), &older).unwrap();
    counted("older");
    let mut other = pool.table.clone();
    (other.generation, other.pool_uid) = (8, "other".to_owned());
    write_table(&pool.table_file(), &other).unwrap();
    counted("other_pool");
    pool.request()
        .await
        .expect("the last good table is in force");
}

/// The log's lines with `words`, once there are `count`.
fn lines(log: &Path, words: &str, count: usize) -> Vec<String> {
    let deadline = Instant::now() + SOON;
    loop {
        let text = std::fs::read_to_string(log).unwrap();
        let found: Vec<String> = text
            .lines()
            .filter(|line| line.contains(words))
            .map(str::to_owned)
            .collect();
        if found.len() >= count {
            return found;
        }
        assert!(Instant::now() < deadline, "{words:?} in {text}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[tokio::test]
async fn an_ended_session_is_logged_in_one_line() {
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.start_agent(0);
    let json = pool.start_logging_connection_server(0, "json");
    let text = pool.start_logging_connection_server(1, "text");
    pool.until(|state| state.free_ports > 0).await;
    pool.until_of(1, |state| state.free_ports > 0).await;

    let finished = pool.request().await.unwrap();
    let mut stream = connect(&finished);
    echo(&mut stream, "12345");
    drop(stream);
    let line = &lines(&json, "session ended", 1)[0];
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["level"], "INFO", "{line}");
    let (fields, span) = (&line["fields"], &line["span"]);
    assert_eq!(fields["cause"], "FINISHED", "{line}");
    assert_eq!(fields["connections"], 1, "{line}");
    assert_eq!(fields["upstream_bytes"], 5, "{line}");
    assert_eq!(fields["downstream_bytes"], 5, "{line}");
    assert!(fields["seconds"].as_f64().unwrap() > 0.0, "{line}");
    assert_eq!(span["name"], "session", "{line}");
    assert_eq!(span["session"], finished.id.as_str(), "{line}");
    assert_eq!(span["port"], finished.port, "{line}");
    assert_eq!(span["server"], "test-0", "{line}");
    // The kernel gives us any loopback address.
    assert!(
        span["client"].as_str().unwrap().starts_with("127."),
        "{line}"
    );

    // One connection server makes and releases the session; the other carries it.
    let released = pool.request().await.unwrap();
    let mut stream = TcpStream::connect((pool.connection_address(1), released.port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    echo(&mut stream, "123");
    pool.client().release(&released.id).await.unwrap();
    let made = lines(&json, "session ended", 2);
    assert!(made[1].contains("RELEASED"), "{made:?}");
    let used = &lines(&text, "session ended", 1)[0];
    for words in [
        " INFO ",
        &released.id,
        &released.port.to_string(),
        "test-0",
        "RELEASED",
        "connections=1 upstream_bytes=3 downstream_bytes=3",
    ] {
        assert!(used.contains(words), "{words}: {used}");
    }
    assert_eq!(
        lines(&json, &finished.id, 1).len(),
        1,
        "the level info logs changes only"
    );
}
