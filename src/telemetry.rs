//! Structured logs to standard error.
//!
//! A separate thread writes them, because a slow reader of the log must not
//! hold up connections. Lines that do not fit into its queue are dropped.

use std::io::IsTerminal;

use tracing_appender::non_blocking::{NonBlocking, WorkerGuard};
use tracing_subscriber::EnvFilter;

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

/// Starts logging. Dropping the result writes the lines that are queued.
///
/// # Errors
/// The part of the filter that does not parse.
pub fn init(options: &Options) -> Result<WorkerGuard, tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(&options.log)?;
    let (writer, guard) = NonBlocking::new(std::io::stderr());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal());
    match options.log_format {
        LogFormat::Text => logs.init(),
        // Spans do not nest here: the innermost has all fields.
        LogFormat::Json => logs.json().with_span_list(false).init(),
    }
    Ok(guard)
}
