//! Serves the API over HTTP/1.1 and HTTP/2 with every wait and buffer bounded.

use std::convert::Infallible;
use std::fmt::Display;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::IntoResponse;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulConnection;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::api::Ends;
use super::client_stream::{ClientStream, MayWait};
use super::problem::Refused;
use super::room::{Permit, Room, SHORT_DEADLINE};

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
    let room = Room::new();
    let (stopping, served) = (CancellationToken::new(), TaskTracker::new());
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
            let permit = room.enter().await;
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
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let requested = CancellationToken::new();
        let Some(service) = service(&stream, &router, requested.clone()) else {
            continue;
        };
        let connection = builder.serve_connection(TokioIo::new(stream.clone()), service);
        let connection = connection.into_owned();
        let (stopping, being_served) = (stopping.clone(), served.token());
        tokio::spawn(async move {
            attend(connection, &permit, &requested, &stopping).await;
            drop(being_served);
            tokio::select! {
                biased;
                () = stream.end() => {}
                () = permit.is_needed() => {}
            }
            drop(permit);
        });
    }
    drop(listener);
    stopping.cancel();
    served.close();
    if timeout(grace, served.wait()).await.is_err() {
        warn!("requests were still being answered at shutdown");
    }
}

/// Serves `connection`, whose first request is noted in `requested`. Once the
/// server is `stopping`, or room is short, the request under way is its last.
async fn attend<C: GracefulConnection<Error: Display>>(
    connection: C,
    permit: &Permit,
    requested: &CancellationToken,
    stopping: &CancellationToken,
) {
    let give_way = async {
        // One that has not sent a request would be refused it otherwise.
        requested.cancelled().await;
        permit.is_needed().await;
    };
    tokio::pin!(connection, give_way);
    let in_time = no_request_in_time(permit, requested);
    tokio::pin!(in_time);
    let mut is_last = false;
    loop {
        tokio::select! {
            served = &mut connection => {
                if let Err(error) = served {
                    debug!(%error, "connection to the load-sharing port broke");
                }
                return;
            }
            () = &mut in_time => {
                return debug!("connection to the load-sharing port sent no request in time");
            }
            () = &mut give_way, if !is_last => {}
            () = stopping.cancelled(), if !is_last => {}
        }
        is_last = true;
        connection.as_mut().graceful_shutdown();
    }
}

/// Completes when the first request has not come in time. The builder's own
/// deadline begins only once it knows the HTTP version from the first bytes.
async fn no_request_in_time(permit: &Permit, requested: &CancellationToken) {
    let short = async {
        permit.is_needed().await;
        sleep(SHORT_DEADLINE).await;
    };
    tokio::select! {
        () = sleep(HEAD_DEADLINE) => {}
        () = short => {}
        () = requested.cancelled() => std::future::pending().await,
    }
}

/// The router as a service of this connection, which notes that a request came
/// in `requested`; `None` when the connection is gone already. It drops a
/// request whose client has left.
fn service(
    stream: &ClientStream,
    router: &Router,
    requested: CancellationToken,
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
            requested.cancel();
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ends);
            let may_wait = MayWait::default();
            request.extensions_mut().insert(may_wait.clone());
            let version = request.version();
            let (router, stream) = (router.clone(), stream.clone());
            async move {
                tokio::select! {
                    biased;
                    response = router.oneshot(request) => response,
                    () = stream.departure(version, &may_wait) => Ok(Refused::Departed.into_response()),
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
