//! The `portpool` program: it turns arguments into one role or command, and
//! signals into its shutdown.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use portpool::client::CommandError;
use portpool::signals::Signals;
use portpool::{agent, client, connection, echo, forward, local, manifest, operator, telemetry};
use tokio::io::AsyncWriteExt;
use tokio::runtime::{Builder, Runtime};

/// Gives a client its own port on its own server for a while.
#[derive(Parser)]
#[command(
    version,
    about,
    max_term_width = 100,
    after_help = "\
Examples:
  portpool local -f examples/echo.yaml    run a pool on this machine
  portpool connect 127.0.0.1:7700         in another terminal: use a session of it

Exit codes: 0 done, 1 failed, 2 wrong input (nothing was started), 3 nothing is free now,
129, 130 and 143 interrupted by SIGHUP, SIGINT and SIGTERM. A second signal ends every command at once."
)]
struct Cli {
    #[command(flatten)]
    telemetry: telemetry::Options,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Local(local::Options),
    Request(client::RequestOptions),
    Connect(client::ConnectOptions),
    Release(client::ReleaseOptions),
    Controller(operator::Options),
    /// Prints the custom resource definition of ProcessingPool (YAML), for kubectl apply -f -
    Crd,
    ConnectionServer(connection::Options),
    ProcessingServer(agent::Options),
    Echo(echo::Options),
    #[command(hide = true)]
    RunProgram(local::supervise::RunProgram),
}

/// The input cannot be used; nothing was started.
const EXIT_BAD_INPUT: u8 = 2;

/// Nothing is free now; a later try may succeed.
const EXIT_EXHAUSTED: u8 = 3;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Before there are threads: the kernel ties a child to the thread of its parent.
    if let Command::RunProgram(options) = &cli.command {
        return local::supervise::run_program(options);
    }
    let is_supervised = local::supervise::die_with_parent();
    if let Command::ConnectionServer(_) = &cli.command {
        forward::reserve_file_table();
    }
    let logs = match telemetry::init(&cli.telemetry) {
        Ok(logs) => logs,
        Err(error) => {
            eprintln!("error: --log {:?}: {error}", cli.telemetry.log);
            return ExitCode::from(EXIT_BAD_INPUT);
        }
    };
    let started = Signals::handle().and_then(|signals| Ok((signals, runtime(&cli.command)?)));
    let (signals, runtime) = match started {
        Ok(started) => started,
        Err(error) => {
            logs.say(&format!("error: failed to start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        tokio::select! {
            result = run(cli.command, is_supervised, &signals) => result,
            // What was running is dropped, and cleans up.
            () = signals.second() => Err(CommandError::Interrupted.into()),
        }
    });
    // A blocked read of standard input must not keep the program running.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_interruption(&error) => signals.exit_code(),
        Err(error) => {
            logs.say(&format!("error: {error}"));
            exit_code(&error)
        }
    }
}

/// An agent has one thread: it does a little for each message, and many agents
/// share a machine. More threads would wake one another for each message.
fn runtime(command: &Command) -> std::io::Result<Runtime> {
    let mut builder = if let Command::ProcessingServer(_) = command {
        Builder::new_current_thread()
    } else {
        Builder::new_multi_thread()
    };
    builder.enable_all().build()
}

/// `is_supervised`: whether `portpool local` runs this process.
async fn run(command: Command, is_supervised: bool, signals: &Signals) -> anyhow::Result<()> {
    let interrupt = signals.first();
    match command {
        Command::Local(options) => local::run(options, interrupt).await?,
        Command::Request(options) => unless(interrupt, client::request(options)).await?,
        Command::Connect(options) => client::connect(options, interrupt).await?,
        Command::Release(options) => unless(interrupt, client::release(options)).await?,
        Command::Controller(options) => operator::run(options, interrupt).await?,
        Command::Crd => unless(interrupt, print(&manifest::crd_yaml())).await?,
        Command::ConnectionServer(options) => {
            connection::run(options, is_supervised, interrupt).await?
        }
        Command::ProcessingServer(options) => agent::run(options, interrupt).await?,
        Command::Echo(options) => echo::run(options, interrupt).await?,
        Command::RunProgram(_) => unreachable!("handled before the runtime starts"),
    }
    Ok(())
}

/// What `work` gives, unless `interrupt` comes first.
async fn unless<E>(
    interrupt: impl Future<Output = ()>,
    work: impl Future<Output = Result<(), E>>,
) -> anyhow::Result<()>
where
    anyhow::Error: From<E>,
{
    tokio::select! {
        done = work => Ok(done?),
        () = interrupt => Err(CommandError::Interrupted.into()),
    }
}

async fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = tokio::io::stdout();
    stdout.write_all(text.as_bytes()).await?;
    stdout.flush().await
}

fn is_interruption(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(CommandError::Interrupted))
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<CommandError>() {
        Some(CommandError::Client(error)) if error.is_exhausted() => ExitCode::from(EXIT_EXHAUSTED),
        Some(error) if error.is_bad_input() => ExitCode::from(EXIT_BAD_INPUT),
        Some(_) => ExitCode::FAILURE,
        None if error.downcast_ref().is_some_and(local::Error::is_bad_input) => {
            ExitCode::from(EXIT_BAD_INPUT)
        }
        None => ExitCode::FAILURE,
    }
}
