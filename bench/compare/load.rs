//! The load generator: one thread, one epoll, sockets that do not block.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::lanes::{FIRST, Lane, UDP_FIRST};
use crate::net::{self, Epoll, Flags, SOON};
use crate::probe;
use crate::process::{Members, ProcessorTime};
use crate::sink::{Asking, DOWNLOAD, ECHO, UPLOAD};

/// Connections that messages are spread over, each on a port of its own.
pub const CONNECTIONS: u16 = 50;
/// Connections being made at a time.
pub const CONNECTING: usize = 32;
/// Ports that connections are spread over.
pub const CONNECT_PORTS: u16 = 1_000;
/// Source addresses that connections are made from, so that none runs out of
/// ports while closed connections wait.
const SOURCES: u8 = 200;
/// Bytes of a datagram.
pub const DATAGRAM: usize = 200;
/// A datagram that has not come back by then is lost.
const LOST: Duration = Duration::from_millis(200);

/// The direction of bulk data: from the sink, or to it.
#[derive(Clone, Copy, PartialEq)]
pub enum Direction {
    Down,
    Up,
}

/// The time of load before the measurement, and of the measurement.
#[derive(Clone, Copy)]
pub struct Times {
    pub warm: Duration,
    pub measured: Duration,
}

/// The result of a load.
#[derive(Default)]
pub struct Found {
    /// Bytes, messages, connections or datagrams.
    pub count: u64,
    pub seconds: f64,
    /// Processor time of the proxy, in seconds; 0 without one.
    pub processor_seconds: f64,
    /// Time that the proxy was ready to run and something else did.
    pub waited_seconds: f64,
    pub faults: usize,
    /// Nanoseconds from when a message was due until its answer had come,
    /// sorted.
    pub latencies: Vec<u64>,
}

impl Found {
    pub fn rate(&self) -> f64 {
        self.count as f64 / self.seconds
    }

    /// Work per second of processor time.
    pub fn efficiency(&self) -> Option<f64> {
        (self.processor_seconds > 0.0).then(|| self.count as f64 / self.processor_seconds)
    }

    /// The latency that `part` of the messages do not exceed, in microseconds.
    pub fn percentile(&self, part: f64) -> Option<f64> {
        let rank = (self.latencies.len() as f64 * part).ceil() as usize;
        let nanoseconds = self.latencies.get(rank.max(1) - 1)?;
        Some(*nanoseconds as f64 / 1e3)
    }
}

/// Measures between two moments.
struct Window<'a> {
    proxy: Option<&'a Members>,
    times: Times,
    begun: Instant,
    start: Option<(Instant, ProcessorTime)>,
}

impl<'a> Window<'a> {
    fn new(proxy: Option<&'a Members>, times: Times) -> Self {
        Self {
            proxy,
            times,
            begun: Instant::now(),
            start: None,
        }
    }

    fn processor_time(&self) -> ProcessorTime {
        self.proxy
            .map_or_else(ProcessorTime::default, Members::processor_time)
    }

    fn is_warm(&self) -> bool {
        self.begun.elapsed() >= self.times.warm
    }

    fn start(&mut self) {
        let used = self.processor_time();
        self.start = Some((Instant::now(), used));
    }

    fn is_over(&self) -> bool {
        self.start
            .is_some_and(|(start, _)| start.elapsed() >= self.times.measured)
    }

    /// When the load must look at the clock again.
    fn next_look(&self) -> Instant {
        match self.start {
            None => self.begun + self.times.warm,
            Some((start, _)) => start + self.times.measured,
        }
    }

    fn end(&self, count: u64, faults: usize) -> Found {
        let (start, used) = self.start.expect("started");
        let seconds = start.elapsed().as_secs_f64();
        let now = self.processor_time();
        Found {
            count,
            seconds,
            processor_seconds: now.used.saturating_sub(used.used) as f64 / 1e9,
            waited_seconds: now.waited.saturating_sub(used.waited) as f64 / 1e9,
            faults,
            latencies: Vec::new(),
        }
    }
}

/// Has `streams` connections carry as much as they can.
pub fn bulk(
    lane: Lane,
    proxy: Option<&Members>,
    sink: &mut Asking,
    streams: u16,
    direction: Direction,
    times: Times,
) -> io::Result<Found> {
    let purpose = [if direction == Direction::Down {
        DOWNLOAD
    } else {
        UPLOAD
    }];
    let interest = if direction == Direction::Down {
        Flags::IN
    } else {
        Flags::OUT
    };
    let mut epoll = Epoll::new()?;
    let mut connections = Vec::new();
    for number in 0..streams {
        let stream = net::connect(lane.at(FIRST + number))?;
        io::Write::write_all(&mut &stream, &purpose)?;
        stream.set_nonblocking(true)?;
        epoll.add(&stream, usize::from(number), interest)?;
        connections.push(stream);
    }
    let mut buffer = vec![0x5a; 1 << 20];
    let (mut taken, mut uploaded_before, mut faults) = (0, 0, 0);
    let mut window = Window::new(proxy, times);
    while !window.is_over() {
        if window.start.is_none() && window.is_warm() {
            uploaded_before = sink.counts()?.uploaded;
            taken = 0;
            window.start();
        }
        for (token, _) in epoll.wait(Some(window.next_look()))? {
            let stream = &connections[token];
            match direction {
                Direction::Down => match net::discard(stream, &mut buffer)? {
                    Some(0) => faults += 1,
                    count => taken += count.unwrap_or(0) as u64,
                },
                Direction::Up => {
                    net::send(stream, &buffer[..256 * 1024])?;
                }
            }
        }
    }
    if direction == Direction::Up {
        taken = sink.counts()?.uploaded - uploaded_before;
    }
    if taken == 0 {
        faults += 1;
    }
    Ok(window.end(taken, faults))
}

/// Connections that have echoed once.
fn echoing(lane: Lane, epoll: &Epoll) -> io::Result<Vec<TcpStream>> {
    let connections = (0..CONNECTIONS).map(|number| {
        let stream = probe::echoes(lane.at(FIRST + number))?;
        stream.set_nonblocking(true)?;
        epoll.add(&stream, usize::from(number), Flags::IN)?;
        Ok(stream)
    });
    connections.collect()
}

/// Sends one message of `size` bytes at a time on each connection, the next one
/// when it is back.
pub fn closed_loop(
    lane: Lane,
    proxy: Option<&Members>,
    size: usize,
    times: Times,
) -> io::Result<Found> {
    let mut epoll = Epoll::new()?;
    let connections = echoing(lane, &epoll)?;
    let (message, mut buffer) = (vec![0x5a; size], vec![0; 64 * 1024]);
    let mut outstanding = vec![size; connections.len()];
    for stream in &connections {
        net::send(stream, &message)?;
    }
    let (mut count, mut faults) = (0, 0);
    let mut window = Window::new(proxy, times);
    while !window.is_over() {
        if window.start.is_none() && window.is_warm() {
            count = 0;
            window.start();
        }
        for (token, _) in epoll.wait(Some(window.next_look()))? {
            match net::receive(&connections[token], &mut buffer)? {
                Some(0) => return Err(io::Error::other("the connection was closed")),
                Some(taken) => outstanding[token] -= taken.min(outstanding[token]),
                None => continue,
            }
            if outstanding[token] == 0 {
                count += 1;
                outstanding[token] = size;
                if net::send(&connections[token], &message)? != Some(size) {
                    faults += 1;
                }
            }
        }
    }
    Ok(window.end(count, faults))
}

/// Sends messages of `size` bytes at `rate` per second over all connections, each
/// when it is due, whether or not earlier ones are back. Latency counts from that
/// time, so that waiting for the generator is part of it.
pub fn open_loop(
    lane: Lane,
    proxy: Option<&Members>,
    size: usize,
    rate: f64,
    times: Times,
) -> io::Result<Found> {
    let mut epoll = Epoll::new()?;
    let connections = echoing(lane, &epoll)?;
    let (message, mut buffer) = (vec![0x5a; size], vec![0; 64 * 1024]);
    let mut due_times = vec![VecDeque::new(); connections.len()];
    let mut partial = vec![0; connections.len()];
    let mut window = Window::new(proxy, times);
    let interval = Duration::from_secs_f64(1.0 / rate);
    let begun = Instant::now();
    let (mut due, mut number, mut faults) = (begun, 0_usize, 0);
    let mut latencies: Vec<u64> = Vec::with_capacity((rate * 2.0) as usize);
    while !window.is_over() {
        if window.start.is_none() && window.is_warm() {
            window.start();
        }
        let now = Instant::now();
        while due <= now {
            let to = number % connections.len();
            // A connection that takes no more has fallen behind for good.
            if net::send(&connections[to], &message)? == Some(size) {
                due_times[to].push_back(due);
            } else {
                faults += 1;
            }
            number += 1;
            due = begun + interval.mul_f64(number as f64);
        }
        for (token, _) in epoll.wait(Some(due.min(window.next_look())))? {
            let Some(taken) = net::receive(&connections[token], &mut buffer)? else {
                continue;
            };
            if taken == 0 {
                return Err(io::Error::other("the connection was closed"));
            }
            let now = Instant::now();
            partial[token] += taken;
            while partial[token] >= size {
                partial[token] -= size;
                let Some(due) = due_times[token].pop_front() else {
                    faults += 1;
                    continue;
                };
                if window.start.is_some_and(|(start, _)| due >= start) {
                    latencies.push(now.duration_since(due).as_nanos() as u64);
                }
            }
        }
    }
    // A message that is still under way has taken at least until now.
    let now = Instant::now();
    let answered = latencies.len() as u64;
    let under_way = due_times.iter().flatten();
    latencies.extend(under_way.map(|due| now.duration_since(*due).as_nanos() as u64));
    latencies.sort_unstable();
    Ok(Found {
        latencies,
        ..window.end(answered, faults)
    })
}

/// A connection that is made, carries a byte there and back and is closed.
struct Visit {
    stream: TcpStream,
    is_sent: bool,
}

/// Makes connections over [`CONNECT_PORTS`] ports, [`CONNECTING`] at a time.
pub fn connect(lane: Lane, proxy: Option<&Members>, times: Times) -> io::Result<Found> {
    let mut epoll = Epoll::new()?;
    let mut number = 0_u32;
    let mut visit = |epoll: &Epoll, token: usize| -> io::Result<Visit> {
        let port = FIRST + (number % u32::from(CONNECT_PORTS)) as u16;
        let source = Ipv4Addr::new(127, 0, 3, 1 + (number % u32::from(SOURCES)) as u8);
        number += 1;
        let stream = net::start_connect(lane.at(port), Some(source))?;
        epoll.add(&stream, token, Flags::OUT)?;
        Ok(Visit {
            stream,
            is_sent: false,
        })
    };
    let mut visits: Vec<Visit> = (0..CONNECTING)
        .map(|token| visit(&epoll, token))
        .collect::<Result<_, _>>()?;
    let (mut count, mut faults) = (0, 0);
    let mut window = Window::new(proxy, times);
    let mut buffer = [0; 16];
    while !window.is_over() {
        if window.start.is_none() && window.is_warm() {
            count = 0;
            window.start();
        }
        for (token, _) in epoll.wait(Some(window.next_look()))? {
            let current = &mut visits[token];
            let is_done = if current.is_sent {
                match net::receive(&current.stream, &mut buffer) {
                    Ok(None) => continue,
                    Ok(Some(1)) => true,
                    Ok(Some(_)) | Err(_) => false,
                }
            } else if matches!(net::send(&current.stream, &[ECHO]), Ok(Some(1))) {
                current.is_sent = true;
                epoll.modify(&current.stream, token, Flags::IN)?;
                continue;
            } else {
                false
            };
            if is_done {
                count += 1;
            } else {
                faults += 1;
            }
            visits[token] = visit(&epoll, token)?;
        }
    }
    Ok(window.end(count, faults))
}

/// A client's datagrams to one UDP port.
struct Flow {
    socket: UdpSocket,
    to: SocketAddr,
    burst: u64,
    outstanding: usize,
    sent: Instant,
}

impl Flow {
    /// Sends the next burst of `size` datagrams.
    fn send(&mut self, size: usize) -> io::Result<()> {
        self.burst += 1;
        let mut datagram = [0x5a; DATAGRAM];
        datagram[..8].copy_from_slice(&self.burst.to_le_bytes());
        for _ in 0..size {
            self.socket.send_to(&datagram, self.to)?;
        }
        self.outstanding = size;
        self.sent = Instant::now();
        Ok(())
    }
}

/// Sends bursts of `size` datagrams on each of `flows` flows, each with a port
/// of its own; the next burst when all are back.
pub fn datagrams(
    lane: Lane,
    proxy: Option<&Members>,
    flows: u16,
    size: usize,
    times: Times,
) -> io::Result<Found> {
    let mut epoll = Epoll::new()?;
    let mut open = Vec::new();
    for number in 0..flows {
        let socket = net::udp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        epoll.add(&socket, usize::from(number), Flags::IN)?;
        let to = lane.at(UDP_FIRST + number);
        let (burst, outstanding, sent) = (0, 0, Instant::now());
        let mut flow = Flow {
            socket,
            to,
            burst,
            outstanding,
            sent,
        };
        flow.send(size)?;
        open.push(flow);
    }
    let (mut count, mut faults) = (0, 0);
    let mut window = Window::new(proxy, times);
    let mut buffer = [0; 2 * DATAGRAM];
    let mut looked = Instant::now();
    while !window.is_over() {
        if window.start.is_none() && window.is_warm() {
            (count, faults) = (0, 0);
            window.start();
        }
        let deadline = window.next_look().min(looked + LOST);
        for (token, _) in epoll.wait(Some(deadline))? {
            let flow = &mut open[token];
            while let Ok((length, _)) = flow.socket.recv_from(&mut buffer) {
                let is_late = buffer[..8] != flow.burst.to_le_bytes();
                if is_late || length != DATAGRAM || flow.outstanding == 0 {
                    continue;
                }
                flow.outstanding -= 1;
                count += 1;
            }
            if flow.outstanding == 0 {
                flow.send(size)?;
            }
        }
        if looked.elapsed() >= LOST {
            looked = Instant::now();
            for flow in open.iter_mut().filter(|flow| flow.sent.elapsed() > LOST) {
                faults += flow.outstanding;
                flow.send(size)?;
            }
        }
    }
    Ok(window.end(count, faults))
}

/// Waits until the sink has no connection of a former load left. Returns how many
/// are left if that takes too long.
pub fn settle(sink: &mut Asking) -> io::Result<u64> {
    let started = Instant::now();
    loop {
        let open = sink.counts()?.open;
        if open == 0 || started.elapsed() > SOON {
            return Ok(open);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
