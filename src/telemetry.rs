//! Structured logs to standard error, and what the program says there at its end.
//!
//! A thread of its own writes them, because a reader that is slow or has stopped
//! must not hold up connections, signals or the end of the program. Lines that do
//! not fit into its queue are dropped and counted.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use tracing::error;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Most lines that wait to be written: a few megabytes.
const QUEUE_LINES: usize = 16 * 1024;

/// How long the end of the program may wait until the queued lines are written.
const FLUSH_LIMIT: Duration = Duration::from_millis(300);

/// How logs are written.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Log filter: a level, or `target=level,…`
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "PORTPOOL_LOG",
        default_value = "info"
    )]
    pub log: String,

    /// Shape of log lines
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        env = "PORTPOOL_LOG_FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,
}

/// Shapes of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The running log. Dropping it writes the lines that are queued, unless their
/// reader has stopped.
#[derive(Debug)]
pub struct Logs {
    writer: NonBlocking,
    worker: Option<WorkerGuard>,
}

/// Starts logging.
///
/// # Errors
/// The part of the filter that does not parse.
pub fn init(options: &Options) -> Result<Logs, tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(&options.log)?;
    let counter = Arc::default();
    let (writer, worker) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUE_LINES)
        .finish(StandardError {
            counter: Arc::clone(&counter),
            reported: 0,
        });
    // It is set only here.
    let _ = counter.set(writer.error_counter());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer.clone())
        .with_ansi(io::stderr().is_terminal());
    match options.log_format {
        LogFormat::Text => logs.init(),
        // Spans do not nest here: the innermost has all fields.
        LogFormat::Json => logs.json().with_span_list(false).init(),
    }
    Ok(Logs {
        writer,
        worker: Some(worker),
    })
}

impl Logs {
    /// Writes `line` as it is, after the lines that are queued.
    pub fn say(&self, line: &str) {
        // It never fails: a line that does not fit is dropped.
        let _ = self
            .writer
            .clone()
            .write_all(format!("{line}\n").as_bytes());
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        let worker = self.worker.take();
        let (writing, written) = mpsc::channel::<()>();
        // Dropping the worker may wait for longer, and may itself write.
        let flush = move || {
            drop(worker);
            drop(writing);
        };
        if thread::Builder::new().spawn(flush).is_ok() {
            let _ = written.recv_timeout(FLUSH_LIMIT);
        }
    }
}

/// Standard error, as the log's thread writes to it. It reports dropped lines
/// once their reader goes on.
struct StandardError {
    counter: Arc<OnceLock<ErrorCounter>>,
    /// How many dropped lines were reported.
    reported: usize,
}

impl Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        io::stderr().write_all(line)?;
        let dropped = self.counter.get().map_or(0, ErrorCounter::dropped_lines);
        let lines = dropped - self.reported;
        if lines > 0 {
            self.reported = dropped;
            error!(
                lines,
                "log lines were dropped, because standard error was not read in time"
            );
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
