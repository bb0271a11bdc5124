//! `portpool local`.

use std::io::{PipeReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::SIGNALS;
use super::program::{AT_ONCE, Program, Reader};
use crate::common::SOON;

const LOCAL: &str = r#"
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {name: ending}
spec:
  replicas: 1
  sessions: {claimSeconds: 30, lingerSeconds: 0}
  ports: [{name: main, port: 7000}]
  template:
    spec:
      containers:
        - name: work
          command: [sh, -c, "NOISE exec portpool echo --listen $POD_IP --ports 7000"]
          env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
"#;

/// Runs a pool of this text, beside which no other test runs one.
fn local(text: &str, stdout: Reader) -> (Program, Vec<PipeReader>, PathBuf) {
    let bin = Path::new(env!("CARGO_BIN_EXE_portpool")).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    let file = file.into_temp_path().keep().unwrap();
    std::fs::write(&file, text).unwrap();
    let arguments = ["local", "--no-live", "-f", file.to_str().unwrap()];
    let (program, readers) = Program::with(&arguments, &[("PATH", &path)], stdout, Reader::Reads);
    (program, readers, file)
}

/// Waits until the pool has `servers` servers, with a port free on the last one.
fn until_servers(servers: usize) {
    let deadline = Instant::now() + SOON;
    let client = portpool::client::Client::new("127.0.0.1:7700").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    loop {
        if let Ok(state) = runtime.block_on(client.pool())
            && state.servers.len() == servers
            && state.free_ports as usize == servers
        {
            return;
        }
        assert!(Instant::now() < deadline, "no {servers} servers");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn local_ends_at_a_signal_in_every_state_and_leaves_nothing() {
    let _turn = crate::local::one_at_a_time();
    let quiet = LOCAL.replace("NOISE", "");
    for (signal, code) in SIGNALS {
        // The manifest is a pipe into which no one writes.
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let status = Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(status.success());
        let mut program = Program::start(&["local", "-f", fifo.to_str().unwrap()]);
        std::thread::sleep(Duration::from_millis(300));
        program.ends_at(signal, 0, "local without its manifest");
        // It has just started.
        let (mut program, _, file) = local(&quiet, Reader::Reads);
        program.until_said("load-sharing port");
        program.ends_at(signal, 0, "local that starts");
        // It runs, and then has a session that waits for its client.
        let (mut program, _, other) = local(&quiet, Reader::Reads);
        until_servers(1);
        let asked = Command::new(env!("CARGO_BIN_EXE_portpool"))
            .args(["request", "127.0.0.1:7700"])
            .output()
            .unwrap();
        assert!(asked.status.success());
        program.signal(signal);
        program.until_said("stopping: ");
        program.ends_at(signal, code, "local that drains");
        let deadline = Instant::now() + AT_ONCE;
        while std::net::TcpStream::connect("127.0.0.1:7700").is_ok() {
            assert!(Instant::now() < deadline, "its connection server goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::fs::remove_file(file).unwrap();
        std::fs::remove_file(other).unwrap();
    }
}

#[test]
fn local_stops_its_pool_when_its_terminal_is_closed() {
    let _turn = crate::local::one_at_a_time();
    let (mut program, _, file) = local(&LOCAL.replace("NOISE", ""), Reader::Reads);
    until_servers(1);
    program.signal(Signal::HUP);
    assert!(program.ends(SOON).is_some(), "it goes on");
    let said = program.said();
    assert!(
        said.contains("stopping: ") && said.contains("stopped"),
        "{said}"
    );
    std::fs::remove_file(file).unwrap();
}

#[test]
fn local_follows_edits_and_ends_while_no_one_reads_its_output() {
    let _turn = crate::local::one_at_a_time();
    let noise = "(while :; do echo tick tick tick tick tick tick; done) &";
    let noisy = LOCAL.replace("NOISE", noise);
    for (signal, _) in SIGNALS {
        let (mut program, mut readers, file) = local(&noisy, Reader::HasStopped);
        until_servers(1);
        std::fs::write(&file, noisy.replace("replicas: 1", "replicas: 2")).unwrap();
        until_servers(2);
        program.signal(signal);
        assert!(program.ends(Duration::from_secs(3)).is_some(), "it goes on");
        let mut text = String::new();
        readers.remove(0).read_to_string(&mut text).unwrap();
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn local_counts_the_lines_that_it_lost() {
    let _turn = crate::local::one_at_a_time();
    let noise = "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); echo tick; done;";
    let (mut program, mut readers, file) =
        local(&LOCAL.replace("NOISE", noise), Reader::HasStopped);
    until_servers(1);
    let mut reader = readers.remove(0);
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    std::thread::sleep(Duration::from_millis(200));
    program.signal(Signal::TERM);
    assert!(program.ends(SOON).is_some());
    std::fs::remove_file(file).unwrap();
    let text = reading.join().unwrap();
    let ticks = text.lines().filter(|line| line.ends_with("tick")).count();
    let lost = text.lines().find_map(|line| {
        let (count, _) = line.strip_prefix('(')?.split_once(" lines were dropped")?;
        count.parse::<usize>().ok()
    });
    assert!(
        lost.is_some_and(|lost| lost + ticks >= 5000),
        "{lost:?}, {ticks} ticks"
    );
    assert!(text.contains("stopped"), "what it says later is read");
}
