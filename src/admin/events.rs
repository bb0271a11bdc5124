//! Streams of server-sent events, for a bounded number of clients.

use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse::{Event, KeepAlive, Sse};
use futures::{Stream, StreamExt};
use serde::Serialize;
use tokio::sync::{Semaphore, broadcast};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError::Lagged;
use tokio_util::sync::CancellationToken;

/// The places of those who watch events.
#[derive(Debug)]
pub struct Watchers {
    places: Arc<Semaphore>,
    stopping: CancellationToken,
}

impl Watchers {
    /// Places for `most` at a time, who are sent away when `stopping`.
    #[must_use]
    pub fn new(most: usize, stopping: CancellationToken) -> Self {
        Self {
            places: Arc::new(Semaphore::new(most)),
            stopping,
        }
    }

    /// The `events` from now on, each with its `name`; `None` when all places are
    /// taken. A watcher that reads too slowly gets an event `lost` with the number of
    /// those that it missed.
    pub fn watch<E: Clone + Serialize + Send + 'static>(
        &self,
        events: broadcast::Receiver<E>,
        name: fn(&E) -> &'static str,
    ) -> Option<Sse<impl Stream<Item = Result<Event, Infallible>> + use<E>>> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let stopping = self.stopping.clone().cancelled_owned();
        let events = BroadcastStream::new(events).take_until(stopping);
        let events = events.map(move |event| {
            let _place = &place;
            Ok(match event {
                Ok(event) => Event::default()
                    .event(name(&event))
                    .json_data(&event)
                    .unwrap_or_default(),
                Err(Lagged(lost)) => Event::default().event("lost").data(lost.to_string()),
            })
        });
        Some(Sse::new(events).keep_alive(KeepAlive::default()))
    }
}
