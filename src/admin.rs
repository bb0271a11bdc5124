//! The admin port of every role: liveness, readiness, metrics, and the table
//! in use. It is not the load-sharing port, so that it can stay private.
//! `events` has streams of events, and `web_pages` refuses those, both for the local API
//! of agents, too.

pub mod events;
pub mod web_pages;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};
use tokio::net::TcpListener;

use crate::table::Table;

/// Content of the pages.
pub struct AdminState {
    /// Metrics of the role.
    pub registry: Arc<Registry>,
    /// Readiness of the role, or the reason why it is not ready.
    pub ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Port-relationship table in use; `None` in a role that has none.
    pub table: Option<TableInUse>,
    /// What only this role has.
    pub pages: Pages,
}

/// Gives the table that a role uses, as soon as it has one.
pub type TableInUse = Arc<dyn Fn() -> Option<Arc<Table>> + Send + Sync>;

/// Pages of one role, beside those of every role.
#[derive(Default)]
pub struct Pages {
    /// What serves them.
    pub router: Router,
    /// Their paths, a line each, for the page `/`.
    pub paths: &'static str,
}

/// Why the admin port cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("failed to listen on admin port {address}: {source}; choose another with --admin")]
pub struct AdminError {
    address: SocketAddr,
    source: io::Error,
}

/// Makes a metric, for example a counter, and registers it under `name`. `help`
/// is the sentence that `/metrics` shows with it.
pub fn register<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: Metric + Clone + Default,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// Registers the version of this program as a metric.
pub fn register_build_info(registry: &mut Registry) {
    #[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
    struct Build {
        version: &'static str,
    }
    let build = Info::new(Build {
        version: env!("CARGO_PKG_VERSION"),
    });
    registry.register("portpool_build", "The version that runs", build);
}

/// Listens for [`serve`]. A role calls this first, so that a port in use stops
/// it before it does anything.
///
/// # Errors
/// [`AdminError`], naming the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, AdminError> {
    let mut bound = TcpListener::bind(address).await;
    // A kernel without IPv6 has no `::`.
    if bound.is_err() && address.ip() == Ipv6Addr::UNSPECIFIED {
        let ipv4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
        bound = TcpListener::bind(ipv4).await.or(bound);
    }
    bound.map_err(|source| AdminError { address, source })
}

/// Serves the pages on `listener` until `shutdown`.
pub async fn serve(
    listener: TcpListener,
    mut state: AdminState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let Pages { router, paths } = std::mem::take(&mut state.pages);
    let table = state.table.take();
    let table_path = if table.is_some() {
        "/v1/port-table\n"
    } else {
        ""
    };
    let index = async move || format!("portpool\n\n/livez\n/readyz\n/metrics\n{table_path}{paths}");
    let mut router = Router::new()
        .route("/", get(index))
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Arc::new(state))
        .merge(router);
    if let Some(table) = table {
        router = router.route("/v1/port-table", get(async move || port_table(table())));
    }
    // Open requests are cut at shutdown: their clients poll and ask again.
    tokio::select! {
        served = axum::serve(listener, router) => {
            if let Err(error) = served {
                tracing::warn!(%error, "admin port failed");
            }
        }
        () = shutdown => {}
    }
}

async fn readyz(State(state): State<Arc<AdminState>>) -> Response {
    match (state.ready)() {
        Ok(()) => "ok\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn metrics(State(state): State<Arc<AdminState>>) -> Response {
    let mut text = String::new();
    if prometheus_client::encoding::text::encode(&mut text, &state.registry).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

fn port_table(table: Option<Arc<Table>>) -> Response {
    match table {
        Some(table) => axum::Json(table.as_ref().clone()).into_response(),
        None => (StatusCode::NOT_FOUND, "no table yet\n").into_response(),
    }
}
