//! The queue of the load-sharing port as clients meet it: who waits, who leaves,
//! and who is not kept out by those who wait.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{COUNT, Pool, Process, SERVER_PORT, SOON, get, table, turn};
use portpool::client::Client;
use portpool::pool::PortProtocol;
use portpool::session::{Session, SessionRequest};
use portpool::table::PortRange;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// "At once", on a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(2);

fn request(change: impl FnOnce(&mut SessionRequest)) -> SessionRequest {
    let mut request = SessionRequest::default();
    change(&mut request);
    request
}

fn waiting(seconds: u32) -> SessionRequest {
    request(|request| request.wait_seconds = seconds)
}

/// A pool of one server whose ports all have a session: these.
async fn full() -> (Pool, Vec<Session>) {
    let pool = Pool::running(1, |table| table.sessions.claim_seconds = 300).await;
    let mut sessions = Vec::new();
    for _ in 0..COUNT {
        sessions.push(pool.request().await.unwrap());
    }
    (pool, sessions)
}

/// Sends a request over HTTP and keeps its connection.
fn post(address: IpAddr, request: &SessionRequest) -> TcpStream {
    let mut stream = TcpStream::connect((address, 7700)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let body = serde_json::to_string(request).unwrap();
    let length = body.len();
    let head = "POST /v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json";
    write!(stream, "{head}\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
    stream
}

#[tokio::test]
async fn who_waits_is_before_those_who_could_use_the_same_ports_only() {
    let pool = Pool::running(1, |table| {
        let range = |name: &str, offset: u16, count: u16, protocol| PortRange {
            name: name.to_owned(),
            protocol,
            ..table::range(20_000 + offset, SERVER_PORT + offset, count)
        };
        table.rows[0].ranges = vec![
            range("voice", 0, 1, PortProtocol::UDP),
            range("game", 1, 3, PortProtocol::TCP),
        ];
    })
    .await;
    let named = |name: &str| request(|request| request.port_name = Some(name.to_owned()));
    let speaking = |protocol| request(|request| request.protocol = Some(protocol));
    let voice = pool.client().request(named("voice")).await.unwrap();
    let client = pool.client();
    let waits = request(|request| {
        request.protocol = Some(PortProtocol::UDP);
        request.wait_seconds = 60;
    });
    let waits = tokio::spawn(async move { client.request(waits).await });
    pool.until(|state| state.waiting == 1).await;
    for wanted in [speaking(PortProtocol::TCP), named("game"), waiting(1)] {
        let started = Instant::now();
        let session = pool.client().request(wanted).await.unwrap();
        assert_eq!(session.port_name, "game");
        assert!(started.elapsed() < Duration::from_secs(1));
    }
    pool.client().release(&voice.id).await.unwrap();
    assert_eq!(waits.await.unwrap().unwrap().port_name, "voice");
}

#[tokio::test]
async fn clients_that_hang_up_leave_the_queue_with_and_without_a_key() {
    let (pool, sessions) = full().await;
    let address = pool.connection_address(0);
    let load_sharing = format!("{address}:7700");
    let arguments = ["request", &load_sharing, "--wait=120"].map(str::to_owned);
    let programs = [Signal::INT, Signal::KILL].map(|signal| (Process::start(&arguments), signal));
    let keyed = request(|request| {
        request.wait_seconds = 120;
        request.idempotency_key = Some("kept".to_owned());
    });
    let streams = [post(address, &waiting(120)), post(address, &keyed)];
    // What old clients send after a body must not hide that they are gone.
    (&streams[1]).write_all(b"\r\n").unwrap();
    pool.until(|state| state.waiting == 4).await;
    for (program, signal) in &programs {
        program.signal(*signal);
    }
    drop(streams);
    let left = pool.until(|state| state.waiting == 0).await;
    assert!(left < AT_ONCE, "they stayed for {left:?}");
    // So the port goes to the one that is there.
    let client = pool.client();
    let there = tokio::spawn(async move { client.request(waiting(60)).await });
    pool.until(|state| state.waiting == 1).await;
    let started = Instant::now();
    pool.client().release(&sessions[0].id).await.unwrap();
    there.await.unwrap().unwrap();
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_same_key_again_is_answered_at_once_while_the_first_request_waits() {
    let (pool, sessions) = full().await;
    let keyed = |wait| {
        request(|request| {
            request.wait_seconds = wait;
            request.idempotency_key = Some("job".to_owned());
        })
    };
    let ask = |wait| {
        let client = pool.client();
        tokio::spawn(async move { client.request(keyed(wait)).await })
    };
    let first = ask(60);
    pool.until(|state| state.waiting == 1).await;
    let started = Instant::now();
    let refusal = pool.client().request(keyed(0)).await.unwrap_err();
    assert!(refusal.is_exhausted(), "{refusal}");
    let command = tokio::process::Command::new(env!("CARGO_BIN_EXE_portpool"))
        .args(["request", &format!("{}:7700", pool.connection_address(0))])
        .args(["--idempotency-key", "job"])
        .output();
    let output = command.await.unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    // One that waits, too, gets the same session as soon as the first does.
    let second = ask(60);
    let third = ask(1);
    let refusal = third.await.unwrap().unwrap_err();
    assert!(refusal.is_exhausted(), "its own wait counts: {refusal}");
    pool.until(|state| state.waiting == 1).await;
    pool.client().release(&sessions[0].id).await.unwrap();
    let (first, second) = (first.await.unwrap(), second.await.unwrap());
    assert_eq!(first.unwrap(), second.unwrap());
    pool.until(|state| state.sessions == u32::from(COUNT)).await;
}

#[tokio::test]
async fn the_same_key_through_another_connection_server_gets_the_same_session() {
    let (mut pool, sessions) = full().await;
    pool.start_connection_server(1);
    pool.until_of(1, |state| state.sessions == u32::from(COUNT))
        .await;
    let ask = |client: Client| {
        let keyed = request(|request| {
            request.wait_seconds = 60;
            request.idempotency_key = Some("job".to_owned());
        });
        tokio::spawn(async move { client.request(keyed).await })
    };
    let both = [ask(pool.client_of(0)), ask(pool.client_of(1))];
    pool.until_of(0, |state| state.waiting == 1).await;
    pool.until_of(1, |state| state.waiting == 1).await;
    pool.client().release(&sessions[0].id).await.unwrap();
    let mut ids = HashSet::new();
    for answer in both {
        ids.insert(answer.await.unwrap().unwrap().id);
    }
    assert_eq!(ids.len(), 1);
}

/// Lets this process open `count` files.
fn allow_files(count: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = count + 1000;
    assert!(
        maximum.is_none_or(|most| most >= needed),
        "{maximum:?} open files"
    );
    if current.is_some_and(|current| current < needed) {
        let current = Some(needed);
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    }
}

/// That asking and giving back take no longer than always.
async fn is_open_to_others(pool: &Pool, session: &Session) {
    let started = Instant::now();
    let answer = get(pool.connection_address(0), 7700, "/v1/pool");
    assert!(answer.contains(" 200 "), "{answer}");
    pool.client().get(&session.id).await.unwrap();
    pool.client().release(&session.id).await.unwrap();
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_wait_others_can_ask_and_give_back() {
    const CLIENTS: usize = 8250;
    let _turn = turn().await;
    allow_files(CLIENTS as u64);
    let (pool, sessions) = full().await;
    let address = pool.connection_address(0);
    let connect = move || {
        let clients = (0..CLIENTS).map(|_| post(address, &waiting(60)));
        clients.collect::<Vec<_>>()
    };
    let mut clients = tokio::task::spawn_blocking(connect).await.unwrap();
    // The last ones are refused, and their connections closed.
    let mut answer = String::new();
    let last = clients.last_mut().unwrap();
    last.read_to_string(&mut answer).unwrap();
    assert!(
        answer.contains("urn:portpool:problem:queue-full"),
        "{answer}"
    );
    assert!(answer.to_lowercase().contains("retry-after: 1"), "{answer}");
    is_open_to_others(&pool, &sessions[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_their_clients_keep_lock_no_one_out() {
    const CLIENTS: usize = 8250;
    let _turn = turn().await;
    allow_files(CLIENTS as u64);
    let (pool, sessions) = full().await;
    let address = pool.connection_address(0);
    let connect = move || {
        let clients = (0..CLIENTS).map(|_| {
            let mut stream = post(address, &SessionRequest::default());
            let _ = stream.read(&mut [0; 1024]).unwrap();
            stream
        });
        clients.collect::<Vec<_>>()
    };
    let clients = tokio::task::spawn_blocking(connect).await.unwrap();
    is_open_to_others(&pool, &sessions[0]).await;
    drop(clients);
}

#[tokio::test]
async fn who_gives_a_port_back_can_ask_again_at_once() {
    let (pool, mut sessions) = full().await;
    let client = pool.client();
    for _ in 0..50 {
        client.release(&sessions.remove(0).id).await.unwrap();
        sessions.push(client.request(SessionRequest::default()).await.unwrap());
    }
    let started = Instant::now();
    assert!(pool.request().await.is_err());
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}

/// Clients that use a port for a moment and ask for the next, fewer than there
/// are ports.
#[tokio::test(flavor = "multi_thread")]
async fn fewer_clients_than_ports_are_all_served_without_waiting() {
    const PORTS: u16 = 40;
    const CLIENTS: usize = 32;
    const ROUNDS: usize = 60;
    let _turn = turn().await;
    let mut pool = Pool::new(2, |table| {
        for (row, first) in table.rows.iter_mut().zip([20_000, 20_000 + PORTS]) {
            row.ranges = vec![table::range(first, SERVER_PORT, PORTS)];
        }
    });
    for slot in 0..2 {
        pool.workloads.push(Process::start(&[
            "echo".to_owned(),
            format!("--listen={}", pool.server_address(slot)),
            format!("--ports={SERVER_PORT}-{}", SERVER_PORT + PORTS - 1),
        ]));
        pool.start_agent(slot);
    }
    pool.start_connection_server(0);
    let all = 2 * u32::from(PORTS);
    pool.until(|state| state.free_ports == all).await;
    let pool = Arc::new(pool);
    let clients = (0..CLIENTS).map(|_| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let client = pool.client();
            for _ in 0..ROUNDS {
                let session = client.request(SessionRequest::default()).await.unwrap();
                let mut stream = client.connect(&session).await.unwrap();
                stream.write_all(b"mine").await.unwrap();
                stream.read_exact(&mut [0; 4]).await.unwrap();
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    pool.until(|state| state.free_ports == all).await;
}

#[tokio::test]
async fn a_refusal_says_whether_servers_start_workloads_are_silent_or_all_is_in_use() {
    let mut pool = Pool::new(1, |_| {});
    pool.start_connection_server(0);
    pool.until(|_| true).await;
    let refusal = async |pool: &Pool| pool.request().await.unwrap_err().to_string();
    let starting = refusal(&pool).await;
    assert!(starting.contains("they are starting"), "{starting}");
    pool.start_agent(0);
    let silent = |state: &portpool::session::PoolState| {
        let mut ports = state.servers.iter().flat_map(|server| &server.ports);
        ports.any(|ports| ports.not_listening == u32::from(COUNT))
    };
    pool.until(silent).await;
    let silent = refusal(&pool).await;
    assert!(
        silent.contains("listens on none of the 4 matching ports"),
        "{silent}"
    );
    pool.start_workload(0);
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
    for _ in 0..COUNT {
        pool.request().await.unwrap();
    }
    let in_use = refusal(&pool).await;
    assert!(
        in_use.contains("all 4 matching ports are in use"),
        "{in_use}"
    );
}

#[tokio::test]
async fn a_refusal_while_an_agent_recovers_says_so() {
    let (mut pool, sessions) = full().await;
    pool.client().release(&sessions[0].id).await.unwrap();
    pool.until(|state| state.free_ports == 1).await;
    pool.agents[0].kill();
    pool.agents.clear();
    pool.start_agent(0);
    let recovers = |state: &portpool::session::PoolState| {
        let ports = state.servers.iter().flat_map(|server| &server.ports);
        let counts: Vec<_> = ports.map(|it| (it.held, it.not_listening)).collect();
        counts == [(u32::from(COUNT) - 1, 1)]
    };
    pool.until(recovers).await;
    let refusal = pool.request().await.unwrap_err().to_string();
    assert!(refusal.contains("its agent was restarted"), "{refusal}");
}

#[tokio::test]
async fn waiting_requests_are_sent_away_when_their_connection_server_drains() {
    let (pool, _sessions) = full().await;
    let client = pool.client();
    let waits = tokio::spawn(async move { client.request(waiting(60)).await });
    pool.until(|state| state.waiting == 1).await;
    let started = Instant::now();
    pool.connection_servers[0].terminate();
    let refusal = waits.await.unwrap().unwrap_err().to_string();
    assert!(refusal.contains("ask again"), "{refusal}");
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}
