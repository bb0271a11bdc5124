//! The client's commands.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::SIGNALS;
use super::program::{AT_ONCE, Program, Reader};
use crate::common::{COUNT, Pool, SOON, turn};

/// A listener whose clients are never answered, and its address.
pub fn blackhole() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// Waits for a client's first bytes.
pub fn asked(listener: &TcpListener) -> std::net::TcpStream {
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0]).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn client_commands_end_at_a_signal_whatever_they_wait_for() {
    let _turn = turn().await;
    for (signal, code) in SIGNALS {
        for command in ["request", "connect", "release"] {
            let (listener, address) = blackhole();
            let id = (command == "release").then_some("some");
            let arguments: Vec<&str> = [command, &address].into_iter().chain(id).collect();
            let mut program = Program::start(&arguments);
            let _client = asked(&listener);
            program.ends_at(signal, code, &format!("{command} without an answer"));
        }
        for command in ["request", "connect"] {
            let mut program = Program::start(&[command, "127.0.0.1:9", "--retry-seconds=60"]);
            program.until_said("no session yet");
            program.ends_at(signal, code, &format!("{command} that tries again"));
        }
    }
    for (signal, code) in SIGNALS {
        for command in ["request", "connect"] {
            let pool = Pool::running(1, |_| {}).await;
            for _ in 0..COUNT {
                pool.request().await.unwrap();
            }
            let address = format!("{}:7700", pool.connection_address(0));
            let mut program = Program::start(&[command, &address, "--wait=60"]);
            pool.until(|state| state.waiting == 1).await;
            program.ends_at(signal, code, &format!("{command} in the queue"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connect_ends_at_a_signal_whichever_side_stalls() {
    let _turn = turn().await;
    let pool = Pool::running(1, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    for (signal, code) in SIGNALS {
        for udp in [None, Some("--udp")] {
            let arguments: Vec<&str> = ["connect", &address].into_iter().chain(udp).collect();
            let mut program = Program::start(&arguments);
            program.until_said("connected to");
            program.ends_at(signal, code, "connect without input");
            // It gives its session back.
            pool.until(|state| state.free_ports == u32::from(COUNT))
                .await;
        }
        // Its own reader stalls.
        let (mut program, _readers) = Program::with(
            &["connect", &address],
            &[],
            Reader::HasStopped,
            Reader::Reads,
        );
        program.until_said("connected to");
        let mut stdin = program.stdin.take().unwrap();
        let writing = std::thread::spawn(move || while stdin.write_all(&[b'x'; 4096]).is_ok() {});
        std::thread::sleep(Duration::from_millis(300));
        program.ends_at(signal, code, "connect whose reader has stopped");
        writing.join().unwrap();
        // The connection server stalls, and does not take the session back.
        let mut program = Program::start(&["connect", &address]);
        program.until_said("connected to");
        pool.connection_servers[0].signal(Signal::STOP);
        program.ends_at(signal, code, "connect to a server that has stopped");
        pool.connection_servers[0].signal(Signal::CONT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_print_end_at_a_signal_without_a_reader() {
    let _turn = turn().await;
    let pool = Pool::running(1, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    for (signal, code) in SIGNALS {
        for arguments in [&["crd"] as &[&str], &["request", &address]] {
            let (mut program, _readers) =
                Program::with(arguments, &[], Reader::HasStopped, Reader::Reads);
            std::thread::sleep(Duration::from_millis(300));
            assert!(program.child.try_wait().unwrap().is_none(), "it prints");
            program.ends_at(signal, code, arguments[0]);
        }
        // An error that no one reads.
        let (mut program, _readers) = Program::with(
            &["request", "nowhere"],
            &[],
            Reader::HasStopped,
            Reader::HasStopped,
        );
        let (status, _) = program.ends(SOON).expect("it ends by itself");
        assert_eq!(status.code(), Some(2));
    }
}

#[test]
fn a_closed_terminal_ends_a_command_unless_nohup_started_it() {
    for (option, code) in [
        ("--default-signal=HUP", Some(129)),
        ("--ignore-signal=HUP", None),
    ] {
        let (listener, address) = blackhole();
        let mut command = Command::new("env");
        command.args([option, env!("CARGO_BIN_EXE_portpool"), "request", &address]);
        let mut child = command.spawn().unwrap();
        let _client = asked(&listener);
        kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
        let started = Instant::now();
        while started.elapsed() < AT_ONCE && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(
            status.map(|status| status.code()),
            code.map(Some),
            "{option}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_process_of_a_container_ends_at_a_signal_too() {
    // The kernel ignores signals for it that it has no handler for.
    let unshare = |program: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["--fork", "--pid", "--kill-child"])
            .args(program);
        command
    };
    if !unshare(&["true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("skipped: no namespace of processes here (unshare --pid)");
        return;
    }
    for (signal, code) in SIGNALS {
        let (listener, address) = blackhole();
        let portpool = env!("CARGO_BIN_EXE_portpool");
        let mut outer = unshare(&[portpool, "request", &address]).spawn().unwrap();
        let _client = asked(&listener);
        let pid = outer.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let first: i32 = children.unwrap().trim().parse().unwrap();
        kill_process(Pid::from_raw(first).unwrap(), signal).unwrap();
        let started = Instant::now();
        while started.elapsed() < AT_ONCE && outer.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = outer.try_wait().unwrap();
        outer.kill().unwrap();
        outer.wait().unwrap();
        assert_eq!(status.expect("it ends").code(), Some(code));
    }
}
