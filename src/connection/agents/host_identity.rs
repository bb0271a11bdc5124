//! Where this connection server listens, said so that no two processes can say
//! the same at a time. Agents conclude from it that the process which was in
//! this place before is no more, and with it all that it forwarded.
//!
//! The listening socket of the load-sharing port makes it so: it is bound
//! without `SO_REUSEPORT`, before agents are greeted, and open for as long as
//! anything is forwarded; a hand-over passes it on. Such a socket is unique in
//! its network namespace, and that in the kernel that was booted; the host's
//! name tells copies of a running virtual machine apart.

use std::fs;
use std::io;
use std::net::TcpListener;

use tracing::debug;

/// The place of the process that opened `load_sharing` in its own network
/// namespace; empty where the kernel does not tell.
#[must_use]
pub(in crate::connection) fn of(load_sharing: &TcpListener) -> String {
    let place = || -> io::Result<String> {
        let read = |path| fs::read_to_string(path).map(|text| text.trim().to_owned());
        let boot = read("/proc/sys/kernel/random/boot_id")?;
        let host = read("/proc/sys/kernel/hostname")?;
        let network = fs::read_link("/proc/self/ns/net")?;
        let address = load_sharing.local_addr()?;
        Ok(format!("{boot}/{host}/{}/{address}", network.display()))
    };
    place().unwrap_or_else(|error| {
        debug!(%error, "this connection server's place cannot be told");
        String::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_has_a_place_of_its_own() {
        let [one, other] = [(), ()].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let place = of(&one);
        assert!((1..=256).contains(&place.len()), "{place}");
        assert_ne!(place, of(&other));
        let address = one.local_addr().unwrap();
        assert!(place.ends_with(&address.to_string()), "{place}");
        drop(one);
        let next = TcpListener::bind(address).unwrap();
        assert_eq!(place, of(&next), "the next one in the same place");
    }
}
