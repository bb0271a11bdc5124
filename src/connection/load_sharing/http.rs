//! Serves the API over HTTP/1.1 and HTTP/2 with every wait and buffer bounded.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::IntoResponse;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::api::Ends;
use super::client_stream::ClientStream;
use super::problem::Refused;

/// Most connections at once; further ones wait in the kernel's backlog. Each
/// may hold an HTTP/1 head of up to [`HEAD_BYTES`], so 128 MiB in the worst case.
const MAX_CONNECTIONS: usize = 8192;

/// Most bytes of a request's head.
const HEAD_BYTES: u32 = 16 * 1024;

/// How long a request's head may take, which bounds idle connections too.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// Requests of one HTTP/2 connection at once.
const MAX_STREAMS: u32 = 1024;

/// Pause after a failed accept, so that a lack of descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` on `listener` until `shutdown`, then lets requests that are
/// being answered finish within `grace`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) {
    let graceful = GracefulShutdown::new();
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // The end of the client's side is not the end of its interest.
        .half_close(true)
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(HEAD_BYTES as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(HEAD_BYTES)
        .keep_alive_interval(HEAD_DEADLINE)
        .keep_alive_timeout(HEAD_DEADLINE);
    tokio::pin!(shutdown);
    loop {
        let accept = async {
            let permit = connections.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accept => accepted,
            () = &mut shutdown => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => ClientStream::new(stream),
            Err(error) => {
                warn!(%error, "failed to accept a connection on the load-sharing port");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let has_requested = Arc::new(AtomicBool::new(false));
        let Some(service) = service(&stream, &router, has_requested.clone()) else {
            continue;
        };
        let connection = builder.serve_connection(TokioIo::new(stream.clone()), service);
        let connection = graceful.watch(connection.into_owned());
        tokio::spawn(async move {
            tokio::select! {
                served = connection => if let Err(error) = served {
                    debug!(%error, "connection to the load-sharing port broke");
                },
                () = no_request_in_time(&has_requested) => debug!("connection to the load-sharing port sent no request in time"),
            }
            stream.end().await;
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown())
        .await
        .is_err()
    {
        warn!("requests were still being answered at shutdown");
    }
}

/// Completes when the first request has not come in time. The builder's own
/// deadline begins only once it knows the HTTP version from the first bytes.
async fn no_request_in_time(has_requested: &AtomicBool) {
    tokio::time::sleep(HEAD_DEADLINE).await;
    if has_requested.load(Ordering::Relaxed) {
        std::future::pending().await
    }
}

/// The router as a service of this connection, which notes that a request came
/// in `has_requested`; `None` when the connection is gone already. It drops a
/// request whose client has left.
fn service(
    stream: &ClientStream,
    router: &Router,
    has_requested: Arc<AtomicBool>,
) -> Option<
    impl hyper::service::Service<
        http::Request<hyper::body::Incoming>,
        Response = axum::response::Response,
        Error = Infallible,
        Future: Send,
    > + Send
    + 'static,
> {
    // Answers are one small write; they should not wait for a next one.
    stream.tcp().set_nodelay(true).ok()?;
    let ends = Ends {
        client: stream.tcp().peer_addr().ok()?,
        local: stream.tcp().local_addr().ok()?,
    };
    let (router, stream) = (router.clone(), stream.clone());
    Some(hyper::service::service_fn(
        move |request: http::Request<hyper::body::Incoming>| {
            has_requested.store(true, Ordering::Relaxed);
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ends);
            let version = request.version();
            let (router, stream) = (router.clone(), stream.clone());
            async move {
                tokio::select! {
                    biased;
                    response = router.oneshot(request) => response,
                    () = stream.departure(version) => Ok(Refused::Departed.into_response()),
                }
            }
        },
    ))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_does_not_come_to_a_request_is_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let forever = std::future::pending();
        tokio::spawn(serve(listener, Router::new(), forever, Duration::ZERO));
        for sent in ["", "PRI * HTTP/2", "GET / HT", "GET / HTTP/1.1\r\nhost"] {
            let started = Instant::now();
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(sent.as_bytes()).await.unwrap();
            let mut answer = String::new();
            // A reset ends it too.
            let _ = stream.read_to_string(&mut answer).await;
            let took = started.elapsed();
            assert!(took <= 2 * HEAD_DEADLINE, "{sent:?} for {took:?}");
            assert!(took >= HEAD_DEADLINE, "{sent:?} for {took:?}");
        }
    }
}
