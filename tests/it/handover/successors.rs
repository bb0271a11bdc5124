//! Successors that die on the way, speak another version or are not allowed to
//! take over.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use super::traffic::{all_arrived, all_came_back, churn, datagrams, drive_all, knock};
use super::{pool, replace, sessions, start_workload};

/// A process of its own that asks for a hand-over and kills itself at the point
/// `DIES_AT`. Does nothing without the environment variables.
#[test]
#[ignore = "run by other tests"]
fn dying_successor() {
    let Ok(path) = std::env::var("HANDOVER_PATH") else {
        return;
    };
    let point = std::env::var("DIES_AT").unwrap();
    let die = || {
        kill_process(getpid(), Signal::KILL).unwrap();
        unreachable!("killed");
    };
    let mut stream = UnixStream::connect(path).unwrap();
    if point == "connected" {
        die();
    }
    stream.write_all(&frame(&ASK)).unwrap();
    let mut frames = 0;
    loop {
        if point == "asked" || (point == "receiving" && frames == 1) {
            die();
        }
        // The kernel closes descriptors that are not received.
        let content = read_frame(&mut stream);
        frames += 1;
        if content == DONE {
            break;
        }
    }
    if point == "received" {
        die();
    }
    stream.write_all(&frame(&READY)).unwrap();
    if point == "ready" {
        die();
    }
    assert_eq!(read_frame(&mut stream), GO);
    die();
}

/// Contents of frames, as protobuf has them.
const ASK: [u8; 4] = [0x0a, 2, 0x08, 1];
const ASK_OTHERWISE: [u8; 4] = [0x0a, 2, 0x08, 99];
const DONE: [u8; 2] = [9 << 3 | 2, 0];
const READY: [u8; 2] = [10 << 3 | 2, 0];
const GO: [u8; 2] = [11 << 3 | 2, 0];

fn frame(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap();
    [&length.to_be_bytes(), &[0; 4], content].concat()
}

fn read_frame(stream: &mut UnixStream) -> Vec<u8> {
    let mut head = [0; 8];
    stream.read_exact(&mut head).unwrap();
    let length = u32::from_be_bytes(head[..4].try_into().unwrap());
    let mut content = vec![0; length as usize];
    stream.read_exact(&mut content).unwrap();
    content
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_is_killed_during_a_hand_over_changes_nothing() {
    let mut pool = pool(|_| {}).await;
    let stop = Arc::new(AtomicBool::new(false));
    let counts = start_workload(&pool, &stop).await;
    let sessions = sessions(&pool, 10).await;
    let streams = drive_all(&sessions[..5], 40, &stop);
    let flows: Vec<_> = sessions[5..8].iter().map(|s| datagrams(s, &stop)).collect();
    let knocking = knock(&sessions[8], &stop);
    let churning = churn(&pool, &stop);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let descriptors = pool.connection_servers[0].descriptors();
    for point in ["connected", "asked", "receiving", "received", "ready", "go"] {
        for _ in 0..2 {
            let status = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "handover::successors::dying_successor",
                    "--ignored",
                ])
                .env("HANDOVER_PATH", pool.handover_socket(0))
                .env("DIES_AT", point)
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            assert_eq!(
                std::os::unix::process::ExitStatusExt::signal(&status),
                Some(9),
                "at {point}: {status}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(pool.connection_servers[0].is_running());
        }
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let now = pool.connection_servers[0].descriptors();
    assert!(
        now < descriptors + 10,
        "descriptors leak: {descriptors}, {now}"
    );
    // A successor that lives takes over.
    replace(&mut pool);
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.store(true, Ordering::Relaxed);
    assert!(churning.await.unwrap() > 0 && knocking.await.unwrap() > 0);
    all_arrived(streams, &counts).await;
    all_came_back(flows).await;
}

#[tokio::test]
async fn a_successor_of_another_version_is_refused() {
    let mut pool = pool(|_| {}).await;
    pool.until(|_| true).await;
    let mut stream = UnixStream::connect(pool.handover_socket(0)).unwrap();
    stream.write_all(&frame(&ASK_OTHERWISE)).unwrap();
    let answer = String::from_utf8_lossy(&read_frame(&mut stream)).into_owned();
    assert!(
        answer.contains("version 99 is not spoken here, only 1"),
        "{answer}"
    );
    assert!(pool.connection_servers[0].is_running());
    replace(&mut pool);
}

/// Asks for a hand-over as another user and prints the answer.
#[test]
#[ignore = "run by other tests"]
fn successor_of_another_user() {
    let Ok(path) = std::env::var("HANDOVER_PATH") else {
        return;
    };
    let mut stream = UnixStream::connect(path).unwrap();
    // The refusal does not wait for the request, so that sending may fail.
    let _ = stream.write_all(&frame(&ASK));
    let answer = read_frame(&mut stream);
    println!("answer: {}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn another_user_is_refused() {
    const NOBODY: u32 = 65_534;
    let mut pool = pool(|_| {}).await;
    pool.until(|_| true).await;
    let socket = pool.handover_socket(0);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600, "no other user can connect");
    if !rustix::process::geteuid().is_root() {
        return println!("not root: cannot be another user; only the file's mode was checked");
    }
    // Even when the file's mode would allow it.
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777));
    open(&socket).unwrap();
    open(socket.parent().unwrap()).unwrap();
    // Not by its path: other users may not be allowed to see the checkout.
    let output = Command::new("/proc/self/exe")
        .args(["--exact", "handover::successors::successor_of_another_user"])
        .args(["--ignored", "--nocapture"])
        .env("HANDOVER_PATH", &socket)
        .current_dir("/")
        .uid(NOBODY)
        .output()
        .unwrap();
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(answer.contains("runs as uid 65534, not as 0"), "{output:?}");
    assert!(pool.connection_servers[0].is_running());
}
