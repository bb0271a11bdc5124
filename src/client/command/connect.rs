//! The command `portpool connect`: connects to the port of a session and pipes,
//! or compares the answer with the expected one.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, stderr, stdin, stdout};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::{AskOptions, CommandError, ask};
use crate::client::{Client, endpoint};
use crate::pool::PortProtocol;
use crate::session::{PortRequest, Session};

/// How long `portpool connect --udp` waits for replies after its input ends.
const LAST_REPLIES: Duration = Duration::from_secs(1);

/// How long the answer that `--expect` names may take.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(5);

/// How long to wait for the answer to a datagram before it is sent again.
const DATAGRAM_TIME: Duration = Duration::from_secs(1);

/// How long an interrupted command may take to give its session back.
const GIVE_BACK_TIME: Duration = Duration::from_millis(500);

/// How long the line that says where a command is connected may take. A reader
/// that has stopped must not hold up the connection.
const SAY_TIME: Duration = Duration::from_millis(200);

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
  portpool connect 127.0.0.1:7700 --port rtp:2 --port control --to control

Exit codes: 0 done, 1 failed, 2 wrong input, 3 nothing is free now, 129, 130 and 143 interrupted.")]
pub struct ConnectOptions {
    #[command(flatten)]
    ask: AskOptions,

    /// Ask for a port that forwards UDP, and send each chunk of input as a datagram; without it, TCP
    #[arg(long)]
    udp: bool,

    /// Connect to the first port of this entry; without it, to the session's first port
    #[arg(long, value_name = "NAME", requires = "ports")]
    to: Option<String>,

    /// Send this instead of standard input; for scripts, with --expect
    #[arg(long, value_name = "TEXT", requires = "expect")]
    send: Option<String>,

    /// Fail unless the answer within 5 s begins with this
    #[arg(long, value_name = "TEXT", requires = "send")]
    expect: Option<String>,
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
    let mut wanted = options.ask.wanted()?;
    match &mut wanted.ports {
        Some(ports) => options.choose(ports)?,
        None => wanted.protocol = Some(options.protocol()?),
    }
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

    /// Checks that `ports` include the one to connect to, and asks for UDP there if
    /// datagrams are to be sent.
    fn choose(&self, ports: &mut [PortRequest]) -> Result<(), CommandError> {
        let name = self.to.as_ref();
        let is_any = ports.iter().any(|port| port.port_name.is_none());
        let mut ports = ports.iter_mut();
        let port = ports.find(|port| name.is_none() || port.port_name.as_ref() == name);
        match (port, name) {
            (Some(port), _) if self.udp => match port.protocol {
                Some(PortProtocol::TCP) => return Err(CommandError::Protocol),
                Some(_) => {}
                None => port.protocol = Some(PortProtocol::UDP),
            },
            (None, Some(name)) if !is_any => return Err(CommandError::NoSuchPort(name.clone())),
            _ => {}
        }
        Ok(())
    }

    /// The session with the port that `--to` names as its first.
    fn chosen(&self, session: &Session) -> Result<Session, CommandError> {
        let Some(name) = &self.to else {
            return Ok(session.clone());
        };
        let port = session.ports.iter().find(|port| port.port_name == *name);
        let port = port.ok_or_else(|| CommandError::NoSuchPort(name.clone()))?;
        Ok(session.at(port))
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
    let session = &options.chosen(session)?;
    if options.udp && !session.protocol.has_udp() {
        return Err(CommandError::Protocol);
    }
    let connection = if options.is_udp() || session.protocol == PortProtocol::UDP {
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
