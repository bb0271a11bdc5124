//! Companion ports: clients with a session on a server connect to them without
//! asking, and these connections end with the session.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use portpool::client::ClientError;
use portpool::pool::EntryAdmission;
use portpool::session::{PoolState, PortRequest, Session, SessionRequest};
use portpool::table::{PortRange, Table};

use crate::common::{
    COUNT, Pool, Process, SERVER_PORT, SOON, connect, echo, is_cut, table, until_metric,
};

/// The first companion port of slot 0; each server has two.
const DATA: u16 = 20_500;

/// Gives every server two companion ports, which lead to the two server ports after
/// the others.
fn with_companions(table: &mut Table) {
    for (slot, row) in (0u16..).zip(&mut table.rows) {
        row.ranges.push(PortRange {
            name: "data".to_owned(),
            admission: Some(EntryAdmission::Companion),
            ..table::range(DATA + 10 * slot, SERVER_PORT + COUNT, 2)
        });
    }
}

/// The address of a client in the pool's network.
fn client(pool: &Pool, number: u32) -> IpAddr {
    pool.connection_address(200 + number)
}

/// A connection from `client` to `port` of the connection server `index`.
fn tcp(pool: &Pool, client: IpAddr, index: u32, port: u16) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(client, 0).into()).unwrap();
    let to = SocketAddr::new(pool.connection_address(index), port);
    socket.connect(&to.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// A socket from which `client` sends to `port` of the connection server `index`.
fn udp(pool: &Pool, client: IpAddr, index: u32, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((client, 0)).unwrap();
    let to = (pool.connection_address(index), port);
    socket.connect(to).unwrap();
    socket
}

/// Whether a datagram comes back within `time`.
fn comes_back(socket: &UdpSocket, time: Duration) -> bool {
    socket.set_read_timeout(Some(time)).unwrap();
    socket.send(b"?").is_ok() && matches!(socket.recv(&mut [0; 8]), Ok(1))
}

/// Waits until datagrams do not come back any more.
fn until_silent(socket: &UdpSocket) {
    let started = Instant::now();
    while comes_back(socket, Duration::from_millis(200)) {
        assert!(started.elapsed() < SOON, "the flow goes on");
    }
}

/// A session that `client` asks the connection server `index` for.
fn request(pool: &Pool, client: IpAddr, index: u32) -> Session {
    let mut stream = tcp(pool, client, index, 7700);
    let request = "POST /v1/sessions HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer}"))
}

fn is_free(state: &PoolState) -> bool {
    state.free_ports == u32::from(COUNT) && state.sessions == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn companion_connections_come_and_go_with_the_session() {
    // Its free ports are those that requests can get.
    let pool = Pool::running(1, with_companions).await;
    let (client, stranger) = (client(&pool, 0), client(&pool, 1));
    assert!(is_cut(&mut tcp(&pool, client, 0, DATA)), "no session yet");
    let session = request(&pool, client, 0);
    // They may be first.
    let mut data = tcp(&pool, client, 0, DATA);
    echo(&mut data, "before the control connection");
    let flow = udp(&pool, client, 0, DATA + 1);
    assert!(comes_back(&flow, SOON));
    pool.until(|state| state.sessions == 1).await;
    let mut control = tcp(&pool, client, 0, session.port);
    echo(&mut control, "control");
    // Others are not let in, and the drops are counted.
    assert!(is_cut(&mut tcp(&pool, stranger, 0, DATA)));
    let strange = udp(&pool, stranger, 0, DATA);
    assert!(!comes_back(&strange, Duration::from_millis(300)));
    let counted = "portpool_refused_total{cause=\"no_session\"} 3";
    until_metric(pool.connection_address(0), 7701, counted);
    // The session lasts as long as any of its connections. It does not linger here.
    drop(control);
    drop(data);
    assert!(comes_back(&flow, SOON));
    let live = pool.client().get(&session.id).await.unwrap();
    assert_eq!(live.id, session.id);
    let mut data = tcp(&pool, client, 0, DATA + 1);
    echo(&mut data, "after the control connection");
    pool.client().release(&session.id).await.unwrap();
    assert!(is_cut(&mut data));
    until_silent(&flow);
    assert!(
        is_cut(&mut tcp(&pool, client, 0, DATA)),
        "the session is over"
    );
    pool.until(is_free).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_no_one_comes_for_ends_with_its_companion_connections() {
    let pool = Pool::running(1, |table| {
        with_companions(table);
        // One that is loaded makes a connection within it.
        table.sessions.claim_seconds = 3;
    })
    .await;
    let client = client(&pool, 0);
    request(&pool, client, 0);
    let mut data = tcp(&pool, client, 0, DATA);
    echo(&mut data, "but no control connection");
    assert!(is_cut(&mut data));
    pool.until(is_free).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_uses_companion_ports_of_every_connection_server() {
    let mut pool = Pool::running(1, with_companions).await;
    pool.start_connection_server(1);
    pool.until_of(1, is_free).await;
    let (requester, client) = (client(&pool, 0), client(&pool, 1));
    let session = request(&pool, requester, 0);
    // Another one than the requester comes, and is known everywhere.
    let mut control = tcp(&pool, client, 0, session.port);
    echo(&mut control, "control");
    let mut data = tcp(&pool, client, 1, DATA);
    echo(&mut data, "data");
    let flow = udp(&pool, client, 1, DATA + 1);
    assert!(comes_back(&flow, SOON));
    // So is the requester.
    let mut early = tcp(&pool, requester, 1, DATA);
    echo(&mut early, "early");
    // What is open at one keeps the session that is open at the other no more.
    drop(control);
    echo(&mut data, "still");
    pool.client().release(&session.id).await.unwrap();
    assert!(is_cut(&mut data) && is_cut(&mut early));
    until_silent(&flow);
    assert!(is_cut(&mut tcp(&pool, client, 1, DATA)));
    pool.until_of(1, is_free).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_clients_behind_one_address_none_loses_its_companions_to_the_other() {
    let pool = Pool::running(1, with_companions).await;
    let client = client(&pool, 0);
    let sessions = [request(&pool, client, 0), request(&pool, client, 0)];
    let mut controls = sessions
        .each_ref()
        .map(|session| tcp(&pool, client, 0, session.port));
    for control in &mut controls {
        echo(control, "control");
    }
    let mut data = [DATA, DATA + 1].map(|port| tcp(&pool, client, 0, port));
    for first in [1, 0] {
        pool.client().release(&sessions[first].id).await.unwrap();
        assert!(is_cut(&mut controls[first]));
        for stream in &mut data {
            if first == 1 {
                echo(stream, "may be the other one's");
            } else {
                assert!(is_cut(stream));
            }
        }
    }
    pool.until(is_free).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn companion_connections_are_handed_over_and_cut_with_the_session() {
    let mut pool = Pool::new(1, with_companions);
    pool.start_workload(0);
    pool.start_agent(0);
    let mut former = pool.start_successor(0);
    pool.until(is_free).await;
    let client = client(&pool, 0);
    let session = request(&pool, client, 0);
    let mut control = tcp(&pool, client, 0, session.port);
    echo(&mut control, "control");
    let mut data = tcp(&pool, client, 0, DATA);
    echo(&mut data, "before");
    let flow = udp(&pool, client, 0, DATA);
    assert!(comes_back(&flow, SOON));
    let _successor: Process = pool.start_successor(0);
    former.wait();
    echo(&mut data, "after");
    assert!(comes_back(&flow, SOON));
    let mut more = tcp(&pool, client, 0, DATA + 1);
    echo(&mut more, "new");
    drop(control);
    echo(&mut data, "they keep the session");
    // The agent is new, and learns of the client from the connection server.
    pool.agents[0].kill();
    pool.start_agent(0);
    pool.until(|state| state.sessions == 1).await;
    let mut late = tcp(&pool, client, 0, DATA);
    echo(&mut late, "through the restart");
    pool.client().release(&session.id).await.unwrap();
    assert!(is_cut(&mut data) && is_cut(&mut more) && is_cut(&mut late));
    until_silent(&flow);
}

#[tokio::test]
async fn a_request_for_a_companion_port_says_what_it_is() {
    let pool = Pool::running(1, with_companions).await;
    let data = |port_name: &str| PortRequest {
        port_name: Some(port_name.to_owned()),
        ..PortRequest::default()
    };
    let single = SessionRequest {
        port_name: Some("data".to_owned()),
        ..SessionRequest::default()
    };
    let several = SessionRequest {
        ports: Some(vec![data("main"), data("data")]),
        ..SessionRequest::default()
    };
    for (request, field) in [(single, ""), (several, "ports[1]: ")] {
        let answer = pool.client().request(request).await;
        let Err(ClientError::Refused(problem)) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(problem.kind, "urn:portpool:problem:companion-port");
        assert_eq!(problem.status, 422);
        let begin = format!("{field}\"data\" is an entry of companion ports");
        assert!(problem.detail.starts_with(&begin), "{}", problem.detail);
        assert!(problem.detail.ends_with("ask for one of main (TCPUDP)"));
    }
    // A request that names no entry gets another port.
    let any = pool.request().await.unwrap();
    assert_eq!(any.port_name, "main");
    echo(&mut connect(&any), "a port for sessions");
}
