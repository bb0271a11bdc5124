//! The commands `portpool request`, `connect` and `release`; `connect` has what
//! happens on a connection.

mod connect;

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, stdout};
use tokio::time::{Instant, sleep};

use self::connect::ANSWER_TIME;
pub use self::connect::{ConnectOptions, connect};
use super::{Client, ClientError, endpoint};
use crate::pool::{ClientBinding, PortProtocol};
use crate::session::{Metadata, MetadataError, PortRequest, Session, SessionRequest};

/// Pause before a request that was waiting is sent to the next connection server.
const UPGRADE_PAUSE: Duration = Duration::from_millis(200);

/// Pause before the next request under `--retry-seconds`.
const ASK_PAUSE: Duration = Duration::from_secs(1);

/// The wanted session.
#[derive(clap::Args, Clone, Debug)]
pub struct AskOptions {
    /// The pool's load-sharing port: HOST:PORT or http://HOST:PORT
    #[arg(value_name = "ADDRESS")]
    pub address: String,

    /// Only ports of the port entry with this name
    #[arg(long, value_name = "NAME")]
    pub port_name: Option<String>,

    /// Only ports that forward this protocol: TCP, UDP or TCPUDP
    #[arg(long, value_name = "PROTOCOL", value_parser = parse_protocol)]
    pub protocol: Option<PortProtocol>,

    /// Only ports of the processing server with this name
    #[arg(long, value_name = "NAME", conflicts_with = "near")]
    pub server: Option<String>,

    /// Only ports of the processing server that has the live session with this id
    #[arg(long, value_name = "ID")]
    pub near: Option<String>,

    /// Several ports in one session, once for each entry: NAME, NAME/PROTOCOL, and :COUNT for adjacent ones
    #[arg(long = "port", value_name = "NAME[/PROTOCOL][:COUNT]", value_parser = parse_port, conflicts_with_all = ["port_name", "protocol"])]
    pub ports: Vec<PortRequest>,

    /// Prefer the server of this key, if the pool has the AffinityHash policy
    #[arg(long, value_name = "KEY")]
    pub affinity_key: Option<String>,

    /// Return the live session of an earlier request with the same key [default: a new session]
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,

    /// Let only this machine's address connect
    #[arg(long)]
    pub bind_to_me: bool,

    /// A string for the workload; once for each of up to 64 keys, 4096 bytes altogether
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_metadata)]
    pub metadata: Vec<(String, String)>,

    /// When nothing is free, wait this long in the queue: 0 to 300
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub wait: u32,

    /// Ask again for this long while no server answers or nothing is free
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub retry_seconds: u32,
}

fn parse_protocol(text: &str) -> Result<PortProtocol, String> {
    PortProtocol::from_name(&text.to_ascii_uppercase())
        .ok_or_else(|| "give TCP, UDP or TCPUDP".to_owned())
}

/// A port as `--port` names it; `*` stands for any name.
fn parse_port(text: &str) -> Result<PortRequest, String> {
    let (entry, count) = match text.split_once(':') {
        Some((entry, count)) => (entry, count.parse().ok().filter(|count| *count > 0)),
        None => (text, Some(1)),
    };
    let (name, protocol) = match entry.split_once('/') {
        Some((name, protocol)) => (name, Some(parse_protocol(protocol)?)),
        None => (entry, None),
    };
    let count = count.ok_or("the count after the colon must be a number from 1 on")?;
    if name.is_empty() {
        return Err("give the name of a port entry, or * for any".to_owned());
    }
    Ok(PortRequest {
        port_name: (name != "*").then(|| name.to_owned()),
        protocol,
        count,
    })
}

/// A key and its value as `--metadata` gives them.
fn parse_metadata(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("give KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl AskOptions {
    /// The request that they describe.
    ///
    /// # Errors
    /// When the metadata is too large, or has a key twice.
    fn wanted(&self) -> Result<SessionRequest, CommandError> {
        let mut keys = BTreeSet::new();
        if let Some((key, _)) = self.metadata.iter().find(|(key, _)| !keys.insert(key)) {
            return Err(CommandError::MetadataTwice(key.clone()));
        }
        Ok(SessionRequest {
            idempotency_key: self.idempotency_key.clone(),
            protocol: self.protocol,
            port_name: self.port_name.clone(),
            server: self.server.clone(),
            near: self.near.clone(),
            ports: (!self.ports.is_empty()).then(|| self.ports.clone()),
            affinity_key: self.affinity_key.clone(),
            client_binding: self.bind_to_me.then_some(ClientBinding::Requester),
            metadata: Metadata::new(self.metadata.iter().cloned())?,
            wait_seconds: self.wait,
        })
    }
}

/// Asks for a session and prints where to connect.
///
/// The port is yours until you give it back (portpool release), miss its claim
/// deadline, or have no connection for the pool's linger time.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  portpool request 127.0.0.1:7700                       prints HOST:PORT
  portpool request 127.0.0.1:7700 -o wide               and the id, for portpool release
  portpool request 127.0.0.1:7700 -o json               with server and deadline
  portpool request 127.0.0.1:7700 --wait 30             wait when nothing is free
  portpool request 127.0.0.1:7700 --port rtp:2 --port control
                                                        several ports: a line NAME HOST:PORT for each
  portpool request 127.0.0.1:7700 --metadata map=harbor --metadata player=ada
                                                        strings that the workload sees
  nc $(portpool request 127.0.0.1:7700 | tr : ' ')      and connect to it

Exit codes: 0 done, 1 failed, 2 wrong input, 3 nothing is free now, 129, 130 and 143 interrupted.")]
pub struct RequestOptions {
    #[command(flatten)]
    ask: AskOptions,

    /// text: HOST:PORT, after NAME with --port; wide: and the session's id; json: the whole session
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Wide,
    Json,
}

/// Gives a session back: its connections are cut and its port becomes free.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Example:
  portpool request 127.0.0.1:7700 -o wide               prints HOST:PORT ID
  portpool release 127.0.0.1:7700 ID

Exit codes: 0 done, 1 failed, 2 wrong input, 129, 130 and 143 interrupted.")]
pub struct ReleaseOptions {
    /// The pool's load-sharing port: HOST:PORT or http://HOST:PORT
    #[arg(value_name = "ADDRESS")]
    address: String,

    /// The session's id, as portpool request -o wide prints it
    #[arg(value_name = "ID")]
    id: String,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Asking or connecting failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// `--to` names an entry that no `--port` asks for.
    #[error("no port of the session has the name {0:?} that --to gives: ask for it with --port")]
    NoSuchPort(String),
    /// The metadata is too large.
    #[error("--{0}")]
    Metadata(#[from] MetadataError),
    /// The metadata has a key twice.
    #[error("--metadata gives the key {0:?} twice: each key has one value")]
    MetadataTwice(String),
    /// `--udp` and a port that forwards TCP only do not go together.
    #[error("--udp needs a port that forwards UDP: leave out --udp, or ask for another port")]
    Protocol,
    /// A signal came before the end.
    #[error("interrupted")]
    Interrupted,
    /// The connection or a standard stream broke.
    #[error("connection broke: {0}")]
    Broken(#[from] io::Error),
    /// The answer does not begin with what `--expect` names.
    #[error("{server} answered {got:?} within {} s, not {expected:?}", ANSWER_TIME.as_secs())]
    Answer {
        /// The processing server.
        server: String,
        /// Expected beginning of the answer.
        expected: String,
        /// Received part of the answer.
        got: String,
    },
}

impl CommandError {
    /// Whether the arguments are at fault.
    #[must_use]
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Client(error) => error.is_bad_input(),
            Self::Protocol | Self::NoSuchPort(_) | Self::Metadata(_) | Self::MetadataTwice(_) => {
                true
            }
            Self::Interrupted | Self::Broken(_) | Self::Answer { .. } => false,
        }
    }
}

/// Asks for a session, for as long as `--retry-seconds` says. A request that waits
/// goes on waiting when its connection server is replaced.
async fn ask(
    client: &Client,
    mut wanted: SessionRequest,
    retry_seconds: u32,
) -> Result<Session, ClientError> {
    let started = Instant::now();
    let deadline = started + Duration::from_secs(retry_seconds.into());
    let wait_until = started + Duration::from_secs(wanted.wait_seconds.into());
    loop {
        let now = Instant::now;
        match client.request(wanted.clone()).await {
            Err(error) if error.is_shutting_down() && now() < wait_until => {
                sleep(UPGRADE_PAUSE).await;
                let left = wait_until.saturating_duration_since(now()).as_secs();
                wanted.wait_seconds = u32::try_from(left).unwrap_or(u32::MAX);
            }
            Err(error) if error.may_pass() && now() < deadline => {
                tracing::info!(%error, "no session yet");
                sleep(ASK_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// `portpool request`.
///
/// # Errors
/// [`CommandError`].
pub async fn request(options: RequestOptions) -> Result<(), CommandError> {
    let client = Client::new(&options.ask.address)?;
    let wanted = options.ask.wanted()?;
    let session = ask(&client, wanted, options.ask.retry_seconds).await?;
    let line = |session: &Session| match options.output {
        Output::Wide => format!("{} {}", endpoint(session), session.id),
        Output::Text | Output::Json => endpoint(session),
    };
    let text = if options.output == Output::Json {
        serde_json::to_string_pretty(&session).map_err(io::Error::other)?
    } else if options.ask.ports.is_empty() {
        line(&session)
    } else {
        let ports = session.ports.iter();
        let lines = ports.map(|port| format!("{} {}", port.port_name, line(&session.at(port))));
        lines.collect::<Vec<_>>().join("\n")
    };
    let mut stdout = stdout();
    stdout.write_all(format!("{text}\n").as_bytes()).await?;
    Ok(stdout.flush().await?)
}

/// `portpool release`.
///
/// # Errors
/// [`CommandError`].
pub async fn release(options: ReleaseOptions) -> Result<(), CommandError> {
    Ok(Client::new(&options.address)?.release(&options.id).await?)
}
