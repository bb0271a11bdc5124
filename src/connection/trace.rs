//! What is logged of a session: one span from its request to its end, and one
//! line at the end that says what it was.
//!
//! Several connection servers know of a session; those that made it or carried
//! connections of it log its end at `info`, the others at `debug`.

use std::net::IpAddr;
use std::time::Instant;

use tracing::field::Empty;
use tracing::{Span, debug, info, info_span, record_all};

use super::forward::Traffic;
use crate::selection::v1;

/// A session's span. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Trace {
    span: Span,
    since: Instant,
    is_made_here: bool,
}

impl Trace {
    /// Begins with a request from `client`.
    #[must_use]
    pub fn request(client: IpAddr) -> Self {
        Self {
            span: info_span!(parent: None, "session", %client, session = Empty, port = Empty, server = Empty),
            since: Instant::now(),
            is_made_here: true,
        }
    }

    /// Begins with what an agent tells of a session made elsewhere.
    #[must_use]
    pub fn learned() -> Self {
        Self {
            span: info_span!(parent: None, "session", session = Empty, port = Empty, server = Empty),
            since: Instant::now(),
            is_made_here: false,
        }
    }

    /// The span, to run the request in.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// `server` has selected a port.
    pub fn selected(&self, session: &v1::Session, server: &str) {
        let (id, port) = (session.session_id.as_str(), session.connection_port);
        record_all!(self.span, session = id, port = port, server = server);
        debug!(parent: &self.span, "session selected");
    }

    /// The session is over and its last connection closed, after `carried`.
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
        if self.is_made_here || connections > 0 {
            info!(parent: &self.span, cause, seconds, connections, upstream_bytes, downstream_bytes, "session ended");
        } else {
            debug!(parent: &self.span, cause, seconds, "session ended");
        }
    }
}

/// What a session has carried through this connection server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carried {
    connections: u64,
    traffic: Traffic,
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
