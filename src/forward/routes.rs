//! The routes of connection ports: the table in force, shared by all threads
//! and looked up once for each client.

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwapOption;

use crate::pool::{ProxyProtocol, Replies};
use crate::table::{ListenPort, PortIndex};

/// The server that a connection port leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) target: SocketAddr,
    pub(super) proxy_protocol: ProxyProtocol,
    pub(super) replies: Replies,
}

/// The routes of the table in force; none before the first.
#[derive(Debug, Default)]
pub(super) struct Routes(ArcSwapOption<PortIndex>);

impl Routes {
    /// Puts a table in force.
    pub(super) fn set(&self, table: Arc<PortIndex>) {
        self.0.store(Some(table));
    }

    /// Whether datagrams are taken on `port`.
    pub(super) fn has_udp(&self, port: ListenPort) -> bool {
        let index = self.0.load();
        let found = index.as_ref().and_then(|index| index.find(port));
        found.is_some_and(|(_, range)| range.protocol.has_udp())
    }

    /// The route of `port`; `None` when the table does not have the port, or not
    /// yet the address of its server.
    pub(super) fn get(&self, port: ListenPort) -> Option<Route> {
        let index = self.0.load();
        let (row, range) = index.as_ref()?.find(port)?;
        Some(Route {
            target: row.socket_address(range.target(port)?)?,
            proxy_protocol: range.proxy_protocol,
            replies: range.replies,
        })
    }
}
