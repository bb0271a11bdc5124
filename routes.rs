//! Where connection ports lead, taken from the table and read whenever a
//! client arrives.

use std::net::{IpAddr, SocketAddr};

use super::Transport;
use crate::pool::ProxyProtocol;
use crate::table::{ListenPort, PortRange, Table};

/// Where one connection port leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The server's address and port; `None` while the address is unknown.
    pub destination: Option<SocketAddr>,
    /// Whether the server is told the client's address first.
    pub proxy_protocol: bool,
}

/// All connection ports of a table. Kept as the table's runs of ports, as
/// few runs serve thousands of ports.
#[derive(Debug, Default)]
pub struct Routes {
    /// Sorted by first connection port; a port is in one run at most.
    runs: Vec<(Option<IpAddr>, PortRange)>,
}

impl Routes {
    /// The routes that `table` sets.
    pub fn new(table: &Table) -> Self {
        let mut runs: Vec<_> = table
            .rows
            .iter()
            .flat_map(|row| row.ranges.iter().map(|range| (row.address, range.clone())))
            .collect();
        runs.sort_by_key(|(_, range)| range.connection_port);
        Self { runs }
    }

    /// Where `port` leads for `transport`; `None` when it leads nowhere.
    pub fn find(&self, port: ListenPort, transport: Transport) -> Option<Route> {
        let after = self
            .runs
            .partition_point(|(_, range)| range.connection_port <= port);
        let (address, range) = self.runs.get(after.checked_sub(1)?)?;
        let target = range.target(port)?;
        if !forwards(range, transport) {
            return None;
        }
        Some(Route {
            destination: address.map(|address| SocketAddr::new(address, target.get())),
            proxy_protocol: range.proxy_protocol == ProxyProtocol::V2,
        })
    }

    /// Every connection port, once per transport that it forwards.
    pub fn ports(&self) -> impl Iterator<Item = (ListenPort, Transport)> {
        self.runs.iter().flat_map(|(_, range)| {
            range.connection_ports().flat_map(|port| {
                [Transport::Tcp, Transport::Udp]
                    .into_iter()
                    .filter(|transport| forwards(range, *transport))
                    .map(move |transport| (port, transport))
            })
        })
    }
}

fn forwards(range: &PortRange, transport: Transport) -> bool {
    match transport {
        Transport::Tcp => range.protocol.has_tcp(),
        Transport::Udp => range.protocol.has_udp(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{LoadSharing, PortProtocol, Sessions};
    use crate::table::{FORMAT_VERSION, Row, RowState, TargetPort};

    fn range(first: u16, server: u16, count: u16, protocol: PortProtocol) -> PortRange {
        PortRange {
            name: "x".to_owned(),
            connection_port: ListenPort::new(first).unwrap(),
            server_port: TargetPort::new(server).unwrap(),
            count,
            protocol,
            shared: false,
            proxy_protocol: ProxyProtocol::None,
        }
    }

    fn row(slot: u32, address: Option<&str>, ranges: Vec<PortRange>) -> Row {
        Row {
            slot,
            server: format!("pool-{slot}"),
            server_uid: None,
            address: address.map(|text| text.parse().unwrap()),
            state: RowState::Active,
            ranges,
        }
    }

    #[test]
    fn each_port_leads_to_its_server_and_to_nowhere_else() {
        let routes = Routes::new(&Table {
            format_version: FORMAT_VERSION,
            pool: "pool".to_owned(),
            pool_uid: "uid".to_owned(),
            generation: 1,
            advertised_address: None,
            agent_port: TargetPort::new(1).unwrap(),
            load_sharing: LoadSharing::default(),
            sessions: Sessions::default(),
            rows: vec![
                row(
                    0,
                    Some("10.0.0.1"),
                    vec![range(200, 7000, 10, PortProtocol::TCP)],
                ),
                row(1, None, vec![range(100, 80, 2, PortProtocol::TCPUDP)]),
            ],
        });
        let destination = |port, transport| {
            let port = ListenPort::new(port).unwrap();
            Some(routes.find(port, transport)?.destination)
        };
        let to = |text: &str| Some(Some(text.parse().unwrap()));
        assert_eq!(destination(200, Transport::Tcp), to("10.0.0.1:7000"));
        assert_eq!(destination(209, Transport::Tcp), to("10.0.0.1:7009"));
        assert_eq!(destination(210, Transport::Tcp), None);
        assert_eq!(destination(199, Transport::Tcp), None);
        assert_eq!(destination(99, Transport::Tcp), None);
        assert_eq!(destination(205, Transport::Udp), None, "TCP only");
        assert_eq!(destination(101, Transport::Udp), Some(None), "no address");
        assert_eq!(routes.ports().count(), 10 + 2 * 2);
    }
}
