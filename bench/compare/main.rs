//! `make bench`: portpool beside HAProxy and nginx, on one machine in one run.
//!
//! ```text
//! generator ─→ direct | portpool | haproxy | haproxy-splice | nginx ─→ sink
//! processor 0             processor 1                             processor 0
//! ```
//!
//! Every round runs each measure on each lane, in an order that rotates, with
//! proxies started anew. The result is the median of the rounds' ratios to
//! the better rival, with its interval.
//!
//! - `load`, `sink`, `net`: the load; `measures`, `lifecycle`: what is measured;
//! - `lanes`: proxies and their settings; `process`: processor time, memory;
//! - `statistics`: medians, intervals, what does not count; `report`: files.

mod evaluation;
mod lanes;
mod lifecycle;
mod load;
mod measures;
mod namespace;
mod net;
mod plot;
mod probe;
mod process;
mod report;
mod sink;
mod statistics;
#[path = "../../tests/common/table.rs"]
mod tables;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;

use crate::lanes::{Bench, CAPACITY, FIRST, LANES, Lane, Proxy, Setup, UDP_COUNT, UDP_FIRST};
use crate::load::Times;
use crate::measures::{MEASURES, Measure, Sample};
use crate::process::Tree;
use crate::sink::Asking;

/// Processors of generator and sink, and of the proxy.
const GENERATOR: &[usize] = &[0];
const ONE_CORE: &[usize] = &[1];
const TWO_CORES: &[usize] = &[0, 1];

/// Measures portpool beside HAProxy and nginx on loopback addresses.
#[derive(Parser, Debug)]
#[command(max_term_width = 100)]
struct Options {
    /// Measures to take, by their names in the table; default: all of them
    #[arg(long, value_delimiter = ',')]
    measures: Vec<String>,

    /// Lanes: direct, portpool, portpool-base, haproxy, haproxy-splice, nginx; default: all
    #[arg(long, value_delimiter = ',')]
    lanes: Vec<String>,

    /// Rounds of each measure, 1 or more
    #[arg(long, default_value_t = 9)]
    rounds: usize,

    /// Rounds with the proxy on both cores, 0 for none; default: half of --rounds, none with --measures
    #[arg(long)]
    both_cores: Option<usize>,

    /// Length of one measurement in seconds
    #[arg(long, default_value_t = 0.8)]
    seconds: f64,

    /// The build of portpool to measure
    #[arg(long, default_value = "target/release/portpool")]
    portpool: PathBuf,

    /// Another build of portpool, to compare with in the lane portpool-base
    #[arg(long)]
    base: Option<PathBuf>,

    /// Count samples also while other programs use the proxy's core: to try things, not to publish
    #[arg(long)]
    busy: bool,

    /// Folder for the results
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,

    /// Copy the last complete run from --output to this folder and measure nothing
    #[arg(long, value_name = "FOLDER")]
    publish: Option<PathBuf>,

    /// Run as the sink
    #[arg(long, hide = true, num_args = 4)]
    sink: Option<Vec<u16>>,

    /// Keep a processor awake
    #[arg(long, hide = true)]
    spin: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.spin {
        loop {
            std::hint::spin_loop();
        }
    }
    if let Some(ports) = &options.sink {
        let [first, last, udp_first, udp_last] = ports[..] else {
            unreachable!("four numbers");
        };
        return exit_code(sink::run(first..=last, udp_first..=udp_last));
    }
    if let Some(folder) = &options.publish {
        return exit_code(report::publish(&options.output, folder));
    }
    if let Some(code) = namespace::enter() {
        return code;
    }
    exit_code(run(&options))
}

fn exit_code(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The chosen lanes, measures, rounds and lengths.
struct Plan {
    lanes: Vec<Lane>,
    measures: Vec<Measure>,
    one_core_rounds: usize,
    two_core_rounds: usize,
    seconds: Duration,
    is_busy: bool,
}

impl Plan {
    fn new(options: &Options) -> io::Result<Self> {
        let wrong = |what: &str, name: &str| io::Error::other(format!("{name:?} is no {what}"));
        let mut lanes = Vec::new();
        for name in &options.lanes {
            lanes.push(Lane::from_name(name).ok_or_else(|| wrong("lane", name))?);
        }
        if lanes.is_empty() {
            lanes = LANES.to_vec();
            lanes.retain(|lane| *lane != Lane::PortpoolBase);
        }
        let has_base = lanes.contains(&Lane::PortpoolBase);
        match (&options.base, has_base) {
            (Some(_), false) => lanes.push(Lane::PortpoolBase),
            (None, true) => return Err(io::Error::other("portpool-base needs --base PROGRAM")),
            _ => {}
        }
        lanes.sort_unstable();
        lanes.dedup();
        for name in &options.measures {
            if !MEASURES.iter().any(|measure| measure.is_meant_by(name)) {
                return Err(wrong("measure", name));
            }
        }
        let is_chosen = |measure: &Measure| {
            let asked = &options.measures;
            asked.is_empty() || asked.iter().any(|name| measure.is_meant_by(name))
        };
        let is_full = options.measures.is_empty();
        let two_core_rounds = if is_full {
            options.rounds.div_ceil(2)
        } else {
            0
        };
        Ok(Self {
            lanes,
            measures: MEASURES.iter().copied().filter(is_chosen).collect(),
            one_core_rounds: options.rounds,
            two_core_rounds: options.both_cores.unwrap_or(two_core_rounds),
            seconds: Duration::from_secs_f64(options.seconds),
            is_busy: options.busy,
        })
    }

    /// Whether the results may be published: everything on all lanes in
    /// enough rounds, on a machine of its own.
    fn is_complete(&self) -> bool {
        const ROUNDS: usize = 9;
        let others = LANES.iter().filter(|lane| **lane != Lane::PortpoolBase);
        others.into_iter().all(|lane| self.lanes.contains(lane))
            && self.measures.len() == MEASURES.len()
            && self.one_core_rounds >= ROUNDS
            && self.two_core_rounds > 0
            && !self.is_busy
    }
}

fn run(options: &Options) -> io::Result<()> {
    let plan = Plan::new(options)?;
    let folder = tempfile::Builder::new()
        .prefix("portpool-bench-")
        .tempdir()?;
    namespace::end_with_signals(folder.path().to_owned());
    let mut bench = prepare(options, &plan, folder.path())?;
    process::pin(GENERATOR)?;
    let begun = Instant::now();
    let mut samples = Vec::new();
    let mut sink = start_sink(1_000)?;
    let capacity = calibrate(&bench, &plan, &mut sink)?;
    for (pass, processors, rounds) in [
        ("one_core", ONE_CORE, plan.one_core_rounds),
        ("two_cores", TWO_CORES, plan.two_core_rounds),
    ] {
        bench.processors = processors.to_vec();
        for round in 0..rounds {
            let lead = format!(
                "{:4.0} s  {pass} round {}/{rounds}",
                begun.elapsed().as_secs_f64(),
                round + 1
            );
            let of_round = carry(&bench, &plan, &mut sink, &capacity, pass, round)?;
            if of_round.is_empty() {
                break;
            }
            println!("{lead}  {}", evaluation::brief(&of_round));
            samples.extend(of_round);
        }
    }
    drop(sink);
    bench.processors = ONE_CORE.to_vec();
    samples.extend(live(&bench, &plan, begun)?);
    let run = report::Run {
        bench: &bench,
        lanes: &plan.lanes,
        samples: &samples,
        capacity: &capacity,
        is_complete: plan.is_complete(),
        seconds: begun.elapsed().as_secs_f64(),
    };
    report::write(&run, &options.output)
}

/// Copies the programs to where an unprivileged user may run them, and where
/// no build replaces them.
fn prepare(options: &Options, plan: &Plan, folder: &std::path::Path) -> io::Result<Bench> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    let copied = |from: &std::path::Path, name: &str| -> io::Result<PathBuf> {
        let to = folder.join(name);
        std::fs::copy(from, &to).map_err(|error| {
            io::Error::other(format!("failed to copy {}: {error}", from.display()))
        })?;
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755))?;
        Ok(to)
    };
    let installed = |name: &str, is_needed: bool| {
        let folders = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"];
        let mut paths = folders
            .iter()
            .map(|folder| PathBuf::from(folder).join(name));
        match paths.find(|path| path.exists()) {
            Some(path) => Ok(path),
            None if !is_needed => Ok(PathBuf::new()),
            None => Err(io::Error::other(format!(
                "{name} is missing: sudo apt-get install haproxy nginx libnginx-mod-stream"
            ))),
        }
    };
    let has = |lane| plan.lanes.contains(&lane);
    Ok(Bench {
        folder: folder.to_owned(),
        portpool: copied(&options.portpool, "portpool-program")?,
        base: match &options.base {
            Some(base) => Some(copied(base, "portpool-base-program")?),
            None => None,
        },
        haproxy: installed("haproxy", has(Lane::Haproxy) || has(Lane::HaproxySplice))?,
        nginx: installed("nginx", has(Lane::Nginx))?,
        processors: ONE_CORE.to_vec(),
    })
}

/// A running sink, and a connection to ask it.
struct Sink {
    asking: Asking,
    _tree: Tree,
}

fn start_sink(ports: u16) -> io::Result<Sink> {
    let mut command = process::command(&std::env::current_exe()?, GENERATOR);
    let ports = [
        FIRST,
        FIRST + ports - 1,
        UDP_FIRST,
        UDP_FIRST + UDP_COUNT - 1,
    ];
    command
        .arg("--sink")
        .args(ports.map(|port| port.to_string()));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut tree = Tree::spawn(&mut command)?;
    let mut line = String::new();
    if let Some(output) = tree.child().stdout.take() {
        BufReader::new(output).read_line(&mut line)?;
    }
    if line != "ready\n" {
        return Err(io::Error::other("the sink could not start"));
    }
    Ok(Sink {
        asking: Asking::connect(FIRST)?,
        _tree: tree,
    })
}

/// Setup of the proxies that carry load.
fn carrying(processors: &[usize]) -> Setup {
    Setup {
        ports: 1_000,
        capacity: CAPACITY,
        threads: processors.len(),
        udp: true,
    }
}

/// Messages per second that the slowest proxy can carry, for each size that
/// latency is to be measured with.
fn calibrate(bench: &Bench, plan: &Plan, sink: &mut Sink) -> io::Result<BTreeMap<usize, f64>> {
    const TRIES: usize = 3;
    let mut sizes: Vec<usize> = plan
        .measures
        .iter()
        .filter_map(|measure| match measure {
            Measure::Latency(size, _) => Some(*size),
            _ => None,
        })
        .collect();
    sizes.dedup();
    let mut slowest = BTreeMap::new();
    for size in sizes {
        let mut rates: Vec<f64> = Vec::new();
        for lane in plan
            .lanes
            .iter()
            .copied()
            .filter(|lane| *lane != Lane::Direct)
        {
            let proxy = Proxy::start(bench, lane, carrying(ONE_CORE))?;
            let members = proxy.tree.members();
            let times = Times {
                warm: plan.seconds / 5,
                measured: plan.seconds / 2,
            };
            let mut tries = Vec::new();
            for _ in 0..TRIES {
                tries.push(load::closed_loop(lane, Some(&members), size, times)?.rate());
                load::settle(&mut sink.asking)?;
            }
            rates.extend(statistics::median(&tries));
        }
        let rate = rates.into_iter().fold(f64::INFINITY, f64::min);
        println!("       capacity for messages of {size} bytes, the slowest proxy's: {rate:.0}/s");
        slowest.insert(size, rate);
    }
    Ok(slowest)
}

/// Takes all measures that carry load, in one round.
fn carry(
    bench: &Bench,
    plan: &Plan,
    sink: &mut Sink,
    capacity: &BTreeMap<usize, f64>,
    pass: &'static str,
    round: usize,
) -> io::Result<Vec<Sample>> {
    let measures = plan.measures.iter().copied().filter(|measure| {
        !measure.is_lifecycle() && (pass == "one_core" || measure.on_both_cores())
    });
    let measures: Vec<Measure> = measures.collect();
    if measures.is_empty() {
        return Ok(Vec::new());
    }
    let mut proxies = BTreeMap::new();
    for lane in plan
        .lanes
        .iter()
        .copied()
        .filter(|lane| *lane != Lane::Direct)
    {
        let proxy = Proxy::start(bench, lane, carrying(&bench.processors))?;
        let members = proxy.tree.members();
        proxies.insert(lane, (proxy, members));
    }
    load::settle(&mut sink.asking)?;
    let mut samples = Vec::new();
    for (number, measure) in measures.into_iter().enumerate() {
        let awake = matches!(measure, Measure::Latency(..))
            .then(|| namespace::keep_awake(TWO_CORES))
            .transpose()?;
        let mut lanes: Vec<Lane> = plan
            .lanes
            .iter()
            .copied()
            .filter(|lane| measure.is_for(*lane))
            .collect();
        if lanes.is_empty() {
            continue;
        }
        let turn = (round + number) % lanes.len();
        lanes.rotate_left(turn);
        for lane in lanes {
            let members = proxies.get(&lane).map(|(_, members)| members);
            let result = measures::run(
                measure,
                lane,
                members,
                &mut sink.asking,
                capacity,
                plan.seconds,
            );
            let mut sample = sample(pass, round, lane, measure, result);
            if plan.is_busy || bench.processors.len() > 1 {
                // On both cores the proxy shares one with generator and sink.
                sample.conditions.waited = 0.0;
            }
            samples.push(sample);
        }
        drop(awake);
    }
    Ok(samples)
}

/// Takes the measures of the proxies' lives, in half as many rounds, because
/// their noise is small.
fn live(bench: &Bench, plan: &Plan, begun: Instant) -> io::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let measures = plan
        .measures
        .iter()
        .filter(|measure| measure.is_lifecycle());
    for measure in measures.copied() {
        let _sink = start_sink(lifecycle::ports(measure))?;
        let rounds = plan.one_core_rounds.div_ceil(2);
        for round in 0..rounds {
            let mut lanes: Vec<Lane> = plan.lanes.clone();
            lanes.retain(|lane| measure.is_for(*lane));
            let turn = round % lanes.len().max(1);
            lanes.rotate_left(turn);
            let first = samples.len();
            for lane in lanes {
                let result = lifecycle::run(measure, bench, lane);
                let mut sample = sample("one_core", round, lane, measure, result);
                if plan.is_busy {
                    sample.conditions.waited = 0.0;
                }
                samples.push(sample);
            }
            let (seconds, brief) = (
                begun.elapsed().as_secs(),
                evaluation::brief(&samples[first..]),
            );
            println!(
                "{seconds:4} s  {} round {}/{rounds}  {brief}",
                measure.name(),
                round + 1
            );
        }
    }
    Ok(samples)
}

/// The sample of `result`. An error counts as a fault.
fn sample(
    pass: &'static str,
    round: usize,
    lane: Lane,
    measure: Measure,
    result: measures::Outcome,
) -> Sample {
    let (figures, conditions, busy) = result.unwrap_or_else(|error| {
        eprintln!("       {} {}: {error}", lane.name(), measure.name());
        let conditions = statistics::Conditions {
            faults: 1,
            ..Default::default()
        };
        (BTreeMap::new(), conditions, 0.0)
    });
    Sample {
        pass,
        round,
        lane,
        measure,
        figures,
        conditions,
        busy,
    }
}
