//! More clients than the limits allow: they are refused, counted, and served
//! when there is room again.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use crate::target::{Proxy, Target};
use crate::until;

/// A server that answers every byte of every client.
pub struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    pub fn on(listener: TcpListener) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = stop.clone();
        listener.set_nonblocking(true).unwrap();
        let thread = std::thread::spawn(move || {
            let mut clients: Vec<TcpStream> = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                while let Ok((client, _)) = listener.accept() {
                    client.set_nonblocking(true).unwrap();
                    clients.push(client);
                }
                let mut space = [0; 64];
                clients.retain_mut(|client| match client.read(&mut space) {
                    Ok(0) => false,
                    Ok(length) => client.write_all(&space[..length]).is_ok(),
                    Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                });
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// What became of a client that has sent a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Served,
    Refused,
    Waiting,
}

pub fn fate(client: &mut TcpStream, wait: Duration) -> Fate {
    client.set_read_timeout(Some(wait)).unwrap();
    match client.read(&mut [0]) {
        Ok(1..) => Fate::Served,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Fate::Waiting,
        Ok(0) | Err(_) => Fate::Refused,
    }
}

/// Sends a byte from each client and counts the served, refused and, after
/// `wait`, still waiting ones.
fn fates(clients: &mut [TcpStream], wait: Duration) -> (usize, usize, usize) {
    for client in &mut *clients {
        // A client that is already refused may fail to send.
        let _ = client.write_all(b"x");
    }
    std::thread::sleep(wait);
    let mut counts = (0, 0, 0);
    for client in clients {
        client.set_nonblocking(true).unwrap();
        match fate(client, Duration::from_millis(1)) {
            Fate::Served => counts.0 += 1,
            Fate::Refused => counts.1 += 1,
            Fate::Waiting => counts.2 += 1,
        }
    }
    counts
}

/// Waits until a new client is served.
fn serves_again(proxy: &Proxy, host: u8) {
    until("a new client is served", || {
        let mut client = proxy.connect_from(host, 0);
        let _ = client.write_all(b"x");
        fate(&mut client, Duration::from_secs(1)) == Fate::Served
    });
}

#[test]
fn ten_times_the_limit_are_refused_and_others_live() {
    const LIMIT: usize = 100;
    let proxy = Proxy::start(|setup| {
        setup.connections = Some(u32::try_from(LIMIT).unwrap());
        setup.per_source = Some(2 * u32::try_from(LIMIT).unwrap());
    });
    let echo = Echo::on(proxy.listener(0));
    let mut clients: Vec<TcpStream> = (0..10 * LIMIT)
        .map(|number| proxy.start_connecting(u8::try_from(10 + number % 40).unwrap(), 0))
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    let (served, refused, waiting) = fates(&mut clients, Duration::from_secs(2));
    println!("{served} served, {refused} refused, {waiting} wait");
    // nginx also counts its other connections.
    assert!(served.abs_diff(LIMIT) <= LIMIT / 10, "{served} served");
    assert_eq!(waiting, 0, "{waiting} clients got no answer");
    if proxy.target == Target::Portpool {
        assert_eq!((served, refused), (LIMIT, 9 * LIMIT));
        assert_eq!(proxy.refused("limit_total"), 900.0);
    }
    drop(clients);
    serves_again(&proxy, 9);
    drop(echo);
    proxy.expect_clean();
}

/// Connections of a flood no longer count once they have ended.
#[test]
fn after_ten_times_the_limit_as_many_are_served_as_before() {
    const LIMIT: usize = 50;
    let proxy = Proxy::start(|setup| {
        setup.connections = Some(u32::try_from(LIMIT).unwrap());
        setup.per_source = Some(2 * u32::try_from(LIMIT).unwrap());
    });
    let before = proxy.census().sockets;
    for _ in 0..4 {
        let echo = Echo::on(proxy.listener(0));
        let flood = (0..10 * LIMIT)
            .map(|number| proxy.start_connecting(u8::try_from(10 + number % 40).unwrap(), 0))
            .collect::<Vec<_>>();
        until("the limit is met", || {
            proxy.census().sockets >= before + 2 * LIMIT
        });
        // Half of the clients reset, the others close.
        for (number, client) in flood.into_iter().enumerate() {
            if number % 2 == 0 {
                crate::reset(client);
            }
        }
        until("the flood is over", || proxy.census().sockets <= before);
        let mut clients: Vec<TcpStream> = (0..LIMIT).map(|_| proxy.connect_from(9, 0)).collect();
        for client in &mut clients {
            client.write_all(b"x").unwrap();
            assert_eq!(fate(client, crate::SOON), Fate::Served);
        }
        drop((clients, echo));
        until("all are gone", || proxy.census().sockets <= before);
    }
    proxy.expect_clean();
}

#[test]
fn one_source_cannot_take_all() {
    let proxy = Proxy::start(|setup| setup.per_source = Some(10));
    let echo = Echo::on(proxy.listener(0));
    let mut greedy: Vec<TcpStream> = (0..30).map(|_| proxy.connect_from(8, 0)).collect();
    let (served, refused, _) = fates(&mut greedy, Duration::from_secs(1));
    assert_eq!((served, refused), (10, 20));
    serves_again(&proxy, 9);
    if proxy.target == Target::Portpool {
        assert_eq!(proxy.refused("limit_source"), 20.0);
    }
    drop(greedy);
    serves_again(&proxy, 8);
    drop(echo);
    proxy.expect_clean();
}

#[test]
fn one_port_cannot_take_all() {
    let proxy = Proxy::start(|setup| setup.per_port = Some(10));
    let echo = [Echo::on(proxy.listener(0)), Echo::on(proxy.listener(1))];
    let mut crowd: Vec<TcpStream> = (0..30).map(|_| proxy.connect(1)).collect();
    let (served, refused, _) = fates(&mut crowd, Duration::from_secs(1));
    assert_eq!((served, refused), (10, 20));
    serves_again(&proxy, 9);
    if proxy.target == Target::Portpool {
        assert_eq!(proxy.refused("limit_port"), 20.0);
    }
    drop((crowd, echo));
    proxy.expect_clean();
}

#[test]
fn without_descriptors_nothing_spins_and_all_are_served_later() {
    let proxy = Proxy::start(|_| {});
    let echo = Echo::on(proxy.listener(0));
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = |current| {
        let limit = Rlimit { current, maximum };
        prlimit(Some(proxy.id()), Resource::Nofile, limit).unwrap();
    };
    limit(Some(3));
    let mut clients: Vec<TcpStream> = (0..50).map(|_| proxy.connect(0)).collect();
    let before = proxy.processor_time();
    std::thread::sleep(Duration::from_secs(2));
    let used = proxy.processor_time() - before;
    println!("{used:?} of processor time in 2 s");
    assert!(used < Duration::from_millis(200), "{used:?} in 2 s");
    limit(maximum);
    let mut served = 0;
    for client in &mut clients {
        client.write_all(b"x").unwrap();
        served += usize::from(fate(client, Duration::from_secs(5)) == Fate::Served);
    }
    assert_eq!(served, 50);
    proxy.counts("accept_failed", 1.0);
    drop((clients, echo));
    proxy.expect_clean();
}

#[test]
fn refusals_cost_the_same_however_many() {
    const ROUND: u32 = 1000;
    let proxy = Proxy::start(|setup| setup.per_source = Some(5));
    let echo = Echo::on(proxy.listener(0));
    let _inside: Vec<TcpStream> = (0..5).map(|_| proxy.connect_from(8, 0)).collect();
    let round = || {
        for _ in 0..ROUND {
            let mut client = proxy.connect_from(8, 0);
            let _ = client.read(&mut [0]);
        }
    };
    proxy.expect_constant_cost(ROUND, round);
    drop((_inside, echo));
    proxy.expect_clean();
}
