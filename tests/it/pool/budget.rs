//! What a pool of a hundred servers takes while nothing happens, and how it serves.
//! Prints what it measures.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::cluster::{Space, spec};
use crate::common::{Pool, Process, turn};
use portpool::agent::sockets::ListenScope;
use portpool::agent::{self, Options};
use portpool::pool::PortProtocol;
use portpool::session::SessionRequest;
use portpool::table::{ListenPort, Slot, TargetPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

const AGENTS: u16 = 100;
const PORTS: u16 = 40;

/// How long after the start nothing happens any more: ports that open are
/// expected for some seconds.
const REST: Duration = Duration::from_secs(9);

/// What is measured at a time. The least of several spans counts, because other
/// programs of the machine make each of them longer.
const SPAN: Duration = Duration::from_secs(3);
const SPANS: usize = 3;

/// Most of a processor that an agent may take.
const AGENT: f64 = 0.001;

/// The ports of an agent that has many, and most of a processor that it may take:
/// while nothing happens, and while requests that find nothing come without pause.
/// Without optimization, a look takes several times as long.
const MANY_PORTS: u16 = 1000;

/// The first server port, above the agent's own ports.
const FIRST: u16 = 8000;
const AGENT_OF_MANY: f64 = if cfg!(debug_assertions) { 0.03 } else { 0.005 };
const AGENT_IN_A_FLOOD: f64 = if cfg!(debug_assertions) { 0.2 } else { 0.05 };

/// Most of a processor that the connection server of a hundred agents may take.
const CONNECTION_SERVER: f64 = 0.02;

/// Most of a processor that the controller of a hundred servers may take.
const CONTROLLER: f64 = 0.02;

/// Most memory that a process may take while nothing happens: what its container
/// requests of the node, in MiB (`plan::objects`, and the values of the chart).
const AGENT_MEMORY: u64 = 16;
const CONNECTION_SERVER_MEMORY: u64 = 64;
const CONTROLLER_MEMORY: u64 = 64;

/// The part of the sessions a second of a pool of two that one of a hundred must
/// make at least: it makes 0.7 of them on two processors without optimization,
/// and made a quarter when its agents read the table again and again.
const SERVES_AS_WELL: f64 = 0.4;

/// The processor time that a thread has taken so far; zero once it has ended.
///
/// Source: Linux `Documentation/scheduler/sched-stats.rst`.
fn processor_time(thread: &Path) -> Duration {
    let text = std::fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
    let time = text.split_ascii_whitespace().next();
    Duration::from_nanos(time.map_or(0, |time| time.parse().unwrap()))
}

/// That of all threads of a process.
fn processor_time_of_all(process: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads
        .map(|thread| processor_time(&thread.unwrap().path()))
        .sum()
}

/// A pool of `servers` servers with `ports` ports each, of which nothing runs.
fn pool_of(servers: u16, ports: u16) -> Pool {
    Pool::new(u32::from(servers), |table| {
        for (row, slot) in table.rows.iter_mut().zip(0..) {
            let range = &mut row.ranges[0];
            range.connection_port = ListenPort::new(20_000 + slot * ports).unwrap();
            range.server_port = TargetPort::new(FIRST).unwrap();
            (range.count, range.protocol) = (ports, PortProtocol::TCP);
        }
    })
}

/// Runs the agents of `pool` on one thread, and returns its directory in `/proc`.
/// They stop when the sender is dropped.
fn run_agents(pool: &Pool) -> (PathBuf, oneshot::Sender<()>, std::thread::JoinHandle<()>) {
    let slots = pool.table.rows.iter().map(|row| row.slot.0);
    let options: Vec<Options> = slots
        .map(|slot| {
            let address = pool.server_address(slot);
            Options {
                advertise: None,
                table: pool.table_file(),
                slot: Slot(slot),
                address,
                listen_scope: ListenScope::Address,
                admin: SocketAddr::new(address, 7071),
                api: None,
                state_file: None,
                drain_seconds: Some(0),
            }
        })
        .collect();
    let (stop, stopping) = oneshot::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    let run = move || {
        let thread = std::fs::read_link("/proc/thread-self").unwrap();
        tell.send(Path::new("/proc").join(thread)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            for options in options {
                tokio::spawn(async { agent::run(options, std::future::pending()).await.unwrap() });
            }
            let _ = stopping.await;
        });
    };
    let thread = std::thread::spawn(run);
    (told.recv().unwrap(), stop, thread)
}

/// The share of a processor that each of the `times` takes while nothing happens.
async fn shares<const N: usize>(times: impl Fn() -> [Duration; N]) -> [f64; N] {
    let mut least = [f64::MAX; N];
    for _ in 0..SPANS {
        let (before, started) = (times(), Instant::now());
        tokio::time::sleep(SPAN).await;
        let (after, passed) = (times(), started.elapsed());
        for (least, (before, after)) in least.iter_mut().zip(before.into_iter().zip(after)) {
            let share = (after - before).as_secs_f64() / passed.as_secs_f64();
            *least = least.min(share);
        }
    }
    least
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_idle_agents_and_their_connection_server_take_little() {
    let _turn = turn().await;
    portpool::forward::check_open_files(10_000).unwrap();
    let mut pool = pool_of(AGENTS, PORTS);
    let listeners: Vec<std::net::TcpListener> = (0..u32::from(AGENTS))
        .flat_map(|slot| (0..PORTS).map(move |port| (slot, FIRST + port)))
        .map(|(slot, port)| std::net::TcpListener::bind((pool.server_address(slot), port)).unwrap())
        .collect();
    let (agents, stop, thread) = run_agents(&pool);
    pool.start_connection_server(0);
    let ports = u32::from(AGENTS * PORTS);
    pool.until(|state| state.free_ports == ports).await;
    tokio::time::sleep(REST).await;

    let process = pool.connection_servers[0].id();
    let [agents, connection_server] =
        shares(|| [processor_time(&agents), processor_time_of_all(process)]).await;
    let agent = agents / f64::from(AGENTS);
    println!(
        "of a processor: {:.3} % for an idle agent with {PORTS} ports, {:.2} % for the connection server of {AGENTS}",
        agent * 100.0,
        connection_server * 100.0
    );
    drop(stop);
    thread.join().unwrap();
    drop(listeners);
    assert!(agent < AGENT, "an idle agent takes {agent}");
    assert!(
        connection_server < CONNECTION_SERVER,
        "an idle connection server takes {connection_server}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_a_thousand_ports_takes_little_idle_and_in_a_flood_of_requests() {
    let _turn = turn().await;
    portpool::forward::check_open_files(10_000).unwrap();
    let mut pool = pool_of(1, MANY_PORTS);
    let address = pool.server_address(0);
    let listen = |port| std::net::TcpListener::bind((address, FIRST + port)).unwrap();
    let listeners: Vec<_> = (0..MANY_PORTS).map(listen).collect();
    let (agent, stop, thread) = run_agents(&pool);
    pool.start_connection_server(0);
    let ports = u32::from(MANY_PORTS);
    pool.until(|state| state.free_ports == ports).await;
    tokio::time::sleep(REST).await;
    let [listening] = shares(|| [processor_time(&agent)]).await;

    drop(listeners);
    pool.until(|state| state.free_ports == 0).await;
    tokio::time::sleep(REST).await;
    let [closed] = shares(|| [processor_time(&agent)]).await;

    let client = pool.client();
    let flood = tokio::spawn(async move {
        let mut refused = 0u32;
        loop {
            let answer = client.request(SessionRequest::default()).await;
            assert!(answer.is_err());
            refused += 1;
            if refused.is_multiple_of(1000) {
                println!("{refused} requests refused");
            }
        }
    });
    let [flooded] = shares(|| [processor_time(&agent)]).await;
    assert!(!flood.is_finished());
    flood.abort();
    println!(
        "of a processor for an agent with {MANY_PORTS} ports: {:.3} % idle, {:.3} % while none is listened on, {:.2} % in a flood of requests",
        listening * 100.0,
        closed * 100.0,
        flooded * 100.0
    );
    drop(stop);
    thread.join().unwrap();
    assert!(listening < AGENT_OF_MANY, "an idle agent takes {listening}");
    assert!(
        closed < AGENT_OF_MANY,
        "an agent of closed ports takes {closed}"
    );
    assert!(
        flooded < AGENT_IN_A_FLOOD,
        "an agent in a flood takes {flooded}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_idle_controller_of_a_hundred_servers_takes_little() {
    let _turn = turn().await;
    let space = Space::with_pool("idle-budget", spec(AGENTS.into())).await;
    tokio::time::sleep(REST).await;
    let process = space.controller.as_ref().unwrap().id();
    let [controller] = shares(|| [processor_time_of_all(process)]).await;
    let memory = memory(process);
    println!(
        "of a processor: {:.2} % for the idle controller of {AGENTS} servers; memory: {memory} MiB",
        controller * 100.0
    );
    assert!(
        memory <= CONTROLLER_MEMORY,
        "an idle controller has {memory} MiB"
    );
    assert!(
        controller < CONTROLLER,
        "an idle controller takes {controller}"
    );
}

/// The memory of a process in MiB, rounded up; of what it shares with others, its
/// share.
///
/// Source: Linux `Documentation/filesystems/proc.rst`, `smaps_rollup`.
fn memory(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib.div_ceil(1024)
}

/// A pool of `agents` servers with [`PORTS`] ports each, every part a process of
/// its own.
async fn running(agents: u16) -> (Pool, Vec<Process>) {
    let mut pool = pool_of(agents, PORTS);
    let workloads = (0..u32::from(agents)).map(|slot| {
        let address = pool.server_address(slot);
        let (first, last) = (FIRST, FIRST + PORTS - 1);
        Process::start(&[
            "echo".to_owned(),
            format!("--listen={address}"),
            format!("--ports={first}-{last}"),
        ])
    });
    let workloads = workloads.collect();
    for slot in 0..u32::from(agents) {
        pool.start_agent(slot);
    }
    pool.start_connection_server(0);
    let ports = u32::from(agents * PORTS);
    pool.until(|state| state.free_ports == ports).await;
    tokio::time::sleep(REST).await;
    (pool, workloads)
}

/// How many sessions eight clients make, use and give back in a second.
async fn sessions_a_second(pool: &Pool) -> f64 {
    let started = Instant::now();
    let clients = (0..8).map(|_| {
        let client = pool.client();
        tokio::spawn(async move {
            let mut made = 0;
            while started.elapsed() < SPAN {
                let session = client.request(SessionRequest::default()).await.unwrap();
                let mut stream = client.connect(&session).await.unwrap();
                stream.write_all(b"mine").await.unwrap();
                stream.read_exact(&mut [0; 4]).await.unwrap();
                client.release(&session.id).await.unwrap();
                made += 1;
            }
            made
        })
    });
    let mut made = 0;
    for client in clients.collect::<Vec<_>>() {
        made += client.await.unwrap();
    }
    f64::from(made) / started.elapsed().as_secs_f64()
}

/// Each agent reports its counts after each session, to one connection server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_of_a_hundred_serves_as_one_of_two_does_and_fits_what_its_pods_request() {
    let _turn = turn().await;
    portpool::forward::check_open_files(10_000).unwrap();
    let (few, _few) = running(2).await;
    let (many, _many) = running(AGENTS).await;
    let agents = many.agents.iter().map(|agent| memory(agent.id()));
    let agent = agents.max().unwrap();
    let connection_server = memory(many.connection_servers[0].id());
    // The best of several spans counts, as other programs take from each.
    let (mut of_two, mut of_hundred) = (0.0, 0.0);
    for _ in 0..SPANS {
        of_two = f64::max(of_two, sessions_a_second(&few).await);
        of_hundred = f64::max(of_hundred, sessions_a_second(&many).await);
    }
    println!(
        "{of_hundred:.0} sessions a second with {AGENTS} agents, {of_two:.0} with 2; memory: at most {agent} MiB of an idle agent, {connection_server} MiB of the connection server"
    );
    assert!(agent <= AGENT_MEMORY, "an idle agent has {agent} MiB");
    assert!(
        connection_server <= CONNECTION_SERVER_MEMORY,
        "an idle connection server has {connection_server} MiB"
    );
    assert!(
        of_hundred >= of_two * SERVES_AS_WELL,
        "{of_hundred} sessions a second, {of_two} with 2 agents"
    );
}
