//! Structured logs to standard error.
//!
//! A thread of their own writes them: a reader of the log that stands still
//! must not hold up connections. What does not fit into its queue is dropped.

use std::io::IsTerminal;

use tracing_appender::non_blocking::{NonBlocking, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// How logs are written.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// What is logged: a level, or `target=level,…`
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "PORTPOOL_LOG",
        default_value = "info"
    )]
    pub log: String,

    /// How log lines look
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
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging; what is queued is written when the result is dropped.
///
/// # Errors
/// When the filter is not one, naming the part.
pub fn init(options: &Options) -> Result<WorkerGuard, tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(&options.log)?;
    let (writer, guard) = NonBlocking::new(std::io::stderr());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal());
    match options.log_format {
        LogFormat::Text => logs.init(),
        // Spans do not nest here: the innermost says it all.
        LogFormat::Json => logs.json().with_span_list(false).init(),
    }
    Ok(guard)
}
