//! The commands `portpool request`, `connect` and `release`.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, stdin, stdout};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep, timeout};

use super::{Client, ClientError, endpoint};
use crate::pool::{ClientBinding, PortProtocol};
use crate::session::{Session, SessionRequest};

/// How long `portpool connect --udp` waits for replies after its input ends.
const LAST_REPLIES: Duration = Duration::from_secs(1);

/// How long the answer that `--expect` names may take.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// How long to wait for the answer to a datagram before it is sent again.
const DATAGRAM_TIME: Duration = Duration::from_secs(1);

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

    /// Prefer the server of this key, if the pool has the AffinityHash policy
    #[arg(long, value_name = "KEY")]
    pub affinity_key: Option<String>,

    /// Return the live session of an earlier request with the same key [default: a new session]
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,

    /// Let only this machine's address connect
    #[arg(long)]
    pub bind_to_me: bool,

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

impl From<&AskOptions> for SessionRequest {
    fn from(options: &AskOptions) -> Self {
        Self {
            idempotency_key: options.idempotency_key.clone(),
            protocol: options.protocol,
            port_name: options.port_name.clone(),
            affinity_key: options.affinity_key.clone(),
            client_binding: options.bind_to_me.then_some(ClientBinding::Requester),
            wait_seconds: options.wait,
        }
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
  portpool request 127.0.0.1:7700 -o json               with id, server and deadline
  portpool request 127.0.0.1:7700 --wait 30             wait when nothing is free
  nc $(portpool request 127.0.0.1:7700 | tr : ' ')      and connect to it

Exit codes: 0 done, 1 failed, 2 wrong input, 3 nothing is free now.")]
pub struct RequestOptions {
    #[command(flatten)]
    ask: AskOptions,

    /// text: HOST:PORT; json: the whole session
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Asks for a session, connects, and pipes standard input and output; gives
/// the session back at the end.
///
/// At the end of the input, the server sees the end too, and the rest of its
/// answer is still printed.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  echo hello | portpool connect 127.0.0.1:7700
  echo hello | portpool connect 127.0.0.1:7700 --udp
  portpool connect 127.0.0.1:7700 --port-name shell     only ports of that entry

Exit codes: 0 done, 1 failed, 2 wrong input, 3 nothing is free now.")]
pub struct ConnectOptions {
    #[command(flatten)]
    ask: AskOptions,

    /// Send each chunk of input as a UDP datagram
    #[arg(long)]
    udp: bool,

    /// Send this instead of standard input; for scripts, with --expect
    #[arg(long, value_name = "TEXT", requires = "expect")]
    send: Option<String>,

    /// Fail unless the answer within 5 s begins with this
    #[arg(long, value_name = "TEXT", requires = "send")]
    expect: Option<String>,
}

/// Gives a session back: its connections are cut and its port becomes free.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Example:
  portpool release 127.0.0.1:7700 $(portpool request 127.0.0.1:7700 -o json | jq -r .id)")]
pub struct ReleaseOptions {
    /// The pool's load-sharing port: HOST:PORT or http://HOST:PORT
    #[arg(value_name = "ADDRESS")]
    address: String,

    /// The session's id
    #[arg(value_name = "ID")]
    id: String,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Asking or connecting failed.
    #[error(transparent)]
    Client(#[from] ClientError),
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

/// Asks for a session, for as long as `--retry-seconds` says.
async fn ask(
    client: &Client,
    wanted: SessionRequest,
    retry_seconds: u32,
) -> Result<Session, ClientError> {
    let deadline = Instant::now() + Duration::from_secs(retry_seconds.into());
    loop {
        match client.request(wanted.clone()).await {
            Err(error) if error.may_pass() && Instant::now() < deadline => {
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
    let wanted = (&options.ask).into();
    let session = ask(&client, wanted, options.ask.retry_seconds).await?;
    let line = match options.output {
        Output::Text => endpoint(&session),
        Output::Json => serde_json::to_string_pretty(&session).map_err(io::Error::other)?,
    };
    let mut stdout = stdout();
    stdout.write_all(format!("{line}\n").as_bytes()).await?;
    Ok(stdout.flush().await?)
}

/// `portpool connect`: until the server ends the connection, or `interrupt`.
///
/// # Errors
/// [`CommandError`].
pub async fn connect(
    options: ConnectOptions,
    interrupt: impl Future<Output = ()>,
) -> Result<(), CommandError> {
    let client = Client::new(&options.ask.address)?;
    let mut wanted = SessionRequest::from(&options.ask);
    if options.udp {
        wanted.protocol.get_or_insert(PortProtocol::UDP);
    }
    let session = ask(&client, wanted, options.ask.retry_seconds).await?;
    eprintln!("connected to {} on {}", session.server, endpoint(&session));
    let expected = options.send.as_deref().zip(options.expect.as_deref());
    let piping = async {
        match (expected, options.udp) {
            (Some((text, expected)), udp) => expect(&client, &session, udp, text, expected).await,
            (None, true) => pipe_datagrams(&session).await,
            (None, false) => pipe_stream(&client, &session).await,
        }
    };
    let piped = tokio::select! {
        piped = piping => piped,
        () = interrupt => Ok(()),
    };
    // Best effort: the session may be over already.
    let _ = client.release(&session.id).await;
    piped
}

/// `portpool release`.
///
/// # Errors
/// [`CommandError`].
pub async fn release(options: ReleaseOptions) -> Result<(), CommandError> {
    Ok(Client::new(&options.address)?.release(&options.id).await?)
}

/// Sends `text`; the answer has to begin with `expected`.
async fn expect(
    client: &Client,
    session: &Session,
    udp: bool,
    text: &str,
    expected: &str,
) -> Result<(), CommandError> {
    let mut got = Vec::new();
    let exchange = async {
        if udp {
            exchange_datagrams(session, text, expected.len(), &mut got).await
        } else {
            exchange_stream(client, session, text, expected.len(), &mut got).await
        }
    };
    // After a timeout, the part that has arrived is compared.
    if let Ok(exchanged) = timeout(ANSWER_TIME, exchange).await {
        exchanged?;
    }
    let answer = String::from_utf8_lossy(&got);
    if !answer.starts_with(expected) {
        return Err(CommandError::Answer {
            server: session.server.clone(),
            expected: expected.to_owned(),
            got: answer.into_owned(),
        });
    }
    let mut stdout = stdout();
    stdout.write_all(format!("{answer}\n").as_bytes()).await?;
    Ok(stdout.flush().await?)
}

/// Sends `text` and adds `length` bytes of the answer to `got`, or fewer when
/// the server ends the connection.
async fn exchange_stream(
    client: &Client,
    session: &Session,
    text: &str,
    length: usize,
    got: &mut Vec<u8>,
) -> Result<(), CommandError> {
    let mut stream = client.connect(session).await?;
    stream.write_all(text.as_bytes()).await?;
    let mut chunk = [0; 4096];
    while got.len() < length {
        match stream.read(&mut chunk).await? {
            0 => break,
            read => got.extend_from_slice(&chunk[..read]),
        }
    }
    Ok(())
}

/// Sends `text` as a datagram, repeats it until a reply arrives, and adds
/// `length` bytes of the answer to `got`.
async fn exchange_datagrams(
    session: &Session,
    text: &str,
    length: usize,
    got: &mut Vec<u8>,
) -> Result<(), CommandError> {
    let socket = udp_socket(session).await?;
    let mut reply = vec![0; 65_535];
    while got.len() < length {
        socket.send(text.as_bytes()).await?;
        if let Ok(received) = timeout(DATAGRAM_TIME, socket.recv(&mut reply)).await {
            got.extend_from_slice(&reply[..received?]);
        }
    }
    Ok(())
}

/// A socket that talks to the session's connection port only.
async fn udp_socket(session: &Session) -> io::Result<UdpSocket> {
    let any = if session.address.contains(':') {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    let socket = UdpSocket::bind(any).await?;
    let peer = (session.address.as_str(), session.port);
    socket.connect(peer).await?;
    Ok(socket)
}

async fn pipe_stream(client: &Client, session: &Session) -> Result<(), CommandError> {
    let (mut from_server, mut to_server) = client.connect(session).await?.into_split();
    let upload = async {
        tokio::io::copy(&mut stdin(), &mut to_server).await?;
        // The server sees the end of our input and may still answer.
        to_server.shutdown().await
    };
    let download = async {
        let mut stdout = stdout();
        tokio::io::copy(&mut from_server, &mut stdout).await?;
        stdout.flush().await
    };
    tokio::pin!(upload, download);
    // The end of the server's answer ends the command, even with input left.
    tokio::select! {
        downloaded = &mut download => Ok(downloaded?),
        uploaded = &mut upload => {
            uploaded?;
            Ok(download.await?)
        }
    }
}

async fn pipe_datagrams(session: &Session) -> Result<(), CommandError> {
    let socket = udp_socket(session).await?;
    let mut stdout = stdout();
    let mut stdin = stdin();
    let (mut chunk, mut reply) = (vec![0; 65_507], vec![0; 65_535]);
    loop {
        tokio::select! {
            read = stdin.read(&mut chunk) => match read? {
                0 => break,
                length => { socket.send(&chunk[..length]).await?; }
            },
            received = socket.recv(&mut reply) => {
                stdout.write_all(&reply[..received?]).await?;
                stdout.flush().await?;
            }
        }
    }
    while let Ok(received) = timeout(LAST_REPLIES, socket.recv(&mut reply)).await {
        stdout.write_all(&reply[..received?]).await?;
        stdout.flush().await?;
    }
    Ok(())
}
