//! Output of `portpool local`: one line per event and, on a terminal, the
//! state of the pool below them, which is redrawn at every step.
//!
//! A thread of its own writes it, because a reader that is slow or has stopped
//! must not hold up the pool. Lines that do not fit into its queue are dropped
//! and counted.

use std::io::{IsTerminal, Write, stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::session::PoolState;

/// Most lines that wait to be written. One of a child has up to 4 KiB.
const QUEUE_LINES: usize = 1024;

/// How long the end of the pool may wait until the queued lines are written.
const FLUSH_LIMIT: Duration = Duration::from_millis(300);

/// Pause before the next try to flush a full queue.
const FLUSH_PAUSE: Duration = Duration::from_millis(10);

/// Writer of events and state. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Events {
    is_live: bool,
    queue: SyncSender<Output>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Output {
    Line(String),
    /// Replaces the state on the screen.
    State(String),
    /// Dropped when everything before it is written.
    Flush(Sender<()>),
}

impl Events {
    /// Draws the state if `live` is set and the output is a terminal.
    pub(super) fn new(live: bool) -> Self {
        let (queue, outputs) = sync_channel(QUEUE_LINES);
        let dropped = Arc::default();
        let screen = Screen {
            state: String::new(),
            lines: 0,
            dropped: Arc::clone(&dropped),
        };
        thread::spawn(move || screen.show(&outputs));
        Self {
            is_live: live && stdout().is_terminal(),
            queue,
            dropped,
        }
    }

    /// Prints `event` with the time.
    pub(super) fn say(&self, event: impl AsRef<str>) {
        let time = jiff::Zoned::now().strftime("%H:%M:%S").to_string();
        self.print(format!("{time} {}", printable(event.as_ref())));
    }

    /// Prints a line that a child has written.
    pub(super) fn output(&self, name: &str, line: &str) {
        self.print(format!("{name} | {}", printable(line)));
    }

    /// Draws `state` below the events.
    pub(super) fn draw(&self, state: &PoolState) {
        if self.is_live {
            // One that does not fit is followed by the next one.
            let _ = self.queue.try_send(Output::State(table(state)));
        }
    }

    /// Removes the state from the screen.
    pub(super) fn clear(&self) {
        let _ = self.queue.try_send(Output::State(String::new()));
    }

    fn print(&self, line: String) {
        if self.queue.try_send(Output::Line(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until everything is written, unless the reader has stopped.
    pub(super) fn flush(&self) {
        let deadline = Instant::now() + FLUSH_LIMIT;
        let (writing, written) = channel();
        let mut flush = Output::Flush(writing);
        while let Err(TrySendError::Full(unsent)) = self.queue.try_send(flush) {
            if Instant::now() > deadline {
                return;
            }
            flush = unsent;
            thread::sleep(FLUSH_PAUSE);
        }
        let _ = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

/// What the thread has written.
struct Screen {
    state: String,
    /// How many lines of the screen the state takes.
    lines: usize,
    dropped: Arc<AtomicU64>,
}

impl Screen {
    fn show(mut self, outputs: &Receiver<Output>) {
        for output in outputs {
            match output {
                Output::Line(line) => self.redraw(Some(&line)),
                Output::State(state) => {
                    self.state = state;
                    self.redraw(None);
                }
                Output::Flush(writing) => drop(writing),
            }
            let dropped = self.dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                self.redraw(Some(&format!(
                    "({dropped} lines were dropped, because this output was not read in time)"
                )));
            }
        }
    }

    /// Redraws the state at the bottom, with `line` above it.
    fn redraw(&mut self, line: Option<&str>) {
        let mut text = String::new();
        if self.lines > 0 {
            text.push_str(&format!("\x1b[{}A\x1b[J", self.lines));
        }
        if let Some(line) = line {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(&self.state);
        self.lines = self.state.lines().count();
        let mut out = stdout().lock();
        // A closed output must not end the pool.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

/// `text` without control characters, because a child must not move the cursor.
fn printable(text: &str) -> String {
    text.chars()
        .map(|letter| {
            if letter.is_control() && letter != '\t' {
                '·'
            } else {
                letter
            }
        })
        .collect()
}

fn table(state: &PoolState) -> String {
    let mut text = format!(
        "\n{:<20} {:<16} {:<10} {:>8} {:>6} {:>6} {:>6} {:>13}\n",
        "SERVER", "ADDRESS", "STATE", "SESSIONS", "FREE", "HELD", "BUSY", "NOT LISTENING"
    );
    for server in &state.servers {
        let status = match (server.attached, server.draining || server.spent) {
            (_, true) => "draining",
            (true, false) => "ready",
            (false, false) => "starting",
        };
        let sum = |count: fn(&crate::session::PortState) -> u32| {
            server.ports.iter().map(count).sum::<u32>()
        };
        text.push_str(&format!(
            "{:<20} {:<16} {status:<10} {:>8} {:>6} {:>6} {:>6} {:>13}\n",
            server.server,
            server.address.as_deref().unwrap_or("-"),
            server.sessions,
            sum(|ports| ports.free),
            sum(|ports| ports.held),
            sum(|ports| ports.busy),
            sum(|ports| ports.not_listening),
        ));
    }
    text
}
