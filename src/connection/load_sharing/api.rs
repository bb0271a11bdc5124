//! The load-sharing port's API: the first receiving part of claim 1, dedicated
//! to request information, and the second sending part, which answers.
//!
//! Handlers translate between HTTP and [`Allocation`]; every refusal is a
//! problem detail (RFC 9457). The OpenAPI document is made from them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, Request, StatusCode, Version, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::watch;
use utoipa::OpenApi;
use utoipa::openapi::RefOr;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::allocation::Allocation;
use super::client_stream::MayWait;
use super::problem::Refused;
use crate::connection::control::Control;
use crate::connection::metrics::Metrics;
use crate::connection::sessions::Sessions;
use crate::forward::Transport;
use crate::pool::{MAX_PORT_NAME_LENGTH, PortProtocol};
use crate::selection;
use crate::session::body::parse_json_object;
use crate::session::{
    MAX_ID_BYTES, MAX_KEY_CHARACTERS, MAX_SERVER_CHARACTERS, MAX_UNAVAILABLE_PORTS,
    MAX_WAIT_SECONDS, PoolState, Problem, ProblemName, ServerState, Session, SessionId,
    SessionRequest, SessionState, UnavailablePort,
};
use crate::table::{Slot, Table};

/// Largest request body in bytes: keys of 128 characters, 17 names and metadata of
/// 4 KiB, with room for escapes: six bytes for each.
const MAX_BODY_BYTES: usize = 32 * 1024;

/// How long a body may take to arrive.
const BODY_DEADLINE: Duration = Duration::from_secs(5);

/// What handlers need.
pub struct Api {
    /// The way to a new session, and the processing servers' counts.
    pub allocation: Arc<Allocation>,
    /// The live sessions.
    pub sessions: Arc<Sessions>,
    /// The way to end a session.
    pub control: Arc<Control>,
    /// The counter of refusals.
    pub metrics: Arc<Metrics>,
    /// The table in use.
    pub table: watch::Receiver<Arc<Table>>,
    /// The address that clients get where the table has none.
    pub advertise: Option<String>,
}

/// Both ends of the connection that a request came by.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The client's address.
    pub client: SocketAddr,
    /// The address of this side, as the client reached it.
    pub local: SocketAddr,
}

/// The OpenAPI document of the load-sharing port.
#[derive(OpenApi)]
#[openapi(info(
    title = "portpool load sharing",
    description = "Ask for a session, connect to the port in the answer. Refusals are problem details (RFC 9457), also those that no path lists: 404 for another path, 405 with `allow` for another method, 400 for HTTP/1.1 without one Host field. What is not well-formed HTTP gets 400, a head of more than 100 fields or 16 KiB 431, without a body. A connection whose first request, or next head, takes longer than 30 s is closed."
))]
struct Document;

/// The API's routes.
pub fn router(api: Arc<Api>) -> Router {
    let (router, _) = documented();
    let metrics = api.metrics.clone();
    router
        .with_state(api)
        .fallback(|| async { Refused::NotFound })
        .method_not_allowed_fallback(|| async { Refused::MethodNotAllowed })
        .layer(middleware::from_fn(need_host))
        .layer(middleware::from_fn_with_state(metrics, count_refusals))
}

/// Answers what is not even a request.
async fn need_host(request: Request<Body>, next: Next) -> Response {
    // RFC 9112, section 3.2: a server must answer 400 then. An HTTP library
    // leaves that to us.
    let hosts = request.headers().get_all(header::HOST).iter().count();
    if request.version() == Version::HTTP_11 && hosts != 1 {
        return Refused::NoHost.into_response();
    }
    next.run(request).await
}

/// Counts problems.
pub(in crate::connection) async fn count_refusals(
    State(metrics): State<Arc<Metrics>>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let response = next.run(request).await;
    if let Some(ProblemName(cause)) = response.extensions().get() {
        metrics.request_refused(cause);
    }
    response
}

/// The OpenAPI document, as served at `/openapi.json`.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    documented().1
}

fn documented() -> (Router<Arc<Api>>, utoipa::openapi::OpenApi) {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(create_session))
        .routes(routes!(get_session, delete_session))
        .routes(routes!(get_pool))
        .routes(routes!(get_openapi))
        .split_for_parts();
    // The macro cannot say that a body may be left out, only that it may be null.
    let sessions = document.paths.paths.get_mut("/v1/sessions");
    let create = sessions.and_then(|path| path.post.as_mut());
    if let Some(RefOr::T(body)) = create.and_then(|operation| operation.request_body.as_mut()) {
        body.required = None;
    }
    (router, document)
}

/// Ask for a session: a connection port of your own for a while.
#[utoipa::path(
    post,
    path = "/v1/sessions",
    request_body(content = SessionRequest, description = "May be left out: any port"),
    responses(
        (status = 201, description = "Connect to `address` and `port` before `claimDeadline`", body = Session),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not application/json", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field is wrong, or what it names does not exist; `type` says which: `invalid-field`, `unknown-port`, `companion-port`, `unknown-server` (`server`), `unknown-session` (`near`), `key-reused`", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "No session now; `type` says why: `no-free-port` (all matching ports are in use), `not-listening` (the workload listens on none), `not-ready` (the servers' pods are not Ready, or their workloads have said so), `no-server` (servers are starting, being removed or being replaced), `not-selected` (servers did not answer), `not-confirmed` (the workloads did not take the session), `queue-full`, `shutting-down`, `departed` (the client ended its side)", body = Problem, content_type = "application/problem+json",
            headers(("retry-after" = u32, description = "Seconds"))),
    )
)]
async fn create_session(
    State(api): State<Arc<Api>>,
    Extension(ends): Extension<Ends>,
    Extension(may_wait): Extension<MayWait>,
    request: Request<Body>,
) -> Result<Response, Refused> {
    let (head, body) = request.into_parts();
    let request = read_request(&head.headers, body).await?;
    if request.wait_seconds > 0 {
        may_wait.say();
    }
    let address = reached_by(&head.uri, &head.headers, ends.local.ip());
    let client = ends.client.ip().to_canonical();
    let table = api.table.borrow().clone();
    let allocated = api.allocation.allocate(request, client, &table).await?;
    let session = api.describe(allocated.slot, &allocated.session, &address);
    let location = format!("/v1/sessions/{}", session.id);
    let created = (
        StatusCode::CREATED,
        [(header::LOCATION, location)],
        Json(session),
    );
    Ok(created.into_response())
}

/// A live session.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "Session id")),
    responses(
        (status = 200, description = "The session", body = Session),
        (status = 404, description = "Unknown, or over", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn get_session(
    State(api): State<Arc<Api>>,
    Extension(ends): Extension<Ends>,
    id: Result<Path<SessionId>, PathRejection>,
    request: Request<Body>,
) -> Result<Json<Session>, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    let known = api.sessions.get(&id).ok_or(Refused::NoSession)?;
    let address = reached_by(request.uri(), request.headers(), ends.local.ip());
    Ok(Json(api.describe(known.slot, &known.session, &address)))
}

/// Give a session back: its connections are cut and its port becomes free.
#[utoipa::path(
    delete,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "Session id")),
    responses(
        (status = 204, description = "Given back"),
        (status = 404, description = "Unknown, or over", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Its processing server is out of reach (`server-out-of-reach`)", body = Problem, content_type = "application/problem+json",
            headers(("retry-after" = u32, description = "Seconds"))),
    )
)]
async fn delete_session(
    State(api): State<Arc<Api>>,
    id: Result<Path<SessionId>, PathRejection>,
) -> Result<StatusCode, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    api.control.release(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Live state of the pool: servers, ports and sessions.
#[utoipa::path(get, path = "/v1/pool", responses((status = 200, description = "The pool", body = PoolState)))]
async fn get_pool(State(api): State<Arc<Api>>) -> Json<PoolState> {
    Json(api.pool_state())
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "OpenAPI")))]
async fn get_openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}

impl Api {
    /// Live state of the pool.
    #[must_use]
    pub fn pool_state(&self) -> PoolState {
        let table = self.table.borrow().clone();
        self.allocation.inspect(|queue| {
            let loads = queue.servers();
            let servers: Vec<ServerState> = table
                .rows
                .iter()
                .map(|row| {
                    let server = loads.get(row.slot).cloned().unwrap_or_default();
                    ServerState {
                        slot: row.slot,
                        server: row.server.clone(),
                        address: row.address.map(|address| address.to_string()),
                        attached: server.attached,
                        draining: server.is_draining(),
                        not_ready: server.is_not_ready(),
                        spent: server.is_spent(),
                        sessions: server.sessions(),
                        ports: server.ports,
                    }
                })
                .collect();
            PoolState {
                pool: table.pool.clone(),
                generation: table.generation,
                policy: table.load_sharing.policy,
                sessions: servers.iter().map(|server| server.sessions).sum(),
                free_ports: loads.free_ports(),
                waiting: u32::try_from(queue.waiting()).unwrap_or(u32::MAX),
                unavailable_ports: self.unavailable_ports(),
                servers,
            }
        })
    }

    /// The connection ports that cannot be listened on here, for [`PoolState`].
    fn unavailable_ports(&self) -> Vec<UnavailablePort> {
        let ports = self.control.unavailable_ports().into_iter();
        let described = ports.filter_map(|unavailable| {
            Some(UnavailablePort {
                port: unavailable.port()?,
                protocol: match unavailable.transport {
                    Transport::Tcp => PortProtocol::TCP,
                    Transport::Udp => PortProtocol::UDP,
                },
                reason: unavailable.reason,
            })
        });
        described.take(MAX_UNAVAILABLE_PORTS).collect()
    }

    fn describe(&self, slot: Slot, session: &selection::Session, reached_by: &str) -> Session {
        let table = self.table.borrow();
        let is_held = session.state == SessionState::Held;
        let first = &session.ports.first;
        Session {
            id: session.id.to_string(),
            address: table
                .advertised_address
                .clone()
                .or_else(|| self.advertise.clone())
                .unwrap_or_else(|| reached_by.to_owned()),
            port: first.port.get(),
            protocol: first.protocol,
            port_name: first.port_name.clone(),
            ports: session.ports.iter().map(Into::into).collect(),
            server: table
                .row(slot)
                .map(|row| row.server.clone())
                .unwrap_or_default(),
            state: session.state,
            claim_deadline: is_held.then_some(session.claim_deadline),
            expires: session.expires,
            created: session.created,
            workload_metadata: session.workload_metadata.clone(),
        }
    }
}

/// The address that the client reached us by: the host it names, since behind
/// a Service our own address is not the one it used; else our own.
fn reached_by(uri: &http::Uri, headers: &HeaderMap, local: IpAddr) -> String {
    let named = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let authority = uri
        .authority()
        .cloned()
        .or_else(|| named.and_then(|host| host.parse().ok()));
    let host = authority.as_ref().map(http::uri::Authority::host);
    host.filter(|host| !host.is_empty())
        .map(|host| {
            host.trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned()
        })
        .unwrap_or_else(|| local.to_canonical().to_string())
}

/// Reads and checks the request information.
async fn read_request(headers: &HeaderMap, body: Body) -> Result<SessionRequest, Refused> {
    let body = read_body(body).await?;
    if body.is_empty() {
        return Ok(SessionRequest::default());
    }
    let request: SessionRequest = parse_json_object(headers, &body)?;
    check(&request).map_err(Refused::InvalidField)?;
    Ok(request)
}

/// Reads a body, in time and within its bounds.
pub(in crate::connection) async fn read_body(body: Body) -> Result<Bytes, Refused> {
    // A body that announces its size is not read at all.
    if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
        return Err(Refused::TooLarge(MAX_BODY_BYTES));
    }
    let body = Limited::new(body, MAX_BODY_BYTES).collect();
    let body = tokio::time::timeout(BODY_DEADLINE, body)
        .await
        .map_err(|_| Refused::TooSlow(BODY_DEADLINE))?
        .map_err(|error| {
            if error.is::<LengthLimitError>() {
                Refused::TooLarge(MAX_BODY_BYTES)
            } else {
                Refused::BrokenOff
            }
        })?;
    Ok(body.to_bytes())
}

fn check(request: &SessionRequest) -> Result<(), String> {
    let keys = [
        (
            "idempotencyKey",
            &request.idempotency_key,
            MAX_KEY_CHARACTERS,
        ),
        ("affinityKey", &request.affinity_key, MAX_KEY_CHARACTERS),
        ("portName", &request.port_name, MAX_PORT_NAME_LENGTH),
        ("server", &request.server, MAX_SERVER_CHARACTERS),
        ("near", &request.near, MAX_ID_BYTES),
    ];
    for (name, value, most) in keys {
        let length = value.as_ref().map(|value| value.chars().count());
        if let Some(length) = length
            && !(1..=most).contains(&length)
        {
            return Err(format!(
                "{name} must have 1 to {most} characters; this one has {length}"
            ));
        }
    }
    if request.server.is_some() && request.near.is_some() {
        return Err("give server or near, not both".to_owned());
    }
    if request.wait_seconds > MAX_WAIT_SECONDS {
        return Err(format!("waitSeconds must not exceed {MAX_WAIT_SECONDS}"));
    }
    Ok(())
}
