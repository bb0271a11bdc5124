//! The local API for the workload beside the agent: which server it is, which
//! sessions it has and what happens to them; and what the workload may decide:
//! confirm or refuse a session where the pool asks it, change or end one, take no new
//! ones for a while, or be replaced. A program that does not ask works as before.
//!
//! It is served on a loopback address, which nothing outside the pod reaches by
//! itself, so it asks for no credentials. Web pages in a browser of the pod are
//! refused: a browser names the page in `Origin`, or another host in `Host`. A
//! program that connects where its clients ask, as a proxy does, must exclude the
//! address itself.
//!
//! What the workload says is the agent's own knowledge and is forgotten when the
//! agent restarts; its event streams end then, so that a workload notices.
//!
//! Decisions are in `book`; `session::workload` has what the answers look like, and
//! `refused` why there is none.

mod refused;

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use futures::Stream;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::de::DeserializeOwned;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::refused::Refused;
use super::metrics::Metrics;
use super::pace::Pace;
use super::server::Agent;
use super::workload_view::page_of;
use crate::admin::events::Watchers;
use crate::admin::web_pages;
use crate::session::body::parse_json_object;
use crate::session::{
    Amendment, Confirmation, PAGE_MAX, Problem, ProblemName, Readiness, ServerView, SessionId,
    SessionList, SessionListQuery, WorkloadEvent, WorkloadRefusal, WorkloadSession,
};

/// Most bytes of a request's body: metadata of 4 KiB with room for escapes, six bytes
/// for each.
const MAX_BODY_BYTES: usize = 32 * 1024;

/// Most clients that watch events at a time.
const WATCHERS_MAX: usize = 8;

/// Most connections at a time, so that a workload that does not close them does not
/// take the open files that the agent needs.
const CONNECTIONS_MAX: usize = 64;

/// How long a request's head may take, which bounds idle connections too.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// How long a request may take until its answer begins.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// Pause after a failed accept, so that a lack of descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The OpenAPI document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "portpool agent, local API",
        description = "For the workload of a processing server: its place, its sessions, and what it decides about them. Its address is in the environment variable PORTPOOL_API, a loopback address. Programs of the pod ask here; web pages are refused."
    ),
    components(schemas(WorkloadEvent))
)]
struct Document;

/// What the handlers need.
struct Api {
    agent: Agent,
    /// The address that clients connect to where the table has none.
    advertise: Option<String>,
    watchers: Watchers,
    /// When the workload may change what connection servers know.
    pace: Pace,
}

/// The OpenAPI document, as served at `/openapi.json`.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    web_pages::documented(documented().split_for_parts().1)
}

fn documented() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(get_server))
        .routes(routes!(set_readiness))
        .routes(routes!(drain))
        .routes(routes!(list_sessions))
        .routes(routes!(get_session, amend_session, end_session))
        .routes(routes!(confirm_session))
        .routes(routes!(refuse_session))
        .routes(routes!(watch_events))
        .routes(routes!(get_openapi))
}

/// Serves the API on `listener` until `stopping`, which cuts open requests. Clients
/// connect to `advertise` where the table has no address.
pub async fn serve(
    listener: TcpListener,
    agent: Agent,
    advertise: Option<String>,
    metrics: Arc<Metrics>,
    stopping: CancellationToken,
) {
    let api = Api {
        agent,
        advertise,
        watchers: Watchers::new(WATCHERS_MAX, stopping.clone()),
        pace: Pace::new(),
    };
    let (router, _) = documented().split_for_parts();
    let router = router
        .fallback(async || Refused::NotFound)
        .method_not_allowed_fallback(async || Refused::MethodNotAllowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(axum::middleware::from_fn(refuse_web_pages))
        .with_state(Arc::new(api));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Some(accepted) = stopping.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, _)) => {
                let place = stopping.run_until_cancelled(place(&places, &metrics));
                let Some(place) = place.await else {
                    return;
                };
                let connection = attend(stream, router.clone(), metrics.clone(), place);
                tokio::spawn(stopping.clone().run_until_cancelled_owned(connection));
            }
            Err(error) => {
                warn!(%error, "failed to accept a connection on the local API");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A place for a connection, which waits for it and is counted if there is none. The
/// semaphore is never closed.
async fn place(places: &Arc<Semaphore>, metrics: &Metrics) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Some(place);
    }
    metrics.request_refused("too-many-connections");
    places.clone().acquire_owned().await.ok()
}

/// Answers the requests of one connection, which has `place` meanwhile.
async fn attend(
    stream: TcpStream,
    router: Router,
    metrics: Arc<Metrics>,
    place: Option<OwnedSemaphorePermit>,
) {
    let service = hyper::service::service_fn(|request: http::Request<Incoming>| {
        let answer = router.clone().oneshot(request.map(Body::new));
        let metrics = &metrics;
        async move {
            let in_time = tokio::time::timeout(ANSWER_DEADLINE, answer).await;
            let answer = in_time.unwrap_or_else(|_| Ok(Refused::TooSlow.into_response()));
            let problem = |answer: &Response| answer.extensions().get().copied();
            if let Some(ProblemName(cause)) = answer.as_ref().ok().and_then(problem) {
                metrics.request_refused(cause);
            }
            answer
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        if error.is_parse() {
            metrics.request_refused("not-http");
        }
        debug!(%error, "connection to the local API broke");
    }
    drop(place);
}

/// Refuses what a browser sends for a web page, also for one that has this machine's
/// address under its own name.
async fn refuse_web_pages(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let host = headers.get(header::HOST).map(HeaderValue::to_str);
    let is_local = host.is_none_or(|host| host.is_ok_and(is_loopback));
    if !is_local {
        return web_pages::refusal();
    }
    web_pages::refuse(request, next).await
}

/// Whether `host`, with or without a port, is this machine.
fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let name = authority.host().trim_matches(['[', ']']);
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|it| it.is_loopback())
}

/// Which server this is: its name, its ports, and whether it takes sessions.
#[utoipa::path(
    get,
    path = "/v1/server",
    responses(
        (status = 200, description = "The server", body = ServerView),
        (status = 503, description = "There is no table yet", body = Problem, content_type = "application/problem+json",
            headers(("retry-after" = u32, description = "Seconds"))),
    )
)]
async fn get_server(State(api): State<Arc<Api>>) -> Result<Json<ServerView>, Refused> {
    let view = api.agent.view().ok_or(Refused::NoRow)?;
    let address = view.address.or_else(|| api.advertise.clone());
    Ok(Json(ServerView { address, ..view }))
}

/// Says whether the workload takes new sessions. Live ones go on. A restart of the
/// agent forgets it: say it again when a stream of events ends.
#[utoipa::path(
    put,
    path = "/v1/readiness",
    request_body = Readiness,
    responses(
        (status = 204, description = "Noted; connection servers learn of it"),
        (status = "4XX", description = "The body is not as described; `type` says how: `not-json`, `malformed`, `invalid-field`, `body` (too large)", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn set_readiness(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Refused> {
    let Readiness { ready } = parse_json_object(&headers, &body?).map_err(Refused::Readiness)?;
    api.pace.take_turn().await;
    api.agent.set_ready(ready);
    Ok(StatusCode::NO_CONTENT)
}

/// Takes no more sessions; when the live ones are over, the server is replaced by a
/// new one, which gets its connection ports. A restart of the agent forgets it: say
/// it again when a stream of events ends.
#[utoipa::path(
    post,
    path = "/v1/drain",
    responses((status = 204, description = "Noted; connection servers learn of it"))
)]
async fn drain(State(api): State<Arc<Api>>) -> StatusCode {
    api.agent.spend();
    StatusCode::NO_CONTENT
}

/// The live sessions, a page at a time.
#[utoipa::path(
    get,
    path = "/v1/sessions",
    params(SessionListQuery),
    responses(
        (status = 200, description = "A page of sessions", body = SessionList),
        (status = 422, description = "A parameter is wrong", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn list_sessions(
    State(api): State<Arc<Api>>,
    query: Result<Query<SessionListQuery>, QueryRejection>,
) -> Result<Json<SessionList>, Refused> {
    let Query(query) = query.map_err(|error| Refused::Parameter(error.body_text()))?;
    let page = page_of(&query, |after, most| api.agent.sessions_after(after, most));
    let wrong = || Refused::Parameter(format!("limit must be 1 to {PAGE_MAX}"));
    page.map(Json).ok_or_else(wrong)
}

/// A live session.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The session's id")),
    responses(
        (status = 200, description = "The session", body = WorkloadSession),
        (status = 404, description = "No live session has this id", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn get_session(
    State(api): State<Arc<Api>>,
    id: Result<Path<SessionId>, PathRejection>,
) -> Result<Json<WorkloadSession>, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    let session = api.agent.session(&id).ok_or(Refused::NoSession)?;
    Ok(Json(WorkloadSession::from(&session)))
}

/// Changes a session's metadata, or when it ends, by a JSON merge patch (RFC 7396).
#[utoipa::path(
    patch,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The session's id")),
    request_body(content(
        (Amendment = "application/merge-patch+json"),
        (Amendment = "application/json"),
    )),
    responses(
        (status = 200, description = "The session after the change", body = WorkloadSession),
        (status = "4XX", description = "The body is not as described, or no live session has this id; `type` says which: `no-session`, `not-json`, `malformed`, `invalid-field`, `body` (too large), `expires-passed`, `expires-too-far`", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn amend_session(
    State(api): State<Arc<Api>>,
    id: Result<Path<SessionId>, PathRejection>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<WorkloadSession>, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    let amendment = Amendment::parse(&headers, &body?)?;
    api.pace.take_turn().await;
    let session = api.agent.amend(&id, &amendment)?;
    Ok(Json(WorkloadSession::from(&session)))
}

/// Confirms a session that is `Offered`: its client gets the port. The same again changes
/// nothing.
#[utoipa::path(
    post,
    path = "/v1/sessions/{id}/confirm",
    params(("id" = String, Path, description = "The session's id")),
    request_body(content = Option<Confirmation>, description = "May be left out"),
    responses(
        (status = 200, description = "The session, which its client may use now", body = WorkloadSession),
        (status = "4XX", description = "The body is not as described (`not-json`, `malformed`, `invalid-field`, `body` if it is too large), no live session has this id, for example because its time to confirm is over or its client has left (`no-session`), the workload is not asked about it (`not-offered`), or it was confirmed before (`confirmed`)", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn confirm_session(
    State(api): State<Arc<Api>>,
    id: Result<Path<SessionId>, PathRejection>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<WorkloadSession>, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    let Confirmation { metadata } = optional(&headers, body)?;
    let session = api.agent.confirm_session(&id, &metadata)?;
    Ok(Json(WorkloadSession::from(&session)))
}

/// Refuses a session that is `Offered`: another processing server is asked for its
/// client, or it is refused.
#[utoipa::path(
    post,
    path = "/v1/sessions/{id}/refuse",
    params(("id" = String, Path, description = "The session's id")),
    request_body(content = Option<WorkloadRefusal>, description = "May be left out"),
    responses(
        (status = 204, description = "The session is over"),
        (status = "4XX", description = "The body is not as described (`not-json`, `malformed`, `invalid-field`, `body` if it is too large), no live session has this id, for example because its time to confirm is over or its client has left (`no-session`), the workload is not asked about it (`not-offered`), or it was confirmed before (`confirmed`)", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn refuse_session(
    State(api): State<Arc<Api>>,
    id: Result<Path<SessionId>, PathRejection>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    let refusal: WorkloadRefusal = optional(&headers, body)?;
    if !refusal.is_valid() {
        return Err(Refused::Reason);
    }
    api.agent.refuse_session(&id, refusal.reason.as_deref())?;
    Ok(StatusCode::NO_CONTENT)
}

/// A body that may be left out, and is a JSON object otherwise.
fn optional<T: Default + DeserializeOwned>(
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<T, Refused> {
    let body = body?;
    if body.is_empty() {
        return Ok(T::default());
    }
    Ok(parse_json_object(headers, &body)?)
}

/// Ends a session: its connections are cut, and its port goes to others.
#[utoipa::path(
    delete,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The session's id")),
    responses(
        (status = 204, description = "The session is over"),
        (status = 404, description = "No live session has this id", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn end_session(
    State(api): State<Arc<Api>>,
    id: Result<Path<SessionId>, PathRejection>,
) -> Result<StatusCode, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    let is_ended = api.agent.end(&id);
    is_ended
        .then_some(StatusCode::NO_CONTENT)
        .ok_or(Refused::NoSession)
}

/// Changes of sessions from now on, as server-sent events. The name of an event is
/// the state that the session is in now (`Offered`, `Held`, `Busy`, `Lingering`), `Ended`,
/// or `Amended` if its metadata or its end has changed; its data is a `WorkloadEvent`. A
/// watcher that reads too slowly gets an event `lost` with the number of those that it
/// missed. To miss nothing, watch first and then list.
#[utoipa::path(
    get,
    path = "/v1/events",
    responses(
        (status = 200, description = "A stream of events", body = String, content_type = "text/event-stream"),
        (status = 503, description = "Too many clients watch already", body = Problem, content_type = "application/problem+json",
            headers(("retry-after" = u32, description = "Seconds"))),
    )
)]
async fn watch_events(
    State(api): State<Arc<Api>>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refused> {
    let events = api.agent.watch();
    let stream = api.watchers.watch(events, WorkloadEvent::name);
    stream.ok_or(Refused::TooManyWatchers)
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "OpenAPI")))]
async fn get_openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}
