//! How many sessions the server takes before it is replaced, and whether its
//! workload asked for that.

/// The sessions of this server, counted against the most that it takes.
#[derive(Clone, Debug)]
pub(super) struct Recycling {
    /// The most that it takes; `None` if there is no such number.
    pub(super) most: Option<u32>,
    /// Those that were made, without those that ended unused.
    used: u32,
    /// Whether there may have been more, of which a restarted agent knows nothing.
    has_restarted: bool,
    /// Whether the workload wants to be replaced, whatever their number.
    is_asked_for: bool,
}

impl Recycling {
    pub(super) fn new(has_restarted: bool) -> Self {
        Self {
            most: None,
            used: 0,
            has_restarted,
            is_asked_for: false,
        }
    }

    /// A session was made.
    pub(super) fn begun(&mut self) {
        self.used = self.used.saturating_add(1);
    }

    /// A session has ended without a connection, also to a companion port.
    pub(super) fn unused(&mut self) {
        self.used = self.used.saturating_sub(1);
    }

    /// The workload wants to be replaced.
    pub(super) fn ask_for(&mut self) {
        self.is_asked_for = true;
    }

    /// Whether the server takes no more.
    pub(super) fn is_spent(&self) -> bool {
        let is_full = |most| self.has_restarted || self.used >= most;
        self.is_asked_for || self.most.is_some_and(is_full)
    }
}
