//! `portpool connect --send --expect`, as scripts and `helm test` use it.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::common::Pool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn connect(pool: &Pool, more: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_portpool"))
        .args(["connect", &format!("{}:7700", pool.connection_address(0))])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// All that a command has printed.
fn text(output: &Output) -> String {
    String::from_utf8([output.stdout.as_slice(), &output.stderr].concat()).unwrap()
}

#[tokio::test]
async fn a_script_sends_and_expects_over_tcp_and_udp() {
    let pool = Pool::running(1, |_| {}).await;
    for udp in [None, Some("--udp")] {
        let options = ["--send=over and out", "--expect=over"].into_iter();
        let options: Vec<&str> = options.chain(udp).collect();
        let output = connect(&pool, &options).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert!(output.stdout.starts_with(b"over"), "{}", text(&output));
    }
    // The sessions were given back at once.
    pool.until(|state| state.free_ports == 4).await;
}

#[tokio::test]
async fn an_unexpected_answer_fails_and_is_reported() {
    let pool = Pool::running(1, |_| {}).await;
    let options = ["--send=ping", "--expect=pong"];
    let output = connect(&pool, &options).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let words = r#"test-0 answered "ping" within 5 s, not "pong""#;
    assert!(text(&output).contains(words), "{}", text(&output));
}

/// The connection server dies between its answer and the connection.
#[tokio::test]
async fn a_session_outlives_the_connection_server_that_gave_it() {
    let mut pool = Pool::running(1, |_| {}).await;
    let (client, session) = (pool.client(), pool.request().await.unwrap());
    pool.connection_servers[0].kill();
    let connecting = tokio::spawn(async move { client.connect(&session).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    pool.start_connection_server(0);
    let mut stream = connecting.await.unwrap().unwrap();
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"hello");
}

#[tokio::test]
async fn a_script_may_come_before_the_pool() {
    let mut pool = Pool::new(1, |_| {});
    let options = ["--send=early", "--expect=early", "--retry-seconds=20"];
    let early = connect(&pool, &options);
    pool.start_connection_server(0);
    pool.start_agent(0);
    pool.start_workload(0);
    let output = early.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    // Without the option, the command fails when no one answers.
    pool.connection_servers.clear();
    let output = connect(&pool, &options[..2]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("failed to ask"), "{}", text(&output));
}
