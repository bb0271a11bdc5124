//! The load-sharing port and the admin port, as programs use them.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};

use bytes::Bytes;
use common::{Pool, connect, echo};
use http::{Request, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::rt::TokioExecutor;
use portpool::client::Client;
use portpool::session::{Session, SessionRequest};
use portpool::table::Table;

fn get(address: IpAddr, port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect((address, port)).unwrap();
    stream.set_read_timeout(Some(common::SOON)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

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
async fn the_admin_ports_tell_health_metrics_and_the_table() {
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
    // A connection server that has never had an agent is not ready; one that
    // had stays ready, so that clients hear what is missing.
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
    pool.until(|state| state.sessions == 1 && state.free_ports == u32::from(common::COUNT) - 1)
        .await;
    let mut stream = TcpStream::connect((pool.connection_address(0), session.port)).unwrap();
    echo(&mut stream, "served");
}
