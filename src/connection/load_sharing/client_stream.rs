//! The connection of a client, which the HTTP library uses while someone else
//! watches whether the client is still there.

use std::io::{self, ErrorKind, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::Version;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

/// How long after the end of its side a client is first asked whether it is
/// still there. Nearly every request that does not wait has its answer by then, unless
/// it names a session in `near` that is not known yet.
const FIRST_PROBE: Duration = Duration::from_millis(250);

/// The same for a request that may wait: if it has to, its client holds a place
/// in the queue.
const FIRST_PROBE_OF_WAITING: Duration = Duration::from_millis(20);

/// How often it is asked after that. A client that leaves later than its side
/// ended is served for at most this long.
const NEXT_PROBE: Duration = Duration::from_secs(5);

/// How long a client may still send after its connection was ended.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// An interim response. A client of HTTP/1.1 has to skip it, whether it expects
/// one or not (RFC 9110, section 15.2), and this is the one that all do skip.
const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What a request says once it is read: that its client would wait.
#[derive(Clone, Debug, Default)]
pub(super) struct MayWait(Arc<Notify>);

impl MayWait {
    pub(super) fn say(&self) {
        self.0.notify_one();
    }
}

/// A stream whose clones are the same connection.
#[derive(Clone, Debug)]
pub(super) struct ClientStream(Arc<TcpStream>);

impl ClientStream {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self(Arc::new(stream))
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        &self.0
    }

    /// Completes when the client, whose request in `version` is being answered,
    /// has left.
    ///
    /// A reset says so. The end of the client's side does not: the client may
    /// have sent all that it has to say and still read, as `nc -N` and clients in
    /// the manner of HTTP/1.0 do (RFC 9112, section 9.6). Yet the kernel sends
    /// the same when a client closes its socket or dies. Only data tells them
    /// apart, since a host resets a connection on which no one reads them.
    /// So we send an interim response. Clients of HTTP/1.0 do not know those:
    /// there the end of the side counts as leaving, if the request may wait.
    ///
    /// May be polled only while no part of a response is under way, because it
    /// writes between responses.
    pub(super) async fn departure(&self, version: Version, may_wait: &MayWait) {
        if version > Version::HTTP_11 {
            // The library sees the end of HTTP/2 connections and streams itself.
            return std::future::pending().await;
        }
        // Readiness has errors only when the runtime stops. This one is reached at
        // the end of the client's side, but not by bytes that the library has not
        // read, for example of a next request.
        let _ = self.0.ready(Interest::PRIORITY).await;
        let reset = self.0.ready(Interest::ERROR);
        tokio::pin!(reset);
        let is_probed = version == Version::HTTP_11;
        let first_probe = async {
            tokio::select! {
                () = sleep(FIRST_PROBE), if is_probed => {}
                () = may_wait.0.notified() => {
                    // Without probes: a port that is free is selected by then, unless
                    // the session in `near` is not known yet.
                    let first = if is_probed { FIRST_PROBE_OF_WAITING } else { FIRST_PROBE };
                    sleep(first).await;
                }
            }
        };
        tokio::select! {
            _ = &mut reset => return,
            () = first_probe => {}
        }
        loop {
            let is_asked = is_probed
                && self
                    .0
                    .try_write(PROBE)
                    .is_ok_and(|sent| sent == PROBE.len());
            if !is_asked {
                return;
            }
            tokio::select! {
                _ = &mut reset => return,
                () = sleep(NEXT_PROBE) => {}
            }
        }
    }

    /// Ends our side and reads what the client still sends, for a moment. A
    /// connection that is closed with unread bytes is reset, and then the client
    /// may lose an answer that it has not read yet.
    pub(super) async fn end(&self) {
        // It may have been ended, or reset, before.
        let _ = SockRef::from(&*self.0).shutdown(Shutdown::Write);
        let discard = async {
            let mut scrap = vec![0; 16 * 1024];
            while self.0.readable().await.is_ok() {
                match self.0.try_read(&mut scrap) {
                    Ok(0) => return,
                    Err(error) if error.kind() != ErrorKind::WouldBlock => return,
                    _ => {}
                }
            }
        };
        // The bytes are dropped after that.
        let _ = timeout(LAST_BYTES, discard).await;
    }
}

/// `result` unless the socket was not ready after all.
fn unless_blocked<T>(result: io::Result<T>) -> Option<Poll<io::Result<T>>> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        result => Some(Poll::Ready(result)),
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(context))?;
            if let Some(read) = unless_blocked(self.0.try_read_buf(buffer)) {
                return read.map_ok(|_| ());
            }
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(context))?;
            if let Some(written) = unless_blocked(self.0.try_write_vectored(bytes)) {
                return written;
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match SockRef::from(&*self.0).shutdown(Shutdown::Write) {
            // The client has reset the connection.
            Err(error) if error.kind() == ErrorKind::NotConnected => Ok(()),
            shut => shut,
        })
    }
}
