//! Processes: started on given processors without privileges, measured with
//! everything they started, ended with the run.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// How long a process may take to end when asked.
const END_LIMIT: Duration = Duration::from_secs(3);

/// Keeps this process, and what it starts from now on, on `processors`.
pub fn pin(processors: &[usize]) -> io::Result<()> {
    let own = std::process::id().to_string();
    let list = list(processors);
    let mut command = Command::new("taskset");
    let output = command
        .args(["--all-tasks", "--cpu-list", "--pid", &list, &own])
        .output()?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(io::Error::other(format!(
            "failed to keep to processors {list}: {message}"
        )));
    }
    Ok(())
}

fn list(processors: &[usize]) -> String {
    let numbers: Vec<String> = processors.iter().map(usize::to_string).collect();
    numbers.join(",")
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A command that runs `program` on `processors`.
pub fn command(program: &Path, processors: &[usize]) -> Command {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &list(processors)]).arg(program);
    command
}

/// The same as a user without capabilities: root is exempt from the budget of
/// pipes that other users have.
pub fn unprivileged(program: &Path, processors: &[usize]) -> Command {
    if !is_root() {
        return command(program, processors);
    }
    let mut command = command("setpriv".as_ref(), processors);
    command.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--no-new-privs",
    ]);
    command.args(["--inh-caps=-all", "--bounding-set=-all"]);
    command.arg(program);
    command
}

/// A process and everything that it starts.
pub struct Tree(Child);

impl Tree {
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        let spawned = command.spawn();
        spawned
            .map(Self)
            .map_err(|error| io::Error::other(format!("failed to start {command:?}: {error}")))
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::kill_process(
            Pid::from_child(&self.0),
            signal,
        )?)
    }

    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().is_ok_and(|status| status.is_some())
    }

    /// The process and its descendants.
    pub fn members(&self) -> Members {
        let mut members = vec![self.0.id()];
        let parents = parents();
        let mut next = 0;
        while let Some(&parent) = members.get(next) {
            members.extend(
                parents
                    .iter()
                    .filter(|(_, of)| **of == parent)
                    .map(|(pid, _)| *pid),
            );
            next += 1;
        }
        Members(members)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let members = self.members();
        let _ = self.signal(Signal::TERM);
        let asked = Instant::now();
        while !self.has_ended() && asked.elapsed() < END_LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
        for pid in members.0 {
            let still_ours = parents().contains_key(&pid);
            if let Some(pid) = Pid::from_raw(pid.cast_signed()).filter(|_| still_ours) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.0.wait();
    }
}

/// The processes of a tree at one time. Looking them up takes milliseconds, so
/// it is done before what is measured.
pub struct Members(Vec<u32>);

impl Members {
    /// Processor time used and waited for so far, as the scheduler counts it: the
    /// network's work while sending is included.
    pub fn processor_time(&self) -> ProcessorTime {
        let times = self.0.iter().flat_map(|pid| processor_times(*pid));
        times.fold(ProcessorTime::default(), |sum, time| ProcessorTime {
            used: sum.used + time.used,
            waited: sum.waited + time.waited,
        })
    }

    /// Proportional set size in bytes: pages shared between n processes count
    /// as an nth each.
    pub fn memory(&self) -> u64 {
        let rollups = self.0.iter().filter_map(|pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok()
        });
        rollups.sum::<u64>() * 1024
    }
}

/// Time on a processor, and ready for one without getting it, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessorTime {
    pub used: u64,
    pub waited: u64,
}

/// Processor time of every thread of `pid`.
fn processor_times(pid: u32) -> Vec<ProcessorTime> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let times = tasks.flatten().filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let mut numbers = text.split_ascii_whitespace().map(str::parse);
        Some(ProcessorTime {
            used: numbers.next()?.ok()?,
            waited: numbers.next()?.ok()?,
        })
    });
    times.collect()
}

/// Parent of every process.
fn parents() -> HashMap<u32, u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return HashMap::new();
    };
    let pairs = entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The process's name comes first, in parentheses, and may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        let parent = rest.split_ascii_whitespace().nth(1)?.parse().ok()?;
        Some((pid, parent))
    });
    pairs.collect()
}

/// The time of the machine's processors so far, in ticks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ticks {
    total: u64,
    stolen: u64,
    idle: u64,
}

impl Ticks {
    pub fn now() -> Self {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let line = text.lines().next().unwrap_or_default();
        let numbers: Vec<u64> = line.split_ascii_whitespace().flat_map(str::parse).collect();
        // user nice system idle iowait irq softirq steal; guest times are in user.
        Self {
            total: numbers.iter().take(8).sum(),
            stolen: numbers.get(7).copied().unwrap_or(0),
            idle: numbers.iter().skip(3).take(2).sum(),
        }
    }

    /// The parts of the time since then that the hypervisor stole and that the
    /// processors were busy.
    pub fn since(self) -> (f64, f64) {
        let now = Self::now();
        let total = (now.total - self.total).max(1) as f64;
        let busy = total - now.idle.saturating_sub(self.idle) as f64;
        ((now.stolen - self.stolen) as f64 / total, busy / total)
    }
}
