//! What a thread lends to the connection or flow that has its turn.

use super::gate::Traffic;
use super::tcp::pipes::Pipes;

/// Bytes that a thread reads at once, and the most that a direction keeps.
pub(super) const SCRATCH_BYTES: usize = 64 * 1024;

/// A thread's space for bytes in transit, its pipes, and the sum of both.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) space: Vec<u8>,
    pub(super) pipes: Pipes,
    /// Bytes carried since they were last added to the counters.
    pub(super) carried: Traffic,
}

impl Scratch {
    /// The scratch of one of `threads` threads.
    pub(super) fn new(threads: usize) -> Self {
        Self {
            space: vec![0; SCRATCH_BYTES],
            pipes: Pipes::new(threads),
            carried: Traffic::default(),
        }
    }
}
