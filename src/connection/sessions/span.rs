//! What is logged of a session: one span from its request to its end, and one
//! line at the end that says what it was.
//!
//! Several connection servers know of a session; those that made it or carried
//! connections of it log its end at `info`, the others at `debug`.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tracing::field::Empty;
use tracing::{Span, debug, info, info_span, record_all};

use crate::forward::Traffic;
use crate::selection::Session;

/// A session's span. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionSpan {
    span: Span,
    since: Instant,
    /// The address of the requester, if the session was requested here.
    client: Option<IpAddr>,
}

impl SessionSpan {
    /// Begins with a request from `client`.
    #[must_use]
    pub fn request(client: IpAddr) -> Self {
        Self {
            span: info_span!(parent: None, "session", %client, session = Empty, port = Empty, further_ports = Empty, server = Empty),
            since: Instant::now(),
            client: Some(client),
        }
    }

    /// Begins with an agent's report of a session made elsewhere.
    #[must_use]
    pub fn learned() -> Self {
        Self {
            span: info_span!(parent: None, "session", session = Empty, port = Empty, further_ports = Empty, server = Empty),
            since: Instant::now(),
            client: None,
        }
    }

    /// Continues a session that another process has known for `age`.
    #[must_use]
    pub fn taken_over(client: Option<IpAddr>, age: Duration) -> Self {
        let begun = client.map_or_else(Self::learned, Self::request);
        let since = begun.since.checked_sub(age).unwrap_or(begun.since);
        Self { since, ..begun }
    }

    /// The address of the requester, if the session was requested here.
    #[must_use]
    pub fn client(&self) -> Option<IpAddr> {
        self.client
    }

    /// How long it has been known here.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// The span, to run the request in.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// `server` has selected a port.
    pub fn selected(&self, session: &Session, server: &str) {
        let (id, port) = (session.id.as_str(), session.ports.first.port.get());
        record_all!(self.span, session = id, port = port, server = server);
        if !session.ports.rest.is_empty() {
            let further = session.ports.rest.iter().map(|it| it.port.to_string());
            let further: Vec<String> = further.collect();
            self.span.record("further_ports", further.join(","));
        }
        debug!(parent: &self.span, "session selected");
    }

    /// The session has ended and its last connection is closed, after `carried`.
    pub fn ended(&self, cause: &'static str, carried: &Carried) {
        let Carried {
            connections,
            traffic,
        } = *carried;
        let Traffic {
            upstream_bytes,
            downstream_bytes,
        } = traffic;
        let seconds = self.since.elapsed().as_secs_f64();
        if self.client.is_some() || connections > 0 {
            info!(parent: &self.span, cause, seconds, connections, upstream_bytes, downstream_bytes, "session ended");
        } else {
            debug!(parent: &self.span, cause, seconds, "session ended");
        }
    }
}

/// The connections and bytes of a session through this connection server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// The number of connections and UDP flows, live ones included.
    pub connections: u64,
    /// The bytes of those that have ended.
    pub traffic: Traffic,
}

impl Carried {
    /// A connection or UDP flow was admitted.
    pub fn opened(&mut self) {
        self.connections += 1;
    }

    /// A connection or UDP flow has ended.
    pub fn closed(&mut self, traffic: Traffic) {
        self.traffic.upstream_bytes += traffic.upstream_bytes;
        self.traffic.downstream_bytes += traffic.downstream_bytes;
    }
}
