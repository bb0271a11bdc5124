//! Ports come and go while something else goes wrong. Sessions on ports that
//! stay and on ports that go continue, and nothing is left behind.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::limits::{Echo, Fate, fate};
use crate::target::Proxy;
use crate::udp::round_trip;
use crate::{SOON, echoes, only_for, pattern, reset, until};

const WHY_NOT: &str = "it has no table; a reload is another process";

/// Connection ports of the largest table, and those of every table.
const PORTS: u16 = 8;
const KEPT: u16 = 4;

/// How often ports go and come back.
const ROUNDS: u16 = 20;

/// Puts a table with `count` ports in force.
fn resize(proxy: &mut Proxy, count: u16) {
    proxy.publish(|table| table.rows[0].ranges[0].count = count);
    let is_open = |index| TcpStream::connect(proxy.port(index)).is_ok();
    until("the table is in force", || {
        is_open(count - 1) && (count == PORTS || !is_open(count))
    });
}

/// A thread that repeats an action until [`Self::end`].
struct Fault {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Fault {
    /// `act` receives the number of its call.
    fn begin(mut act: impl FnMut(usize) + Send + 'static) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (is_over, count) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                act(count.fetch_add(1, Ordering::Relaxed));
            }
        });
        let thread = Some(thread);
        Self { stop, done, thread }
    }

    /// Waits until `act` has run `count` more times.
    fn goes_on(&self, count: usize) {
        let before = self.done.load(Ordering::Relaxed);
        until("the fault goes on", || {
            self.done.load(Ordering::Relaxed) >= before + count
        });
    }

    /// Stops the thread; returns how often `act` has run. Panics if it failed.
    fn end(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.done.load(Ordering::Relaxed)
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        // A test that fails leaves nothing running beside the others.
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One connection of a storm: reset at once, or served first and then reset or
/// closed. A client of a port that stays is always served.
fn storm(number: usize, address: SocketAddr, is_kept: bool) {
    let client = TcpStream::connect(address);
    assert!(client.is_ok() || !is_kept, "{address}: {client:?}");
    let Ok(mut client) = client else {
        return;
    };
    if number.is_multiple_of(3) {
        return reset(client);
    }
    let fate = match client.write_all(b"x") {
        Ok(()) => fate(&mut client, SOON),
        Err(_) => Fate::Refused,
    };
    let is_fair = fate == Fate::Served || !is_kept && fate == Fate::Refused;
    assert!(is_fair, "{address}: {fate:?}");
    if number % 3 == 1 {
        reset(client);
    }
}

#[test]
fn ports_come_and_go_amid_a_storm_of_connections_and_resets() {
    only_for!(Portpool; WHY_NOT);
    let mut proxy = Proxy::start(|setup| setup.ports = PORTS);
    // One session on a port that stays, one on a port that goes.
    let mut steady = [0, PORTS - 1].map(|index| proxy.pair(index));
    let echo: Vec<_> = (0..PORTS)
        .map(|index| Echo::on(proxy.listener(index)))
        .collect();
    let addresses: Vec<_> = (0..PORTS).map(|index| proxy.port(index)).collect();
    let faults = [0, 1].map(|of_two| {
        let addresses = addresses.clone();
        Fault::begin(move |call| {
            let number = 2 * call + of_two;
            // Three in a row for each port, so that each port has each kind.
            let index = number / 3 % addresses.len();
            storm(number, addresses[index], index < usize::from(KEPT));
        })
    });
    for round in 0..ROUNDS {
        for count in [KEPT, PORTS] {
            resize(&mut proxy, count);
            faults.iter().for_each(|fault| fault.goes_on(20));
            for (client, server) in &mut steady {
                echoes(client, server, &pattern(10_000, round.into()));
            }
        }
    }
    let connections: usize = faults.into_iter().map(Fault::end).sum();
    println!("{connections} connections");
    drop((steady, echo));
    proxy.expect_clean();
}

/// Sends until the peer takes no more; returns how many bytes it took.
fn fill(to: &mut TcpStream, bytes: &[u8]) -> usize {
    to.set_nonblocking(true).unwrap();
    let (mut sent, mut refused) = (0, 0);
    while refused < 20 {
        assert!(sent < bytes.len(), "the proxy did not stop reading");
        match to.write(&bytes[sent..]) {
            Ok(length) => (sent, refused) = (sent + length, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refused += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
    to.set_nonblocking(false).unwrap();
    sent
}

/// Reads to the end; what arrives must be `sent`.
fn expect_all(from: &mut TcpStream, sent: &[u8]) {
    from.set_read_timeout(Some(SOON)).unwrap();
    let mut received = Vec::new();
    from.read_to_end(&mut received).unwrap();
    assert!(received == sent, "{} of {}", received.len(), sent.len());
}

#[test]
fn ports_come_and_go_amid_shut_windows() {
    only_for!(Portpool; WHY_NOT);
    let mut proxy = Proxy::start(|setup| setup.ports = PORTS);
    let bytes = [1, 2].map(|seed| pattern(64 << 20, seed));
    // No peer reads, on ports that stay and on ports that go.
    let mut stuck: Vec<_> = [0, 1, PORTS - 2, PORTS - 1]
        .into_iter()
        .map(|index| {
            let (mut client, mut server) = proxy.pair(index);
            // Small buffers: the machine's memory is not under test.
            for stream in [&client, &server].map(socket2::SockRef::from) {
                stream.set_recv_buffer_size(64 << 10).unwrap();
                stream.set_send_buffer_size(64 << 10).unwrap();
            }
            let lengths = [fill(&mut client, &bytes[0]), fill(&mut server, &bytes[1])];
            (client, server, lengths)
        })
        .collect();
    let echo: Vec<_> = (0..PORTS)
        .map(|index| Echo::on(proxy.listener(index)))
        .collect();
    for _ in 0..ROUNDS {
        for count in [KEPT, PORTS] {
            resize(&mut proxy, count);
            let mut client = proxy.connect(0);
            client.write_all(b"x").unwrap();
            assert_eq!(fate(&mut client, SOON), Fate::Served);
        }
    }
    // While half the ports are gone, one session of theirs ends by a reset and
    // all others in order.
    resize(&mut proxy, KEPT);
    let (client, server, _) = stuck.pop().unwrap();
    reset(client);
    drop(server);
    for (client, server, [upstream, downstream]) in &mut stuck {
        client.shutdown(std::net::Shutdown::Write).unwrap();
        server.shutdown(std::net::Shutdown::Write).unwrap();
        expect_all(server, &bytes[0][..*upstream]);
        expect_all(client, &bytes[1][..*downstream]);
    }
    resize(&mut proxy, PORTS);
    drop((stuck, echo));
    proxy.expect_clean();
}

#[test]
fn ports_come_and_go_amid_a_flood_of_datagrams() {
    const FLOWS: u32 = 200;
    only_for!(Portpool; WHY_NOT);
    let mut proxy = Proxy::start(|setup| {
        (setup.has_udp, setup.udp_idle_seconds) = (true, 10);
        (setup.ports, setup.flows) = (PORTS, Some(FLOWS));
    });
    let servers: Vec<_> = (0..PORTS).map(|index| proxy.udp_server(index)).collect();
    // Clients with flows on ports that stay, and on one that goes.
    let steady: Vec<_> = [0, 1, PORTS - 1]
        .map(|index| (proxy.udp_client(9, index), &servers[usize::from(index)]))
        .into();
    let flows: Vec<_> = steady
        .iter()
        .map(|(client, server)| {
            round_trip(client, server, b"one");
            round_trip(client, server, b"two")
        })
        .collect();
    // Each datagram of the flood is from another client, and no server answers.
    let sources: Vec<_> = (20..220).map(|host| proxy.address(host)).collect();
    let flooded: Vec<_> = (2..PORTS - 1).map(|index| proxy.port(index)).collect();
    let flood = Fault::begin(move |number| {
        let client = UdpSocket::bind((sources[number % sources.len()], 0)).unwrap();
        // A closed port may report an error.
        let _ = client.send_to(b"flood", flooded[number % flooded.len()]);
    });
    for round in 0..ROUNDS {
        for count in [KEPT, PORTS] {
            resize(&mut proxy, count);
            flood.goes_on(100);
            for ((client, server), flow) in steady.iter().zip(&flows) {
                let datagram = pattern(1000, round.into());
                let from = round_trip(client, server, &datagram);
                assert_eq!(from, *flow, "it kept its flow");
            }
        }
    }
    println!("{} datagrams", flood.end());
    let evicted = proxy.metric("portpool_flows_ended_total{cause=\"evicted\"}");
    assert!(evicted >= 1000.0, "{evicted} evicted");
    drop(steady);
    drop(servers);
    proxy.expect_clean();
}
