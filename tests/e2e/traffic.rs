//! Clients outside of the cluster.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use portpool::client::{Client, ClientError};
use portpool::session::{Session, SessionRequest};

use crate::common::{connect, echo};
use crate::world::{LIMIT, expect, until};

/// Longest that a client waits for bytes.
const PATIENCE: Duration = Duration::from_secs(5);

/// A session and the connection that uses it.
pub struct Live {
    pub session: Session,
    stream: std::net::TcpStream,
}

impl Live {
    /// Asks for a session, connects, and exchanges bytes.
    pub async fn new(client: &Client) -> Self {
        let session = client.request(SessionRequest::default()).await.unwrap();
        let mut stream = connect(&session);
        echo(&mut stream, "hello");
        Self { session, stream }
    }

    /// Exchanges bytes again.
    pub fn check(&mut self) {
        echo(&mut self.stream, "still there");
    }
}

/// Exchanges a datagram.
pub fn echo_udp(session: &Session) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket
        .connect((session.address.as_str(), session.port))
        .unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut answer = [0; 64];
    // Datagrams may be lost.
    for _ in 0..10 {
        socket.send(b"datagram").unwrap();
        if let Ok(length) = socket.recv(&mut answer) {
            assert_eq!(&answer[..length], b"datagram");
            return;
        }
    }
    panic!("no datagram came back from {session:?}");
}

/// Clients that come one after another until [`Self::end`].
pub struct Traffic {
    stopping: Arc<AtomicBool>,
    sessions: Arc<AtomicU32>,
    clients: tokio::task::JoinHandle<Report>,
}

/// The results of all clients.
#[derive(Debug)]
pub struct Report {
    /// Sessions over which bytes were exchanged.
    pub sessions: u32,
    /// Errors, and how long after the start they occurred.
    pub failures: Vec<(Duration, String)>,
    /// Longest time between the ends of two successive sessions.
    pub longest_gap: Duration,
}

impl Traffic {
    pub fn start(client: Client) -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let sessions = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&sessions);
        let clients = tokio::spawn(come_and_go(client, Arc::clone(&stopping), counted));
        Self {
            stopping,
            sessions,
            clients,
        }
    }

    /// Waits until `sessions` more sessions have been used.
    pub async fn goes_on(&self, sessions: u32) {
        let wanted = self.sessions.load(Ordering::Relaxed) + sessions;
        until("clients come and go", LIMIT, async || {
            expect(self.sessions.load(Ordering::Relaxed), |seen| {
                *seen >= wanted
            })
        })
        .await;
    }

    /// Stops the clients and prints what happened to them.
    pub async fn end(self) -> Report {
        self.stopping.store(true, Ordering::Relaxed);
        let report = self.clients.await.unwrap();
        println!(
            "traffic meanwhile: {} sessions, {} failures, longest gap {:.2} s",
            report.sessions,
            report.failures.len(),
            report.longest_gap.as_secs_f64(),
        );
        for same in report.failures.chunk_by(|one, next| one.1 == next.1) {
            let (at, error) = &same[0];
            println!(
                "  {} times from {:.1} s: {error}",
                same.len(),
                at.as_secs_f64()
            );
        }
        report
    }
}

async fn come_and_go(
    client: Client,
    stopping: Arc<AtomicBool>,
    sessions: Arc<AtomicU32>,
) -> Report {
    let started = Instant::now();
    let mut last = started;
    let mut report = Report {
        sessions: 0,
        failures: Vec::new(),
        longest_gap: Duration::ZERO,
    };
    while !stopping.load(Ordering::Relaxed) {
        match once(&client).await {
            Ok(()) => {
                report.sessions += 1;
                sessions.store(report.sessions, Ordering::Relaxed);
                report.longest_gap = report.longest_gap.max(last.elapsed());
                last = Instant::now();
            }
            Err(error) => report.failures.push((started.elapsed(), error)),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    report.longest_gap = report.longest_gap.max(last.elapsed());
    report
}

/// One client: requests a session, connects, exchanges bytes and releases it.
async fn once(client: &Client) -> Result<(), String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let session = client.request(SessionRequest::default()).await;
    let session = session.map_err(|error| format!("request: {error}"))?;
    let at = |step: &str, error: &dyn std::fmt::Display| {
        format!("{step} {}:{}: {error}", session.server, session.port)
    };
    let exchange = async {
        let mut stream = client
            .connect(&session)
            .await
            .map_err(|error| at("connect", &error))?;
        let mut answer = [0; 5];
        stream
            .write_all(b"bytes")
            .await
            .map_err(|error| at("write", &error))?;
        stream
            .read_exact(&mut answer)
            .await
            .map_err(|error| at("read", &error))?;
        (&answer == b"bytes")
            .then_some(())
            .ok_or_else(|| at("read", &"other bytes"))
    };
    let done = tokio::time::timeout(PATIENCE, exchange).await;
    let done = done.unwrap_or_else(|_| Err(at("no bytes in time from", &"")));
    let released = client.release(&session.id).await;
    done?;
    match released {
        // The session ended before it was released.
        Err(ClientError::Refused(problem)) if problem.status == 404 => Ok(()),
        other => other.map_err(|error| at("release", &error)),
    }
}
