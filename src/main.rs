//! The `portpool` program: it turns arguments into one role or command, and
//! signals into its shutdown.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use portpool::{agent, client, connection, echo, forward, local, manifest, operator, telemetry};
use tokio::signal::unix::{SignalKind, signal};

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

Exit codes: 0 done, 1 failed, 2 wrong input (nothing was started), 3 nothing is free now."
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
    let _logs = match telemetry::init(&cli.telemetry) {
        Ok(logs) => logs,
        Err(error) => {
            eprintln!("error: --log {:?}: {error}", cli.telemetry.log);
            return ExitCode::from(EXIT_BAD_INPUT);
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: failed to start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(cli.command, is_supervised));
    // A blocked read of standard input must not keep the program running.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            exit_code(&error)
        }
    }
}

/// `is_supervised`: whether `portpool local` runs this process.
async fn run(command: Command, is_supervised: bool) -> anyhow::Result<()> {
    match command {
        Command::Local(options) => local::run(options, interrupted()?).await?,
        Command::Request(options) => client::request(options).await?,
        Command::Connect(options) => client::connect(options, interrupted()?).await?,
        Command::Release(options) => client::release(options).await?,
        Command::Controller(options) => operator::run(options, interrupted()?).await?,
        Command::Crd => print!("{}", manifest::crd_yaml()),
        Command::ConnectionServer(options) => {
            connection::run(options, is_supervised, interrupted()?).await?
        }
        Command::ProcessingServer(options) => agent::run(options, interrupted()?).await?,
        Command::Echo(options) => echo::run(options, interrupted()?).await?,
        Command::RunProgram(_) => unreachable!("handled before the runtime starts"),
    }
    Ok(())
}

/// Completes at SIGTERM or Ctrl-C; a second one ends the process at once.
fn interrupted() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut either = async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(async move {
        either().await;
        tokio::spawn(async move {
            either().await;
            std::process::exit(130);
        });
    })
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    use client::CommandError;
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
