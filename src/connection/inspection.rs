//! The admin port's own pages of a connection server: which session is where,
//! what happens to sessions, and the live state of the pool. Administrators change
//! live sessions here.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::Request;
use axum::middleware;
use axum::response::sse::{Event, Sse};
use futures::Stream;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::load_sharing::api::{Api, count_refusals, read_body};
use super::load_sharing::problem::Refused;
use super::sessions::events::SessionEvent;
use super::sessions::listing::{PAGE_MAX, SessionInfo, SessionPage, SessionQuery};
use crate::admin::Pages;
use crate::admin::events::Watchers;
use crate::admin::web_pages;
use crate::session::{Amendment, PoolState, Problem, SessionId};

/// Most clients that watch events at a time.
const WATCHERS_MAX: usize = 32;

/// The OpenAPI document of these pages.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "portpool connection server, admin port",
        description = "Which session is where, as one connection server knows it. Every connection server of a pool knows all live sessions; connections are those through the one that is asked. Web pages are refused: a request with the field Origin gets 403 (`web-page`)."
    ),
    components(schemas(SessionEvent))
)]
struct Document;

/// What the handlers need.
struct Inspection {
    api: Arc<Api>,
    watchers: Watchers,
}

/// The pages. Watchers are sent away when `stopping`.
#[must_use]
pub fn pages(api: Arc<Api>, stopping: CancellationToken) -> Pages {
    let metrics = api.metrics.clone();
    let inspection = Inspection {
        api,
        watchers: Watchers::new(WATCHERS_MAX, stopping),
    };
    let (router, _) = documented().split_for_parts();
    Pages {
        router: router
            .route_layer(middleware::from_fn(web_pages::refuse))
            .route_layer(middleware::from_fn_with_state(metrics, count_refusals))
            .with_state(Arc::new(inspection)),
        paths: "/v1/pool\n/v1/sessions\n/v1/events\n/openapi.json\n",
    }
}

/// The OpenAPI document, as served at `/openapi.json` of the admin port.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    web_pages::documented(documented().split_for_parts().1)
}

fn documented() -> OpenApiRouter<Arc<Inspection>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(list_sessions))
        .routes(routes!(get_session, amend_session))
        .routes(routes!(watch_events))
        .routes(routes!(get_pool))
        .routes(routes!(get_openapi))
}

/// The live sessions, a page at a time.
#[utoipa::path(
    get,
    path = "/v1/sessions",
    params(SessionQuery),
    responses(
        (status = 200, description = "A page of sessions", body = SessionPage),
        (status = 422, description = "A parameter is wrong", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn list_sessions(
    State(inspection): State<Arc<Inspection>>,
    query: Result<Query<SessionQuery>, QueryRejection>,
) -> Result<Json<SessionPage>, Refused> {
    let Query(query) = query.map_err(|error| Refused::InvalidField(error.body_text()))?;
    let Some(length) = query.page_length() else {
        let message = format!("limit must be 1 to {PAGE_MAX}");
        return Err(Refused::InvalidField(message));
    };
    Ok(Json(inspection.api.sessions.list(&query, length)))
}

/// A live session.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The session's id")),
    responses(
        (status = 200, description = "The session", body = SessionInfo),
        (status = 404, description = "Unknown, or over", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn get_session(
    State(inspection): State<Arc<Inspection>>,
    id: Result<Path<SessionId>, PathRejection>,
) -> Result<Json<SessionInfo>, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    inspection.session(&id).map(Json)
}

/// Changes a live session's metadata, or when it ends, by a JSON merge patch (RFC
/// 7396). All connection servers and the workload learn of it: see `Amended` in
/// `/v1/events`.
#[utoipa::path(
    patch,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The session's id")),
    request_body(content(
        (Amendment = "application/merge-patch+json"),
        (Amendment = "application/json"),
    )),
    responses(
        (status = 200, description = "The session after the change", body = SessionInfo),
        (status = 400, description = "Not JSON, or broken off (`malformed`)", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "Unknown, or over; the change was made if the session ended right after it", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time (`too-slow`)", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The agent of the session's processing server is too old (`agent-too-old`)", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large (`too-large`)", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is neither application/merge-patch+json nor application/json (`not-json`)", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field is wrong; `type` says how: `invalid-field`, `expires-passed`, `expires-too-far`", body = Problem, content_type = "application/problem+json"),
        (status = 502, description = "The session's processing server did not understand the change, or refused it for an unknown reason (`not-amended`)", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The session's processing server is out of reach or has not answered in time (`server-out-of-reach`), after which the change may have been made; or too many sessions are being changed (`too-many-amendments`)", body = Problem, content_type = "application/problem+json",
            headers(("retry-after" = u32, description = "Seconds"))),
    )
)]
async fn amend_session(
    State(inspection): State<Arc<Inspection>>,
    id: Result<Path<SessionId>, PathRejection>,
    request: Request<Body>,
) -> Result<Json<SessionInfo>, Refused> {
    let Path(id) = id.map_err(|_| Refused::NoSession)?;
    let (head, body) = request.into_parts();
    let body = read_body(body).await?;
    let amendment = Amendment::parse(&head.headers, &body)?;
    inspection.api.control.amend(&id, amendment).await?;
    inspection.session(&id).map(Json)
}

impl Inspection {
    fn session(&self, id: &SessionId) -> Result<SessionInfo, Refused> {
        self.api.sessions.info(id).ok_or(Refused::NoSession)
    }
}

/// Changes of sessions from now on, as server-sent events. The name of an event
/// is the state that a session is in now (`Held`, `Busy`, `Lingering`), `Ended`, or
/// `Amended` if its metadata or its end has changed; its data is a `SessionEvent`. A watcher that reads too slowly gets
/// an event `lost` with the number of those that it missed. To miss nothing,
/// watch first and then list.
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
    State(inspection): State<Arc<Inspection>>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refused> {
    let events = inspection.api.sessions.watch();
    let stream = inspection.watchers.watch(events, SessionEvent::name);
    stream.ok_or(Refused::TooManyWatchers(WATCHERS_MAX))
}

/// Live state of the pool: sessions by server, ports by state.
#[utoipa::path(get, path = "/v1/pool", responses((status = 200, description = "The pool", body = PoolState)))]
async fn get_pool(State(inspection): State<Arc<Inspection>>) -> Json<PoolState> {
    Json(inspection.api.pool_state())
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "OpenAPI")))]
async fn get_openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}
