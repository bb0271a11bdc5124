//! The PROXY protocol header, version 2, which gives a processing server the
//! client's address.
//!
//! It is written by hand, and a crate that parses it checks it in the tests: a
//! writer and a parser of different origin find each other's mistakes.
//!
//! Source: HAProxy, `doc/proxy-protocol.txt`, section 2.2.

use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// The header of a TCP connection from `client` that came in on `local`.
pub(super) fn header(client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.push(VERSION_AND_COMMAND);
    match (client.ip().to_canonical(), local.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            header.push(TCP_OVER_IPV4);
            header.extend(12u16.to_be_bytes());
            header.extend(source.octets());
            header.extend(destination.octets());
        }
        (source, destination) => {
            let wide = |address| match address {
                IpAddr::V4(address) => address.to_ipv6_mapped(),
                IpAddr::V6(address) => address,
            };
            header.push(TCP_OVER_IPV6);
            header.extend(36u16.to_be_bytes());
            header.extend(wide(source).octets());
            header.extend(wide(destination).octets());
        }
    }
    header.extend(client.port().to_be_bytes());
    header.extend(local.port().to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use ppp::v2::{Addresses, Header};

    #[test]
    fn an_independent_parser_reads_the_addresses_back() {
        for (client, local) in [
            ("192.0.2.7:4000", "198.51.100.1:20000"),
            ("[2001:db8::7]:4000", "[2001:db8::1]:20000"),
            ("[::ffff:192.0.2.7]:4000", "[::ffff:198.51.100.1]:20000"),
        ] {
            let (client, local): (SocketAddr, SocketAddr) =
                (client.parse().unwrap(), local.parse().unwrap());
            let bytes = header(client, local);
            let parsed = Header::try_from(bytes.as_slice()).unwrap();
            match parsed.addresses {
                Addresses::IPv4(found) => {
                    assert_eq!(IpAddr::V4(found.source_address), client.ip().to_canonical());
                    assert_eq!((found.source_port, found.destination_port), (4000, 20000));
                }
                Addresses::IPv6(found) => {
                    assert_eq!(IpAddr::V6(found.source_address), client.ip());
                    assert_eq!((found.source_port, found.destination_port), (4000, 20000));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
