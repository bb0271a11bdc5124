//! Many ports and sessions at once. Prints what it measures; figures to quote
//! come from `cargo test --release --test it pool::scale -- --nocapture`.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::common::{Pool, Process, connect, echo, turn};
use portpool::pool::PortProtocol;
use portpool::session::{Session, SessionRequest};
use portpool::table::{ListenPort, TargetPort};

/// Ports of each of the two servers.
const PORTS: u16 = 5_000;
/// First server port; above the agent's own.
const FIRST: u16 = 8_000;
const SESSIONS: usize = 5_000;
/// Connections of one source: two open files each beside the 10,000 listeners and
/// what the load-sharing port may take, of the 20,000 that a process may commonly
/// have.
const CONNECTIONS: usize = 3_700;
/// Requests at a time.
const CLIENTS: usize = 32;
/// Clients at a time, and the time between two requests of one client, for a
/// realistic load of 800 requests a second instead of the highest possible.
const PACED_CLIENTS: usize = 8;
const PACE: Duration = Duration::from_millis(10);

/// Resident memory of a process in KiB.
fn resident(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Takes `count` sessions, `clients` at a time, each after `pace`; each
/// request's time.
async fn allocate(
    pool: &Pool,
    count: usize,
    clients: usize,
    pace: Duration,
) -> (Vec<Session>, Vec<Duration>) {
    let client = pool.client();
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut taken = Vec::new();
                for _ in 0..count.div_ceil(clients) {
                    tokio::time::sleep(pace).await;
                    let started = Instant::now();
                    let session = client.request(SessionRequest::default()).await.unwrap();
                    taken.push((session, started.elapsed()));
                }
                taken
            })
        })
        .collect();
    let (mut sessions, mut times) = (Vec::new(), Vec::new());
    for task in tasks {
        let (taken, took): (Vec<_>, Vec<_>) = task.await.unwrap().into_iter().unzip();
        sessions.extend(taken);
        times.extend(took);
    }
    times.sort();
    (sessions, times)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_ports_and_five_thousand_sessions_at_once() {
    let _turn = turn().await;
    portpool::forward::check_open_files(10_000).unwrap();
    let mut pool = Pool::new(2, |table| {
        for (row, first) in table.rows.iter_mut().zip([20_000, 20_000 + PORTS]) {
            row.ranges[0].connection_port = ListenPort::new(first).unwrap();
            row.ranges[0].server_port = TargetPort::new(FIRST).unwrap();
            row.ranges[0].count = PORTS;
            row.ranges[0].protocol = PortProtocol::TCP;
        }
        table.sessions.claim_seconds = 600;
    });
    for slot in 0..2 {
        let ports = format!("--ports={FIRST}-{}", FIRST + PORTS - 1);
        let listen = format!("--listen={}", pool.server_address(slot));
        pool.workloads
            .push(Process::start(&["echo".to_owned(), listen, ports]));
        pool.start_agent(slot);
    }
    let started = Instant::now();
    pool.start_connection_server(0);
    let free = 2 * u32::from(PORTS);
    pool.until(|state| state.free_ports == free).await;
    println!(
        "10,000 ports: answering, with all agents attached, {:?} after start",
        started.elapsed()
    );

    let started = Instant::now();
    let (sessions, times) = allocate(&pool, SESSIONS, CLIENTS, Duration::ZERO).await;
    let rate = sessions.len() as f64 / started.elapsed().as_secs_f64();
    let percentile = |times: &[Duration], of: usize| times[times.len() * of / 100];
    println!(
        "{} sessions, {CLIENTS} at a time: {rate:.0}/s, p50 {:?}, p99 {:?}",
        sessions.len(),
        percentile(&times, 50),
        percentile(&times, 99)
    );
    let (paced, times) = allocate(&pool, 2_000, PACED_CLIENTS, PACE).await;
    println!(
        "{} sessions, {PACED_CLIENTS} clients with {PACE:?} between: p50 {:?}, p99 {:?}",
        paced.len(),
        percentile(&times, 50),
        percentile(&times, 99)
    );
    let sessions: Vec<Session> = sessions.into_iter().chain(paced).collect();
    let mut ports: Vec<u16> = sessions.iter().map(|session| session.port).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), sessions.len(), "no port twice");
    let held = u32::try_from(sessions.len()).unwrap();
    pool.until(|state| state.sessions == held).await;

    let connected = u32::try_from(CONNECTIONS).unwrap();
    let before = resident(&pool.connection_servers[0]);
    let mut streams: Vec<TcpStream> = sessions[..CONNECTIONS].iter().map(connect).collect();
    echo(streams.last_mut().unwrap(), "the last one");
    pool.until(|state| {
        state
            .servers
            .iter()
            .map(|server| server.ports[0].busy)
            .sum::<u32>()
            == connected
    })
    .await;
    let after = resident(&pool.connection_servers[0]);
    let each = (after.saturating_sub(before)) * 1024 / u64::from(connected);
    println!(
        "{connected} idle connections: {before} KiB before, {after} KiB after, {each} bytes each"
    );
    assert!(each < 4096, "{each} bytes of memory per idle connection");

    // A client that sends something has claimed its session.
    for stream in &mut streams {
        stream.write_all(b"x").unwrap();
    }
    drop(streams);
    let left = free - (held - connected);
    let back = pool.until(|state| state.free_ports == left).await;
    println!("{connected} sessions over and their ports free again after {back:?}");
}
