//! A child process that is restarted when it ends.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::events::Events;
use super::supervise::PARENT;

/// Pause before the first restart. It doubles up to the longest one, and is
/// short again after a child has run for as long as the longest pause.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

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
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        match spawn(&binary, &program, &events) {
            Ok(mut child) => loop {
                tokio::select! {
                    status = child.wait() => {
                        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                        events.say(format!("{} ended ({status}); restarting it", program.name));
                        break;
                    }
                    () = stopping.cancelled() => return end(child, program.grace).await,
                    () = replacing.notified() => replace(&mut child, &binary, &program, &events).await,
                }
            },
            Err(error) => events.say(format!("{} failed to start: {error}", program.name)),
        }
        if started.elapsed() >= LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopping.cancelled() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Starts a successor, which takes over from `child`; it is the new `child`
/// then.
async fn replace(child: &mut Child, binary: &PathBuf, program: &Program, events: &Events) {
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
        _ = child.wait() => {
            events.say(format!("{name} was replaced"));
            *child = successor;
        }
        _ = successor.wait() => events.say(format!("{name} continues; its successor did not take over")),
    }
}

fn spawn(binary: &PathBuf, program: &Program, events: &Events) -> std::io::Result<Child> {
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
    let mut child = command.spawn()?;
    if let Some(output) = child.stdout.take() {
        tokio::spawn(show(output, program.name.clone(), events.clone()));
    }
    if let Some(output) = child.stderr.take() {
        tokio::spawn(show(output, program.name.clone(), events.clone()));
    }
    Ok(child)
}

async fn end(mut child: Child, grace: Duration) {
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // The child may have ended already.
        let _ = kill_process(pid, Signal::TERM);
    }
    if tokio::time::timeout(grace, child.wait()).await.is_err() {
        let _ = child.kill().await;
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
