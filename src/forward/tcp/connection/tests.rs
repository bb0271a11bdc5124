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
use crate::forward::tcp::stream::Mark;

/// A socket whose peer is the test.
#[derive(Debug, Default)]
struct Model {
    inbox: RefCell<VecDeque<u8>>,
    /// Bytes that were read.
    read: Cell<usize>,
    /// The place of the urgent byte among those that were and will be read.
    mark: Cell<Option<usize>>,
    is_ended: Cell<bool>,
    room: Cell<usize>,
    sent: RefCell<Vec<u8>>,
    /// The places of the urgent bytes among those sent.
    sent_urgent: RefCell<Vec<usize>>,
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
            _ => {
                self.read.set(self.read.get() + length);
                if self.mark.get().is_some_and(|mark| mark < self.read.get()) {
                    self.mark.set(None);
                }
                Ok(inbox.drain(..length).collect())
            }
        }
    }

    /// The number of bytes before the urgent one, if there is one.
    fn before_mark(&self) -> Option<usize> {
        self.mark.get().map(|mark| mark - self.read.get())
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
        let before = self.before_mark().filter(|before| *before > 0);
        let bytes = self.take(space.len().min(before.unwrap_or(usize::MAX)))?;
        space[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        self.give(bytes)
    }

    fn fill_pipe(&self, pipe: &Pipe) -> Result<usize, Errno> {
        let most = match self.before_mark() {
            // As Linux does.
            Some(0) if self.is_ended.get() => return Ok(0),
            Some(0) => return Err(Errno::AGAIN),
            Some(before) => before,
            None => usize::MAX,
        };
        let bytes = self.take(most.min(64 * 1024))?;
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

    fn mark(&self) -> Result<Mark, Errno> {
        Ok(match self.before_mark() {
            None => Mark::None,
            Some(0) => Mark::Here,
            Some(before) => Mark::Ahead(before),
        })
    }

    fn send_urgent(&self, byte: u8) -> Result<usize, Errno> {
        let length = self.give(&[byte])?;
        let place = self.sent.borrow().len() - 1;
        self.sent_urgent.borrow_mut().push(place);
        Ok(length)
    }

    fn end(&self) {
        self.was_ended.set(true);
    }

    fn take_error(&self) -> Option<Errno> {
        self.error.get()
    }

    fn reset_on_close(&self) {}
}

const READABLE: Signals = Signals::READABLE;

const URGENT: Signals = Signals {
    urgent: true,
    ..READABLE
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
    /// The places of urgent bytes among those sent that no later one replaced.
    sent_urgent: [Vec<usize>; 2],
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
            sent_urgent: [Vec::new(), Vec::new()],
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
        if self.put(side, length) {
            self.signal(side, READABLE);
        }
    }

    /// Sends an urgent byte. It replaces one that was not read yet.
    fn send_urgent(&mut self, side: Side) {
        if self.put_urgent(side) {
            self.signal(side, URGENT);
        }
    }

    /// Puts an urgent byte into a socket without a signal.
    fn put_urgent(&mut self, side: Side) -> bool {
        let place = self.sent[side as usize].len();
        if !self.put(side, 1) {
            return false;
        }
        if self.socket(side).mark.replace(Some(place)).is_some() {
            self.sent_urgent[side as usize].pop();
        }
        self.sent_urgent[side as usize].push(place);
        true
    }

    /// Puts bytes into a socket without a signal. Returns whether it was open.
    fn put(&mut self, side: Side, length: usize) -> bool {
        if self.socket(side).is_ended.get() {
            return false;
        }
        let start = self.sent[side as usize].len();
        let bytes: Vec<u8> = (start..start + length).map(|at| (at % 251) as u8).collect();
        self.socket(side).inbox.borrow_mut().extend(&bytes);
        self.sent[side as usize].extend(bytes);
        true
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
            let urgent = &self.sent_urgent[from as usize];
            let arrived_urgent = destination.sent_urgent.borrow();
            assert!(
                urgent.starts_with(&arrived_urgent),
                "urgent bytes arrive in place"
            );
            if arrived.len() == sent.len() {
                assert_eq!(*urgent, *arrived_urgent);
            }
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
    SendUrgent(Side),
    MakeRoom(Side, usize),
    End(Side),
    GiveBackIdlePipes,
}

fn step() -> impl Strategy<Value = Step> {
    let side = prop_oneof![Just(Side::Client), Just(Side::Server)];
    let length = prop_oneof![1usize..10, 1usize..400_000];
    prop_oneof![
        5 => (side.clone(), length.clone()).prop_map(|(side, length)| Step::Send(side, length)),
        1 => side.clone().prop_map(Step::SendUrgent),
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
                Step::SendUrgent(side) => bench.send_urgent(side),
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

/// A busy source is polled and not watched: nothing reports its urgent byte.
#[test]
fn a_splice_stops_at_an_urgent_byte_until_it_is_reported() {
    let start = || {
        let mut bench = Bench::new();
        bench.make_room(Side::Server, usize::MAX / 4);
        bench.send(Side::Client, 4 * SCRATCH_BYTES);
        assert!(bench.connection.has_pipe(Side::Client));
        bench.put(Side::Client, 1000);
        bench.put_urgent(Side::Client);
        bench.put(Side::Client, 1000);
        bench
    };
    let mut bench = start();
    for _ in 0..2 {
        let outcome = bench.connection.pump_from(Side::Client, &mut bench.scratch);
        assert_eq!(outcome, Outcome::Waiting);
        let arrived = bench.connection.server.sent.borrow().len();
        assert_eq!(arrived, 4 * SCRATCH_BYTES + 1000);
    }
    bench.signal(Side::Client, URGENT);
    bench.check();
    assert_eq!(
        bench.connection.server.sent.borrow().len(),
        4 * SCRATCH_BYTES + 2001
    );
    // A splice that finds it last looks like one at the end.
    let mut bench = start();
    bench.end(Side::Client);
    bench.check();
    assert_eq!(
        bench.connection.server.sent.borrow().len(),
        4 * SCRATCH_BYTES + 2001
    );
    assert!(bench.connection.server.was_ended.get());
}

#[test]
fn an_urgent_byte_that_is_held_is_exported_as_one() {
    let mut bench = Bench::new();
    bench.send_urgent(Side::Client);
    let connection = bench
        .connection
        .export(Instant::now(), &mut bench.scratch.pipes);
    assert!(connection.upstream.is_urgent);
    bench.connection = Connection::import(connection, None, Instant::now());
    bench.make_room(Side::Server, 1);
    bench.check();
    assert_eq!(*bench.connection.server.sent_urgent.borrow(), [0]);
}

#[test]
fn a_server_that_refuses_is_told_from_sides_that_leave() {
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
    bench.connection.server.error.set(Some(Errno::CONNRESET));
    let outcome = bench
        .connection
        .event(Side::Server, gone, &mut bench.scratch);
    assert_eq!(outcome, Outcome::Broken, "it had accepted");
    let mut bench = start();
    bench.connection.client.error.set(Some(Errno::CONNRESET));
    let outcome = bench
        .connection
        .event(Side::Client, gone, &mut bench.scratch);
    assert_eq!(outcome, Outcome::Broken);
}
