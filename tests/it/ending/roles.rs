//! The roles of a pool: connection server, agent and workload.

use std::io::Read;
use std::time::Duration;

use rustix::process::Signal;

use super::SIGNALS;
use super::program::{Program, Reader};
use crate::common::{Pool, turn};
use portpool::session::SessionRequest;

/// The arguments of the roles: a connection server and an agent at the addresses
/// `index` of `pool`, and a workload beside those that run.
fn roles(pool: &Pool, index: u32) -> [Vec<String>; 3] {
    let (host, server) = (pool.connection_address(index), pool.server_address(index));
    let workload = pool.server_address(9);
    let table = format!("--table={}", pool.table_file().display());
    [
        vec![
            "connection-server".to_owned(),
            table.clone(),
            format!("--listen={host}"),
            format!("--admin={host}:7701"),
            format!("--handover={}", pool.handover_socket(9).display()),
        ],
        vec![
            "processing-server".to_owned(),
            table,
            "--slot=0".to_owned(),
            format!("--address={server}"),
            format!("--admin={server}:7071"),
        ],
        vec!["echo".to_owned(), format!("--listen={workload}")],
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_end_at_a_signal_also_before_they_have_a_table() {
    let _turn = turn().await;
    let pool = Pool::new(1, |_| {});
    for (signal, _) in SIGNALS {
        for arguments in roles(&pool, 9) {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut program = Program::start(&arguments);
            program.until_said("ready");
            program.ends_at(signal, 0, arguments[0]);
            if arguments[0] == "echo" {
                continue;
            }
            let missing = pool.table_file().with_file_name("missing.json");
            let missing = format!("--table={}", missing.display());
            let arguments: Vec<&str> = arguments
                .into_iter()
                .map(|argument| {
                    if argument.starts_with("--table") {
                        &missing
                    } else {
                        argument
                    }
                })
                .collect();
            let mut program = Program::start(&arguments);
            program.until_said("cannot be read now");
            program.ends_at(signal, 0, "a role without a table");
        }
    }
    let socket = pool.handover_socket(9);
    assert!(!socket.exists(), "the socket for a successor is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_drains_says_so_and_a_second_signal_ends_it() {
    let _turn = turn().await;
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.agents.clear();
    for (signal, code) in SIGNALS {
        let [connection_server, agent, _] = roles(&pool, 0);
        let start = |arguments: &[String]| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            Program::start(&arguments)
        };
        let (mut connection_server, mut agent) = (start(&connection_server), start(&agent));
        pool.until(|state| state.free_ports > 0).await;
        let session = pool.request().await.unwrap();
        let mut stream = crate::common::connect(&session);
        crate::common::echo(&mut stream, "busy");
        // The agent ends a session whose client has not come, as far as it knows.
        pool.until(|state| state.servers[0].ports[0].busy == 1)
            .await;
        for (program, name) in [(&mut agent, "agent"), (&mut connection_server, "server")] {
            program.signal(signal);
            program.until_said("draining");
            assert!(
                program.said().contains("a second signal"),
                "{}",
                program.said()
            );
            assert!(
                program.ends(Duration::from_millis(500)).is_none(),
                "{name} drains"
            );
            program.ends_at(signal, code, name);
        }
    }
    assert!(
        !pool.handover_socket(9).exists(),
        "the socket for a successor is left"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_no_one_reads_holds_nothing_up() {
    let _turn = turn().await;
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    let trace = [("PORTPOOL_LOG", "trace")];
    for (signal, _) in SIGNALS {
        let [connection_server, agent, echo] = roles(&pool, 0);
        let start = |arguments: &[String]| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            Program::with(&arguments, &trace, Reader::HasStopped, Reader::HasStopped)
        };
        let mut programs = [start(&agent), start(&connection_server), start(&echo)];
        pool.until(|state| state.free_ports > 0).await;
        for _ in 0..20 {
            let request = SessionRequest {
                wait_seconds: 10,
                ..SessionRequest::default()
            };
            let session = pool.client().request(request).await.unwrap();
            crate::common::echo(&mut crate::common::connect(&session), "served");
            // It may be over already.
            let _ = pool.client().release(&session.id).await;
        }
        for (program, _) in &mut programs {
            program.ends_at(signal, 0, "a role whose log is not read");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_log_lost_is_counted_once_it_is_read_again() {
    let _turn = turn().await;
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.start_agent(0);
    let [mut arguments, _, _] = roles(&pool, 9);
    let host = pool.connection_address(0);
    arguments[2] = format!("--listen={host}");
    arguments[3] = format!("--admin={host}:7701");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let trace = [("PORTPOOL_LOG", "trace")];
    let (mut program, mut readers) =
        Program::with(&arguments, &trace, Reader::Reads, Reader::HasStopped);
    pool.until(|state| state.free_ports > 0).await;
    // More lines than the queue holds.
    let client = pool.client();
    for _ in 0..400 {
        let session = client.request(SessionRequest::default()).await.unwrap();
        client.release(&session.id).await.unwrap();
    }
    let mut reader = readers.remove(0);
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    std::thread::sleep(Duration::from_millis(300));
    program.ends_at(Signal::TERM, 0, "a connection server");
    let text = reading.join().unwrap();
    let dropped = text
        .lines()
        .find(|line| line.contains("log lines were dropped"));
    let lines = dropped.and_then(|line| line.rsplit_once("lines="));
    assert!(
        lines.is_some(),
        "{} lines: {dropped:?}",
        text.lines().count()
    );
}
