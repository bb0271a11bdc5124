//! How programs end: every command, in every state that may hold it up, ends
//! within a second of SIGINT or SIGTERM or says what it waits for; a second signal
//! ends it at once; nothing is left; and nothing waits for a reader of its output.

use rustix::process::Signal;

mod commands;
mod controllers;
mod program;
mod roles;
mod whole_pool;

/// The signals, with the code of a command that one of them interrupts.
const SIGNALS: [(Signal, i32); 2] = [(Signal::INT, 130), (Signal::TERM, 143)];
