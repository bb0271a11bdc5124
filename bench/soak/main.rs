//! `make soak`: a pool of real processes under churn and faults for a given time.
//! Every byte is checked. The run fails if a session fails outside of an
//! announced fault, or if memory or descriptors grow.
//!
//! - `clients`: sessions, TCP and UDP; `faults`: kills and table changes;
//! - `pool`: the processes; `watch`: their memory and descriptors.

mod clients;
mod faults;
mod pool;
#[path = "../../tests/common/table.rs"]
mod tables;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use fastrand::Rng;
use portpool::client::Client;

use crate::clients::Counts;
use crate::faults::Announced;
use crate::pool::{CONNECTION_SERVERS, PORTS, Pool, SERVERS};
use crate::watch::Watched;

/// Clients at a time: fewer than ports, so that a session is free again when
/// the next is asked for.
const CLIENTS: u64 = 12;
/// Longest until everything is free after the start and at the end.
const SETTLE: Duration = Duration::from_secs(60);
/// Time between two samples of memory and descriptors.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);

/// Runs a pool under churn and faults and reports whether anything was lost.
#[derive(Parser, Debug)]
struct Options {
    /// Length of the run in minutes
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,

    /// Seed of the faults and the bytes: the same seed gives the same order
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// The build of portpool to test
    #[arg(long, default_value = "target/release/portpool")]
    portpool: PathBuf,

    /// Log level of the processes, whose files are kept when the run fails:
    /// `info` logs the end of every session, about 25 MB a minute
    #[arg(long, default_value = "warn")]
    log: String,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> io::Result<bool> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let mut pool = Pool::start(&options.portpool, &options.log)?;
    let load_sharing: Vec<String> = (0..CONNECTION_SERVERS)
        .map(|index| pool.load_sharing(index))
        .collect();
    let free = SERVERS * u32::from(PORTS);
    for address in &load_sharing {
        until_free(&runtime, address, free)?;
    }
    let first = |processes: &[Option<pool::Process>]| {
        let process = processes[0].as_ref();
        process.expect("the first of each role always runs").id()
    };
    let mut watched = [
        Watched::new("connection server", first(&pool.connection_servers)),
        Watched::new("agent", first(&pool.agents)),
        Watched::new("workload", first(&pool.workloads)),
    ];
    let (announced, counts) = (Announced::default(), Counts::default());
    let at_rest: Vec<usize> = watched.iter().map(Watched::descriptors).collect();
    let mut faults = BTreeMap::new();
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (load_sharing, announced, counts) = (&load_sharing, &announced, &counts);
            let (runtime, stop) = (runtime.handle().clone(), stop.clone());
            // Each client has random numbers of its own, and so have the faults.
            let seed = Rng::with_seed(options.seed).u64(..).wrapping_add(number);
            scope.spawn(move || {
                clients::run(load_sharing, announced, counts, &runtime, &stop, seed);
            });
        }
        let result = disturb(
            options,
            &mut pool,
            &announced,
            &counts,
            &mut watched,
            &mut faults,
            &stop,
        );
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    // The table is as at the start. Processes that were killed last recover by
    // themselves.
    faults::remove_guest(&mut pool)?;
    let mut settled = true;
    for address in &load_sharing {
        if let Err(error) = until_free(&runtime, address, free) {
            println!("{error}");
            settled = false;
        }
    }
    let passed = report(&watched, &at_rest, &counts, settled);
    if !passed {
        println!("logs are in {}", pool.keep_logs().display());
    }
    Ok(passed)
}

/// Causes faults and watches the processes until the time is over.
fn disturb(
    options: &Options,
    pool: &mut Pool,
    announced: &Announced,
    counts: &Counts,
    watched: &mut [Watched],
    faults: &mut BTreeMap<&'static str, u64>,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut random = Rng::with_seed(options.seed);
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(options.minutes * 60.0);
    let pause = |random: &mut Rng| Duration::from_millis(random.u64(3_000..9_000));
    let mut fault = begun + pause(&mut random);
    let mut line = begun + Duration::from_secs(60);
    while Instant::now() < end && !stop.load(Ordering::Relaxed) {
        for process in watched.iter_mut() {
            process.sample();
        }
        std::thread::sleep(SAMPLE_INTERVAL.min(end.saturating_duration_since(Instant::now())));
        if Instant::now() >= fault {
            faults::next(pool, announced, &mut random, faults)?;
            fault = Instant::now() + pause(&mut random);
        }
        if Instant::now() >= line || Instant::now() >= end {
            println!(
                "{:5.1} min  {}",
                begun.elapsed().as_secs_f64() / 60.0,
                summary(watched, counts, faults)
            );
            line += Duration::from_secs(60);
        }
    }
    Ok(())
}

fn number(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn summary(watched: &[Watched], counts: &Counts, faults: &BTreeMap<&'static str, u64>) -> String {
    let faults: Vec<String> = faults
        .iter()
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    let memory: Vec<String> = watched
        .iter()
        .map(|process| {
            let mebibytes = process.most_memory() / 1024.0 / 1024.0;
            format!(
                "{} {mebibytes:.1} MiB, {} files",
                process.name, process.most_descriptors
            )
        })
        .collect();
    format!(
        "{} sessions, {:.1} GB, {} datagrams ({} resent), {} half-closes, {} resets; {}; excused {}, exhausted {}, lost {}, corrupted {}; at most: {}",
        number(&counts.sessions),
        number(&counts.bytes) as f64 / 1e9,
        number(&counts.datagrams),
        number(&counts.datagrams_resent),
        number(&counts.half_closes),
        number(&counts.resets),
        faults.join(", "),
        number(&counts.excused),
        number(&counts.exhausted),
        number(&counts.lost),
        number(&counts.corrupted),
        memory.join("; "),
    )
}

/// Waits until every port is free again, as this connection server sees it.
fn until_free(runtime: &tokio::runtime::Runtime, address: &str, free: u32) -> io::Result<()> {
    let client = Client::new(address).map_err(io::Error::other)?;
    let started = Instant::now();
    let mut last = String::new();
    while started.elapsed() < SETTLE {
        match runtime.block_on(client.pool()) {
            Ok(state) if state.free_ports == free && state.sessions == 0 => return Ok(()),
            Ok(state) => last = format!("{} free, {} sessions", state.free_ports, state.sessions),
            Err(error) => last = error.to_string(),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(io::Error::other(format!(
        "{address} does not come to {free} free ports: {last}"
    )))
}

/// Prints the results and returns whether the run has passed.
fn report(watched: &[Watched], at_rest: &[usize], counts: &Counts, settled: bool) -> bool {
    let mut passed = settled && number(&counts.sessions) > 0;
    for (process, at_rest) in watched.iter().zip(at_rest) {
        let (growth, is_flat) = process.growth();
        let descriptors = process.descriptors();
        // Idle connections of clients and pools of agents come and go.
        let holds = descriptors > 0 && descriptors <= at_rest + 8;
        println!(
            "{}: memory at most {:.1} MiB, trend {:+.2} MiB ({}); descriptors {at_rest} before, at most {}, {descriptors} after ({})",
            process.name,
            process.most_memory() / 1024.0 / 1024.0,
            growth / 1024.0 / 1024.0,
            if is_flat {
                "flat, or the run is too short"
            } else {
                "GROWS"
            },
            process.most_descriptors,
            if holds { "given back" } else { "LEAKED" },
        );
        passed &= is_flat && holds;
    }
    let (lost, corrupted) = (number(&counts.lost), number(&counts.corrupted));
    passed &= lost == 0 && corrupted == 0;
    let result = if passed { "passed" } else { "FAILED" };
    println!(
        "{result}: {} sessions, lost {lost}, corrupted {corrupted}",
        number(&counts.sessions)
    );
    passed
}
