//! Structured logs to standard error.

use std::io::IsTerminal;

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

/// Starts logging.
///
/// # Errors
/// When the filter is not one, naming the part.
pub fn init(options: &Options) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(&options.log)?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match options.log_format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}
