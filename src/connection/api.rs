//! The load-sharing port's API: the first receiving part of claim 1, dedicated
//! to request information, and the second sending part, which answers.
//!
//! Handlers translate between HTTP and [`Allocation`]; every refusal is a
//! problem detail (RFC 9457). The OpenAPI document is made from them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use http_body_util::{BodyExt, Limited};
use tokio::sync::watch;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::agents::Agents;
use super::allocation::{Allocation, Refusal};
use super::reservations::Reservations;
use super::sessions::{Sessions, canonical};
use crate::pool::PortProtocol;
use crate::selection::v1;
use crate::session::{
    MAX_KEY_BYTES, MAX_WAIT_SECONDS, PoolState, Problem, ServerState, Session, SessionRequest,
    SessionState,
};
use crate::table::Table;

/// Largest request body in bytes: keys of 128 bytes and names, with room for
/// escapes.
const MAX_BODY_BYTES: usize = 8 * 1024;

/// How long a body may take to arrive.
const BODY_DEADLINE: Duration = Duration::from_secs(5);

/// What handlers need.
pub struct Api {
    /// Makes sessions.
    pub allocation: Arc<Allocation>,
    /// Knows sessions.
    pub sessions: Arc<Sessions>,
    /// Knows servers.
    pub reservations: Arc<Reservations>,
    /// Carries out releases.
    pub agents: Arc<Agents>,
    /// The table in use.
    pub table: watch::Receiver<Arc<Table>>,
    /// Address that clients are told where the table has none.
    pub advertise: Option<String>,
}

/// Both ends of the connection that a request came by.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The client's address.
    pub client: SocketAddr,
    /// Ours, as the client reached it.
    pub local: SocketAddr,
}

/// The OpenAPI document of the load-sharing port.
#[derive(OpenApi)]
#[openapi(info(
    title = "portpool load sharing",
    description = "Ask for a session, connect to the port you are told. Errors are problem details (RFC 9457)."
))]
struct Document;

/// The API's routes.
pub fn router(api: Arc<Api>) -> Router {
    let (router, document) = documented();
    let document = Arc::new(document);
    router
        .with_state(api)
        .route(
            "/openapi.json",
            axum::routing::get(move || async move { Json((*document).clone()) }),
        )
        .fallback(|| async {
            problem(
                StatusCode::NOT_FOUND,
                "not-found",
                "No such resource",
                "see /openapi.json for what there is",
            )
        })
        .method_not_allowed_fallback(|| async {
            problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "method-not-allowed",
                "Method not allowed",
                "see /openapi.json for what there is",
            )
        })
}

/// The OpenAPI document, as served at `/openapi.json`.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    documented().1
}

fn documented() -> (Router<Arc<Api>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(create_session))
        .routes(routes!(get_session, delete_session))
        .routes(routes!(get_pool))
        .split_for_parts()
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
        (status = 422, description = "A field is wrong, or its port does not exist", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Nothing is free now", body = Problem, content_type = "application/problem+json",
            headers(("retry-after" = u32, description = "Seconds"))),
    )
)]
async fn create_session(
    State(api): State<Arc<Api>>,
    Extension(ends): Extension<Ends>,
    request: Request<Body>,
) -> Response {
    let (head, body) = request.into_parts();
    let request = match read_request(&head.headers, body).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let address = reached_by(&head.uri, &head.headers, ends.local.ip());
    let client = canonical(ends.client.ip());
    match api.allocation.allocate(request, client).await {
        Ok((slot, session)) => {
            let session = api.describe(slot, &session, &address);
            let location = format!("/v1/sessions/{}", session.id);
            (
                StatusCode::CREATED,
                [(header::LOCATION, location)],
                Json(session),
            )
                .into_response()
        }
        Err(refusal) => refused(&refusal),
    }
}

/// A live session.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "Session id")),
    responses(
        (status = 200, body = Session),
        (status = 404, description = "Unknown, or over", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn get_session(
    State(api): State<Arc<Api>>,
    Extension(ends): Extension<Ends>,
    Path(id): Path<String>,
    request: Request<Body>,
) -> Response {
    let Some((slot, session)) = api.sessions.get(&id) else {
        return no_session();
    };
    let address = reached_by(request.uri(), request.headers(), ends.local.ip());
    Json(api.describe(slot, &session, &address)).into_response()
}

/// Give a session back: its connections are cut and its port becomes free.
#[utoipa::path(
    delete,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "Session id")),
    responses(
        (status = 204, description = "Given back"),
        (status = 404, description = "Unknown, or over", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Its processing server is out of reach", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn delete_session(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Response {
    match api.sessions.release(&id) {
        None => no_session(),
        Some(Err(_)) => problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "server-out-of-reach",
            "Processing server out of reach",
            "the session's processing server is not attached now; try again in a second",
        ),
        Some(Ok(action)) => {
            api.agents.carry_out(action);
            StatusCode::NO_CONTENT.into_response()
        }
    }
}

/// Live state of the pool: servers, ports and sessions.
#[utoipa::path(get, path = "/v1/pool", responses((status = 200, body = PoolState)))]
async fn get_pool(State(api): State<Arc<Api>>) -> Json<PoolState> {
    Json(api.pool_state())
}

impl Api {
    /// Live state of the pool.
    #[must_use]
    pub fn pool_state(&self) -> PoolState {
        let table = self.table.borrow().clone();
        self.reservations.inspect(|sharing| {
            let servers: Vec<ServerState> = table
                .rows
                .iter()
                .map(|row| {
                    let server = sharing
                        .servers()
                        .get(&row.slot)
                        .cloned()
                        .unwrap_or_default();
                    ServerState {
                        slot: row.slot,
                        server: row.server.clone(),
                        address: row.address.map(|address| address.to_string()),
                        attached: server.attached,
                        draining: server.is_draining(),
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
                free_ports: sharing.free_ports(),
                waiting: u32::try_from(sharing.waiting()).unwrap_or(u32::MAX),
                servers,
            }
        })
    }

    fn describe(&self, slot: u32, session: &v1::Session, reached_by: &str) -> Session {
        let table = self.table.borrow();
        let state = match session.state() {
            v1::session::State::Busy => SessionState::Busy,
            v1::session::State::Lingering => SessionState::Lingering,
            v1::session::State::Held | v1::session::State::Unspecified => SessionState::Held,
        };
        let is_held = state == SessionState::Held;
        Session {
            id: session.session_id.clone(),
            address: table
                .advertised_address
                .clone()
                .or_else(|| self.advertise.clone())
                .unwrap_or_else(|| reached_by.to_owned()),
            port: u16::try_from(session.connection_port).unwrap_or_default(),
            protocol: PortProtocol::from_name(&session.protocol).unwrap_or_default(),
            port_name: session.port_name.clone(),
            server: table
                .row(slot)
                .map(|row| row.server.clone())
                .unwrap_or_default(),
            state,
            claim_deadline: is_held.then(|| timestamp(session.claim_deadline_ms)),
            created: timestamp(session.created_ms),
        }
    }
}

fn timestamp(unix_ms: u64) -> jiff::Timestamp {
    let unix_ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(unix_ms).unwrap_or_default()
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
        .unwrap_or_else(|| canonical(local).to_string())
}

/// Reads and checks the request information.
async fn read_request(headers: &HeaderMap, body: Body) -> Result<SessionRequest, Response> {
    let body = Limited::new(body, MAX_BODY_BYTES).collect();
    let body = match tokio::time::timeout(BODY_DEADLINE, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            let detail = format!("the body must not exceed {MAX_BODY_BYTES} bytes");
            return Err(problem(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too-large",
                "Body too large",
                &detail,
            ));
        }
        Ok(Err(_)) => {
            return Err(problem(
                StatusCode::BAD_REQUEST,
                "malformed",
                "Malformed body",
                "the body broke off",
            ));
        }
        Err(_) => {
            let detail = format!("the body must arrive within {} s", BODY_DEADLINE.as_secs());
            return Err(problem(
                StatusCode::REQUEST_TIMEOUT,
                "too-slow",
                "Body too slow",
                &detail,
            ));
        }
    };
    if body.is_empty() {
        return Ok(SessionRequest::default());
    }
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let media_type = content_type
        .and_then(|value| value.split(';').next())
        .unwrap_or_default();
    if !media_type.trim().eq_ignore_ascii_case("application/json") {
        let detail = "send the body with content-type: application/json";
        return Err(problem(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "not-json",
            "Unsupported media type",
            detail,
        ));
    }
    let request: SessionRequest = serde_json::from_slice(&body).map_err(|error| {
        if error.is_data() {
            problem(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid-field",
                "Invalid field",
                &error.to_string(),
            )
        } else {
            problem(
                StatusCode::BAD_REQUEST,
                "malformed",
                "Malformed JSON",
                &error.to_string(),
            )
        }
    })?;
    check(&request).map_err(|detail| {
        problem(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-field",
            "Invalid field",
            &detail,
        )
    })?;
    Ok(request)
}

fn check(request: &SessionRequest) -> Result<(), String> {
    let keys = [
        ("idempotencyKey", &request.idempotency_key, MAX_KEY_BYTES),
        ("affinityKey", &request.affinity_key, MAX_KEY_BYTES),
        ("portName", &request.port_name, 15),
    ];
    for (name, value, most) in keys {
        if let Some(value) = value
            && (value.is_empty() || value.len() > most)
        {
            return Err(format!(
                "{name} must have 1 to {most} bytes; this one has {}",
                value.len()
            ));
        }
    }
    if request.wait_seconds > MAX_WAIT_SECONDS {
        return Err(format!("waitSeconds must not exceed {MAX_WAIT_SECONDS}"));
    }
    Ok(())
}

fn refused(refusal: &Refusal) -> Response {
    let (status, title) = match refusal {
        Refusal::NoFreePort => (StatusCode::SERVICE_UNAVAILABLE, "No free port"),
        Refusal::NoServer => (StatusCode::SERVICE_UNAVAILABLE, "No processing server"),
        Refusal::QueueFull => (StatusCode::SERVICE_UNAVAILABLE, "Queue full"),
        Refusal::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "Shutting down"),
        Refusal::UnknownPort(_) => (StatusCode::UNPROCESSABLE_ENTITY, "Unknown port"),
        Refusal::KeyReused => (StatusCode::UNPROCESSABLE_ENTITY, "Idempotency key reused"),
    };
    let mut response = problem(status, refusal.name(), title, &refusal.to_string());
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

fn no_session() -> Response {
    let detail = "no live session has this id; it may be over";
    problem(
        StatusCode::NOT_FOUND,
        "no-session",
        "No such session",
        detail,
    )
}

fn problem(status: StatusCode, name: &str, title: &str, detail: &str) -> Response {
    let problem = Problem {
        kind: format!("urn:portpool:problem:{name}"),
        title: title.to_owned(),
        status: status.as_u16(),
        detail: detail.to_owned(),
    };
    let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
    (status, content_type, Json(problem)).into_response()
}
