//! The state machine of a connection against model sockets, with real pipes:
//! whatever order things happen in, every byte arrives once and in order, and
//! nothing waits for a signal that was given already.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::forward::scratch::SCRATCH_BYTES;
use crate::forward::tcp::direction::BUSY_BYTES;
use crate::forward::tcp::pipes::Pipe;

/// A socket whose peer is the test.
#[derive(Debug, Default)]
struct Model {
    inbox: RefCell<VecDeque<u8>>,
    is_ended: Cell<bool>,
    room: Cell<usize>,
    sent: RefCell<Vec<u8>>,
    was_ended: Cell<bool>,
    /// A send found no room: the next room is signalled.
    wants_room: Cell<bool>,
    error: Cell<Option<Errno>>,
}

impl Model {
    fn take(&self, most: usize) -> Result<Vec<u8>, Errno> {
        if let Some(errno) = self.error.get() {
            return Err(errno);
        }
        let mut inbox = self.inbox.borrow_mut();
        let length = inbox.len().min(most);
        match length {
            0 if self.is_ended.get() => Ok(Vec::new()),
            0 => Err(Errno::AGAIN),
            _ => Ok(inbox.drain(..length).collect()),
        }
    }

    fn give(&self, bytes: &[u8]) -> Result<usize, Errno> {
        assert!(!self.was_ended.get(), "nothing is sent after the end");
        let length = bytes.len().min(self.room.get());
        if length < bytes.len() {
            self.wants_room.set(true);
        }
        if length == 0 {
            return Err(Errno::AGAIN);
        }
        self.room.set(self.room.get() - length);
        self.sent.borrow_mut().extend(&bytes[..length]);
        Ok(length)
    }
}

impl Stream for Model {
    fn read(&self, space: &mut [u8]) -> Result<usize, Errno> {
        let bytes = self.take(space.len())?;
        space[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        self.give(bytes)
    }

    fn fill_pipe(&self, pipe: &Pipe) -> Result<usize, Errno> {
        let bytes = self.take(64 * 1024)?;
        assert_eq!(rustix::io::write(&pipe.input, &bytes), Ok(bytes.len()));
        Ok(bytes.len())
    }

    fn drain_pipe(&self, pipe: &Pipe, length: usize) -> Result<usize, Errno> {
        if self.room.get() == 0 {
            return self.give(&[0]);
        }
        let mut space = vec![0; length.min(self.room.get())];
        let length = rustix::io::read(&pipe.output, &mut space)?;
        self.give(&space[..length])
    }

    fn end(&self) {
        self.was_ended.set(true);
    }

    fn take_error(&self) -> Option<Errno> {
        self.error.get()
    }

    fn reset_on_close(&self) {}
}

const READABLE: Signals = Signals {
    readable: true,
    writable: false,
    ended: false,
    gone: false,
    failed: false,
};

const WRITABLE: Signals = Signals {
    readable: false,
    writable: true,
    ..READABLE
};

const ENDED: Signals = Signals {
    ended: true,
    ..READABLE
};

/// A connection between models, and what its peers have sent.
struct Bench {
    connection: Connection<Model>,
    scratch: Scratch,
    sent: [Vec<u8>; 2],
    is_finished: bool,
}

impl Bench {
    fn new() -> Self {
        let mut bench = Self {
            connection: Connection::new(
                ListenPort::new(20_000).unwrap(),
                SessionKey(1),
                Model::default(),
                Model::default(),
                Instant::now(),
            ),
            scratch: Scratch::new(1),
            sent: [Vec::new(), Vec::new()],
            is_finished: false,
        };
        bench.signal(Side::Server, WRITABLE);
        bench
    }

    fn socket(&self, side: Side) -> &Model {
        match side {
            Side::Client => &self.connection.client,
            Side::Server => &self.connection.server,
        }
    }

    /// Signals once, as an edge-triggered epoll does, and gives turns.
    fn signal(&mut self, side: Side, signals: Signals) {
        if self.is_finished {
            return;
        }
        let mut outcome = self.connection.event(side, signals, &mut self.scratch);
        while outcome == Outcome::Ready {
            outcome = self.connection.pump(&mut self.scratch);
        }
        self.is_finished = outcome == Outcome::Finished;
        assert!(matches!(outcome, Outcome::Waiting | Outcome::Finished));
    }

    fn send(&mut self, side: Side, length: usize) {
        if self.socket(side).is_ended.get() {
            return;
        }
        let start = self.sent[side as usize].len();
        let bytes: Vec<u8> = (start..start + length).map(|at| (at % 251) as u8).collect();
        self.socket(side).inbox.borrow_mut().extend(&bytes);
        self.sent[side as usize].extend(bytes);
        self.signal(side, READABLE);
    }

    fn make_room(&mut self, side: Side, length: usize) {
        let socket = self.socket(side);
        socket.room.set(socket.room.get() + length);
        if socket.wants_room.take() {
            self.signal(side, WRITABLE);
        }
    }

    fn end(&mut self, side: Side) {
        self.socket(side).is_ended.set(true);
        self.signal(side, ENDED);
    }

    /// What must hold whenever the connection waits.
    fn check(&self) {
        for (from, to) in [(Side::Client, Side::Server), (Side::Server, Side::Client)] {
            let (source, destination) = (self.socket(from), self.socket(to));
            let (sent, arrived) = (&self.sent[from as usize], destination.sent.borrow());
            assert!(sent.starts_with(&arrived), "bytes arrive in order");
            let under_way = sent.len() - arrived.len() - source.inbox.borrow().len();
            assert!(under_way <= 64 * 1024, "{under_way} bytes are held");
            let is_stuck = arrived.len() < sent.len() && destination.room.get() > 0;
            assert!(!is_stuck, "{from:?} waits for a signal that was given");
            if source.is_ended.get() && arrived.len() == sent.len() {
                assert!(
                    destination.was_ended.get() || self.is_finished,
                    "the end is passed on"
                );
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send(Side, usize),
    MakeRoom(Side, usize),
    End(Side),
    GiveBackIdlePipes,
}

fn step() -> impl Strategy<Value = Step> {
    let side = prop_oneof![Just(Side::Client), Just(Side::Server)];
    let length = prop_oneof![1usize..10, 1usize..400_000];
    prop_oneof![
        5 => (side.clone(), length.clone()).prop_map(|(side, length)| Step::Send(side, length)),
        5 => (side.clone(), length).prop_map(|(side, length)| Step::MakeRoom(side, length)),
        1 => side.prop_map(Step::End),
        1 => Just(Step::GiveBackIdlePipes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_byte_arrives_once_in_order_and_nothing_waits_for_a_past_signal(
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let mut bench = Bench::new();
        for step in steps {
            match step {
                Step::Send(side, length) => bench.send(side, length),
                Step::MakeRoom(side, length) => bench.make_room(side, length),
                Step::End(side) => bench.end(side),
                Step::GiveBackIdlePipes => {
                    bench.connection.give_back_idle_pipes(&mut bench.scratch.pipes);
                }
            }
            bench.check();
        }
        for side in [Side::Client, Side::Server] {
            bench.end(side);
            bench.make_room(side, usize::MAX / 4);
        }
        bench.check();
        prop_assert!(bench.is_finished);
        bench.connection.give_back_pipes(&mut bench.scratch.pipes);
        prop_assert_eq!(bench.scratch.pipes.lent(), 0);
    }
}

#[test]
fn a_direction_that_carries_much_has_a_pipe_until_it_is_quiet() {
    let mut bench = Bench::new();
    bench.make_room(Side::Server, usize::MAX / 4);
    bench.send(Side::Client, SCRATCH_BYTES);
    assert_eq!(bench.scratch.pipes.lent(), 0, "one message is no stream");
    bench.send(Side::Client, 4 * SCRATCH_BYTES);
    assert_eq!(bench.scratch.pipes.lent(), 1);
    bench.send(Side::Client, BUSY_BYTES);
    bench
        .connection
        .give_back_idle_pipes(&mut bench.scratch.pipes);
    assert_eq!(bench.scratch.pipes.lent(), 1);
    bench
        .connection
        .give_back_idle_pipes(&mut bench.scratch.pipes);
    assert_eq!(bench.scratch.pipes.lent(), 0);
    bench.check();
}

#[test]
fn a_server_that_refuses_is_distinguished_from_a_client_that_leaves() {
    let gone = Signals {
        gone: true,
        failed: true,
        ..ENDED
    };
    let start = || {
        let mut bench = Bench::new();
        bench.connection.is_connecting = true;
        bench
    };
    let mut bench = start();
    bench.connection.server.error.set(Some(Errno::CONNREFUSED));
    let outcome = bench
        .connection
        .event(Side::Server, gone, &mut bench.scratch);
    assert_eq!(outcome, Outcome::Unreachable(Errno::CONNREFUSED));
    let mut bench = start();
    bench.connection.client.error.set(Some(Errno::CONNRESET));
    let outcome = bench
        .connection
        .event(Side::Client, gone, &mut bench.scratch);
    assert_eq!(outcome, Outcome::Broken);
}
