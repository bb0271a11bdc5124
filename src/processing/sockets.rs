//! Which ports the workload listens on, read from the kernel's socket table
//! of this network namespace. No connection is made to find out.
//!
//! Source: Linux `Documentation/networking/proc_net_tcp.rst`.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::book::Listening;

/// Socket state `TCP_LISTEN`.
const LISTEN: &str = "0A";
/// Socket state of an unconnected UDP socket (`TCP_CLOSE`).
const UNCONNECTED: &str = "07";

/// Which sockets count as the workload's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ListenScope {
    /// Only those bound to our address: where several servers share a network
    /// namespace, as under `portpool local`.
    Address,
    /// Those bound to all addresses too: where the namespace is ours, as in a
    /// pod.
    Any,
}

/// Reads the listening ports for `address` now.
///
/// Reading `/proc/net/tcp` takes about 1 µs per socket of the namespace.
///
/// # Errors
/// The file system's; a missing table (no IPv6) counts as empty.
pub fn read(address: IpAddr, scope: ListenScope) -> io::Result<Listening> {
    let table = |name: &str| match std::fs::read_to_string(format!("/proc/net/{name}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result,
    };
    let mut listening = Listening::default();
    for name in ["tcp", "tcp6"] {
        listening
            .tcp
            .extend(ports(&table(name)?, LISTEN, address, scope));
    }
    for name in ["udp", "udp6"] {
        listening
            .udp
            .extend(ports(&table(name)?, UNCONNECTED, address, scope));
    }
    Ok(listening)
}

/// The local ports of sockets in `state` that serve `address`. Lines that are
/// not as documented are passed over.
fn ports(table: &str, state: &str, address: IpAddr, scope: ListenScope) -> BTreeSet<u16> {
    let sockets = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, _remote) = (fields.next()?, fields.next()?);
        if fields.next()? != state {
            return None;
        }
        let (bound, port) = local.split_once(':')?;
        let bound = parse_address(bound)?.to_canonical();
        let is_ours = bound == address || (scope == ListenScope::Any && bound.is_unspecified());
        is_ours.then(|| u16::from_str_radix(port, 16).ok())?
    });
    sockets.collect()
}

/// The kernel prints addresses as 32-bit words in the machine's byte order.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let digits = text.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match text.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let mut octets = [0; 16];
            for index in 0..4 {
                octets[index * 4..index * 4 + 4].copy_from_slice(&word(index)?);
            }
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{TcpListener, UdpSocket};

    fn address(last: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, last])
    }

    #[test]
    fn real_sockets_are_found_on_their_address_only() {
        let tcp = TcpListener::bind((address(9), 0)).unwrap();
        let udp = UdpSocket::bind((address(9), 0)).unwrap();
        let (tcp_port, udp_port) = (
            tcp.local_addr().unwrap().port(),
            udp.local_addr().unwrap().port(),
        );
        let found = read(address(9), ListenScope::Address).unwrap();
        assert!(found.tcp.contains(&tcp_port) && found.udp.contains(&udp_port));
        let elsewhere = read(address(10), ListenScope::Any).unwrap();
        assert!(!elsewhere.tcp.contains(&tcp_port) && !elsewhere.udp.contains(&udp_port));
        drop((tcp, udp));
        let found = read(address(9), ListenScope::Address).unwrap();
        assert!(!found.tcp.contains(&tcp_port) && !found.udp.contains(&udp_port));
    }

    #[test]
    fn a_wildcard_socket_counts_where_the_namespace_is_ours() {
        let socket = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(
            read(address(9), ListenScope::Any)
                .unwrap()
                .tcp
                .contains(&port)
        );
        assert!(
            !read(address(9), ListenScope::Address)
                .unwrap()
                .tcp
                .contains(&port)
        );
    }

    #[test]
    fn a_connected_udp_socket_is_not_listening() {
        let server = UdpSocket::bind((address(9), 0)).unwrap();
        let client = UdpSocket::bind((address(9), 0)).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let found = read(address(9), ListenScope::Address).unwrap();
        assert!(!found.udp.contains(&client.local_addr().unwrap().port()));
    }

    #[test]
    fn both_families_and_mapped_addresses_are_understood() {
        let head = "  sl  local_address rem_address   st\n";
        let v4 = format!("{head}   0: 0100007F:1B58 00000000:0000 0A 0:0\n");
        assert_eq!(
            ports(&v4, LISTEN, address(1), ListenScope::Address),
            BTreeSet::from([7000])
        );
        let mapped = format!("{head}   0: 0000000000000000FFFF00000100007F:1B58 0:0000 0A\n");
        assert_eq!(
            ports(&mapped, LISTEN, address(1), ListenScope::Address),
            BTreeSet::from([7000])
        );
        let v6 = format!("{head}   0: 00000000000000000000000001000000:1B58 0:0000 0A\n");
        let loopback = IpAddr::V6(Ipv6Addr::LOCALHOST);
        assert_eq!(
            ports(&v6, LISTEN, loopback, ListenScope::Address),
            BTreeSet::from([7000])
        );
        assert_eq!(
            ports(&v4, UNCONNECTED, address(1), ListenScope::Any),
            BTreeSet::new()
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(.{0,80}\n){0,5}", bound in "\\PC{0,40}") {
            ports(&text, LISTEN, address(1), ListenScope::Any);
            let line = format!("head\n 0: {bound}:1B58 0:0 0A\n");
            ports(&line, LISTEN, address(1), ListenScope::Any);
        }
    }
}
