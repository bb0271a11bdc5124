//! Processes that do not outlive their parent.
//!
//! There are two kinds. Our own roles ask the kernel to kill them with their
//! parent ([`die_with_parent`]). Other programs run under [`run_program`]: a
//! small parent that outlives them, adopts their orphans, and kills all of them
//! at the end.
//!
//! ```text
//! portpool local            adopts the orphans of a killed supervisor (`orphans`)
//!   └ run-program           adopts the orphans of the program
//!       └ program           killed with its parent: it was `run-program --become` before
//!           └ daemons …     orphans at last, whatever they do
//! ```
//!
//! A daemon leaves its parent and its session, but not the nearest subreaper
//! above it. So as long as a descendant lives, the supervisor has a child, and
//! it knows that none is left when the kernel says that it has no child. What a
//! look into `/proc` shows is out of date at once; it only says what to kill.
//! When a supervisor and `portpool local` are killed with SIGKILL at the same time,
//! the program ends, but not its daemons: nothing is left to end them.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, kill_process_group,
    set_child_subreaper, set_parent_process_death_signal, wait,
};
use signal_hook::consts::{SIGALRM, SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Name of the variable that gives a child the process id of its parent.
pub const PARENT: &str = "PORTPOOL_PARENT";

/// Pause between two rounds of killing.
const ROUND: Duration = Duration::from_millis(5);

/// The program that is running, also when its file was replaced or removed.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Exit status that a shell reports for a killed program.
const KILLED: u8 = 137;

/// Exit status that a shell reports for a program that cannot be started.
const NOT_STARTED: u8 = 127;

/// Asks the kernel to kill this process with the parent that [`PARENT`] names.
/// Does nothing without the variable; returns whether it is set. Must be called
/// before anything else.
pub fn die_with_parent() -> bool {
    let Some(parent) = std::env::var(PARENT)
        .ok()
        .and_then(|parent| parent.parse().ok())
    else {
        return false;
    };
    let asked = set_parent_process_death_signal(Some(Signal::KILL));
    // The parent may have died before the kernel was asked.
    if asked.is_err() || getppid().map(Pid::as_raw_pid) != Some(parent) {
        std::process::exit(1);
    }
    true
}

/// Runs a program and ends with its status. When the program ends, when this
/// process receives SIGTERM, or when its parent dies, all processes that the
/// program started are killed too.
#[derive(clap::Args, Clone, Debug)]
pub struct RunProgram {
    /// Seconds that the program may take to end after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    grace_seconds: u64,

    /// Become the program, which the kernel kills with its parent
    #[arg(long = "become", hide = true)]
    becomes: bool,

    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

/// Carries out `portpool run-program`.
#[must_use]
pub fn run_program(options: &RunProgram) -> ExitCode {
    let Some((program, arguments)) = options.program.split_first() else {
        return ExitCode::from(NOT_STARTED);
    };
    if options.becomes {
        die_with_parent();
        let error = Command::new(program)
            .args(arguments)
            .env_remove(PARENT)
            .exec();
        eprintln!("failed to run {}: {error}", program.display());
        return ExitCode::from(NOT_STARTED);
    }
    match supervise(&options.program, Duration::from_secs(options.grace_seconds)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("failed to run {}: {error}", program.display());
            ExitCode::from(NOT_STARTED)
        }
    }
}

fn supervise(program: &[OsString], grace: Duration) -> std::io::Result<u8> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGCHLD, SIGALRM])?;
    // Orphans of the program become our children, so that they can be found.
    set_child_subreaper(Some(getpid()))?;
    set_parent_process_death_signal(Some(Signal::TERM))?;
    let parent = std::env::var(PARENT)
        .ok()
        .and_then(|parent| parent.parse::<i32>().ok());
    let is_orphan = || parent.is_some_and(|parent| getppid().map(Pid::as_raw_pid) != Some(parent));
    if is_orphan() {
        return Ok(1);
    }
    let child = Command::new(THIS_PROGRAM)
        .args(["run-program", "--become", "--"])
        .args(program)
        .env(PARENT, std::process::id().to_string())
        .process_group(0)
        .spawn()?;
    let main = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let mut is_ending = false;
    for signal in signals.forever() {
        match signal {
            SIGCHLD => {
                if let Some(status) = reap(main) {
                    kill_descendants();
                    return Ok(status);
                }
            }
            // The parent is dead or asks a second time: do not wait any longer.
            SIGTERM | SIGINT if is_ending || is_orphan() => break,
            SIGTERM | SIGINT => {
                is_ending = true;
                if let Some(main) = main {
                    // The program may have ended already.
                    let _ = kill_process_group(main, Signal::TERM);
                }
                std::thread::spawn(move || {
                    std::thread::sleep(grace);
                    let _ = kill_process(getpid(), Signal::ALARM);
                });
            }
            _ => break,
        }
    }
    kill_descendants();
    Ok(KILLED)
}

/// Reaps ended children. Returns the status of `main` if it is one of them.
fn reap(main: Option<Pid>) -> Option<u8> {
    let mut ended = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if Some(pid) == main {
            let by_signal = status.terminating_signal().map(|signal| 128 + signal);
            let code = status.exit_status().or(by_signal).unwrap_or(1);
            ended = Some(u8::try_from(code).unwrap_or(1));
        }
    }
    ended
}

/// Kills all descendants of this process, until the kernel says that it has no
/// child: a killed process may leave orphans, which become our children.
pub(super) fn kill_descendants() {
    loop {
        let running = descendants(&Processes::read());
        let is_refused = |pid: &Pid| kill_process(*pid, Signal::KILL) == Err(Errno::PERM);
        let refused = running.iter().filter(|pid| is_refused(pid)).count();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        if refused > 0 && refused == running.len() {
            // They changed their user, as sudo does.
            eprintln!("not permitted to end {}", names(&running));
            return;
        }
        std::thread::sleep(ROUND);
    }
}

/// The processes `pids` for a message, for example `sleep (12), cat (13)`.
pub(super) fn names(pids: &[Pid]) -> String {
    let names = pids.iter().map(|pid| {
        let pid = pid.as_raw_pid();
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("{} ({pid})", name.trim_end())
    });
    names.collect::<Vec<_>>().join(", ")
}

/// All descendants of this process in `processes` that still run.
fn descendants(processes: &Processes) -> Vec<Pid> {
    processes.below(processes.children(getpid()).map(|child| child.pid))
}

/// The processes of this machine at some time, or somewhat different ones: they
/// are read one after another.
#[derive(Debug)]
pub(super) struct Processes(Vec<Process>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: Pid,
    parent: i32,
    /// Whether it has ended, and only its status is left.
    has_ended: bool,
}

impl Processes {
    pub(super) fn read() -> Self {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = entries.filter_map(|entry| {
            parse_stat(&std::fs::read_to_string(entry.path().join("stat")).ok()?)
        });
        Self(processes.collect())
    }

    /// The children of `parent`.
    pub(super) fn children(&self, parent: Pid) -> impl Iterator<Item = &Process> {
        let is_child = move |process: &&Process| process.parent == parent.as_raw_pid();
        self.0.iter().filter(is_child)
    }

    /// Those of `roots` and of all their descendants that still run.
    pub(super) fn below(&self, roots: impl Iterator<Item = Pid>) -> Vec<Pid> {
        let mut found: Vec<Pid> = roots.collect();
        let mut next = 0;
        while let Some(&parent) = found.get(next) {
            found.extend(self.children(parent).map(|child| child.pid));
            next += 1;
        }
        let has_ended = |pid: &Pid| {
            let mut processes = self.0.iter();
            processes.any(|process| process.pid == *pid && process.has_ended)
        };
        found.retain(|pid| !has_ended(pid));
        found
    }
}

/// The process of a line of `/proc/PID/stat`. The name, in parentheses, may hold
/// any text.
fn parse_stat(stat: &str) -> Option<Process> {
    let (pid, rest) = stat.split_once(" (")?;
    let mut fields = rest.rsplit_once(") ")?.1.split(' ');
    let (state, parent) = (fields.next()?, fields.next()?);
    Some(Process {
        pid: Pid::from_raw(pid.parse().ok()?)?,
        parent: parent.parse().ok()?,
        has_ended: state == "Z",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_hold_anything() {
        let parsed = |stat| {
            let process: Process = parse_stat(stat).unwrap();
            (process.pid.as_raw_pid(), process.parent, process.has_ended)
        };
        assert_eq!(parsed("7 (a) S (b)) S 3 7 7"), (7, 3, false));
        assert_eq!(parsed("7 (a) Z 3 7 7"), (7, 3, true));
        assert_eq!(parse_stat("nothing"), None);
    }
}
