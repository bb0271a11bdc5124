//! The identity of the listening socket of this connection server. No two
//! processes have the same one at a time. So when another connection server
//! attaches under it, agents know that the former process is dead, and that
//! everything it forwarded is closed.
//!
//! The listening socket of the load-sharing port guarantees that: it is bound
//! without `SO_REUSEPORT` before agents are greeted, and stays open for as long
//! as anything is forwarded; a hand-over passes it on. Such a socket is unique
//! in its network namespace, which is unique in the kernel that was booted. The
//! host's name distinguishes copies of a running virtual machine.

use std::fs;
use std::io;
use std::net::TcpListener;

use tracing::debug;

/// The host identity of the process that opened `load_sharing` in its own
/// network namespace; empty where the kernel does not reveal it.
#[must_use]
pub(in crate::connection) fn of(load_sharing: &TcpListener) -> String {
    let identity = || -> io::Result<String> {
        let read = |path| fs::read_to_string(path).map(|text| text.trim().to_owned());
        let boot = read("/proc/sys/kernel/random/boot_id")?;
        let host = read("/proc/sys/kernel/hostname")?;
        let network = fs::read_link("/proc/self/ns/net")?;
        let address = load_sharing.local_addr()?;
        Ok(format!("{boot}/{host}/{}/{address}", network.display()))
    };
    identity().unwrap_or_else(|error| {
        debug!(%error, "failed to find out this connection server's host identity");
        String::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_has_an_identity_of_its_own() {
        let [one, other] = [(), ()].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let identity = of(&one);
        assert!((1..=256).contains(&identity.len()), "{identity}");
        assert_ne!(identity, of(&other));
        let address = one.local_addr().unwrap();
        assert!(identity.ends_with(&address.to_string()), "{identity}");
        drop(one);
        let next = TcpListener::bind(address).unwrap();
        assert_eq!(identity, of(&next), "the next one at the same address");
    }
}
