//! The data threads as control sees them: which of them has a port, and the way
//! of commands to it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use super::command::{Command, Unwatched};
use super::gate::Gate;
use super::shared::Shared;
use super::worker::Worker;
use crate::table::ListenPort;

/// How long control waits for ports to be watched or closed. 60,000 ports take
/// a data thread about 0.1 s, a turn of its loop milliseconds.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// The data threads, at least one.
#[derive(Debug)]
pub(super) struct Threads(Vec<Thread>);

#[derive(Debug)]
struct Thread {
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    handle: Mutex<Option<JoinHandle<()>>>,
}

impl Thread {
    fn start(name: String, gate: Arc<dyn Gate>, shared: Shared) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let worker = Worker::new(inbox, &wake, gate, shared)?;
        let handle = std::thread::Builder::new()
            .name(name)
            .spawn(move || worker.run())?;
        Ok(Self {
            commands,
            wake,
            handle: Mutex::new(Some(handle)),
        })
    }

    fn send(&self, command: Command) {
        // A thread that has stopped has nothing left to command.
        if self.commands.send(command).is_ok() {
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Threads {
    /// Starts as many as `shared` says.
    ///
    /// # Errors
    /// The system's, when it has no thread or descriptor left.
    pub(super) fn start(gate: &Arc<impl Gate>, shared: &Shared) -> io::Result<Self> {
        let threads = (0..shared.threads)
            .map(|index| Thread::start(format!("forward-{index}"), gate.clone(), shared.clone()));
        Ok(Self(threads.collect::<Result<_, _>>()?))
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// The index of the thread that has `port`, and all that comes in on it.
    pub(super) fn owner(&self, port: ListenPort) -> usize {
        usize::from(port.get()) % self.0.len()
    }

    /// Sends `command` to the thread of an index.
    pub(super) fn send(&self, index: usize, command: Command) {
        self.0[index].send(command);
    }

    /// Sends `command` to the thread that has `port`.
    pub(super) fn send_to_owner(&self, port: ListenPort, command: Command) {
        self.send(self.owner(port), command);
    }

    /// Sends a command to each thread, which answers once, or drops the sender
    /// when it has stopped.
    pub(super) fn ask_all<T>(
        &self,
        command: impl Fn(mpsc::Sender<T>) -> Command,
    ) -> mpsc::Receiver<T> {
        let (sender, answers) = mpsc::channel();
        for thread in &self.0 {
            thread.send(command(sender.clone()));
        }
        answers
    }

    /// Waits until the threads have carried out their commands. Returns the ports
    /// that could not be watched.
    pub(super) fn settle(&self) -> Vec<Unwatched> {
        let answers = self.ask_all(Command::Settle);
        let mut failed = Vec::new();
        for _ in &self.0 {
            // A thread answers within a turn of its loop, or has stopped.
            match answers.recv_timeout(SETTLE_LIMIT) {
                Ok(answer) => failed.extend(answer),
                Err(_) => {
                    tracing::warn!("a data thread is slow to open or close connection ports");
                    break;
                }
            }
        }
        failed
    }

    /// Stops the threads; returns when they have closed everything.
    pub(super) fn stop(&self) {
        for thread in &self.0 {
            thread.send(Command::Stop);
        }
        for thread in &self.0 {
            if let Some(handle) = thread.handle.lock().take()
                && handle.join().is_err()
            {
                tracing::error!("a data thread has panicked");
            }
        }
    }
}
