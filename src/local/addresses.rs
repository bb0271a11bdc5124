//! The loopback addresses of a pool. Each pool of the machine has a network of its
//! own, 127.N.0.0/16, so that several can run at once: N is 0 for the first.
//!
//! Clients of a further pool find its connection server at 127.0.0.1 too, when
//! its ports are free there; otherwise in its network.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use crate::table::Slot;

/// Most pools of a machine at once. Further ones are refused.
const NETWORKS: u8 = 64;

/// The addresses of a pool. The network is reserved while this value lives.
#[derive(Debug)]
pub(super) struct Addresses {
    /// Network of the processing servers and the admin pages.
    network: u8,
    /// Network of the connection servers: `network`, or 0.
    connection_network: u8,
    _reserved: UnixListener,
}

impl Addresses {
    /// Reserves the first network that no other pool has. Connection servers are at
    /// 127.0.0.1.
    ///
    /// # Errors
    /// The system's, or that there are too many pools.
    pub(super) fn reserve() -> io::Result<Self> {
        Self::reserve_from(0)
    }

    fn reserve_from(least: u8) -> io::Result<Self> {
        for network in least..NETWORKS {
            if let Some(reserved) = reserve(network)? {
                return Ok(Self {
                    network,
                    connection_network: 0,
                    _reserved: reserved,
                });
            }
        }
        let message = format!("{NETWORKS} pools run here already; stop one of them");
        Err(io::Error::other(message))
    }

    /// Moves the connection servers to a network of this pool's own. The first
    /// network will not do: 127.0.0.1 is in it.
    ///
    /// # Errors
    /// As for [`Addresses::reserve`].
    pub(super) fn leave_localhost(&mut self) -> io::Result<()> {
        if self.network == 0 {
            *self = Self::reserve_from(1)?;
        }
        self.connection_network = self.network;
        Ok(())
    }

    /// Whether the network is another one than 127.0.0.0/16.
    pub(super) fn is_further(&self) -> bool {
        self.network > 0
    }

    /// Whether other pools run on this machine. One of them may be at 127.0.0.1
    /// although the first network is free: its predecessor there has ended.
    pub(super) fn has_company(&self) -> bool {
        let mut others = (0..NETWORKS).filter(|network| *network != self.network);
        others.any(|network| matches!(reserve(network), Ok(None)))
    }

    /// Address of the processing server in `slot`: 127.N.0.2 and up.
    pub(super) fn server(&self, slot: Slot) -> IpAddr {
        Ipv4Addr::from(u32::from(first(self.network)) + 1 + slot.0).into()
    }

    /// Address of a connection server: 127.0.0.1, then 127.0.255.1 and up, or the
    /// same in the pool's network.
    pub(super) fn connection(&self, index: u32) -> IpAddr {
        connection_server(self.connection_network, index)
    }

    /// Address of the admin pages of a connection server.
    pub(super) fn admin(&self, index: u32) -> IpAddr {
        connection_server(self.network, index)
    }
}

/// Reserves a network; `None` if another pool has it.
fn reserve(network: u8) -> io::Result<Option<UnixListener>> {
    // An abstract address goes with the process, and belongs to the network
    // namespace, as loopback addresses do.
    let name = format!("portpool-local-127.{network}");
    match UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?) {
        Ok(reserved) => Ok(Some(reserved)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error),
    }
}

/// 127.N.0.1
fn first(network: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, network, 0, 1)
}

fn connection_server(network: u8, index: u32) -> IpAddr {
    match index {
        0 => first(network).into(),
        _ => Ipv4Addr::from(u32::from(Ipv4Addr::new(127, network, 255, 0)) + index).into(),
    }
}
