//! Measures of a proxy's life: idle sessions, many ports, a change of ports while
//! sessions run.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::lanes::{Bench, FIRST, Lane, Proxy, Setup};
use crate::measures::{Measure, Outcome};
use crate::net::{self, Epoll, Flags, SOON};
use crate::probe;
use crate::process::Ticks;
use crate::sink::ECHO;
use crate::statistics::Conditions;

/// Idle sessions, spread over a thousand ports.
const IDLE: u16 = 4_000;
/// Ports of a large start. With sessions they fit into 20,000 open files.
pub const MANY: u16 = 18_000;
/// A large start counts as done when this many ports answer. All are asked only
/// afterwards, because that takes longer than the start.
const ASKED: u16 = 16;
/// Ports before a reload, which adds one; and the sessions that run meanwhile.
pub const CHANGED: u16 = 10_000;
const RUNNING: u16 = 2_000;
/// Messages per second over the running sessions.
const PINGS: f64 = 2_000.0;
/// How long latency is watched before a change, and from its start on.
const WATCHED: Duration = Duration::from_millis(1_500);

/// Runs `measure`; the sink must have its ports.
pub fn run(measure: Measure, bench: &Bench, lane: Lane) -> Outcome {
    let ticks = Ticks::now();
    let mut conditions = Conditions::default();
    let figures = match measure {
        Measure::IdleSessions => idle_sessions(bench, lane),
        Measure::Start => start(bench, lane, &mut conditions),
        Measure::Reload => reload(bench, lane),
        _ => unreachable!("carries load"),
    }?;
    let (steal, busy) = ticks.since();
    conditions.steal = steal;
    Ok((figures, conditions, busy))
}

/// Ports that the sink needs.
pub fn ports(measure: Measure) -> u16 {
    match measure {
        Measure::Start => MANY,
        Measure::Reload => CHANGED + 1,
        _ => 1_000,
    }
}

fn setup(ports: u16, capacity: usize) -> Setup {
    Setup {
        ports,
        capacity,
        threads: 1,
        udp: false,
    }
}

fn idle_sessions(bench: &Bench, lane: Lane) -> io::Result<BTreeMap<String, f64>> {
    let proxy = Proxy::start(bench, lane, setup(1_000, usize::from(IDLE) + 500))?;
    let members = proxy.tree.members();
    let before = members.memory();
    let sessions: Vec<TcpStream> = (0..IDLE)
        .map(|number| probe::echoes(lane.at(FIRST + number % 1_000)))
        .collect::<Result<_, _>>()?;
    let after = members.memory();
    for session in &sessions {
        probe::still_echoes(session)?;
    }
    let each = after.saturating_sub(before) as f64 / f64::from(IDLE);
    Ok(BTreeMap::from([("idle_session_bytes".to_owned(), each)]))
}

fn start(
    bench: &Bench,
    lane: Lane,
    conditions: &mut Conditions,
) -> io::Result<BTreeMap<String, f64>> {
    let (few_bytes, _) = {
        let proxy = Proxy::start(bench, lane, setup(1_000, 500))?;
        (proxy.tree.members().memory(), proxy)
    };
    let started = Instant::now();
    let mut proxy = Proxy::spawn(bench, lane, setup(MANY, 500))?;
    for number in 0..ASKED {
        let port = FIRST + (u32::from(MANY - 1) * u32::from(number) / u32::from(ASKED - 1)) as u16;
        while probe::echoes(lane.at(port)).is_err() {
            proxy.check(started)?;
            std::thread::sleep(Duration::from_micros(500));
        }
    }
    let took = started.elapsed();
    let members = proxy.tree.members();
    let waited = Duration::from_nanos(members.processor_time().waited);
    conditions.waited = waited.as_secs_f64() / took.as_secs_f64();
    let many_bytes = members.memory();
    for port in FIRST..FIRST + MANY {
        probe::echoes(lane.at(port))
            .map_err(|error| io::Error::other(format!("port {port}: {error}")))?;
    }
    let each = many_bytes.saturating_sub(few_bytes) as f64 / f64::from(MANY - 1_000);
    Ok(BTreeMap::from([
        ("start_18000".to_owned(), took.as_secs_f64() * 1e3),
        ("listen_port_bytes".to_owned(), each),
    ]))
}

fn reload(bench: &Bench, lane: Lane) -> io::Result<BTreeMap<String, f64>> {
    let capacity = usize::from(RUNNING) + 500;
    let mut proxy = Proxy::start(bench, lane, setup(CHANGED, capacity))?;
    let sessions = (0..RUNNING)
        .map(|number| probe::echoes(lane.at(FIRST + number * (CHANGED / RUNNING))))
        .collect::<Result<_, _>>()?;
    let watch = Watch::start(sessions);
    std::thread::sleep(WATCHED);
    let new = lane.at(FIRST + CHANGED);
    if probe::echoes(new).is_ok() {
        return Err(io::Error::other("the new port answers before it is there"));
    }
    let added = Instant::now();
    proxy.reload(CHANGED + 1)?;
    let answers = until(&mut proxy, || probe::echoes(new).is_ok())?;
    std::thread::sleep(WATCHED.saturating_sub(added.elapsed()));
    let removed = Instant::now();
    proxy.reload(CHANGED)?;
    let is_gone = until(&mut proxy, || probe::echoes(new).is_err())?;
    std::thread::sleep(WATCHED.saturating_sub(removed.elapsed()));
    let seen = watch.stop()?;
    let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
    Ok(BTreeMap::from([
        ("reload_10000".to_owned(), milliseconds(answers)),
        ("reload_10000_removed".to_owned(), milliseconds(is_gone)),
        ("reload_10000_cut".to_owned(), seen.cut as f64),
        (
            "reload_10000_worst_before".to_owned(),
            milliseconds(seen.worst(|due| due < added)),
        ),
        (
            "reload_10000_worst".to_owned(),
            milliseconds(seen.worst(|due| due >= added)),
        ),
    ]))
}

/// Waits until `holds`; returns how long that took.
fn until(proxy: &mut Proxy, holds: impl Fn() -> bool) -> io::Result<Duration> {
    let started = Instant::now();
    while !holds() {
        proxy.check(started)?;
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(started.elapsed())
}

/// Sends messages on running sessions, each when it is due.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<Seen>>,
}

/// Observations on running sessions.
#[derive(Default)]
struct Seen {
    /// Sessions that ended, or did not answer in time.
    cut: usize,
    /// When a message was due, and how long until its answer came.
    messages: Vec<(Instant, Duration)>,
}

impl Seen {
    fn worst(&self, counts: impl Fn(Instant) -> bool) -> Duration {
        let of_those = self.messages.iter().filter(|(due, _)| counts(*due));
        of_those.map(|(_, took)| *took).max().unwrap_or_default()
    }
}

impl Watch {
    fn start(sessions: Vec<TcpStream>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        Self {
            stop,
            thread: std::thread::spawn(move || watch(sessions, &stopped)),
        }
    }

    fn stop(self) -> io::Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.join();
        joined.unwrap_or_else(|_| Err(io::Error::other("the watching thread has panicked")))
    }
}

fn watch(sessions: Vec<TcpStream>, stop: &AtomicBool) -> io::Result<Seen> {
    let mut epoll = Epoll::new()?;
    let mut sessions: Vec<Option<TcpStream>> = sessions.into_iter().map(Some).collect();
    for (token, session) in sessions.iter().flatten().enumerate() {
        session.set_nonblocking(true)?;
        epoll.add(session, token, Flags::IN)?;
    }
    let mut due_times = vec![VecDeque::new(); sessions.len()];
    let (mut seen, mut buffer) = (Seen::default(), [0; 64]);
    let begun = Instant::now();
    let (mut due, mut number) = (begun, 0);
    while !stop.load(Ordering::Relaxed) {
        while due <= Instant::now() {
            let to = number % sessions.len();
            if let Some(session) = &sessions[to] {
                due_times[to].push_back(due);
                if !matches!(net::send(session, &[ECHO]), Ok(Some(1))) {
                    sessions[to] = None;
                    seen.cut += 1;
                }
            }
            number += 1;
            due = begun + Duration::from_secs_f64(number as f64 / PINGS);
        }
        for (token, _) in epoll.wait(Some(due))? {
            let Some(session) = &sessions[token] else {
                continue;
            };
            let taken = match net::receive(session, &mut buffer) {
                Ok(None) => continue,
                Ok(Some(taken)) => taken,
                Err(_) => 0,
            };
            for _ in 0..taken {
                if let Some(due) = due_times[token].pop_front() {
                    seen.messages.push((due, due.elapsed()));
                }
            }
            if taken == 0 {
                sessions[token] = None;
                seen.cut += 1;
            }
        }
    }
    // A message that is never answered was lost with its session.
    let is_late = |due: &Instant| due.elapsed() > SOON / 10;
    seen.cut += due_times
        .iter()
        .zip(&sessions)
        .filter(|(times, session)| session.is_some() && times.front().is_some_and(is_late))
        .count();
    Ok(seen)
}
