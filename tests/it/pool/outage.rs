//! Fast clients and few ports while a connection server dies: clients are
//! served all the time.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::{COUNT, Pool, connect, echo, turn};
use parking_lot::Mutex;
use portpool::client::Client;
use portpool::session::{PoolState, SessionRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// Longest that a client waits before it requests another session.
const PATIENCE: Duration = Duration::from_secs(1);

/// Clients that take session after session, each request and each connection
/// through the next connection server, as a Service spreads them.
struct Clients {
    tasks: Vec<tokio::task::JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    served: Arc<Mutex<Vec<Instant>>>,
}

impl Clients {
    /// `pause` is the time between two sessions of a client.
    fn start(pool: &Pool, count: usize, pause: Duration) -> Self {
        let (stop, served) = (Arc::<AtomicBool>::default(), Arc::default());
        let servers: Arc<[(Client, IpAddr)]> = (0..2)
            .map(|index| (pool.client_of(index), pool.connection_address(index)))
            .collect();
        let turn = Arc::new(AtomicUsize::new(0));
        let client = |_| {
            let (servers, turn, stop) = (servers.clone(), turn.clone(), stop.clone());
            let served: Arc<Mutex<Vec<Instant>>> = Arc::clone(&served);
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    match take_session(&servers, &turn).await {
                        Some(()) => {
                            served.lock().push(Instant::now());
                            sleep(pause).await;
                        }
                        None => sleep(Duration::from_millis(10)).await,
                    }
                }
            })
        };
        let tasks = (0..count).map(client).collect();
        Self {
            tasks,
            stop,
            served,
        }
    }

    fn served(&self) -> usize {
        self.served.lock().len()
    }

    /// Longest time between `start` and now in which no client was served.
    async fn longest_gap(self, start: Instant) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let end = Instant::now();
        for task in self.tasks {
            task.await.unwrap();
        }
        let mut times = self.served.lock().clone();
        times.retain(|time| (start..end).contains(time));
        times.extend([start, end]);
        times.sort();
        times
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap()
    }
}

/// Requests a session, connects and exchanges bytes. A client that is refused
/// tries the next connection server, and one that gives up releases its session.
async fn take_session(servers: &[(Client, IpAddr)], turn: &AtomicUsize) -> Option<()> {
    let next = || &servers[turn.fetch_add(1, Ordering::Relaxed) % servers.len()];
    let session = next().0.request(SessionRequest::default()).await.ok()?;
    let exchange = async {
        loop {
            let Ok(mut stream) = TcpStream::connect((next().1, session.port)).await else {
                continue;
            };
            let mut answer = [0; 5];
            stream.write_all(b"hello").await.ok()?;
            stream.read_exact(&mut answer).await.ok()?;
            return Some(());
        }
    };
    let answered = timeout(PATIENCE, exchange).await.ok().flatten();
    if answered.is_none() {
        for (client, _) in servers {
            let _ = client.release(&session.id).await;
        }
    }
    answered
}

async fn two_connection_servers() -> Pool {
    let mut pool = Pool::running(1, |_| {}).await;
    pool.start_connection_server(1);
    let all = u32::from(COUNT);
    pool.until_of(1, |state| state.free_ports == all).await;
    pool
}

#[tokio::test]
async fn a_killed_connection_server_keeps_no_ports_once_another_replaces_it() {
    let _turn = turn().await;
    let mut pool = two_connection_servers().await;
    let clients = Clients::start(&pool, 2 * usize::from(COUNT), Duration::ZERO);
    while clients.served() < 200 {
        sleep(Duration::from_millis(10)).await;
    }
    let killed = Instant::now();
    pool.connection_servers[0].kill();
    sleep(Duration::from_millis(500)).await;
    pool.start_connection_server(0);
    sleep(Duration::from_secs(5)).await;
    let gap = clients.longest_gap(killed).await;
    assert!(
        gap < Duration::from_secs(3),
        "no client was served for {gap:?}"
    );
    let all = u32::from(COUNT);
    pool.until_of(1, |state| state.free_ports == all).await;
}

#[tokio::test]
async fn a_killed_connection_server_keeps_no_port_of_later_sessions() {
    let _turn = turn().await;
    let mut pool = two_connection_servers().await;
    // Fewer clients than ports, and slow ones: agents keep the ports that the dead
    // server used, and those whose end it has not confirmed yet.
    let clients = Clients::start(&pool, usize::from(COUNT) / 2, Duration::from_millis(50));
    while clients.served() < 100 {
        sleep(Duration::from_millis(10)).await;
    }
    let killed = Instant::now();
    pool.connection_servers[0].kill();
    sleep(Duration::from_secs(4)).await;
    let gap = clients.longest_gap(killed).await;
    assert!(
        gap < Duration::from_secs(2),
        "no client was served for {gap:?}"
    );
    let all = u32::from(COUNT);
    pool.until_of(1, |state| state.free_ports == all).await;
}

#[tokio::test]
async fn a_successor_takes_over_the_ports_of_its_predecessor() {
    let _turn = turn().await;
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.start_agent(0);
    let mut first = pool.start_successor(0);
    pool.start_connection_server(1);
    let all = u32::from(COUNT);
    pool.until_of(1, |state| state.free_ports == all).await;
    let mut second = pool.start_successor(0);
    assert!(first.ends());
    let mut stream = connect(&pool.request().await.unwrap());
    echo(&mut stream, "through the second");
    // The client might still claim a port that the server had not reported as busy.
    let is_busy = |state: &PoolState| state.servers[0].ports[0].busy == 1;
    pool.until_of(1, is_busy).await;
    second.kill();
    let _third = pool.start_successor(0);
    let back = pool.until_of(1, |state| state.free_ports == all).await;
    assert!(back < Duration::from_secs(5), "all is free after {back:?}");
}
