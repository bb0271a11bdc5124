//! Structured logs to standard error, and what the program says there at its end.
//!
//! A reader that is slow or has stopped holds up neither connections nor signals
//! nor the end of the program: see `output`.

use std::io::{self, IsTerminal, Write};

use tracing::error;
use tracing_subscriber::EnvFilter;

use crate::output::{Output, Sink};

/// Most lines that wait to be written: a few megabytes.
const QUEUE_LINES: usize = 16 * 1024;

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
pub struct Logs(Output<Vec<u8>>);

/// Starts logging.
///
/// # Errors
/// The part of the filter that does not parse.
pub fn init(options: &Options) -> Result<Logs, tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(&options.log)?;
    let output = Output::new(QUEUE_LINES, StandardError);
    let lines = output.clone();
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || Line(lines.clone()))
        .with_ansi(io::stderr().is_terminal());
    match options.log_format {
        LogFormat::Text => logs.init(),
        // Spans do not nest here: the innermost has all fields.
        LogFormat::Json => logs.json().with_span_list(false).init(),
    }
    Ok(Logs(output))
}

impl Logs {
    /// Writes `line` as it is, after the lines that are queued.
    pub fn say(&self, line: &str) {
        self.0.send(format!("{line}\n").into_bytes());
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.0.flush();
    }
}

/// Queues what is written at once, which is a line.
struct Line(Output<Vec<u8>>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.send(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error. Dropped lines are reported once their reader goes on.
struct StandardError;

impl Sink for StandardError {
    type Item = Vec<u8>;

    fn write(&mut self, line: Vec<u8>) {
        // There is nowhere to report that it is closed.
        let _ = io::stderr().write_all(&line);
    }

    fn report_dropped(&mut self, lines: u64) {
        error!(
            lines,
            "log lines were dropped, because standard error was not read in time"
        );
    }
}
