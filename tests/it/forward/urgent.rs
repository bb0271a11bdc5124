//! TCP's urgent data through the data plane: each urgent byte arrives as one,
//! at its place among the others.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use portpool::forward::Decision;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionread;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::bench::{Bench, SESSION, pattern};

/// How long a test waits for something to read before it goes on and fails.
const LONG: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// Sends `byte` as urgent.
fn send_urgent(stream: &TcpStream, byte: u8) {
    assert_eq!(send(stream, &[byte], SendFlags::OOB), Ok(1));
}

/// What a peer has sent until its end, and the urgent bytes, each with the
/// number of bytes before it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Received {
    bytes: Vec<u8>,
    urgent: Vec<(usize, u8)>,
}

/// Reads as a program does that keeps urgent bytes apart from others.
fn read_to_end(mut stream: &TcpStream) -> Received {
    let mut received = Received::default();
    let mut space = vec![0; 100_000];
    loop {
        let mut polled = [PollFd::new(stream, PollFlags::IN | PollFlags::PRI)];
        assert_eq!(poll(&mut polled, Some(&LONG)), Ok(1));
        let is_urgent = polled[0].revents().contains(PollFlags::PRI);
        // Ends at an urgent byte.
        let before = usize::try_from(ioctl_fionread(stream).unwrap()).unwrap();
        if is_urgent && before == 0 {
            let mut byte = [0];
            recv(stream, &mut byte, RecvFlags::OOB).unwrap();
            received.urgent.push((received.bytes.len(), byte[0]));
        } else if before == 0 && !has_ended(stream) {
            // An urgent byte has come meanwhile.
            continue;
        }
        // The next read passes an urgent byte that was received.
        let most = if before == 0 { space.len() } else { before };
        let most = most.min(space.len());
        let length = stream.read(&mut space[..most]).unwrap();
        received.bytes.extend(&space[..length]);
        if length == 0 {
            return received;
        }
    }
}

/// Whether there is nothing more to read, now and later.
fn has_ended(stream: &TcpStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP | PollFlags::PRI)];
    poll(&mut polled, Some(&LONG)).unwrap();
    ioctl_fionread(stream).unwrap() == 0 && !polled[0].revents().contains(PollFlags::PRI)
}

#[test]
fn an_urgent_byte_arrives_at_its_place_both_ways() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let listener = bench.serve();
    for is_up in [true, false] {
        // From a telnet command to streams that are spliced.
        for before in [1, 3, 1000, 99_999, 1_234_567, 12_345_678] {
            let client = bench.connect();
            let (server, _) = listener.accept().unwrap();
            let (mut from, to) = if is_up {
                (client, server)
            } else {
                (server, client)
            };
            let sent = pattern(before + 2000, 7);
            let bytes = sent.clone();
            let sender = std::thread::spawn(move || {
                from.write_all(&bytes[..before]).unwrap();
                send_urgent(&from, 0xf2);
                from.write_all(&bytes[before..]).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
                from
            });
            let received = read_to_end(&to);
            assert_eq!(received.urgent, [(before, 0xf2)], "up: {is_up}");
            assert!(received.bytes == sent, "{} bytes", received.bytes.len());
            sender.join().unwrap();
        }
    }
}

/// What an FTP client sends to abort a transfer (RFC 959, section 4.1.3), to a
/// server that reads urgent bytes in line.
#[test]
fn a_server_reads_in_line_up_to_the_mark() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    socket2::SockRef::from(&server)
        .set_out_of_band_inline(true)
        .unwrap();
    let mut space = [0; 64];
    for _ in 0..3 {
        client.write_all(b"RETR file\r\n\xff\xf4\xff").unwrap();
        send_urgent(&client, 0xf2);
        let mut polled = [PollFd::new(&server, PollFlags::PRI)];
        poll(&mut polled, Some(&LONG)).unwrap();
        client.write_all(b"ABOR\r\n").unwrap();
        // A read ends at the mark, as it does on a direct connection.
        let length = server.read(&mut space).unwrap();
        assert_eq!(&space[..length], b"RETR file\r\n\xff\xf4\xff");
        server.read_exact(&mut space[..7]).unwrap();
        assert_eq!(&space[..7], b"\xf2ABOR\r\n");
    }
    let answer = b"426 aborted\r\n";
    server.write_all(answer).unwrap();
    client.read_exact(&mut space[..answer.len()]).unwrap();
}

#[test]
fn an_urgent_byte_behind_a_slow_reader_survives_a_hand_over() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (client, server) = bench.pair();
    // As much as the sockets take, so that the urgent byte stays behind.
    socket2::SockRef::from(&client)
        .set_nonblocking(true)
        .unwrap();
    let sent = pattern(64 << 20, 5);
    let mut before = 0;
    let mut idle = 0;
    while idle < 20 {
        match (&client).write(&sent[before..]) {
            Ok(length) => (before, idle) = (before + length, 0),
            Err(_) => {
                idle += 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    }
    socket2::SockRef::from(&client)
        .set_nonblocking(false)
        .unwrap();
    let sender = std::thread::spawn(move || {
        send_urgent(&client, 1);
        (&client).write_all(b"after").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        client
    });
    bench.hand_over();
    let received = read_to_end(&server);
    assert_eq!(received.urgent, [(before, 1)]);
    assert!(received.bytes == [&sent[..before], b"after"].concat());
    sender.join().unwrap();
}

#[test]
fn every_urgent_byte_of_a_conversation_arrives() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    // An urgent byte that is a client's first of all may arrive as an ordinary
    // one: the first read is not preceded by a report.
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    for number in 0..200 {
        for (from, to) in [(&client, &server), (&server, &client)] {
            send_urgent(from, number);
            let mut polled = [PollFd::new(to, PollFlags::PRI)];
            assert_eq!(poll(&mut polled, Some(&LONG)), Ok(1));
            let mut byte = [0];
            recv(to, &mut byte, RecvFlags::OOB).unwrap();
            assert_eq!(byte, [number]);
        }
    }
}
