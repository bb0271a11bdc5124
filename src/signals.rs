//! SIGINT, SIGTERM and SIGHUP: the first one asks the program to end, the second
//! one ends it at once. SIGHUP comes when the terminal is closed; a program that
//! nohup has started ignores it.
//!
//! A thread of its own receives them, so that work which blocks cannot hold them
//! up. Handlers are set for every command, because the kernel ignores a signal
//! without one for the first process of a container.

use std::io;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator;
use tokio::sync::watch;

/// How long the program may take to clean up after the second signal.
const CLEAN_UP: Duration = Duration::from_millis(500);

/// The signals that this process has received.
#[derive(Clone, Debug)]
pub struct Signals {
    received: watch::Receiver<Received>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Received {
    count: u32,
    /// Exit status of a program that the last signal ended.
    status: u8,
}

impl Signals {
    /// Handles the signals from now on. Must be called once.
    ///
    /// # Errors
    /// The system refuses a handler or the thread.
    pub fn handle() -> io::Result<Self> {
        let mut signals = iterator::Signals::new([SIGINT, SIGTERM])?;
        if !ignores_hangup() {
            signals.add_signal(SIGHUP)?;
        }
        let (sender, received) = watch::channel(Received::default());
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    sender.send_modify(|received| {
                        received.count += 1;
                        received.status = 128 + u8::try_from(signal).unwrap_or_default();
                    });
                    if sender.borrow().count > 1 {
                        thread::sleep(CLEAN_UP);
                        // Without the usual steps at an exit, which may block too.
                        signal_hook::low_level::exit(sender.borrow().status.into());
                    }
                }
            })?;
        Ok(Self { received })
    }

    /// Completes at the first signal.
    pub fn first(&self) -> impl Future<Output = ()> + Send + use<> {
        self.at(1)
    }

    /// Completes at the second signal.
    pub fn second(&self) -> impl Future<Output = ()> + Send + use<> {
        self.at(2)
    }

    fn at(&self, count: u32) -> impl Future<Output = ()> + Send + use<> {
        let mut received = self.received.clone();
        async move {
            if received
                .wait_for(|received| received.count >= count)
                .await
                .is_err()
            {
                // The thread has ended; it never does.
                std::future::pending().await
            }
        }
    }

    /// The exit code of a program that was interrupted: 129 after SIGHUP, 130 after
    /// SIGINT, 143 after SIGTERM.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        self.received.borrow().status.into()
    }
}

/// Whether this process was started with SIGHUP ignored. Where the kernel does not
/// tell, it was not.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let ignored = lines.find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 << (SIGHUP - 1) != 0)
}
