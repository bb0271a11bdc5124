//! Output from a thread of its own, because a reader that is slow or has stopped
//! must not hold up anything else. What does not fit into the queue is dropped
//! and counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// How long a flush may take.
const FLUSH_LIMIT: Duration = Duration::from_millis(300);

/// Pause before the next try to flush a full queue.
const FLUSH_PAUSE: Duration = Duration::from_millis(10);

/// Where the thread writes to. It may block.
pub trait Sink: Send + 'static {
    /// What the queue has.
    type Item: Send + 'static;

    /// Writes `item`.
    fn write(&mut self, item: Self::Item);

    /// Reports that `items` were dropped since the last report.
    fn report_dropped(&mut self, items: u64);
}

/// The queue of what is to be written. Clones are the same queue.
#[derive(Debug)]
pub struct Output<T> {
    queue: SyncSender<Task<T>>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Task<T> {
    Write(T),
    /// Dropped when everything before it is written.
    Flush(Sender<()>),
}

impl<T> Clone for Output<T> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            dropped: Arc::clone(&self.dropped),
        }
    }
}

impl<T: Send + 'static> Output<T> {
    /// Starts a thread that writes to `sink`; at most `capacity` items wait for
    /// it. It ends with the last clone of the result.
    pub fn new(capacity: usize, mut sink: impl Sink<Item = T>) -> Self {
        let (queue, tasks) = sync_channel(capacity);
        let dropped = Arc::default();
        let output = Self {
            queue,
            dropped: Arc::clone(&dropped),
        };
        thread::spawn(move || run(&tasks, &mut sink, &dropped));
        output
    }

    /// Has `item` written. If it does not fit, it is dropped and counted.
    pub fn send(&self, item: T) {
        if !self.send_unless_full(item) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has `item` written if it fits; returns whether it does.
    pub fn send_unless_full(&self, item: T) -> bool {
        self.queue.try_send(Task::Write(item)).is_ok()
    }

    /// Waits until everything is written, but not for long: the reader may have
    /// stopped.
    pub fn flush(&self) {
        let deadline = Instant::now() + FLUSH_LIMIT;
        let (writing, written) = channel();
        let mut flush = Task::Flush(writing);
        while let Err(TrySendError::Full(unsent)) = self.queue.try_send(flush) {
            if Instant::now() > deadline {
                return;
            }
            flush = unsent;
            thread::sleep(FLUSH_PAUSE);
        }
        let _ = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

fn run<S: Sink>(tasks: &Receiver<Task<S::Item>>, sink: &mut S, dropped: &AtomicU64) {
    for task in tasks {
        match task {
            Task::Write(item) => sink.write(item),
            Task::Flush(writing) => drop(writing),
        }
        let items = dropped.swap(0, Ordering::Relaxed);
        if items > 0 {
            sink.report_dropped(items);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A sink that waits for a permit before each item, and says what it wrote.
    struct Slow {
        permits: mpsc::Receiver<()>,
        written: mpsc::Sender<String>,
    }

    impl Sink for Slow {
        type Item = u32;

        fn write(&mut self, item: u32) {
            let _ = self.permits.recv();
            let _ = self.written.send(item.to_string());
        }

        fn report_dropped(&mut self, items: u64) {
            let _ = self.written.send(format!("{items} dropped"));
        }
    }

    fn slow(capacity: usize) -> (Output<u32>, mpsc::Sender<()>, mpsc::Receiver<String>) {
        let (permit, permits) = mpsc::channel();
        let (sent, written) = mpsc::channel();
        let sink = Slow {
            permits,
            written: sent,
        };
        (Output::new(capacity, sink), permit, written)
    }

    #[test]
    fn what_does_not_fit_is_dropped_and_counted_when_its_reader_goes_on() {
        let (output, permit, written) = slow(2);
        for item in 0..100 {
            output.send(item);
        }
        drop(permit);
        output.flush();
        let written: Vec<String> = written.try_iter().collect();
        // Two were in the queue, and one was being written if the thread was quick.
        let lines = written.len() - 1;
        assert!((2..=3).contains(&lines), "{written:?}");
        assert_eq!(written[1], format!("{} dropped", 100 - lines));
    }

    #[test]
    fn a_flush_does_not_wait_for_a_reader_that_has_stopped() {
        let (output, _permit, _written) = slow(1);
        for item in 0..3 {
            output.send(item);
        }
        let started = Instant::now();
        output.flush();
        let waited = started.elapsed();
        assert!(waited >= FLUSH_LIMIT, "{waited:?}");
        assert!(waited < FLUSH_LIMIT * 10, "{waited:?}");
    }
}
