//! How TCP connections end.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::bench::{Bench, SESSION, until, was_reset};
use portpool::forward::Decision;

#[test]
fn after_one_side_has_ended_the_other_goes_on() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    server.write_all(b"answer").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    bench.all_closed();
}

#[test]
fn a_reset_is_passed_on_both_ways() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let reset = |stream: TcpStream| {
        socket2::SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .map(|()| drop(stream))
            .unwrap()
    };
    let (client, mut server) = bench.pair();
    reset(client);
    assert!(was_reset(&mut server));
    drop(server);
    let (mut client, server) = bench.pair();
    reset(server);
    assert!(was_reset(&mut client));
    bench.all_closed();
}

#[test]
fn a_server_that_refuses_or_has_no_address_resets_the_client() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    assert!(was_reset(&mut bench.connect()));
    until(|| bench.forwarder.counters().connect_refused == 1);
    bench.table.rows[0].address = None;
    assert_eq!(bench.apply(), []);
    assert!(was_reset(&mut bench.connect()));
    until(|| bench.forwarder.counters().no_server == 1);
    bench.all_closed();
}

#[test]
fn a_server_that_does_not_answer_is_given_up() {
    let bench = Bench::new(Decision::Admit(SESSION));
    // A full backlog: the kernel drops what comes.
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener
        .bind(&SocketAddr::new(bench.server, 7000).into())
        .unwrap();
    listener.listen(0).unwrap();
    let _filling: Vec<_> = (0..2)
        .map(|_| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&SocketAddr::new(bench.server, 7000).into());
            socket
        })
        .collect();
    let started = Instant::now();
    assert!(was_reset(&mut bench.connect()));
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(bench.forwarder.counters().connect_timed_out, 1);
    bench.all_closed();
}

#[test]
fn a_silent_connection_is_reset_after_its_idle_time() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    bench.table.sessions.idle_timeout_seconds = 1;
    assert_eq!(bench.apply(), []);
    let (mut client, _server) = bench.pair();
    let started = Instant::now();
    assert!(was_reset(&mut client));
    assert!((Duration::from_millis(900)..Duration::from_secs(3)).contains(&started.elapsed()));
    assert_eq!(bench.forwarder.counters().idle, 1);
}

/// A hand-over registers the sockets anew, which epoll answers with an event.
#[test]
fn nothing_but_bytes_and_ends_renews_the_idle_time() {
    type Other = fn(&mut Bench);
    let others: [(&str, Other); 2] = [
        ("a hand-over", |bench| bench.hand_over()),
        ("a newer table", |bench| {
            bench.table.generation += 1;
            assert_eq!(bench.apply(), []);
        }),
    ];
    for (what, other) in others {
        for is_half_closed in [false, true] {
            let mut bench = Bench::new(Decision::Admit(SESSION));
            bench.table.sessions.idle_timeout_seconds = 2;
            assert_eq!(bench.apply(), []);
            let (mut client, mut server) = bench.pair();
            let started = Instant::now();
            if is_half_closed {
                server.shutdown(Shutdown::Write).unwrap();
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
            }
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(450));
                other(&mut bench);
            }
            server.set_nonblocking(false).unwrap();
            assert!(was_reset(&mut server), "{what}");
            let lasted = started.elapsed();
            let expected = Duration::from_millis(1_900)..Duration::from_millis(2_700);
            assert!(expected.contains(&lasted), "{what}: {lasted:?}");
            assert_eq!(bench.forwarder.counters().idle, 1);
        }
    }
}
