//! Sessions of several ports, end to end: one processing server or none, one
//! life, whole through crashes and hand-overs.

use std::collections::{HashMap, HashSet};
use std::net::{TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use portpool::client::{Client, ClientError};
use portpool::session::{
    ConnectionPort, PoolState, PortRequest, Session, SessionRequest, SessionState,
};
use portpool::table::{ListenPort, PortRange, Table};

use crate::common::{COUNT, Pool, Process, SERVER_PORT, SOON, connect, echo, is_cut, table, turn};

/// Each server has two adjacent ports `media` and two `control`.
fn call_ports(table: &mut Table) {
    for row in &mut table.rows {
        let of_row = row.ranges[0].clone();
        let half = |name: &str, offset: u16| PortRange {
            name: name.to_owned(),
            ..table::range(
                of_row.connection_port.get() + offset,
                SERVER_PORT + offset,
                COUNT / 2,
            )
        };
        row.ranges = vec![half("media", 0), half("control", COUNT / 2)];
    }
}

fn ports(name: &str, count: u32) -> PortRequest {
    PortRequest {
        port_name: Some(name.to_owned()),
        count,
        ..PortRequest::default()
    }
}

/// A request for one control port and two media ports.
fn call() -> SessionRequest {
    SessionRequest {
        ports: Some(vec![ports("control", 1), ports("media", 2)]),
        ..SessionRequest::default()
    }
}

/// A connection to each port of a session.
fn connect_all(session: &Session) -> Vec<TcpStream> {
    let ports = session.ports.iter();
    ports.map(|port| connect(&session.at(port))).collect()
}

fn counts(state: &PoolState, server: usize) -> [u32; 4] {
    let ports = &state.servers[server].ports;
    let sum = |of: fn(&portpool::session::PortState) -> u32| ports.iter().map(of).sum();
    [
        sum(|it| it.free),
        sum(|it| it.held),
        sum(|it| it.busy),
        sum(|it| it.lingering),
    ]
}

#[tokio::test]
async fn a_session_of_several_ports_is_on_one_server_and_lives_as_one() {
    let pool = Pool::running(2, call_ports).await;
    let client = pool.client();
    let session = client.request(call()).await.unwrap();
    let names: Vec<&str> = session
        .ports
        .iter()
        .map(|it| it.port_name.as_str())
        .collect();
    assert_eq!(names, ["control", "media", "media"]);
    assert_eq!(session.ports[0].port, session.port);
    assert_eq!(session.port_name, "control");
    let media = session.ports[1].port;
    assert_eq!((media % 2, session.ports[2].port), (0, media + 1));
    let row = pool
        .table
        .rows
        .iter()
        .find(|row| row.server == session.server);
    let slot = usize::try_from(row.unwrap().slot.0).unwrap();
    pool.until(|state| counts(state, slot) == [1, 3, 0, 0] && state.sessions == 1)
        .await;
    let mut streams = connect_all(&session);
    for stream in &mut streams {
        echo(stream, "hello");
    }
    pool.until(|state| counts(state, slot) == [1, 0, 3, 0])
        .await;
    assert_eq!(client.get(&session.id).await.unwrap().ports, session.ports);
    // Busy for as long as one of its ports has a connection.
    let mut last = streams.pop().unwrap();
    drop(streams);
    echo(&mut last, "still here");
    let live = client.get(&session.id).await.unwrap();
    assert_eq!(live.state, SessionState::Busy);
    client.release(&session.id).await.unwrap();
    assert!(is_cut(&mut last));
    pool.until(|state| state.free_ports == 2 * u32::from(COUNT) && state.sessions == 0)
        .await;
}

/// As RTP and RTCP do, where the server reports to the client, too.
#[tokio::test]
async fn datagrams_come_back_from_each_port_of_a_pair() {
    let pool = Pool::running(1, call_ports).await;
    let request = SessionRequest {
        ports: Some(vec![ports("media", 2)]),
        ..SessionRequest::default()
    };
    let session = pool.client().request(request).await.unwrap();
    let sockets = session.ports.iter().map(|port| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        let at = session.at(port);
        socket.connect((at.address.as_str(), at.port)).unwrap();
        socket
    });
    let sockets: Vec<UdpSocket> = sockets.collect();
    for round in 0..3_u8 {
        // Both are on their way before an answer is read.
        for (of, socket) in (0_u8..).zip(&sockets) {
            socket.send(&[of, round]).unwrap();
        }
        for (of, socket) in (0_u8..).zip(&sockets) {
            let mut answer = [0; 16];
            let length = socket.recv(&mut answer).unwrap();
            assert_eq!(answer[..length], [of, round]);
        }
    }
}

#[tokio::test]
async fn an_answer_for_one_port_lists_it_too() {
    let pool = Pool::running(1, |_| {}).await;
    let session = pool.request().await.unwrap();
    let only = ConnectionPort {
        port: session.port,
        protocol: session.protocol,
        port_name: session.port_name.clone(),
    };
    assert_eq!(session.ports, [only]);
}

#[tokio::test]
async fn ports_that_no_server_has_together_are_waited_for_and_not_split() {
    let pool = Pool::running(2, call_ports).await;
    let client = pool.client();
    // One control port is left on each server, and no media port on the first.
    let calls = [client.request(call()).await, client.request(call()).await];
    let calls = calls.map(Result::unwrap);
    assert_ne!(calls[0].server, calls[1].server);
    let refused = client.request(call()).await.unwrap_err();
    assert!(refused.is_exhausted(), "{refused}");
    assert!(
        refused
            .to_string()
            .contains("all 3 requested ports free at once"),
        "{refused}"
    );
    let waits = SessionRequest {
        wait_seconds: 60,
        ..call()
    };
    let waits = tokio::spawn({
        let client = pool.client();
        async move { client.request(waits).await }
    });
    pool.until(|state| state.waiting == 1).await;
    client.release(&calls[1].id).await.unwrap();
    let session = waits.await.unwrap().unwrap();
    assert_eq!(session.server, calls[1].server);
}

#[tokio::test]
async fn wrong_ports_are_refused_at_once_and_the_field_is_named() {
    let pool = Pool::running(1, call_ports).await;
    let listed = |ports: Vec<PortRequest>| SessionRequest {
        ports: Some(ports),
        // What cannot be is not waited for.
        wait_seconds: 300,
        ..SessionRequest::default()
    };
    let cases = [
        (listed(Vec::new()), "ports must have 1 to 16 elements"),
        (listed(vec![ports("media", 1); 17]), "it has 17"),
        (
            listed(vec![ports("media", 0)]),
            "ports[0].count must be 1 to 64; this one is 0",
        ),
        (
            listed(vec![ports("media", 1), ports("media", 65)]),
            "ports[1].count must be",
        ),
        (
            listed(vec![ports("media", 33), ports("control", 33)]),
            "these are 66",
        ),
        (
            listed(vec![ports("media", 3)]),
            "ports[0].count is 3, but a processing server has at most 2",
        ),
        (
            listed(vec![ports("media", 2), ports("media", 1)]),
            "ports asks for 3 ports",
        ),
        (
            listed(vec![ports("media", 1), ports("none", 1)]),
            "ports[1]: no port entry",
        ),
        (
            listed(vec![ports("", 1)]),
            "ports[0].portName must have 1 to 15",
        ),
        (
            SessionRequest {
                port_name: Some("media".to_owned()),
                ..call()
            },
            "portName cannot be given together with ports",
        ),
        (
            SessionRequest {
                protocol: Some(portpool::pool::PortProtocol::TCP),
                ..call()
            },
            "protocol cannot be given together with ports",
        ),
    ];
    let started = Instant::now();
    for (request, expected) in cases {
        match pool.client().request(request).await {
            Err(ClientError::Refused(problem)) => {
                assert!(problem.detail.contains(expected), "{problem}");
                assert_eq!(problem.status, 422, "{problem}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
    assert!(started.elapsed() < SOON);
}

#[tokio::test]
async fn even_ports_that_can_never_align_are_refused_at_once() {
    let pool = Pool::running(1, |table| {
        table.rows[0].ranges = vec![
            table::range(20_001, SERVER_PORT, 2),
            PortRange {
                name: "other".to_owned(),
                ..table::range(20_004, SERVER_PORT + 2, 2)
            },
        ];
    })
    .await;
    let request = |name: &str| SessionRequest {
        ports: Some(vec![ports(name, 2)]),
        wait_seconds: 60,
        ..SessionRequest::default()
    };
    let refused = pool.client().request(request("main")).await.unwrap_err();
    assert!(
        refused.to_string().contains("that begin with an even one"),
        "{refused}"
    );
    pool.client().request(request("other")).await.unwrap();
}

#[tokio::test]
async fn a_session_of_several_ports_survives_its_agent_and_a_connection_server_whole() {
    let mut pool = Pool::running(1, call_ports).await;
    pool.start_connection_server(1);
    let full = u32::from(COUNT);
    pool.until_of(1, |state| state.free_ports == full).await;
    let session = pool.client().request(call()).await.unwrap();
    let mut streams = connect_all(&session);
    pool.until(|state| counts(state, 0) == [1, 0, 3, 0]).await;
    pool.agents[0].kill();
    pool.start_agent(0);
    pool.until(|state| counts(state, 0)[2] == 3 && state.sessions == 1)
        .await;
    for stream in &mut streams {
        echo(stream, "through the restart");
    }
    // The other connection server admits on any of its ports.
    let further = session.at(&session.ports[2]);
    let mut elsewhere = TcpStream::connect((pool.connection_address(1), further.port)).unwrap();
    elsewhere.set_read_timeout(Some(SOON)).unwrap();
    echo(&mut elsewhere, "elsewhere");
    pool.connection_servers[0].kill();
    echo(&mut elsewhere, "still");
    let live = pool.client_of(1).get(&session.id).await.unwrap();
    assert_eq!(live.ports, session.ports);
    pool.client_of(1).release(&session.id).await.unwrap();
    assert!(is_cut(&mut elsewhere));
}

#[tokio::test]
async fn a_session_of_several_ports_is_handed_over_whole() {
    let mut pool = Pool::new(1, call_ports);
    pool.start_workload(0);
    pool.start_agent(0);
    let mut former = pool.start_successor(0);
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
    let session = pool.client().request(call()).await.unwrap();
    let mut streams = connect_all(&session);
    for stream in &mut streams {
        echo(stream, "before");
    }
    let _successor: Process = pool.start_successor(0);
    former.wait();
    for stream in &mut streams {
        echo(stream, "after");
    }
    let mut late = connect(&session.at(&session.ports[1]));
    echo(&mut late, "new");
    // The end of the connections on all its ports is the end of the session.
    drop((streams, late));
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
}

/// What a client got in a round of the load test.
struct Got {
    session: Session,
    took: Duration,
}

/// Asks in turns for five ports and for one, for `rounds`, and gives everything
/// back.
async fn load(client: Client, rounds: usize) -> (Vec<Got>, Vec<Got>) {
    let (mut large, mut small) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        for (got, wanted) in [
            (&mut large, Some(vec![ports("main", 2), ports("main", 3)])),
            (&mut small, None),
        ] {
            let request = SessionRequest {
                ports: wanted,
                wait_seconds: 60,
                ..SessionRequest::default()
            };
            let started = Instant::now();
            let session = client.request(request).await.unwrap();
            let took = started.elapsed();
            client.release(&session.id).await.unwrap();
            got.push(Got { session, took });
        }
    }
    (large, small)
}

/// The median and the 99th percentile.
fn percentiles(got: &[Got]) -> [Duration; 2] {
    let mut times: Vec<Duration> = got.iter().map(|it| it.took).collect();
    times.sort_unstable();
    [times[times.len() / 2], times[times.len() * 99 / 100]]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_for_five_ports_are_neither_split_nor_answered_in_part() {
    const SERVERS: u32 = 20;
    const CLIENTS: usize = 50;
    const PORTS: u16 = 12;
    let _turn = turn().await;
    let mut pool = Pool::new(SERVERS, |table| {
        for (row, first) in table.rows.iter_mut().zip((20_000..).step_by(PORTS.into())) {
            // All lead to one server port, so that 20 small workloads do.
            row.ranges = vec![PortRange {
                mapping: portpool::pool::Mapping::Shared,
                ..table::range(first, SERVER_PORT, PORTS)
            }];
        }
    });
    for slot in 0..SERVERS {
        pool.start_workload(slot);
        pool.start_agent(slot);
    }
    pool.start_connection_server(0);
    let all = SERVERS * u32::from(PORTS);
    pool.until(|state| state.free_ports == all).await;
    let clients = (0..CLIENTS).map(|_| tokio::spawn(load(pool.client(), 10)));
    let (mut large, mut small) = (Vec::new(), Vec::new());
    for client in clients.collect::<Vec<_>>() {
        let (larger, smaller) = client.await.unwrap();
        large.extend(larger);
        small.extend(smaller);
    }
    let servers: HashMap<&str, HashSet<u16>> = pool
        .table
        .rows
        .iter()
        .map(|row| {
            let ports = row.ranges[0].connection_ports().map(ListenPort::get);
            (row.server.as_str(), ports.collect())
        })
        .collect();
    for Got { session, .. } in &large {
        let ports: Vec<u16> = session.ports.iter().map(|it| it.port).collect();
        assert_eq!(ports.len(), 5, "partial: {session:?}");
        let there = &servers[session.server.as_str()];
        assert!(
            ports.iter().all(|port| there.contains(port)),
            "split: {session:?}"
        );
        assert_eq!((ports[0] % 2, ports[1]), (0, ports[0] + 1));
        assert_eq!([ports[3], ports[4]], [ports[2] + 1, ports[2] + 2]);
    }
    let ([large_p50, large_p99], [small_p50, small_p99]) =
        (percentiles(&large), percentiles(&small));
    println!(
        "five ports: p50 {large_p50:?}, p99 {large_p99:?}; one port: p50 {small_p50:?}, p99 {small_p99:?}"
    );
    pool.until(|state| state.free_ports == all).await;
}
