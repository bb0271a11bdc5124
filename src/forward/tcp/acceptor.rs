//! The TCP connection ports of a thread, and accepting on them.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{self, SocketFlags};

use crate::forward::counters::count;
use crate::forward::io::{EventSource, Io};
use crate::forward::listeners::Listener;
use crate::forward::snapshot::PortSnapshot;
use crate::table::ListenPort;

/// How long accepting pauses when descriptors or memory ran out: often enough
/// to go on soon, seldom enough not to spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Open TCP ports, some of which may pause.
#[derive(Debug, Default)]
pub(super) struct Acceptor {
    ports: HashMap<ListenPort, TcpListener>,
    pause: Option<Pause>,
}

/// A pause in accepting.
#[derive(Debug)]
struct Pause {
    until: Instant,
    ports: Vec<ListenPort>,
}

/// What a port's queue had.
pub(super) enum Accepted {
    Client {
        socket: OwnedFd,
        address: SocketAddr,
    },
    /// A client that has left already.
    Gone,
    /// Nothing, or the port cannot accept now.
    Nothing,
}

impl Acceptor {
    pub(super) fn reserve(&mut self, ports: usize) {
        self.ports.reserve(ports);
    }

    /// Opens a port.
    pub(super) fn open(
        &mut self,
        port: ListenPort,
        listener: TcpListener,
        io: &Io,
    ) -> rustix::io::Result<()> {
        // A listener that cannot be watched is closed: it would take clients that no one
        // accepts, and keep its port from the next try.
        watch(port, &listener, io)?;
        self.ports.insert(port, listener);
        Ok(())
    }

    pub(super) fn close(&mut self, port: ListenPort) {
        self.ports.remove(&port);
    }

    /// Accepts one client. Where more wait the port is reported again, which
    /// costs less than asking each port in vain for a second one.
    pub(super) fn accept(&mut self, port: ListenPort, io: &mut Io) -> Accepted {
        // The port may have been closed since it was reported.
        let Some(listener) = self.ports.get(&port) else {
            return Accepted::Nothing;
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match net::acceptfrom_with(listener, flags) {
            Ok((socket, address)) => match address.map(SocketAddr::try_from) {
                Some(Ok(address)) => Accepted::Client { socket, address },
                _ => Accepted::Gone,
            },
            Err(Errno::NFILE | Errno::MFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.pause(port, io);
                Accepted::Nothing
            }
            Err(Errno::AGAIN) => Accepted::Nothing,
            Err(_) => Accepted::Gone,
        }
    }

    /// Takes the port out of epoll for a while: reported again and again, it
    /// would only spin.
    fn pause(&mut self, port: ListenPort, io: &mut Io) {
        count(&io.counters.accept_failed);
        if let Some(listener) = self.ports.get(&port)
            && epoll::delete(&io.epoll, listener).is_ok()
        {
            let until = io.now + PAUSE;
            self.add_to_pause(port, until);
            io.timers.schedule_before(until);
        }
    }

    fn add_to_pause(&mut self, port: ListenPort, until: Instant) {
        let ports = Vec::new();
        let pause = self.pause.get_or_insert(Pause { until, ports });
        pause.ports.push(port);
    }

    pub(super) fn has_pause(&self) -> bool {
        self.pause.is_some()
    }

    /// Accepts again on the ports that have paused long enough.
    pub(super) fn tick(&mut self, io: &Io) {
        let Some(pause) = self.pause.take_if(|pause| pause.until <= io.now) else {
            return;
        };
        for port in pause.ports {
            let listener = self.ports.get(&port);
            let watched = listener.map(|listener| watch(port, listener, io));
            // Without memory for the watch, it is tried again.
            if let Some(Err(_)) = watched {
                self.add_to_pause(port, io.now + PAUSE);
            }
        }
    }

    /// Takes out all ports.
    pub(super) fn export(&mut self) -> impl Iterator<Item = PortSnapshot> {
        self.pause = None;
        self.ports.drain().map(|(port, listener)| PortSnapshot {
            port,
            is_draining: false,
            listener: Listener::Tcp(listener),
        })
    }
}

fn watch(port: ListenPort, listener: &TcpListener, io: &Io) -> rustix::io::Result<()> {
    io.watch(listener, EventSource::TcpPort.of_port(port), EventFlags::IN)
}
