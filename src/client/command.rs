//! The commands `portpool request`, `connect` and `release`.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, stderr, stdin, stdout};
use tokio::net::{TcpStream, UdpSocket};
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

/// How long an interrupted command may take to give its session back.
const GIVE_BACK_TIME: Duration = Duration::from_millis(500);

/// How long the line that says where a command is connected may take. A reader
/// that has stopped must not hold up the connection.
const SAY_TIME: Duration = Duration::from_millis(200);

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
  portpool request 127.0.0.1:7700 -o wide               and the id, for portpool release
  portpool request 127.0.0.1:7700 -o json               with server and deadline
  portpool request 127.0.0.1:7700 --wait 30             wait when nothing is free
  nc $(portpool request 127.0.0.1:7700 | tr : ' ')      and connect to it

Exit codes: 0 done, 1 failed, 2 wrong input, 3 nothing is free now, 130 and 143 interrupted.")]
pub struct RequestOptions {
    #[command(flatten)]
    ask: AskOptions,

    /// text: HOST:PORT; wide: HOST:PORT and the session's id; json: the whole session
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Wide,
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

Exit codes: 0 done, 1 failed, 2 wrong input, 3 nothing is free now, 130 and 143 interrupted.")]
pub struct ConnectOptions {
    #[command(flatten)]
    ask: AskOptions,

    /// Ask for a port that forwards UDP, and send each chunk of input as a datagram; without it, TCP
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
  portpool request 127.0.0.1:7700 -o wide               prints HOST:PORT ID
  portpool release 127.0.0.1:7700 ID

Exit codes: 0 done, 1 failed, 2 wrong input, 130 and 143 interrupted.")]
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
    /// `--udp` and `--protocol TCP` do not go together.
    #[error("--udp needs a port that forwards UDP: leave out --protocol TCP")]
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
            Self::Protocol => true,
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
    let wanted = (&options.ask).into();
    let session = ask(&client, wanted, options.ask.retry_seconds).await?;
    let line = match options.output {
        Output::Text => endpoint(&session),
        Output::Wide => format!("{} {}", endpoint(&session), session.id),
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
    let protocol = options.protocol()?;
    let wanted = SessionRequest {
        protocol: Some(protocol),
        ..SessionRequest::from(&options.ask)
    };
    tokio::pin!(interrupt);
    let session = tokio::select! {
        session = ask(&client, wanted, options.ask.retry_seconds) => session?,
        () = &mut interrupt => return Err(CommandError::Interrupted),
    };
    let used = tokio::select! {
        used = talk(&client, &session, &options) => used,
        () = &mut interrupt => Err(CommandError::Interrupted),
    };
    // Best effort: the session may be over already.
    let give_back = client.release(&session.id);
    if matches!(used, Err(CommandError::Interrupted)) {
        let _ = timeout(GIVE_BACK_TIME, give_back).await;
        return used;
    }
    tokio::select! {
        _ = give_back => {}
        () = &mut interrupt => {}
    }
    used
}

impl ConnectOptions {
    fn is_udp(&self) -> bool {
        self.udp || self.ask.protocol == Some(PortProtocol::UDP)
    }

    /// The protocol that the port has to forward.
    fn protocol(&self) -> Result<PortProtocol, CommandError> {
        match self.ask.protocol {
            Some(PortProtocol::TCP) if self.udp => Err(CommandError::Protocol),
            Some(protocol) => Ok(protocol),
            None if self.udp => Ok(PortProtocol::UDP),
            None => Ok(PortProtocol::TCP),
        }
    }
}

/// A way to the processing server.
enum Connection {
    Stream(TcpStream),
    Datagrams(UdpSocket),
}

/// Connects, says so, and pipes, or compares the answer with the expected one.
async fn talk(
    client: &Client,
    session: &Session,
    options: &ConnectOptions,
) -> Result<(), CommandError> {
    let connection = if options.is_udp() {
        Connection::Datagrams(client.connect_udp(session).await?)
    } else {
        Connection::Stream(client.connect(session).await?)
    };
    say_connected(session).await;
    let expected = options.send.as_deref().zip(options.expect.as_deref());
    match (connection, expected) {
        (connection, Some((text, expected))) => expect(session, connection, text, expected).await,
        (Connection::Stream(stream), None) => pipe_stream(stream).await,
        (Connection::Datagrams(socket), None) => pipe_datagrams(&socket).await,
    }
}

async fn say_connected(session: &Session) {
    let line = format!("connected to {} on {}\n", session.server, endpoint(session));
    let mut stderr = stderr();
    let say = async {
        stderr.write_all(line.as_bytes()).await?;
        stderr.flush().await
    };
    // Without a reader of the line, the connection is no worse.
    let _ = timeout(SAY_TIME, say).await;
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
    session: &Session,
    connection: Connection,
    text: &str,
    expected: &str,
) -> Result<(), CommandError> {
    let (length, mut got) = (expected.len(), Vec::new());
    let exchange = async {
        match connection {
            Connection::Stream(stream) => exchange_stream(stream, text, length, &mut got).await,
            Connection::Datagrams(socket) => {
                exchange_datagrams(&socket, text, length, &mut got).await
            }
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
    mut stream: TcpStream,
    text: &str,
    length: usize,
    got: &mut Vec<u8>,
) -> io::Result<()> {
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
    socket: &UdpSocket,
    text: &str,
    length: usize,
    got: &mut Vec<u8>,
) -> io::Result<()> {
    let mut reply = vec![0; 65_535];
    while got.len() < length {
        socket.send(text.as_bytes()).await?;
        if let Ok(received) = timeout(DATAGRAM_TIME, socket.recv(&mut reply)).await {
            got.extend_from_slice(&reply[..received?]);
        }
    }
    Ok(())
}

async fn pipe_stream(stream: TcpStream) -> Result<(), CommandError> {
    let (mut from_server, mut to_server) = stream.into_split();
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

async fn pipe_datagrams(socket: &UdpSocket) -> Result<(), CommandError> {
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
