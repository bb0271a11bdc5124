//! A small workload for trying things out: it sends every byte and datagram
//! back, on many ports.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tracing::{debug, info};

/// Runs an echo server: the workload of examples/echo.yaml.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Example:
  portpool echo --listen 127.0.0.2 --ports 7000-7003")]
pub struct Options {
    /// Address to listen on
    #[arg(long, value_name = "IP", env = "POD_IP", default_value = "127.0.0.1")]
    pub listen: IpAddr,

    /// Ports to listen on, TCP and UDP each: numbers and ranges, as in 7000-7003,7010
    #[arg(long, value_name = "PORTS", default_value = "7000", value_delimiter = ',', value_parser = parse_range)]
    pub ports: Vec<PortRun>,
}

/// A closed range of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRun {
    first: u16,
    last: u16,
}

fn parse_range(text: &str) -> Result<PortRun, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| {
        let port: Option<u16> = text.trim().parse().ok();
        port.filter(|port| *port > 0)
            .ok_or_else(|| format!("{text:?} is not a port number from 1 to 65535"))
    };
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!("{first} is above {last}"));
    }
    Ok(PortRun { first, last })
}

/// Why the echo server cannot run.
#[derive(Debug, thiserror::Error)]
#[error("failed to listen on {transport} port {address}: {source}")]
pub struct Error {
    transport: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Echoes until `shutdown`.
///
/// # Errors
/// [`Error`] names the port that cannot be listened on.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    let mut tasks = JoinSet::new();
    let ports: Vec<u16> = options
        .ports
        .iter()
        .flat_map(|run| run.first..=run.last)
        .collect();
    for port in &ports {
        let address = SocketAddr::new(options.listen, *port);
        let listener = TcpListener::bind(address).await.map_err(|source| Error {
            transport: "TCP",
            address,
            source,
        })?;
        let socket = UdpSocket::bind(address).await.map_err(|source| Error {
            transport: "UDP",
            address,
            source,
        })?;
        tasks.spawn(accept(listener));
        tasks.spawn(echo_datagrams(socket));
    }
    info!(listen = %options.listen, ports = ports.len(), "echo server ready");
    shutdown.await;
    Ok(())
}

async fn accept(listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                connections.spawn(async move {
                    if let Err(error) = echo_stream(stream).await {
                        debug!(%client, %error, "client went away");
                    }
                });
            }
            Err(error) => {
                debug!(%error, "failed to accept");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn echo_stream(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = stream.split();
    // Ends the writing side once the client has ended its own.
    tokio::io::copy(&mut reader, &mut writer).await?;
    tokio::io::AsyncWriteExt::shutdown(&mut writer).await
}

async fn echo_datagrams(socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut datagram = vec![0; 65_535];
    loop {
        // An error of one datagram (its client is gone) does not concern the others.
        if let Ok((length, client)) = socket.recv_from(&mut datagram).await {
            let _ = socket.send_to(&datagram[..length], client).await;
        }
    }
}
