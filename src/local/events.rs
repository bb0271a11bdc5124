//! Output of `portpool local`: one line per event and, on a terminal, the
//! state of the pool below them, which is redrawn at every step.

use std::io::{IsTerminal, Write, stdout};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::session::PoolState;

/// Writer of events and state. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Events {
    is_live: bool,
    shown: Arc<Mutex<Shown>>,
}

#[derive(Debug, Default)]
struct Shown {
    state: String,
    lines: usize,
}

impl Events {
    /// Draws the state if `live` is set and the output is a terminal.
    pub(super) fn new(live: bool) -> Self {
        Self {
            is_live: live && stdout().is_terminal(),
            shown: Arc::default(),
        }
    }

    /// Prints `event` with the time.
    pub(super) fn say(&self, event: impl AsRef<str>) {
        let time = jiff::Zoned::now().strftime("%H:%M:%S").to_string();
        self.print(&format!("{time} {}", printable(event.as_ref())));
    }

    /// Prints a line that a child has written.
    pub(super) fn output(&self, name: &str, line: &str) {
        self.print(&format!("{name} | {}", printable(line)));
    }

    /// Draws `state` below the events.
    pub(super) fn draw(&self, state: &PoolState) {
        if self.is_live {
            let mut shown = self.shown.lock();
            shown.state = table(state);
            redraw(&mut shown, None);
        }
    }

    /// Removes the state from the screen.
    pub(super) fn clear(&self) {
        let mut shown = self.shown.lock();
        shown.state.clear();
        redraw(&mut shown, None);
    }

    fn print(&self, line: &str) {
        redraw(&mut self.shown.lock(), Some(line));
    }
}

/// Redraws the state at the bottom, with `line` above it.
fn redraw(shown: &mut Shown, line: Option<&str>) {
    let mut text = String::new();
    if shown.lines > 0 {
        text.push_str(&format!("\x1b[{}A\x1b[J", shown.lines));
    }
    if let Some(line) = line {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(&shown.state);
    shown.lines = shown.state.lines().count();
    let mut out = stdout().lock();
    // A closed output must not end the pool.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
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
        let status = match (server.attached, server.draining) {
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
