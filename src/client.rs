//! The information processing apparatus of claim 1: it asks the load-sharing
//! port for a session and connects to the connection port of the answer.
//!
//! ```no_run
//! use portpool::client::Client;
//! use portpool::session::SessionRequest;
//!
//! # async fn example() -> Result<(), portpool::client::ClientError> {
//! let client = Client::new("127.0.0.1:7700")?;
//! let session = client.request(SessionRequest::default()).await?;
//! let stream = client.connect(&session).await?;
//! // Talk to the processing server over `stream`, then give the session back:
//! drop(stream);
//! client.release(&session.id).await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`workload`] is for the other side: workloads that ask their agent.

mod command;
pub mod workload;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::{HttpConnector, HttpInfo};
use hyper_util::rt::TokioExecutor;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::net::{TcpStream, UdpSocket, lookup_host};
use tokio::time::{Instant, sleep, timeout, timeout_at};

pub use self::command::{
    AskOptions, CommandError, ConnectOptions, ReleaseOptions, RequestOptions, connect, release,
    request,
};
use crate::session::{MAX_ID_BYTES, PoolState, Problem, Session, SessionRequest};

/// How long an answer may take beyond the time that a request waits.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// How long a connection may take to come up.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Pause before the next try after a connection was refused.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// Most bytes of an answer: a pool of 1000 servers takes about 500 KB.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;

/// How often a request is sent at most. It counts as one request, because each
/// try has the same idempotency key.
const TRIES: u32 = 3;

/// Pause between tries.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The type of the refusal of a connection server that stops. It says that
/// another one answers.
const SHUTTING_DOWN: &str = "urn:portpool:problem:shutting-down";

/// The type of the refusal to end a session whose processing server is not attached.
const OUT_OF_REACH: &str = "urn:portpool:problem:server-out-of-reach";

/// A client of one load-sharing port. Cheap to clone; keeps connections.
#[derive(Clone, Debug)]
pub struct Client {
    base: Uri,
    http: HttpClient<HttpConnector, Full<Bytes>>,
    /// Where the load-sharing port has answered last.
    answered: Arc<Mutex<Option<IpAddr>>>,
}

/// Why there is no answer, or another one than expected.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not `HOST:PORT` or `http://HOST:PORT`.
    #[error("{0:?} is not the address of a load-sharing port; give HOST:PORT or http://HOST:PORT")]
    Address(String),
    /// No session can have this id.
    #[error("{0:?} is not the id of a session; portpool request -o wide prints it")]
    SessionId(String),
    /// The server refused.
    #[error("{0}")]
    Refused(Problem),
    /// There is no connection to the load-sharing port, or it broke.
    #[error("failed to ask {address}: {message}")]
    Unreachable {
        /// Address of the load-sharing port.
        address: String,
        /// The error with its causes.
        message: String,
    },
    /// No answer in time.
    #[error("no answer from {0} in time; is a pool running there?")]
    TimedOut(String),
    /// Something answered that is not portpool.
    #[error(
        "{address} answered with something else than expected (status {status}); is it a load-sharing port?"
    )]
    Unexpected {
        /// Address of the load-sharing port.
        address: String,
        /// Status of the answer.
        status: StatusCode,
    },
    /// The connection port cannot be reached.
    #[error(
        "failed to connect to {address}: {source}; is the port reachable from here, and does the workload listen?"
    )]
    Connect {
        /// Address of the connection port.
        address: String,
        /// The system's error.
        source: io::Error,
    },
}

impl ClientError {
    /// Whether the request itself is wrong, so that asking again is no use.
    #[must_use]
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Address(_) | Self::SessionId(_) => true,
            Self::Refused(problem) => matches!(problem.status, 400 | 413 | 415 | 422),
            _ => false,
        }
    }

    /// Whether a request for a session may succeed later: nothing was free.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        matches!(self, Self::Refused(problem) if problem.status == 503 && problem.kind != OUT_OF_REACH)
    }

    /// Whether to ask again at once: the connection server stops, and another one
    /// answers.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        matches!(self, Self::Refused(problem) if problem.kind == SHUTTING_DOWN)
    }

    /// Whether asking again later may help: nothing was free, or a server did not
    /// answer.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Refused(problem) => problem.status == 503,
            Self::Unreachable { .. } | Self::TimedOut(_) => true,
            _ => false,
        }
    }
}

impl Client {
    /// A client of the load-sharing port at `address`: `HOST:PORT` or
    /// `http://HOST:PORT`. Does not connect yet.
    ///
    /// # Errors
    /// [`ClientError::Address`].
    pub fn new(address: &str) -> Result<Self, ClientError> {
        let invalid = || ClientError::Address(address.to_owned());
        let text = if address.contains("://") {
            address.trim_end_matches('/').to_owned()
        } else {
            format!("http://{address}")
        };
        let base: Uri = text.parse().map_err(|_| invalid())?;
        let is_plain =
            base.scheme_str() == Some("http") && base.path() == "/" && base.query().is_none();
        if !is_plain || base.port().is_none() {
            return Err(invalid());
        }
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_DEADLINE));
        connector.set_nodelay(true);
        Ok(Self {
            base,
            http: HttpClient::builder(TokioExecutor::new()).build(connector),
            answered: Arc::default(),
        })
    }

    /// Asks for a session. When the answer is lost, it asks again under the same
    /// idempotency key; a `request` without one gets a random one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn request(&self, mut request: SessionRequest) -> Result<Session, ClientError> {
        let key = || uuid::Uuid::new_v4().to_string();
        request.idempotency_key.get_or_insert_with(key);
        let patience = ANSWER_DEADLINE + Duration::from_secs(request.wait_seconds.into());
        let body = serde_json::to_vec(&request).expect("strings and numbers serialize");
        let mut tries = 1;
        loop {
            let answer = self
                .send(Method::POST, "/v1/sessions", body.clone(), patience)
                .await;
            match answer.and_then(|(status, body)| self.decode(status, &body)) {
                Err(ClientError::Unreachable { .. }) if tries < TRIES => {}
                result => return result,
            }
            tries += 1;
            sleep(RETRY_PAUSE).await;
        }
    }

    /// The live session `id`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with status 404 when it is over;
    /// [`ClientError::SessionId`].
    pub async fn get(&self, id: &str) -> Result<Session, ClientError> {
        let path = session_path(id)?;
        let (status, body) = self
            .send(Method::GET, &path, Vec::new(), ANSWER_DEADLINE)
            .await?;
        self.decode(status, &body)
    }

    /// Gives session `id` back; its connections are cut.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with status 404 when it is over;
    /// [`ClientError::SessionId`].
    pub async fn release(&self, id: &str) -> Result<(), ClientError> {
        let path = session_path(id)?;
        let (status, body) = self
            .send(Method::DELETE, &path, Vec::new(), ANSWER_DEADLINE)
            .await?;
        match status {
            StatusCode::NO_CONTENT => Ok(()),
            _ => Err(self.refusal(status, &body)),
        }
    }

    /// Live state of the pool.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn pool(&self) -> Result<PoolState, ClientError> {
        let (status, body) = self
            .send(Method::GET, "/v1/pool", Vec::new(), ANSWER_DEADLINE)
            .await?;
        self.decode(status, &body)
    }

    /// Connects to the session's connection port.
    ///
    /// A refused connection is tried again for up to 5 s. Connection servers
    /// never refuse, so one has just died. Then the address soon leads to
    /// another one, or to the next process of this one, which knows the session.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub async fn connect(&self, session: &Session) -> Result<TcpStream, ClientError> {
        let address = endpoint(session);
        let deadline = Instant::now() + CONNECT_DEADLINE;
        let connecting = async {
            loop {
                match self
                    .first_of(session, async |to| TcpStream::connect(to).await)
                    .await
                {
                    Err(error)
                        if error.kind() == io::ErrorKind::ConnectionRefused
                            && Instant::now() + REFUSED_PAUSE < deadline =>
                    {
                        sleep(REFUSED_PAUSE).await
                    }
                    connected => return connected,
                }
            }
        };
        let connected = timeout_at(deadline, connecting)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let prepared = connected.and_then(|stream| stream.set_nodelay(true).map(|()| stream));
        prepared.map_err(|source| ClientError::Connect { address, source })
    }

    /// A UDP socket that exchanges datagrams with the session's connection port
    /// only.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub async fn connect_udp(&self, session: &Session) -> Result<UdpSocket, ClientError> {
        let connected = self.first_of(session, async |to: SocketAddr| {
            let any = match to.ip() {
                IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(to).await?;
            Ok(socket)
        });
        connected.await.map_err(|source| ClientError::Connect {
            address: endpoint(session),
            source,
        })
    }

    /// The first success of `connect` at an address of the session's port, else
    /// the first error. A name may have addresses that the pool does not listen
    /// on, and over UDP nothing tells so. The address where the load-sharing port
    /// has answered therefore comes first, if it is one of them.
    async fn first_of<T>(
        &self,
        session: &Session,
        connect: impl AsyncFn(SocketAddr) -> io::Result<T>,
    ) -> io::Result<T> {
        let found = lookup_host((session.address.as_str(), session.port)).await?;
        let mut addresses: Vec<SocketAddr> = found.collect();
        let answered = *self.answered.lock();
        addresses.sort_by_key(|address| Some(address.ip()) != answered);
        let mut failed = None;
        for address in addresses {
            match connect(address).await {
                Ok(connected) => return Ok(connected),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        Err(failed.unwrap_or_else(|| io::Error::other("the name has no address")))
    }

    fn address(&self) -> String {
        self.base
            .authority()
            .map(ToString::to_string)
            .unwrap_or_default()
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        patience: Duration,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let address = self.address();
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{address}{path}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body))
            .map_err(|_| ClientError::Address(format!("{address}{path}")))?;
        let unreachable = |message: String| ClientError::Unreachable {
            address: address.clone(),
            message,
        };
        let exchange = async {
            // With its causes: the outer error alone says "client error".
            let response = self
                .http
                .request(request)
                .await
                .map_err(|error| unreachable(format!("{:#}", anyhow::Error::new(error))))?;
            let (head, body) = response.into_parts();
            if let Some(connection) = head.extensions.get::<HttpInfo>() {
                *self.answered.lock() = Some(connection.remote_addr().ip());
            }
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| unreachable(error.to_string()))?;
            Ok((head.status, body.to_bytes()))
        };
        timeout(patience, exchange)
            .await
            .unwrap_or(Err(ClientError::TimedOut(address.clone())))
    }

    fn decode<T: DeserializeOwned>(
        &self,
        status: StatusCode,
        body: &[u8],
    ) -> Result<T, ClientError> {
        if !status.is_success() {
            return Err(self.refusal(status, body));
        }
        let address = self.address();
        serde_json::from_slice(body).map_err(|_| ClientError::Unexpected { address, status })
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ClientError {
        match serde_json::from_slice(body) {
            Ok(problem) => ClientError::Refused(problem),
            Err(_) => ClientError::Unexpected {
                address: self.address(),
                status,
            },
        }
    }
}

/// The path of session `id`.
fn session_path(id: &str) -> Result<String, ClientError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    if (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(is_plain) {
        Ok(format!("/v1/sessions/{id}"))
    } else {
        Err(ClientError::SessionId(id.to_owned()))
    }
}

/// Where to connect: `HOST:PORT`, with brackets around an IPv6 address.
#[must_use]
pub fn endpoint(session: &Session) -> String {
    if session.address.contains(':') {
        format!("[{}]:{}", session.address, session.port)
    } else {
        format!("{}:{}", session.address, session.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_request_for_a_session_finds_nothing_free() {
        for (name, status, exhausted, may_pass) in [
            ("no-free-port", 503, true, true),
            ("not-ready", 503, true, true),
            ("server-out-of-reach", 503, false, true),
            ("no-session", 404, false, false),
        ] {
            let error = ClientError::Refused(Problem {
                kind: format!("urn:portpool:problem:{name}"),
                title: String::new(),
                status,
                detail: String::new(),
            });
            let found = (error.is_exhausted(), error.may_pass());
            assert_eq!(found, (exhausted, may_pass), "{name}");
        }
    }
}
