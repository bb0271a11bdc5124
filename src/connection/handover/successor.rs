//! Upgrades by signal: at SIGUSR2 a connection server starts its own program,
//! as it is on disk now, as its successor. The process that was started first
//! stays, so that its supervisor (a container's runtime, systemd) notices
//! nothing: once it has handed over it stands in for its successor, which means
//! that it passes signals on and ends with the last one's status.
//!
//! ```text
//! connection server ─USR2→ starts successor ─hand-over→ stand-in ─USR2→ starts the next one
//!                              └ takes over ←──────────────┴──TERM──→ ends
//! ```

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitStatus;

use futures::future::select_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// Starts successors of this process.
#[derive(Debug)]
pub(in crate::connection) struct Starter {
    upgrades: tokio::signal::unix::Signal,
    /// Where this program was when it started; an upgrade replaces the file.
    program: PathBuf,
    /// Whether `portpool local` runs this process: it starts successors itself,
    /// and kills what it started.
    is_supervised: bool,
    /// The running ones: the one that serves, and one that takes over.
    successors: Vec<Child>,
}

impl Starter {
    /// Handles SIGUSR2 from now on. `is_supervised`: whether `portpool local` runs
    /// this process.
    pub(in crate::connection) fn new(is_supervised: bool) -> io::Result<Self> {
        Ok(Self {
            upgrades: signal(SignalKind::user_defined2())?,
            program: std::env::current_exe()?,
            is_supervised,
            successors: Vec::new(),
        })
    }

    /// Completes at SIGUSR2.
    pub(in crate::connection) async fn requested(&mut self) {
        if self.upgrades.recv().await.is_none() {
            std::future::pending().await
        }
    }

    /// Starts a successor, which requests a hand-over, unless `most` are running
    /// already.
    pub(in crate::connection) fn start(&mut self, most: usize) {
        if self.is_supervised {
            return warn!("SIGUSR2 is for portpool local, which starts successors");
        }
        self.successors
            .retain_mut(|successor| matches!(successor.try_wait(), Ok(None)));
        if self.successors.len() >= most {
            return warn!("a successor is starting already");
        }
        let arguments = std::env::args_os().skip(1);
        match Command::new(&self.program).args(arguments).spawn() {
            Ok(successor) => {
                info!(pid = successor.id(), "successor started");
                self.successors.push(successor);
            }
            Err(error) => {
                let program = self.program.display();
                warn!(%program, %error, "failed to start a successor; the connection server goes on");
            }
        }
    }

    /// Stands in for the successor that has taken over, until the last one has
    /// ended, and returns its status; `None` when a process has taken over that
    /// was not started here.
    pub(in crate::connection) async fn stand_in(
        mut self,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<ExitStatus> {
        let mut last = None;
        let mut is_stopping = false;
        while !self.successors.is_empty() {
            let successors = self.successors.iter_mut();
            let ends = select_all(successors.map(|successor| Box::pin(successor.wait())));
            let happened = tokio::select! {
                (status, index, _) = ends => Happened::Ended(status.ok(), index),
                _ = self.upgrades.recv() => Happened::Upgrade,
                () = &mut shutdown, if !is_stopping => Happened::Shutdown,
            };
            match happened {
                Happened::Ended(status, index) => {
                    self.successors.remove(index);
                    last = status;
                }
                Happened::Upgrade => self.start(2),
                Happened::Shutdown => {
                    is_stopping = true;
                    let running = self.successors.iter().filter_map(Child::id);
                    for pid in running.filter_map(|pid| Pid::from_raw(pid.try_into().ok()?)) {
                        // One that has ended needs no signal.
                        let _ = kill_process(pid, Signal::TERM);
                    }
                }
            }
        }
        last
    }
}

/// What a stand-in reacts to.
enum Happened {
    Ended(Option<ExitStatus>, usize),
    Upgrade,
    Shutdown,
}
