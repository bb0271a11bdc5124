//! Refuses web pages: a browser near a port shows pages of strangers, which must neither
//! see sessions nor change them.

use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::session::Problem;

/// Refuses a request of a web page: the browser names the page in `Origin`.
pub async fn refuse(request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::ORIGIN) {
        return refusal();
    }
    next.run(request).await
}

/// The answer to a web page.
#[must_use]
pub fn refusal() -> Response {
    let detail = "programs ask here, web pages do not: ask without Origin, and a local API at the address in PORTPOOL_API";
    let status = StatusCode::FORBIDDEN;
    Problem::response(status, "web-page", "Not for web pages", detail.to_owned())
}
