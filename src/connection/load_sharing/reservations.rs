//! Load sharing shared between requests: the struct that decides behind a
//! lock, reservations that settle themselves, and the futures of requests
//! that wait.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::servers::{Filter, LoadSharing, Place};
use crate::pool::Policy;
use crate::session::PortState;
use crate::table::Slot;

/// Counts of all processing servers, and who waits for them.
#[derive(Debug, Default)]
pub struct Reservations {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sharing: LoadSharing,
    waiters: HashMap<Place, oneshot::Sender<Reservation>>,
}

/// A request on its way to a server; settled when dropped.
#[derive(Debug)]
pub struct Reservation {
    /// The server's slot.
    pub slot: Slot,
    filter: Filter,
    reservations: Arc<Reservations>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let (slot, filter) = (self.slot, &self.filter);
        self.reservations
            .change(|sharing| sharing.settle(slot, filter));
    }
}

/// A request's place in the queue; left when dropped.
#[derive(Debug)]
pub struct Waiting {
    place: Place,
    filter: Filter,
    turn: oneshot::Receiver<Reservation>,
    reservations: Arc<Reservations>,
}

impl Waiting {
    /// Waits until a server is reserved for the request. `None` when the
    /// queue is gone.
    pub async fn turn(&mut self) -> Option<Reservation> {
        (&mut self.turn).await.ok()
    }

    /// The place, to wait there again after a server said no.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut inner = self.reservations.inner.lock();
        inner.sharing.leave(&self.filter, self.place);
        inner.waiters.remove(&self.place);
    }
}

impl Reservations {
    /// Changes the counts, then wakes the requests that can go now.
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut LoadSharing)) {
        let woken: Vec<_> = {
            let mut inner = self.inner.lock();
            change(&mut inner.sharing);
            let woken = inner.sharing.wake();
            woken
                .into_iter()
                .map(|(place, slot, filter)| {
                    let reservation = Reservation {
                        slot,
                        filter,
                        reservations: self.clone(),
                    };
                    (inner.waiters.remove(&place), reservation)
                })
                .collect()
        };
        // Outside the lock: a reservation nobody takes settles itself.
        for (waiter, reservation) in woken {
            if let Some(waiter) = waiter {
                let _ = waiter.send(reservation);
            }
        }
    }

    /// Sets the policy.
    pub fn set_policy(self: &Arc<Self>, policy: Policy) {
        self.change(|sharing| sharing.set_policy(policy));
    }

    /// An agent's stream is up; it counts from its first counts on.
    pub fn attach(self: &Arc<Self>, slot: Slot) {
        self.change(|sharing| sharing.server(slot).attached = true);
    }

    /// An agent's stream is down: the server gets nothing.
    pub fn detach(self: &Arc<Self>, slot: Slot) {
        self.change(|sharing| {
            let server = sharing.server(slot);
            server.attached = false;
            server.ports.clear();
        });
    }

    /// The server's row became, or is no longer, `Draining`.
    pub fn set_draining(self: &Arc<Self>, slot: Slot, is_draining: bool) {
        self.change(|sharing| sharing.server(slot).row_draining = is_draining);
    }

    /// An agent reported its ports.
    pub fn counted(self: &Arc<Self>, slot: Slot, ports: Vec<PortState>, is_draining: bool) {
        self.change(|sharing| {
            let server = sharing.server(slot);
            server.ports = ports;
            server.agent_draining = is_draining;
        });
    }

    /// Forgets slots that `keep` does not name.
    pub fn retain(self: &Arc<Self>, keep: impl Fn(Slot) -> bool) {
        self.change(|sharing| sharing.retain(keep));
    }

    /// Reserves a server now, leaving out `excluded` ones.
    #[must_use]
    pub fn reserve(
        self: &Arc<Self>,
        filter: &Filter,
        affinity_key: Option<&str>,
        excluded: &[Slot],
    ) -> Option<Reservation> {
        let slot = self
            .inner
            .lock()
            .sharing
            .reserve(filter, affinity_key, excluded)?;
        let (filter, reservations) = (filter.clone(), self.clone());
        Some(Reservation {
            slot,
            filter,
            reservations,
        })
    }

    /// Joins the queue, at `place` if it had one; `None` when it is full.
    #[must_use]
    pub fn wait(
        self: &Arc<Self>,
        filter: &Filter,
        affinity_key: Option<&str>,
        place: Option<Place>,
    ) -> Option<Waiting> {
        let (sender, turn) = oneshot::channel();
        let mut inner = self.inner.lock();
        let place = inner.sharing.wait(filter, affinity_key, place)?;
        inner.waiters.insert(place, sender);
        drop(inner);
        let waiting = Waiting {
            place,
            filter: filter.clone(),
            turn,
            reservations: self.clone(),
        };
        // What became free between the last look and now must not be missed.
        self.change(|_| {});
        Some(waiting)
    }

    /// Sends every waiting request away: its [`Waiting::turn`] gives `None`.
    pub fn dismiss(&self) {
        let waiters = std::mem::take(&mut self.inner.lock().waiters);
        drop(waiters);
    }

    /// Looks at the servers and the queue.
    pub fn inspect<T>(&self, look: impl FnOnce(&LoadSharing) -> T) -> T {
        look(&self.inner.lock().sharing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PortProtocol;

    fn counts(free: u32) -> Vec<PortState> {
        vec![PortState {
            name: "main".to_owned(),
            protocol: PortProtocol::TCP,
            free,
            held: 0,
            busy: 0,
            lingering: 0,
            not_listening: 0,
        }]
    }

    #[tokio::test]
    async fn a_waiting_request_gets_the_port_that_becomes_free() {
        let reservations = Arc::new(Reservations::default());
        reservations.attach(Slot(0));
        let mut waiting = reservations.wait(&Filter::default(), None, None).unwrap();
        reservations.counted(Slot(0), counts(1), false);
        assert_eq!(waiting.turn().await.unwrap().slot, Slot(0));
    }

    #[tokio::test]
    async fn a_turn_that_nobody_takes_goes_to_the_next() {
        let reservations = Arc::new(Reservations::default());
        reservations.attach(Slot(0));
        let first = reservations.wait(&Filter::default(), None, None).unwrap();
        let mut second = reservations.wait(&Filter::default(), None, None).unwrap();
        reservations.counted(Slot(0), counts(1), false);
        drop(first);
        assert_eq!(second.turn().await.unwrap().slot, Slot(0));
        assert_eq!(reservations.inspect(LoadSharing::waiting), 0);
    }

    #[test]
    fn a_dropped_reservation_is_settled() {
        let reservations = Arc::new(Reservations::default());
        reservations.attach(Slot(0));
        reservations.counted(Slot(0), counts(1), false);
        let any = Filter::default();
        let reservation = reservations.reserve(&any, None, &[]);
        assert!(reservation.is_some());
        assert!(reservations.reserve(&any, None, &[]).is_none());
        drop(reservation);
        assert!(reservations.reserve(&any, None, &[]).is_some());
    }
}
