//! The workload's side of its agent's local API, for workloads in Rust: which server
//! this is, its sessions and what happens to them, and what the workload decides.
//!
//! ```no_run
//! use portpool::client::workload::{Event, Workload};
//! use portpool::session::{Metadata, WorkloadState};
//!
//! # async fn example() -> Result<(), portpool::client::workload::WorkloadError> {
//! let workload = Workload::from_environment()?;
//! // Watch first, then list: nothing is missed.
//! let mut events = workload.events().await?;
//! let mut sessions = workload.sessions().await?;
//! loop {
//!     for session in sessions {
//!         if session.state != WorkloadState::Offered {
//!             continue;
//!         }
//!         let decided = match session.metadata.get("map") {
//!             Some("harbor") => workload.confirm(&session.id, Metadata::default()).await,
//!             _ => workload.refuse(&session.id, Some("there is no such map")).await,
//!         };
//!         match decided {
//!             // Its client has left, its time is over, or it was decided before.
//!             Err(error) if error.is_too_late() => {}
//!             decided => decided?,
//!         }
//!     }
//!     sessions = match events.next().await? {
//!         Some(Event::Change(change)) => change.session.into_iter().collect(),
//!         Some(Event::Lost(_)) => workload.sessions().await?,
//!         None => return Ok(()),
//!     };
//! }
//! # }
//! ```
//!
//! No request is repeated: an agent that was restarted has forgotten what the workload
//! has said, and its streams of events end then.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::session_path;
use crate::session::{
    Amendment, Confirmation, Metadata, Problem, Readiness, ServerView, SessionList, WorkloadEvent,
    WorkloadRefusal, WorkloadSession,
};

/// The environment variable with the address of the local API.
const ADDRESS_VARIABLE: &str = "PORTPOOL_API";

/// How long an answer may take to begin: the agent has 10 s for it.
const ANSWER_DEADLINE: Duration = Duration::from_secs(11);

/// How long a connection is kept that is not used: shorter than the agent keeps it, so
/// that no request goes to one that the agent is closing.
const IDLE_TIME: Duration = Duration::from_secs(20);

/// Most bytes of an answer: a page of sessions, each with the largest metadata of both
/// sides, each byte of it escaped, take 5 MiB; the rest is for their other fields.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;

/// Most bytes of an event that is not complete: metadata of both sides, with escapes.
const MAX_EVENT_BYTES: usize = 128 * 1024;

/// Why there is no answer, or another one than expected.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The environment has no address: this is no workload of a pool.
    #[error("{ADDRESS_VARIABLE} is not set: portpool sets it for the workloads of a pool")]
    NoAddress,
    /// Not `http://HOST:PORT`.
    #[error(
        "{0:?} is not the address of a local API: give http://HOST:PORT, as in {ADDRESS_VARIABLE}"
    )]
    Address(String),
    /// No session can have this id.
    #[error("{0:?} is not the id of a session")]
    SessionId(String),
    /// The agent refused.
    #[error("{0}")]
    Refused(Problem),
    /// There is no connection to the agent, or it broke.
    #[error("failed to ask the agent at {address}: {message}")]
    Unreachable {
        /// Address of the local API.
        address: String,
        /// The error with its causes.
        message: String,
    },
    /// No answer in time.
    #[error("no answer from the agent at {0} in time")]
    TimedOut(String),
    /// Something answered that is not an agent.
    #[error(
        "{address} answered with something else than expected (status {status}); is it a local API?"
    )]
    Unexpected {
        /// Address of the local API.
        address: String,
        /// Status of the answer.
        status: StatusCode,
    },
}

impl WorkloadError {
    /// Whether the session is over, or the workload has nothing to decide about it any
    /// more.
    #[must_use]
    pub fn is_too_late(&self) -> bool {
        matches!(self, Self::Refused(problem) if [404, 409].contains(&problem.status))
    }
}

/// A client of the local API. Cheap to clone; keeps connections.
#[derive(Clone, Debug)]
pub struct Workload {
    /// `HOST:PORT`.
    address: String,
    http: HttpClient<HttpConnector, Full<Bytes>>,
}

impl Workload {
    /// The client of the agent beside this program, at the address in `PORTPOOL_API`.
    ///
    /// # Errors
    /// [`WorkloadError::NoAddress`], [`WorkloadError::Address`].
    pub fn from_environment() -> Result<Self, WorkloadError> {
        let address = std::env::var(ADDRESS_VARIABLE);
        Self::new(&address.map_err(|_| WorkloadError::NoAddress)?)
    }

    /// A client of the local API at `address`, `http://HOST:PORT`. Does not connect yet.
    ///
    /// # Errors
    /// [`WorkloadError::Address`].
    pub fn new(address: &str) -> Result<Self, WorkloadError> {
        let invalid = || WorkloadError::Address(address.to_owned());
        let base: Uri = address.parse().map_err(|_| invalid())?;
        let is_plain = base.scheme_str() == Some("http")
            && base.port().is_some()
            && base.path() == "/"
            && base.query().is_none();
        let authority = base.authority().filter(|_| is_plain);
        Ok(Self {
            address: authority.ok_or_else(invalid)?.to_string(),
            http: HttpClient::builder(TokioExecutor::new())
                .pool_idle_timeout(IDLE_TIME)
                .build_http(),
        })
    }

    /// Which server this is.
    ///
    /// # Errors
    /// [`WorkloadError`]; refused with 503 while the agent has no table.
    pub async fn server(&self) -> Result<ServerView, WorkloadError> {
        self.ask(Method::GET, "/v1/server", None::<&()>).await
    }

    /// The live sessions, in the order of their ids.
    ///
    /// # Errors
    /// [`WorkloadError`].
    pub async fn sessions(&self) -> Result<Vec<WorkloadSession>, WorkloadError> {
        let mut sessions = Vec::new();
        let mut page = "/v1/sessions".to_owned();
        loop {
            let list: SessionList = self.ask(Method::GET, &page, None::<&()>).await?;
            sessions.extend(list.items);
            let Some(next) = list.next else {
                return Ok(sessions);
            };
            // Only ids that need no escapes, as in paths.
            path(&next)?;
            page = format!("/v1/sessions?after={next}");
        }
    }

    /// The live session `id`.
    ///
    /// # Errors
    /// [`WorkloadError`]; refused with 404 when it is over.
    pub async fn session(&self, id: &str) -> Result<WorkloadSession, WorkloadError> {
        self.ask(Method::GET, &path(id)?, None::<&()>).await
    }

    /// Changes of sessions from now on. The stream ends with the agent.
    ///
    /// # Errors
    /// [`WorkloadError`]; refused with 503 when too many watch already.
    pub async fn events(&self) -> Result<Events, WorkloadError> {
        let response = self.send(Method::GET, "/v1/events", None::<&()>).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let body = self.read(response).await?;
            return Err(self.refusal(status, &body));
        }
        Ok(Events {
            address: self.address.clone(),
            body: response.into_body(),
            read: Vec::new(),
        })
    }

    /// Confirms the offered session `id`: its client gets the port, and `metadata` with
    /// it. The same again changes nothing.
    ///
    /// # Errors
    /// [`WorkloadError`]; refused with 404 when its time is over, and with 409 when the
    /// workload is not asked about it or has decided before.
    pub async fn confirm(&self, id: &str, metadata: Metadata) -> Result<(), WorkloadError> {
        let path = format!("{}/confirm", path(id)?);
        let confirmation = Confirmation { metadata };
        let confirmed = self.ask(Method::POST, &path, Some(&confirmation)).await;
        confirmed.map(|_: WorkloadSession| ())
    }

    /// Refuses the offered session `id`. Its client sees the `reason`, of 1 to 256
    /// characters, if no other server takes it.
    ///
    /// # Errors
    /// As [`Workload::confirm`].
    pub async fn refuse(&self, id: &str, reason: Option<&str>) -> Result<(), WorkloadError> {
        let path = format!("{}/refuse", path(id)?);
        let reason = reason.map(str::to_owned);
        self.tell(Method::POST, &path, Some(&WorkloadRefusal { reason }))
            .await
    }

    /// Changes the metadata of the live session `id`, or when it ends. Returns it.
    ///
    /// # Errors
    /// [`WorkloadError`]; refused with 404 when it is over, and with 422 when it cannot
    /// be so.
    pub async fn amend(
        &self,
        id: &str,
        amendment: &Amendment,
    ) -> Result<WorkloadSession, WorkloadError> {
        self.ask(Method::PATCH, &path(id)?, Some(amendment)).await
    }

    /// Ends the live session `id`: its connections are cut.
    ///
    /// # Errors
    /// [`WorkloadError`]; refused with 404 when it is over.
    pub async fn end(&self, id: &str) -> Result<(), WorkloadError> {
        self.tell(Method::DELETE, &path(id)?, None::<&()>).await
    }

    /// Says whether the workload takes new sessions; live ones go on.
    ///
    /// # Errors
    /// [`WorkloadError`].
    pub async fn set_ready(&self, ready: bool) -> Result<(), WorkloadError> {
        self.tell(Method::PUT, "/v1/readiness", Some(&Readiness { ready }))
            .await
    }

    /// Takes no more sessions, so that the server is replaced when the live ones are over.
    ///
    /// # Errors
    /// [`WorkloadError`].
    pub async fn drain(&self) -> Result<(), WorkloadError> {
        self.tell(Method::POST, "/v1/drain", None::<&()>).await
    }

    /// Sends a request whose answer has no body.
    async fn tell(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<(), WorkloadError> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        let body = self.read(response).await?;
        match status {
            StatusCode::NO_CONTENT => Ok(()),
            _ => Err(self.refusal(status, &body)),
        }
    }

    /// Sends a request and parses its answer.
    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, WorkloadError> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        let body = self.read(response).await?;
        if status != StatusCode::OK {
            return Err(self.refusal(status, &body));
        }
        serde_json::from_slice(&body).map_err(|_| self.unexpected(status))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, WorkloadError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        let mut bytes = Bytes::new();
        if let Some(body) = body {
            request = request.header(header::CONTENT_TYPE, "application/json");
            let text = serde_json::to_vec(body).expect("strings and booleans serialize");
            bytes = text.into();
        }
        let request = request
            .body(Full::from(bytes))
            .map_err(|_| WorkloadError::Address(self.address.clone()))?;
        let answer = timeout(ANSWER_DEADLINE, self.http.request(request)).await;
        let answer = answer.map_err(|_| WorkloadError::TimedOut(self.address.clone()))?;
        answer.map_err(|error| unreachable(&self.address, error))
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, WorkloadError> {
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
        let body = timeout(ANSWER_DEADLINE, body).await;
        let body = body.map_err(|_| WorkloadError::TimedOut(self.address.clone()))?;
        let body = body.map_err(|error| WorkloadError::Unreachable {
            address: self.address.clone(),
            message: error.to_string(),
        })?;
        Ok(body.to_bytes())
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> WorkloadError {
        match serde_json::from_slice(body) {
            Ok(problem) => WorkloadError::Refused(problem),
            Err(_) => self.unexpected(status),
        }
    }

    fn unexpected(&self, status: StatusCode) -> WorkloadError {
        WorkloadError::Unexpected {
            address: self.address.clone(),
            status,
        }
    }
}

/// What a stream of events says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A session has changed.
    Change(Box<WorkloadEvent>),
    /// So many events were lost, because they were read too slowly: list the sessions.
    Lost(u64),
}

/// Changes of sessions as they happen.
#[derive(Debug)]
pub struct Events {
    address: String,
    body: Incoming,
    /// What has arrived of events that are not complete.
    read: Vec<u8>,
}

impl Events {
    /// The next event; `None` when the agent has ended the stream.
    ///
    /// # Errors
    /// [`WorkloadError`], after which there are no further events.
    pub async fn next(&mut self) -> Result<Option<Event>, WorkloadError> {
        loop {
            if let Some(end) = self.read.windows(2).position(|bytes| bytes == b"\n\n") {
                let block: Vec<u8> = self.read.drain(..end + 2).collect();
                // Comments keep the connection alive.
                if let Some(event) = parse(&block) {
                    return event.map(Some).ok_or_else(|| self.unexpected());
                }
                continue;
            }
            if self.read.len() > MAX_EVENT_BYTES {
                return Err(self.unexpected());
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.read.extend(frame.data_ref().into_iter().flatten()),
                Some(Err(error)) => return Err(unreachable(&self.address, error)),
                None => return Ok(None),
            }
        }
    }

    fn unexpected(&self) -> WorkloadError {
        WorkloadError::Unexpected {
            address: self.address.clone(),
            status: StatusCode::OK,
        }
    }
}

/// The event that `block` has; `None` if it has none, `Some(None)` if it does not parse.
///
/// Source: the HTML standard, section "Server-sent events".
fn parse(block: &[u8]) -> Option<Option<Event>> {
    let text = String::from_utf8_lossy(block);
    let field = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| Some(line.strip_prefix(name)?.trim_start().to_owned()))
    };
    let (name, data) = (field("event:")?, field("data:")?);
    Some(if name == "lost" {
        data.parse().ok().map(Event::Lost)
    } else {
        let change = serde_json::from_str(&data).ok();
        change.map(|change: WorkloadEvent| Event::Change(Box::new(change.named(&name))))
    })
}

/// The path of session `id`.
fn path(id: &str) -> Result<String, WorkloadError> {
    session_path(id).map_err(|_| WorkloadError::SessionId(id.to_owned()))
}

fn unreachable(
    address: &str,
    error: impl std::error::Error + Send + Sync + 'static,
) -> WorkloadError {
    WorkloadError::Unreachable {
        address: address.to_owned(),
        // With its causes: the outer error alone says "client error".
        message: format!("{:#}", anyhow::Error::new(error)),
    }
}
