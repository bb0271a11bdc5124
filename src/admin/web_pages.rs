//! Refuses web pages: a browser near a port shows pages of strangers, which must neither
//! see sessions nor change them.

use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use utoipa::openapi::path::Operation;
use utoipa::openapi::{Content, OpenApi, Ref, ResponseBuilder};

use crate::session::Problem;

/// `document` with the refusal among the answers of every operation. It has the schema
/// of [`Problem`].
#[must_use]
pub fn documented(mut document: OpenApi) -> OpenApi {
    let problem = Content::new(Some(Ref::from_schema_name("Problem")));
    let refusal = ResponseBuilder::new()
        .description("The request is of a web page (`web-page`)")
        .content("application/problem+json", problem)
        .build();
    for path in document.paths.paths.values_mut() {
        let operations: [&mut Option<Operation>; 5] = [
            &mut path.get,
            &mut path.put,
            &mut path.post,
            &mut path.delete,
            &mut path.patch,
        ];
        for operation in operations.into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            responses.insert("403".to_owned(), refusal.clone().into());
        }
    }
    document
}

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
