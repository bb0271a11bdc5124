//! Processes that do not outlive their parent.
//!
//! There are two kinds. Our own roles ask the kernel to kill them with their
//! parent ([`die_with_parent`]). Other programs run under [`run_program`]: a
//! small parent that outlives them, adopts their orphans, and kills all of them
//! at the end.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, kill_process_group,
    set_child_subreaper, set_parent_process_death_signal, wait,
};
use signal_hook::consts::{SIGALRM, SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Name of the variable that gives a child the process id of its parent.
pub const PARENT: &str = "PORTPOOL_PARENT";

/// How long a program may take to end after SIGTERM.
const KILL_AFTER: Duration = Duration::from_secs(5);

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
    match supervise(program, arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("failed to run {}: {error}", program.display());
            ExitCode::from(NOT_STARTED)
        }
    }
}

fn supervise(program: &OsString, arguments: &[OsString]) -> std::io::Result<u8> {
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
    let child = Command::new(program)
        .args(arguments)
        .env_remove(PARENT)
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
                std::thread::spawn(|| {
                    std::thread::sleep(KILL_AFTER);
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

/// Kills all descendants of this process, until none is left: a killed process
/// may leave orphans, which become our children.
fn kill_descendants() {
    loop {
        let descendants = descendants();
        if descendants.is_empty() {
            return;
        }
        for pid in descendants {
            let _ = kill_process(pid, Signal::KILL);
        }
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// All descendants of this process that still run.
fn descendants() -> Vec<Pid> {
    let mut processes: Vec<(i32, i32)> = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        processes.extend(parse_stat(&stat));
    }
    let mut found = vec![getpid().as_raw_pid()];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            processes
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found
        .into_iter()
        .skip(1)
        .filter_map(Pid::from_raw)
        .collect()
}

/// Process id and parent in a line of `/proc/PID/stat`, or `None` for a process
/// that has ended. The name, in parentheses, may hold any text.
fn parse_stat(stat: &str) -> Option<(i32, i32)> {
    let (pid, rest) = stat.split_once(" (")?;
    let mut fields = rest.rsplit_once(") ")?.1.split(' ');
    let (state, parent) = (fields.next()?, fields.next()?);
    if state == "Z" {
        return None;
    }
    Some((pid.parse().ok()?, parent.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_hold_anything() {
        assert_eq!(parse_stat("7 (a) S (b)) S 3 7 7"), Some((7, 3)));
        assert_eq!(parse_stat("7 (a) Z 3 7 7"), None);
        assert_eq!(parse_stat("nothing"), None);
    }
}
