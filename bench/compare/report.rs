//! The files that a run is written to, and the table that is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::evaluation::{Evaluation, Ratio, evaluate, rounded};
use crate::lanes::{self, Bench, Lane};
use crate::measures::{METRICS, Metric, Sample};
use crate::statistics::Estimate;

/// A finished run.
pub struct Run<'a> {
    pub bench: &'a Bench,
    pub lanes: &'a [Lane],
    pub samples: &'a [Sample],
    pub capacity: &'a BTreeMap<usize, f64>,
    /// Whether everything was measured as it is to be published.
    pub is_complete: bool,
    pub seconds: f64,
}

/// The files that are published.
const FILES: [&str; 3] = ["summary.json", "table.md", "plot.svg"];

/// Copies the last run's results from `from` to `to`.
///
/// # Errors
/// When there is none, or it left something out.
pub fn publish(from: &Path, to: &Path) -> io::Result<()> {
    let path = from.join("summary.json");
    let text = fs::read(&path).map_err(|error| {
        io::Error::other(format!(
            "no results in {}: {error}; run make bench",
            path.display()
        ))
    })?;
    let summary: Value = serde_json::from_slice(&text)?;
    if summary["isComplete"] != true {
        return Err(io::Error::other(
            "the last run left measures, lanes or rounds out: run make bench without choosing any",
        ));
    }
    fs::create_dir_all(to)?;
    for file in FILES {
        fs::copy(from.join(file), to.join(file))?;
    }
    Ok(())
}

/// Writes [`FILES`] and `samples.json`, and prints the table.
pub fn write(run: &Run, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let table = table(run);
    fs::write(
        folder.join("samples.json"),
        serde_json::to_vec(&samples(run))?,
    )?;
    fs::write(
        folder.join("summary.json"),
        serde_json::to_vec_pretty(&summary(run))?,
    )?;
    fs::write(folder.join("table.md"), &table)?;
    fs::write(
        folder.join("plot.svg"),
        crate::plot::plot(&evaluate(run.samples, "one_core")),
    )?;
    println!("\n{table}\n{}", folder.join("summary.json").display());
    Ok(())
}

fn samples(run: &Run) -> Vec<Value> {
    let samples = run.samples.iter().map(|sample| {
        json!({
            "pass": sample.pass, "round": sample.round, "lane": sample.lane.name(),
            "measure": sample.measure.name(), "figures": sample.figures,
            "faults": sample.conditions.faults, "steal": sample.conditions.steal, "waited": sample.conditions.waited,
            "rate": sample.conditions.rate, "offeredRate": sample.conditions.offered_rate,
            "busy": sample.busy,
        })
    });
    samples.collect()
}

fn summary(run: &Run) -> Value {
    let one_core = evaluate(run.samples, "one_core");
    let two_cores = evaluate(run.samples, "two_cores");
    json!({
        "isComplete": run.is_complete,
        "machine": machine(),
        "versions": versions(run),
        "configurations": configurations(run),
        "method": {
            "seconds": run.seconds,
            "rounds": rounds(run, "one_core"),
            "roundsOnTwoCores": rounds(run, "two_cores"),
            "messagesPerSecondOfTheSlowestProxy": run.capacity.iter().map(|(size, rate)| (size.to_string(), rate)).collect::<BTreeMap<_, _>>(),
        },
        "lanes": figures(&one_core),
        "ratios": ratios(&one_core, Evaluation::ratio),
        "ratiosToBase": ratios(&one_core, |evaluation, metric| evaluation.ratio_to(metric, Lane::PortpoolBase)),
        "lanesOnTwoCores": figures(&two_cores),
        "ratiosOnTwoCores": ratios(&two_cores, Evaluation::ratio),
        "discarded": discarded(&one_core, &two_cores),
    })
}

fn rounds(run: &Run, pass: &str) -> usize {
    let of_pass = run.samples.iter().filter(|sample| sample.pass == pass);
    of_pass
        .map(|sample| sample.round)
        .collect::<BTreeSet<_>>()
        .len()
}

fn figures(evaluation: &Evaluation) -> Value {
    let mut lanes: BTreeMap<&str, BTreeMap<&str, Value>> = BTreeMap::new();
    for ((name, lane), figure) in &evaluation.figures {
        let unit = METRICS
            .iter()
            .find(|metric| metric.name == *name)
            .map_or("", |metric| metric.unit);
        let value = json!({
            "unit": unit, "median": figure.median, "min": figure.minimum, "max": figure.maximum,
            "rounds": figure.values.len(),
        });
        lanes.entry(lane.name()).or_default().insert(name, value);
    }
    json!(lanes)
}

fn ratios(evaluation: &Evaluation, of: impl Fn(&Evaluation, &Metric) -> Option<Ratio>) -> Value {
    let mut all = BTreeMap::new();
    for metric in METRICS {
        if let Some(Ratio { estimate, to }) = of(evaluation, metric) {
            let value = json!({
                "median": estimate.median, "low": estimate.low, "high": estimate.high,
                "rounds": estimate.rounds, "to": to.name(), "aim": metric.aim,
                "isMet": metric.meets(estimate.median),
            });
            all.insert(metric.name, value);
        }
    }
    json!(all)
}

fn discarded(one_core: &Evaluation, two_cores: &Evaluation) -> Value {
    let passes = [("one_core", one_core), ("two_cores", two_cores)];
    let all = passes.iter().flat_map(|(pass, evaluation)| {
        evaluation.discarded.iter().map(move |((lane, measure, why), count)| {
            json!({"pass": pass, "lane": lane.name(), "measure": measure, "why": why.name(), "samples": count})
        })
    });
    all.collect()
}

fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
    };
    let processors = read("/proc/cpuinfo");
    json!({
        "processor": field(&processors, "model name"),
        "family": field(&processors, "cpu family"),
        "model": field(&processors, "model\t"),
        "processors": processors.lines().filter(|line| line.starts_with("processor")).count(),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "isVirtual": processors.contains(" hypervisor"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "system": read("/etc/os-release").lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(|name| name.trim_matches('"').to_owned()),
        "congestionControl": read("/proc/sys/net/ipv4/tcp_congestion_control").trim(),
        "openFiles": rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        "hasOwnNetwork": crate::namespace::is_inside(),
    })
}

fn versions(run: &Run) -> Value {
    let mut versions = BTreeMap::new();
    for lane in run.lanes {
        let (program, argument) = match lane {
            Lane::Direct => continue,
            Lane::Portpool => (Some(&run.bench.portpool), "--version"),
            Lane::PortpoolBase => (run.bench.base.as_ref(), "--version"),
            Lane::Haproxy | Lane::HaproxySplice => (Some(&run.bench.haproxy), "-v"),
            Lane::Nginx => (Some(&run.bench.nginx), "-v"),
        };
        let Some(output) =
            program.and_then(|program| Command::new(program).arg(argument).output().ok())
        else {
            continue;
        };
        // nginx prints its version on standard error.
        let text = [output.stdout, output.stderr].concat();
        let line = String::from_utf8_lossy(&text)
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned();
        versions.insert(lane.name(), line);
    }
    let revision = Command::new("git")
        .args(["describe", "--always", "--dirty"])
        .output();
    if let Ok(output) = revision {
        versions.insert(
            "revision",
            String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        );
    }
    json!(versions)
}

fn configurations(run: &Run) -> Value {
    let setup = crate::carrying(crate::ONE_CORE);
    let mut all = BTreeMap::new();
    for lane in run.lanes {
        let value = json!({
            "arguments": lanes::arguments(*lane, Path::new("FOLDER"), setup),
            "file": lanes::configuration(*lane, setup),
            "remarks": lanes::remarks(*lane),
        });
        all.insert(lane.name(), value);
    }
    json!(all)
}

fn table(run: &Run) -> String {
    let (machine, versions) = (machine(), versions(run));
    let part = |of: &Value, name: &str| of[name].as_str().unwrap_or("unknown").to_owned();
    let mut text = format!(
        "{} × {}, {}, Linux {}{}; {}. portpool {}.\n\n",
        machine["processors"],
        part(&machine, "processor"),
        part(&machine, "memory"),
        part(&machine, "kernel"),
        if machine["isVirtual"] == true {
            ", virtual"
        } else {
            ""
        },
        ["haproxy", "nginx"]
            .map(|name| part(&versions, name))
            .join("; "),
        part(&versions, "revision"),
    );
    for (pass, title) in [
        (
            "one_core",
            "Proxy on one core, generator and sink on the other",
        ),
        ("two_cores", "Proxy on both cores"),
    ] {
        let evaluation = evaluate(run.samples, pass);
        if evaluation.figures.is_empty() {
            continue;
        }
        let _ = writeln!(
            text,
            "{title}. {} rounds; cells: median [lowest, highest]; ratio: portpool to the better of HAProxy and nginx, median of rounds [95 % interval].\n",
            rounds(run, pass)
        );
        let lanes: Vec<Lane> = run
            .lanes
            .iter()
            .copied()
            .filter(|lane| evaluation.figures.keys().any(|(_, of)| of == lane))
            .collect();
        let has_base = lanes.contains(&Lane::PortpoolBase);
        let names: Vec<&str> = lanes.iter().map(|lane| lane.name()).collect();
        let base = if has_base { " to base |" } else { "" };
        let _ = writeln!(
            text,
            "| measure | {} | ratio | to | aim |{base}",
            names.join(" | ")
        );
        let _ = writeln!(
            text,
            "|---|{}---|---|---|{}",
            "---|".repeat(lanes.len()),
            if has_base { "---|" } else { "" }
        );
        for metric in METRICS {
            if evaluation
                .figures
                .keys()
                .any(|(name, _)| *name == metric.name)
            {
                row(&mut text, &evaluation, &lanes, metric, pass == "one_core");
            }
        }
        text.push('\n');
    }
    text
}

fn row(text: &mut String, evaluation: &Evaluation, lanes: &[Lane], metric: &Metric, has_aim: bool) {
    let _ = write!(text, "| {}, {} |", metric.name, metric.unit);
    for lane in lanes {
        let cell = evaluation.figures.get(&(metric.name, *lane)).map_or_else(
            || " - |".to_owned(),
            |figure| {
                let [median, low, high] =
                    [figure.median, figure.minimum, figure.maximum].map(rounded);
                format!(" {median} [{low}, {high}] |")
            },
        );
        text.push_str(&cell);
    }
    let shown = |ratio: &Ratio| {
        let Estimate {
            median, low, high, ..
        } = ratio.estimate;
        format!("{median:.3} [{low:.3}, {high:.3}]")
    };
    match evaluation.ratio(metric) {
        None => text.push_str(" - | - |"),
        Some(ratio) => {
            let bold = if metric.meets(ratio.estimate.median) == Some(true) {
                "**"
            } else {
                ""
            };
            let _ = write!(
                text,
                " {bold}{}{bold} | {} |",
                shown(&ratio),
                ratio.to.name()
            );
        }
    }
    let aim = if has_aim {
        metric.aim_text()
    } else {
        "-".to_owned()
    };
    let _ = write!(text, " {aim} |");
    if lanes.contains(&Lane::PortpoolBase) {
        let ratio = evaluation.ratio_to(metric, Lane::PortpoolBase);
        let _ = write!(
            text,
            " {} |",
            ratio.map_or_else(|| "-".to_owned(), |ratio| shown(&ratio))
        );
    }
    text.push('\n');
}
