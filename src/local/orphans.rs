//! The children of this process, and those that it did not start: the orphans of
//! a program whose supervisor (`supervise`) was killed. They become our children,
//! and are killed.

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid,
};
use tokio::process::{Child, Command};

use super::supervise::{Processes, names};

/// Pause between two rounds of killing.
const ROUND: Duration = Duration::from_millis(5);

/// How long orphans are waited for, in all. The end of a killed process takes that long
/// only in the kernel.
const PATIENCE: Duration = Duration::from_secs(2);

/// The children that this process has started. Children belong to the process, so
/// there is one list.
static STARTED: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Lets orphans of our descendants become our children.
///
/// # Errors
/// The system's.
pub(super) fn adopt() -> io::Result<()> {
    Ok(set_child_subreaper(Some(getpid()))?)
}

/// A child that this process has started. Kept until it has ended, so that it does
/// not count as an orphan.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) child: Child,
    pid: i32,
}

impl Started {
    /// Starts `command`.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn spawn(command: &mut Command) -> io::Result<Self> {
        // Held until the child is known.
        let mut started = STARTED.lock();
        let child = command.spawn()?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.expect("a child that was not waited for has an id");
        started.insert(pid);
        Ok(Self { child, pid })
    }

    /// The process, which may have ended.
    pub(super) fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.pid)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        STARTED.lock().remove(&self.pid);
    }
}

/// Kills the orphans that there are now.
///
/// # Errors
/// The names of those that do not end, for example because they changed their user.
pub(super) async fn kill() -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = kill_once();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(names(&left));
        }
        tokio::time::sleep(ROUND).await;
    }
}

/// Kills the orphans and everything below them. Returns those that were found.
fn kill_once() -> Vec<Pid> {
    let processes = Processes::read();
    // Children that were started meanwhile are known, because the lock is taken
    // after the processes were read.
    let started = STARTED.lock();
    let is_orphan = |pid: &Pid| !started.contains(&pid.as_raw_pid());
    let children = processes.children(getpid()).map(|child| child.pid);
    let orphans: Vec<Pid> = children.filter(is_orphan).collect();
    for pid in processes.below(orphans.iter().copied()) {
        // It may have ended already.
        let _ = kill_process(pid, Signal::KILL);
    }
    for pid in &orphans {
        // Nothing else waits for it: tokio waits for its own children only.
        let _ = waitpid(Some(*pid), WaitOptions::NOHANG);
    }
    orphans
}
