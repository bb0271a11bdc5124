//! Loopback addresses that no other test uses. This file uses nothing of
//! `common`, so that tests/robustness includes it by its path.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// Second byte of this process's addresses. The listener marks it as taken, so
/// that test programs can run beside each other.
static PROCESS: LazyLock<(u8, TcpListener)> = LazyLock::new(|| {
    let begin = std::process::id();
    (begin..begin + 150)
        .find_map(|number| {
            let number = 100 + u8::try_from(number % 150).ok()?;
            let marker = TcpListener::bind((Ipv4Addr::new(127, number, 0, 1), 7999)).ok()?;
            Some((number, marker))
        })
        .expect("no more than 150 test programs run at once")
});

/// The first three bytes of a network for one test. After 256 tests the numbers
/// start over; the tests that used them have long ended.
pub fn network() -> [u8; 3] {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    [127, PROCESS.0, NEXT.fetch_add(1, Ordering::Relaxed)]
}

/// Address `host` of `network`.
pub fn address([a, b, c]: [u8; 3], host: u8) -> IpAddr {
    Ipv4Addr::new(a, b, c, host).into()
}
