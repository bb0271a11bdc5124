//! Output of `portpool local`: one line per event and, on a terminal, the
//! state of the pool below them, which is redrawn at every step.
//!
//! A reader that is slow or has stopped does not hold up the pool: see `output`.

use std::io::{IsTerminal, Write, stdout};

use super::readiness::is_ready;
use crate::output::{Output, Sink};
use crate::session::PoolState;

/// Most lines that wait to be written. One of a child has up to 4 KiB.
const QUEUE_LINES: usize = 1024;

/// Writer of events and state. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Events {
    is_live: bool,
    output: Output<Event>,
}

#[derive(Debug)]
enum Event {
    Line(String),
    /// Replaces the state on the screen.
    State(String),
}

impl Events {
    /// Draws the state if `live` is set and the output is a terminal.
    pub(super) fn new(live: bool) -> Self {
        Self {
            is_live: live && stdout().is_terminal(),
            output: Output::new(QUEUE_LINES, Screen::default()),
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
            self.output.send_unless_full(Event::State(table(state)));
        }
    }

    /// Removes the state from the screen.
    pub(super) fn clear(&self) {
        self.output.send_unless_full(Event::State(String::new()));
    }

    fn print(&self, line: String) {
        self.output.send(Event::Line(line));
    }

    /// Waits until everything is written, unless the reader has stopped.
    pub(super) fn flush(&self) {
        self.output.flush();
    }
}

/// What was written.
#[derive(Default)]
struct Screen {
    state: String,
    /// How many lines of the screen the state takes.
    lines: usize,
}

impl Sink for Screen {
    type Item = Event;

    fn write(&mut self, event: Event) {
        match event {
            Event::Line(line) => self.redraw(Some(&line)),
            Event::State(state) => {
                self.state = state;
                self.redraw(None);
            }
        }
    }

    fn report_dropped(&mut self, items: u64) {
        self.redraw(Some(&format!(
            "({items} lines were dropped, because this output was not read in time)"
        )));
    }
}

impl Screen {
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
            (true, false) if is_ready(server) => "ready",
            (true, false) => "not ready",
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
