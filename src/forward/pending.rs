//! Clients at the door: those that were accepted and are not admitted yet, and
//! of these the pending ones, whose session the gate has been asked for.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::counters::count;
use super::gate::{PENDING_DEADLINE, PendingId, Transport};
use super::io::Io;
use super::quota::Permit;
use super::snapshot::ClientSnapshot;
use super::tcp::stream::Stream;
use super::udp::addresses::AddressPair;
use crate::table::ListenPort;

/// Most pending clients of a thread; further ones are refused. Bounds what
/// scanning for a port's clients costs.
const PENDING_MAX: usize = 1024;

/// Datagrams of one pending client that are kept.
const DATAGRAMS_MAX: usize = 8;

/// A TCP client that is not admitted yet.
#[derive(Debug)]
pub(super) struct TcpClient {
    /// The connection port that it came in on.
    pub(super) port: ListenPort,
    pub(super) socket: OwnedFd,
    pub(super) address: SocketAddr,
    pub(super) permit: Permit,
}

/// A UDP client that is not admitted yet, with its first datagrams.
#[derive(Debug)]
pub(super) struct UdpClient {
    /// The connection port that its datagrams came in on.
    pub(super) port: ListenPort,
    pub(super) addresses: AddressPair,
    pub(super) datagrams: Vec<Box<[u8]>>,
    pub(super) permit: Permit,
}

/// A client that is not admitted yet.
#[derive(Debug)]
pub(super) enum Client {
    Tcp(TcpClient),
    Udp(UdpClient),
}

impl Client {
    fn port(&self) -> ListenPort {
        match self {
            Self::Tcp(client) => client.port,
            Self::Udp(client) => client.port,
        }
    }

    /// Its address, canonical.
    fn address(&self) -> IpAddr {
        let address = match self {
            Self::Tcp(client) => client.address,
            Self::Udp(client) => client.addresses.client,
        };
        address.ip().to_canonical()
    }

    /// Resets a TCP client. A UDP client gets no answer.
    pub(super) fn refuse(self) {
        match self {
            Self::Tcp(client) => client.socket.reset_on_close(),
            Self::Udp(_) => {}
        }
    }
}

/// A client whose session is asked for.
#[derive(Debug)]
struct Pending {
    client: Client,
    since: Instant,
}

/// The pending clients of a thread.
#[derive(Debug, Default)]
pub(super) struct PendingClients {
    clients: HashMap<PendingId, Pending>,
    /// The pending UDP clients by port and addresses: their next datagrams come
    /// while they wait.
    udp: HashMap<(ListenPort, AddressPair), PendingId>,
    last_id: u64,
}

impl PendingClients {
    pub(super) fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// Keeps a client and asks the gate for its session.
    pub(super) fn ask(&mut self, client: Client, io: &mut Io) {
        if self.clients.len() >= PENDING_MAX {
            count(&io.counters.too_many);
            return client.refuse();
        }
        self.last_id += 1;
        let id = PendingId(self.last_id);
        let (port, transport, address) = match &client {
            Client::Tcp(client) => (client.port, Transport::Tcp, client.address),
            Client::Udp(client) => {
                self.udp.insert((client.port, client.addresses), id);
                (client.port, Transport::Udp, client.addresses.client)
            }
        };
        let since = io.now;
        self.clients.insert(id, Pending { client, since });
        io.gate.ask(id, port, transport, address);
        io.schedule();
    }

    /// Keeps a datagram of a pending client, if there is room. `false` when
    /// the client is not pending.
    pub(super) fn keep_datagram(
        &mut self,
        port: ListenPort,
        addresses: AddressPair,
        datagram: &[u8],
    ) -> bool {
        let Some(id) = self.udp.get(&(port, addresses)) else {
            return false;
        };
        if let Some(Pending {
            client: Client::Udp(client),
            ..
        }) = self.clients.get_mut(id)
            && client.datagrams.len() < DATAGRAMS_MAX
        {
            client.datagrams.push(datagram.into());
        }
        true
    }

    /// Takes out a client that is decided on; `None` when it was refused
    /// meanwhile.
    pub(super) fn take(&mut self, id: PendingId) -> Option<Client> {
        let client = self.clients.remove(&id)?.client;
        if let Client::Udp(client) = &client {
            self.udp.remove(&(client.port, client.addresses));
        }
        Some(client)
    }

    /// Refuses the clients that wait at `port`.
    pub(super) fn refuse_at(&mut self, port: ListenPort, io: &Io) {
        for client in self.take_if(|pending| pending.client.port() == port) {
            count(&io.counters.no_session);
            client.refuse();
        }
    }

    /// Refuses `client`, whose address is canonical, where it waits at `port`.
    pub(super) fn refuse_client_at(&mut self, port: ListenPort, client: IpAddr, io: &Io) {
        let is_it = |of: &Client| of.port() == port && of.address() == client;
        for client in self.take_if(|pending| is_it(&pending.client)) {
            count(&io.counters.no_session);
            client.refuse();
        }
    }

    /// Refuses the clients that have waited too long.
    pub(super) fn tick(&mut self, io: &Io) {
        let is_late = |since| io.now.duration_since(since) >= PENDING_DEADLINE;
        for client in self.take_if(|pending| is_late(pending.since)) {
            count(&io.counters.pending_too_long);
            client.refuse();
        }
    }

    fn take_if(&mut self, condition: impl Fn(&Pending) -> bool) -> Vec<Client> {
        let chosen = self
            .clients
            .iter()
            .filter(|(_, pending)| condition(pending));
        let chosen: Vec<PendingId> = chosen.map(|(id, _)| *id).collect();
        chosen.into_iter().filter_map(|id| self.take(id)).collect()
    }

    /// Takes out all clients; the importing thread asks for them again.
    pub(super) fn export(&mut self) -> Vec<ClientSnapshot> {
        let clients = self.take_if(|_| true).into_iter();
        let snapshots = clients.map(|client| match client {
            Client::Tcp(client) => ClientSnapshot::Tcp {
                port: client.port,
                socket: client.socket,
                address: client.address,
            },
            Client::Udp(client) => ClientSnapshot::Udp {
                port: client.port,
                address: client.addresses.client,
                local: client.addresses.local,
                datagrams: client.datagrams.into_iter().map(Vec::from).collect(),
            },
        });
        snapshots.collect()
    }
}

impl Client {
    /// A client that another thread or process has exported.
    pub(super) fn import(snapshot: ClientSnapshot, permit: Permit) -> Self {
        match snapshot {
            ClientSnapshot::Tcp {
                port,
                socket,
                address,
            } => Self::Tcp(TcpClient {
                port,
                socket,
                address,
                permit,
            }),
            ClientSnapshot::Udp {
                port,
                address,
                local,
                datagrams,
            } => Self::Udp(UdpClient {
                port,
                addresses: AddressPair {
                    client: address,
                    local,
                },
                datagrams: datagrams.into_iter().map(Vec::into_boxed_slice).collect(),
                permit,
            }),
        }
    }
}
