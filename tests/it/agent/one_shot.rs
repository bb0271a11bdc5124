//! Workloads that serve one client and end: each client after the first one must
//! get a port of the next program, not of the one that is about to end.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::common::{Pool, SOON, connect, turn};
use portpool::pool::PortProtocol;
use portpool::session::SessionRequest;

/// A workload that is started again and again until it is dropped.
struct Restarted {
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Restarted {
    /// `serve` serves one client, or returns before that when it is stopping.
    fn run(serve: impl Fn(&AtomicBool) + Send + 'static) -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let flag = stopping.clone();
        let thread = std::thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                serve(&flag);
                // As long as a runner takes to start it again.
                std::thread::sleep(Duration::from_millis(30));
            }
        });
        Self {
            stopping,
            thread: Some(thread),
        }
    }
}

impl Drop for Restarted {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
    }
}

/// A listener that gives up when it is stopping.
fn accept(listener: &TcpListener, stopping: &AtomicBool) -> Option<TcpStream> {
    listener.set_nonblocking(true).unwrap();
    while !stopping.load(Ordering::Relaxed) {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            return Some(stream);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}

/// Serves one client and closes its listener `closes` milliseconds after that;
/// before it serves, if that is `None`.
fn serve_once(at: SocketAddr, closes: Option<u64>, stopping: &AtomicBool) {
    let listener = TcpListener::bind(at).unwrap();
    let Some(mut stream) = accept(&listener, stopping) else {
        return;
    };
    let listener = closes.map(|_| listener);
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    stream.write_all(&bytes).unwrap();
    drop(stream);
    std::thread::sleep(Duration::from_millis(closes.unwrap_or(0)));
    // What waits in its queue is reset.
    drop(listener);
}

/// A pool of one server with one TCP port, and nothing that listens there.
fn pool() -> Pool {
    let mut pool = Pool::new(1, |table| {
        let range = &mut table.rows[0].ranges[0];
        (range.count, range.protocol) = (1, PortProtocol::TCP);
    });
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool
}

fn waiting() -> SessionRequest {
    SessionRequest {
        wait_seconds: 20,
        ..SessionRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_after_a_one_shot_program_gets_the_next_one() {
    let _turn = turn().await;
    for closes in [None, Some(0), Some(5), Some(100)] {
        let pool = pool();
        let at = SocketAddr::new(pool.server_address(0), crate::common::SERVER_PORT);
        let _workload = Restarted::run(move |stopping| serve_once(at, closes, stopping));
        for round in 0..6 {
            let session = pool.client().request(waiting()).await.unwrap();
            let mut stream = connect(&session);
            stream.write_all(b"hello").unwrap();
            let mut bytes = Vec::new();
            let read = stream.read_to_end(&mut bytes);
            assert_eq!(bytes, b"hello", "round {round} of {closes:?}: {read:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_gets_its_own_run_of_iperf3() {
    if Command::new("iperf3").arg("--version").output().is_err() {
        eprintln!("skipped: no iperf3 here");
        return;
    }
    let _turn = turn().await;
    let pool = pool();
    let (address, port) = (pool.server_address(0), crate::common::SERVER_PORT);
    let _workload = Restarted::run(move |stopping| {
        let mut server = Command::new("iperf3")
            .args(["--server", "--one-off", "--port"])
            .arg(port.to_string())
            .arg("--bind")
            .arg(address.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while server.try_wait().unwrap().is_none() {
            if stopping.load(Ordering::Relaxed) {
                server.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    for round in 0..6 {
        let session = pool.client().request(waiting()).await.unwrap();
        let client = Command::new("iperf3")
            .args(["--bytes", "100K", "--connect-timeout"])
            .arg(SOON.as_millis().to_string())
            .args(["--port", &session.port.to_string()])
            .args(["--client", &session.address])
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&client.stderr);
        assert!(client.status.success(), "round {round}: {output}");
    }
}
