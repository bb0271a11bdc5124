//! A child process that is restarted when it ends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::events::Events;
use super::orphans::{self, Started};
use super::served;
use super::supervise::PARENT;

/// Pause before the first restart. It doubles up to the longest one, and is
/// short again after a child has run for as long as the longest pause, or has
/// served a session.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A stop that takes longer says what it waits for.
const SHORT_STOP: Duration = Duration::from_secs(1);

/// Time for a supervisor to kill its program once the grace period is over.
const KILLING: Duration = Duration::from_secs(2);

/// Longest line of output that is shown, in bytes; a longer one is split.
const LINE_BYTES: u64 = 4096;

/// A program to run.
#[derive(Clone, Debug)]
pub(super) struct Program {
    /// Name in events, for example `echo-0/agent`.
    pub(super) name: String,
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
    pub(super) folder: Option<String>,
    /// Time that the program may take to end after SIGTERM.
    pub(super) grace: Duration,
    /// The admin pages of the agent beside it, when it is a workload's.
    pub(super) agent: Option<SocketAddr>,
}

/// A running child. [`Supervised::stop`] stops it; it is killed when its parent
/// dies.
#[derive(Debug)]
pub(super) struct Supervised {
    stopping: CancellationToken,
    replacing: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Supervised {
    pub(super) fn start(binary: PathBuf, program: Program, events: Events) -> Self {
        let stopping = CancellationToken::new();
        let replacing = Arc::new(Notify::new());
        let task = supervise(binary, program, events, stopping.clone(), replacing.clone());
        Self {
            stopping,
            replacing,
            task: tokio::spawn(task),
        }
    }

    /// Starts the program again, as it is on disk now. The new process takes over
    /// from the running child, which then ends by itself. If it cannot take over,
    /// the running child continues.
    pub(super) fn replace(&self) {
        self.replacing.notify_one();
    }

    /// Ends the child: SIGTERM, and SIGKILL after its grace period.
    pub(super) async fn stop(self) {
        self.stopping.cancel();
        // The task ends with the child; it does not panic.
        let _ = self.task.await;
    }
}

async fn supervise(
    binary: PathBuf,
    program: Program,
    events: Events,
    stopping: CancellationToken,
    replacing: Arc<Notify>,
) {
    let mut restarts = Restarts::default();
    loop {
        let started = Instant::now();
        let (reason, is_done) = match spawn(&binary, &program, &events) {
            Ok(mut child) => loop {
                tokio::select! {
                    status = child.child.wait() => {
                        let is_success = status.as_ref().is_ok_and(ExitStatus::success);
                        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                        break (format!("ended ({status})"), is_success);
                    }
                    () = stopping.cancelled() => {
                        end(child, &program, &events).await;
                        return kill_orphans(&program.name, &events).await;
                    }
                    () = replacing.notified() => replace(&mut child, &binary, &program, &events).await,
                }
            },
            Err(error) => (format!("failed to start: {error}"), false),
        };
        kill_orphans(&program.name, &events).await;
        let sessions = match program.agent {
            Some(agent) if is_done => served::sessions(agent).await,
            _ => None,
        };
        let pause = restarts.next(sessions, started.elapsed());
        let when = if pause.is_zero() {
            "after a session; starting it again at once".to_owned()
        } else {
            format!("; starting it again in {:.1} s", pause.as_secs_f64())
        };
        let separator = if pause.is_zero() { " " } else { "" };
        events.say(format!("{} {reason}{separator}{when}", program.name));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopping.cancelled() => return,
        }
    }
}

/// When a program is started again that has ended.
#[derive(Debug)]
struct Restarts {
    pause: Duration,
    /// The sessions of its processing server at its last end.
    sessions: u64,
}

impl Default for Restarts {
    fn default() -> Self {
        Self {
            pause: FIRST_PAUSE,
            sessions: 0,
        }
    }
}

impl Restarts {
    /// The pause before the next start of a program that has `run` for this long.
    /// `sessions` counts those of its processing server, when it ended with
    /// success: after a further session there is no pause, because programs that serve
    /// one client and end work that way.
    fn next(&mut self, sessions: Option<u64>, run: Duration) -> Duration {
        if let Some(sessions) = sessions {
            // An agent that was restarted counts from 0.
            let has_served = sessions > 0 && sessions != self.sessions;
            self.sessions = sessions;
            if has_served {
                self.pause = FIRST_PAUSE;
                return Duration::ZERO;
            }
        }
        if run >= LONGEST_PAUSE {
            self.pause = FIRST_PAUSE;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        pause
    }
}

/// Starts a successor, which takes over from `child`; it is the new `child`
/// then.
async fn replace(child: &mut Started, binary: &PathBuf, program: &Program, events: &Events) {
    let name = &program.name;
    let mut successor = match spawn(binary, program, events) {
        Ok(successor) => successor,
        Err(error) => {
            return events.say(format!(
                "{name} continues; its successor failed to start: {error}"
            ));
        }
    };
    tokio::select! {
        _ = child.child.wait() => {
            events.say(format!("{name} was replaced"));
            *child = successor;
        }
        _ = successor.child.wait() => events.say(format!("{name} continues; its successor did not take over")),
    }
}

fn spawn(binary: &PathBuf, program: &Program, events: &Events) -> std::io::Result<Started> {
    let mut command = Command::new(binary);
    command
        .args(&program.arguments)
        .envs(program.environment.iter().cloned())
        .env(PARENT, std::process::id().to_string())
        // Ctrl-C reaches only this process, which ends the children in order.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(folder) = &program.folder {
        command.current_dir(folder);
    }
    let mut started = Started::spawn(&mut command)?;
    let child = &mut started.child;
    if let Some(output) = child.stdout.take() {
        tokio::spawn(show(output, program.name.clone(), events.clone()));
    }
    if let Some(output) = child.stderr.take() {
        tokio::spawn(show(output, program.name.clone(), events.clone()));
    }
    Ok(started)
}

async fn end(mut started: Started, program: &Program, events: &Events) {
    if let Some(pid) = started.pid() {
        // The child may have ended already.
        let _ = kill_process(pid, Signal::TERM);
    }
    let (child, grace) = (&mut started.child, program.grace);
    let short = SHORT_STOP.min(grace);
    if tokio::time::timeout(short, child.wait()).await.is_ok() {
        return;
    }
    if program.agent.is_some() {
        events.say(format!(
            "waiting for {} to end, up to {} s",
            program.name,
            grace.as_secs()
        ));
    }
    let rest = grace - short + KILLING;
    if tokio::time::timeout(rest, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

/// Kills what a supervisor has left that was killed itself.
async fn kill_orphans(name: &str, events: &Events) {
    if let Err(left) = orphans::kill().await {
        events.say(format!("{name} has left processes that do not end: {left}"));
    }
}

/// Shows a child's output line by line.
async fn show(output: impl AsyncRead + Unpin, name: String, events: Events) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut output)
            .take(LINE_BYTES)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(_) => events.output(&name, String::from_utf8_lossy(&line).trim_end()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_served_starts_at_once_and_another_later_and_later() {
        let (mut restarts, short) = (Restarts::default(), Duration::from_millis(1));
        let millis = |duration: Duration| duration.as_millis();
        let failures: Vec<_> = (0..10)
            .map(|_| millis(restarts.next(None, short)))
            .collect();
        assert_eq!(failures[..4], [200, 400, 800, 1600]);
        assert_eq!(failures[8..], [30_000, 30_000]);
        for sessions in 1..5 {
            assert_eq!(millis(restarts.next(Some(sessions), short)), 0);
        }
        // It ended with success, but no one came.
        assert_eq!(millis(restarts.next(Some(4), short)), 200);
        assert_eq!(millis(restarts.next(Some(4), short)), 400);
        // The agent was restarted.
        assert_eq!(millis(restarts.next(Some(0), short)), 800);
        assert_eq!(millis(restarts.next(Some(1), short)), 0);
        restarts.next(None, short);
        assert_eq!(millis(restarts.next(None, LONGEST_PAUSE)), 200);
    }
}
