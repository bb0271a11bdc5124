//! Load sharing shared between requests: [`Servers`] behind a lock, reservations
//! that settle themselves, and the futures of requests that wait.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::servers::{QueuePosition, Servers, Woken};
use crate::pool::Policy;
use crate::selection::Counts;
use crate::session::PortFilter;
use crate::table::Slot;

/// Counts of all processing servers, and the requests that wait for them.
#[derive(Debug, Default)]
pub struct Reservations {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    servers: Servers,
    waiters: HashMap<QueuePosition, oneshot::Sender<Reservation>>,
}

/// A request on its way to a server; settled when dropped.
#[derive(Debug)]
pub struct Reservation {
    /// The server's slot.
    pub slot: Slot,
    filter: PortFilter,
    reservations: Arc<Reservations>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let (slot, filter) = (self.slot, &self.filter);
        self.reservations
            .change(|servers| servers.settle(slot, filter));
    }
}

/// A request in the queue, which it leaves when dropped.
#[derive(Debug)]
pub struct Waiting {
    position: QueuePosition,
    filter: PortFilter,
    turn: oneshot::Receiver<Reservation>,
    reservations: Arc<Reservations>,
}

impl Waiting {
    /// Waits until a server is reserved for the request. `None` when the
    /// queue is gone.
    pub async fn turn(&mut self) -> Option<Reservation> {
        (&mut self.turn).await.ok()
    }

    /// The position, to wait there again after a server refused.
    #[must_use]
    pub fn position(&self) -> QueuePosition {
        self.position
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut inner = self.reservations.inner.lock();
        inner.servers.leave(&self.filter, self.position);
        inner.waiters.remove(&self.position);
    }
}

impl Reservations {
    /// Changes the counts, then wakes the requests that can go now.
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut Servers)) {
        let woken: Vec<_> = {
            let mut inner = self.inner.lock();
            change(&mut inner.servers);
            let woken = inner.servers.wake();
            woken
                .into_iter()
                .map(|woken| {
                    let Woken {
                        position,
                        slot,
                        filter,
                    } = woken;
                    let reservation = Reservation {
                        slot,
                        filter,
                        reservations: self.clone(),
                    };
                    (inner.waiters.remove(&position), reservation)
                })
                .collect()
        };
        // Outside the lock: a reservation that no request takes settles itself.
        for (waiter, reservation) in woken {
            if let Some(waiter) = waiter {
                let _ = waiter.send(reservation);
            }
        }
    }

    /// Sets the policy.
    pub fn set_policy(self: &Arc<Self>, policy: Policy) {
        self.change(|servers| servers.set_policy(policy));
    }

    /// An agent's stream is up; it counts from its first counts on.
    pub fn attach(self: &Arc<Self>, slot: Slot) {
        self.change(|servers| servers.server(slot).attached = true);
    }

    /// An agent's stream is down: the server gets no requests.
    pub fn detach(self: &Arc<Self>, slot: Slot) {
        self.change(|servers| {
            let server = servers.server(slot);
            server.attached = false;
            server.ports.clear();
        });
    }

    /// The server's row became, or is no longer, `Draining`.
    pub fn set_draining(self: &Arc<Self>, slot: Slot, is_draining: bool) {
        self.change(|servers| servers.server(slot).row_draining = is_draining);
    }

    /// An agent reported its ports.
    pub fn counted(self: &Arc<Self>, slot: Slot, counts: Counts) {
        self.change(|servers| {
            let server = servers.server(slot);
            server.ports = counts.ports;
            server.agent_draining = counts.draining;
        });
    }

    /// Forgets slots that `keep` does not name.
    pub fn retain(self: &Arc<Self>, keep: impl Fn(Slot) -> bool) {
        self.change(|servers| servers.retain(keep));
    }

    /// Reserves a server now, leaving out `excluded` ones.
    #[must_use]
    pub fn reserve(
        self: &Arc<Self>,
        filter: &PortFilter,
        affinity_key: Option<&str>,
        excluded: &[Slot],
    ) -> Option<Reservation> {
        let slot = self
            .inner
            .lock()
            .servers
            .reserve(filter, affinity_key, excluded)?;
        let (filter, reservations) = (filter.clone(), self.clone());
        Some(Reservation {
            slot,
            filter,
            reservations,
        })
    }

    /// Joins the queue, at `position` if it had one; `None` when it is full.
    #[must_use]
    pub fn wait(
        self: &Arc<Self>,
        filter: &PortFilter,
        affinity_key: Option<&str>,
        position: Option<QueuePosition>,
    ) -> Option<Waiting> {
        let (sender, turn) = oneshot::channel();
        let mut inner = self.inner.lock();
        let position = inner.servers.wait(filter, affinity_key, position)?;
        inner.waiters.insert(position, sender);
        drop(inner);
        let waiting = Waiting {
            position,
            filter: filter.clone(),
            turn,
            reservations: self.clone(),
        };
        // A port that became free since the last attempt must not be missed.
        self.change(|_| {});
        Some(waiting)
    }

    /// Refuses every waiting request: its [`Waiting::turn`] gives `None`.
    pub fn dismiss(&self) {
        let waiters = std::mem::take(&mut self.inner.lock().waiters);
        drop(waiters);
    }

    /// Reads from the servers and the queue.
    pub fn inspect<T>(&self, inspect: impl FnOnce(&Servers) -> T) -> T {
        inspect(&self.inner.lock().servers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PortProtocol;
    use crate::session::PortState;

    fn counts(free: u32) -> Counts {
        let ports = PortState {
            name: "main".to_owned(),
            protocol: PortProtocol::TCP,
            free,
            held: 0,
            busy: 0,
            lingering: 0,
            not_listening: 0,
        };
        Counts {
            ports: vec![ports],
            draining: false,
        }
    }

    #[tokio::test]
    async fn a_waiting_request_gets_the_port_that_becomes_free() {
        let reservations = Arc::new(Reservations::default());
        reservations.attach(Slot(0));
        let mut waiting = reservations
            .wait(&PortFilter::default(), None, None)
            .unwrap();
        reservations.counted(Slot(0), counts(1));
        assert_eq!(waiting.turn().await.unwrap().slot, Slot(0));
    }

    #[tokio::test]
    async fn a_turn_that_no_request_takes_goes_to_the_next() {
        let reservations = Arc::new(Reservations::default());
        reservations.attach(Slot(0));
        let first = reservations
            .wait(&PortFilter::default(), None, None)
            .unwrap();
        let mut second = reservations
            .wait(&PortFilter::default(), None, None)
            .unwrap();
        reservations.counted(Slot(0), counts(1));
        drop(first);
        assert_eq!(second.turn().await.unwrap().slot, Slot(0));
        assert_eq!(reservations.inspect(Servers::waiting), 0);
    }

    #[test]
    fn a_dropped_reservation_is_settled() {
        let reservations = Arc::new(Reservations::default());
        reservations.attach(Slot(0));
        reservations.counted(Slot(0), counts(1));
        let any = PortFilter::default();
        let reservation = reservations.reserve(&any, None, &[]);
        assert!(reservation.is_some());
        assert!(reservations.reserve(&any, None, &[]).is_none());
        drop(reservation);
        assert!(reservations.reserve(&any, None, &[]).is_some());
    }
}
