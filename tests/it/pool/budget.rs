//! What a pool of a hundred servers takes while nothing happens. Prints what it
//! measures.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::cluster::{Space, spec};
use crate::common::{Pool, turn};
use portpool::agent::sockets::ListenScope;
use portpool::agent::{self, Options};
use portpool::pool::PortProtocol;
use portpool::table::{ListenPort, Slot};
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

/// Most of a processor that the connection server of a hundred agents may take.
const CONNECTION_SERVER: f64 = 0.02;

/// Most of a processor that the controller of a hundred servers may take.
const CONTROLLER: f64 = 0.02;

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

/// Runs the agents of `pool` on one thread, and returns its directory in `/proc`.
/// They stop when the sender is dropped.
fn run_agents(pool: &Pool) -> (PathBuf, oneshot::Sender<()>, std::thread::JoinHandle<()>) {
    let options: Vec<Options> = (0..u32::from(AGENTS))
        .map(|slot| {
            let address = pool.server_address(slot);
            Options {
                table: pool.table_file(),
                slot: Slot(slot),
                address,
                listen_scope: ListenScope::Address,
                admin: SocketAddr::new(address, 7071),
                state_file: None,
                drain_seconds: 0,
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
    let mut pool = Pool::new(u32::from(AGENTS), |table| {
        for (row, slot) in table.rows.iter_mut().zip(0..) {
            let range = &mut row.ranges[0];
            range.connection_port = ListenPort::new(20_000 + slot * PORTS).unwrap();
            (range.count, range.protocol) = (PORTS, PortProtocol::TCP);
        }
    });
    let listeners: Vec<std::net::TcpListener> = (0..u32::from(AGENTS))
        .flat_map(|slot| (0..PORTS).map(move |port| (slot, crate::common::SERVER_PORT + port)))
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
async fn the_idle_controller_of_a_hundred_servers_takes_little() {
    let _turn = turn().await;
    let space = Space::with_pool("idle-budget", spec(AGENTS.into())).await;
    tokio::time::sleep(REST).await;
    let process = space.controller.as_ref().unwrap().id();
    let [controller] = shares(|| [processor_time_of_all(process)]).await;
    println!(
        "of a processor: {:.2} % for the idle controller of {AGENTS} servers",
        controller * 100.0
    );
    assert!(
        controller < CONTROLLER,
        "an idle controller takes {controller}"
    );
}
