//! The sockets of this network namespace as `/proc/net` lists them, for where
//! `sock_diag` does not answer.
//!
//! Source: Linux `Documentation/networking/proc_net_tcp.rst`.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::ListenScope;
use crate::agent::book::{ServerPort, SocketId};
use crate::sock_diag::Protocol;

/// The sockets at `ports` now, in their order; `None` where there is none that
/// `scope` includes.
///
/// # Errors
/// The file system's.
pub(super) fn look(
    address: IpAddr,
    scope: ListenScope,
    ports: &[ServerPort],
) -> io::Result<Vec<Option<SocketId>>> {
    let mut found: HashMap<(Protocol, u16), SocketId> = HashMap::new();
    for (protocol, state, tables) in [
        (Protocol::Tcp, "0A", ["tcp", "tcp6"]),
        // Unconnected ones have the state of closed ones.
        (Protocol::Udp, "07", ["udp", "udp6"]),
    ] {
        if ports.iter().any(|port| port.protocol == protocol) {
            for table in tables {
                let sockets = parse_table(&read_table(table)?, state);
                let ours = sockets
                    .into_iter()
                    .filter(|(bound, _)| scope.includes(bound.ip(), address));
                found.extend(ours.map(|(bound, id)| ((protocol, bound.port()), id)));
            }
        }
    }
    let found = ports
        .iter()
        .map(|port| found.get(&(port.protocol, port.number.get())).copied());
    Ok(found.collect())
}

/// A missing table (no IPv6) counts as empty.
fn read_table(name: &str) -> io::Result<String> {
    match std::fs::read_to_string(format!("/proc/net/{name}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    }
}

/// The local addresses and inodes of the sockets in `state`. Lines that are not
/// as documented are passed over.
fn parse_table(table: &str, state: &str) -> Vec<(SocketAddr, SocketId)> {
    let sockets = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (bound, port) = fields.get(1)?.split_once(':')?;
        if *fields.get(3)? != state {
            return None;
        }
        let port = u16::from_str_radix(port, 16).ok()?;
        let inode = fields.get(9)?.parse().ok()?;
        Some((
            SocketAddr::new(parse_address(bound)?, port),
            SocketId(inode),
        ))
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

    #[test]
    fn both_families_and_mapped_addresses_are_understood() {
        let head = "  sl  local_address rem_address   st\n";
        for (bound, expected) in [
            ("0100007F:1B58", "127.0.0.1:7000"),
            (
                "0000000000000000FFFF00000100007F:1B58",
                "[::ffff:127.0.0.1]:7000",
            ),
            ("00000000000000000000000001000000:1B58", "[::1]:7000"),
        ] {
            let table = format!("{head}   0: {bound} 0:0 0A 0:0 00:0 0 0 0 77 1\n");
            let socket = (expected.parse().unwrap(), SocketId(77));
            assert_eq!(parse_table(&table, "0A"), [socket]);
            assert_eq!(parse_table(&table, "07"), []);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn no_text_panics(text in "(.{0,80}\n){0,5}", bound in "\\PC{0,40}") {
            parse_table(&text, "0A");
            parse_table(&format!("head\n 0: {bound}:1B58 0:0 0A 0:0 00:0 0 0 0 77 1\n"), "0A");
        }
    }
}
