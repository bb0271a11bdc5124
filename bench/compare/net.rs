//! Sockets and epoll for generator and sink.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::net::RecvFlags;
use socket2::{Domain, Socket, Type};

pub use epoll::EventFlags as Flags;

/// Longest that a connection may take to be made or a message to come back.
pub const SOON: Duration = Duration::from_secs(10);

/// An epoll and the events of its last turn.
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Epoll {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            fd: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(256),
        })
    }

    pub fn add(&self, source: impl AsFd, token: usize, flags: Flags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token as u64);
        Ok(epoll::add(&self.fd, source, data, flags)?)
    }

    pub fn modify(&self, source: impl AsFd, token: usize, flags: Flags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token as u64);
        Ok(epoll::modify(&self.fd, source, data, flags)?)
    }

    /// Waits until something happens or `deadline` comes; gives tokens and
    /// what happened.
    pub fn wait(&mut self, deadline: Option<Instant>) -> io::Result<Vec<(usize, Flags)>> {
        if let Some(deadline) = deadline {
            // epoll_wait counts in milliseconds, poll in nanoseconds.
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
            if retried(|| poll(&mut fds, Some(&left)))? == 0 {
                return Ok(Vec::new());
            }
        }
        self.events.clear();
        let events = &mut self.events;
        retried(|| {
            epoll::wait(&self.fd, rustix::buffer::spare_capacity(events), None).map(|_| ())
        })?;
        let ready = self.events.iter();
        Ok(ready
            .map(|event| (event.data.u64() as usize, event.flags))
            .collect())
    }
}

fn retried<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// A blocking connection with timeouts of [`SOON`].
pub fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

/// A non-blocking connection under way from `source`; any address when none.
pub fn start_connect(to: SocketAddr, source: Option<Ipv4Addr>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(IpAddr::V4(source), 0).into())?;
    }
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(error)
            if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    Ok(socket.into())
}

pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // Inherited by accepted connections.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// A UDP socket with room for the bursts of all flows.
pub fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(1 << 20)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Takes up to `buffer`'s length off the connection without copying it.
/// `Ok(None)` when there is nothing now.
pub fn discard(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    unless_blocked(rustix::net::recv(stream, buffer, RecvFlags::TRUNC).map(|(_, taken)| taken))
}

/// `Ok(None)` when there is nothing now.
pub fn receive(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    unless_blocked(rustix::net::recv(stream, buffer, RecvFlags::empty()).map(|(taken, _)| taken))
}

/// `Ok(None)` when there is no room now.
pub fn send(stream: &TcpStream, bytes: &[u8]) -> io::Result<Option<usize>> {
    let flags = rustix::net::SendFlags::NOSIGNAL;
    unless_blocked(rustix::net::send(stream, bytes, flags))
}

fn unless_blocked(result: rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
