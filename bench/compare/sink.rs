//! Where the proxies lead: one thread, one epoll. A connection's first byte
//! says what it is for.
//!
//! | byte | the sink |
//! |---|---|
//! | [`ECHO`] | sends back everything, this byte too |
//! | [`DOWNLOAD`] | sends without end |
//! | [`UPLOAD`] | drops and counts what comes |
//! | [`COUNT`] | answers every byte with [`Counts`] |
//!
//! Datagrams are sent back.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::RangeInclusive;

use crate::net::{self, Epoll, Flags};

pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

pub const ECHO: u8 = b'E';
pub const DOWNLOAD: u8 = b'D';
pub const UPLOAD: u8 = b'U';
pub const COUNT: u8 = b'C';

/// Bytes sent at once in bulk.
const CHUNK: usize = 256 * 1024;

/// Counters of the sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes taken by uploads since the start.
    pub uploaded: u64,
    /// Connections open now, without those that ask for the counters.
    pub open: u64,
}

/// A connection that asks the sink for its counters.
pub struct Asking(TcpStream);

impl Asking {
    pub fn connect(port: u16) -> io::Result<Self> {
        let mut stream = net::connect(SocketAddr::new(ADDRESS.into(), port))?;
        stream.write_all(&[COUNT])?;
        let mut asking = Self(stream);
        asking.read()?;
        Ok(asking)
    }

    pub fn counts(&mut self) -> io::Result<Counts> {
        self.0.write_all(&[COUNT])?;
        self.read()
    }

    fn read(&mut self) -> io::Result<Counts> {
        let mut answer = [0; 16];
        self.0.read_exact(&mut answer)?;
        let number = |at: usize| {
            let bytes = answer[at..at + 8].try_into();
            u64::from_le_bytes(bytes.expect("eight bytes"))
        };
        Ok(Counts {
            uploaded: number(0),
            open: number(8),
        })
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Purpose {
    Unknown,
    Echo,
    Download,
    Upload,
    Count,
}

struct Connection {
    stream: TcpStream,
    purpose: Purpose,
    /// Echoed bytes that have not been taken yet.
    rest: Vec<u8>,
}

/// Serves `tcp` and `udp` ports of [`ADDRESS`] until standard input ends;
/// writes a line when it is ready.
pub fn run(tcp: RangeInclusive<u16>, udp: RangeInclusive<u16>) -> io::Result<()> {
    let mut sink = Sink::open(tcp, udp)?;
    std::thread::spawn(|| {
        let _ = io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    println!("ready");
    sink.serve()
}

struct Sink {
    epoll: Epoll,
    listeners: Vec<TcpListener>,
    sockets: Vec<UdpSocket>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    counts: Counts,
    buffer: Vec<u8>,
    chunk: Vec<u8>,
}

impl Sink {
    fn open(tcp: RangeInclusive<u16>, udp: RangeInclusive<u16>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let at = |port| SocketAddr::new(IpAddr::V4(ADDRESS), port);
        let listeners: Vec<_> = tcp
            .map(|port| net::listen(at(port)))
            .collect::<Result<_, _>>()?;
        let sockets: Vec<_> = udp
            .map(|port| net::udp(at(port)))
            .collect::<Result<_, _>>()?;
        for (token, listener) in listeners.iter().enumerate() {
            epoll.add(listener, token, Flags::IN)?;
        }
        for (token, socket) in (listeners.len()..).zip(&sockets) {
            epoll.add(socket, token, Flags::IN)?;
        }
        Ok(Self {
            epoll,
            listeners,
            sockets,
            connections: Vec::new(),
            free: Vec::new(),
            counts: Counts::default(),
            buffer: vec![0; 1 << 20],
            chunk: vec![0x5a; CHUNK],
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            for (token, _) in self.epoll.wait(None)? {
                if let Some(listener) = self.listeners.get(token) {
                    // A connection that ended before it was accepted is no error.
                    if let Ok((stream, _)) = listener.accept() {
                        self.open_connection(stream)?;
                    }
                } else if let Some(socket) = self.sockets.get(token - self.listeners.len()) {
                    echo_datagrams(socket, &mut self.buffer);
                } else {
                    self.turn(token);
                }
            }
        }
    }

    fn open_connection(&mut self, stream: TcpStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let slot = self.free.pop().unwrap_or(self.connections.len());
        if slot == self.connections.len() {
            self.connections.push(None);
        }
        let token = self.listeners.len() + self.sockets.len() + slot;
        self.epoll.add(&stream, token, Flags::IN)?;
        self.connections[slot] = Some(Connection {
            stream,
            purpose: Purpose::Unknown,
            rest: Vec::new(),
        });
        self.counts.open += 1;
        Ok(())
    }

    fn turn(&mut self, token: usize) {
        let slot = token - self.listeners.len() - self.sockets.len();
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        let was_counting = connection.purpose == Purpose::Count;
        let goes_on = connection
            .turn(
                &self.epoll,
                token,
                &mut self.counts,
                &mut self.buffer,
                &self.chunk,
            )
            .unwrap_or(false);
        let is_counting = connection.purpose == Purpose::Count;
        if is_counting && !was_counting {
            self.counts.open -= 1;
        }
        if !goes_on {
            self.connections[slot] = None;
            self.free.push(slot);
            if !is_counting {
                self.counts.open -= 1;
            }
        }
    }
}

impl Connection {
    /// Does what can be done now. Returns whether the connection continues.
    fn turn(
        &mut self,
        epoll: &Epoll,
        token: usize,
        counts: &mut Counts,
        buffer: &mut [u8],
        chunk: &[u8],
    ) -> io::Result<bool> {
        if self.purpose == Purpose::Unknown {
            return self.begin(epoll, token, counts, buffer);
        }
        match self.purpose {
            Purpose::Upload => match net::discard(&self.stream, buffer)? {
                Some(0) => return Ok(false),
                Some(taken) => counts.uploaded += taken as u64,
                None => {}
            },
            Purpose::Download => {
                // A bound keeps a turn short: it is four times what a socket takes at once.
                for _ in 0..4 {
                    if net::send(&self.stream, chunk)?.is_none_or(|sent| sent < chunk.len()) {
                        break;
                    }
                }
            }
            Purpose::Unknown | Purpose::Echo | Purpose::Count if !self.rest.is_empty() => {
                let sent = net::send(&self.stream, &self.rest)?.unwrap_or(0);
                self.rest.drain(..sent);
                if self.rest.is_empty() {
                    epoll.modify(&self.stream, token, Flags::IN)?;
                }
            }
            Purpose::Unknown | Purpose::Echo | Purpose::Count => {
                match net::receive(&self.stream, buffer)? {
                    Some(0) => return Ok(false),
                    Some(taken) => self.answer(epoll, token, *counts, &buffer[..taken])?,
                    None => {}
                }
            }
        }
        Ok(true)
    }

    fn begin(
        &mut self,
        epoll: &Epoll,
        token: usize,
        counts: &mut Counts,
        buffer: &mut [u8],
    ) -> io::Result<bool> {
        let taken = match net::receive(&self.stream, buffer)? {
            None => return Ok(true),
            Some(0) => return Ok(false),
            Some(taken) => taken,
        };
        self.purpose = match buffer[0] {
            ECHO => Purpose::Echo,
            DOWNLOAD => Purpose::Download,
            UPLOAD => Purpose::Upload,
            COUNT => Purpose::Count,
            _ => return Ok(false),
        };
        match self.purpose {
            Purpose::Download => epoll.modify(&self.stream, token, Flags::OUT)?,
            Purpose::Upload => counts.uploaded += taken as u64,
            _ => self.answer(epoll, token, *counts, &buffer[..taken])?,
        }
        Ok(true)
    }

    fn answer(
        &mut self,
        epoll: &Epoll,
        token: usize,
        counts: Counts,
        taken: &[u8],
    ) -> io::Result<()> {
        let numbers: Vec<u8>;
        let answer = if self.purpose == Purpose::Count {
            numbers = [counts.uploaded, counts.open]
                .into_iter()
                .flat_map(u64::to_le_bytes)
                .collect();
            &numbers[..]
        } else {
            taken
        };
        let sent = net::send(&self.stream, answer)?.unwrap_or(0);
        if sent < answer.len() {
            self.rest.extend_from_slice(&answer[sent..]);
            epoll.modify(&self.stream, token, Flags::OUT)?;
        }
        Ok(())
    }
}

fn echo_datagrams(socket: &UdpSocket, buffer: &mut [u8]) {
    while let Ok((length, from)) = socket.recv_from(buffer) {
        // A full buffer drops it, as a network may.
        let _ = socket.send_to(&buffer[..length], from);
    }
}
