//! Tests that need a network of their own: they run again in a process with
//! its own network namespace.

use std::process::Command;

use crate::target::not_applicable;

/// Set in the process that has a namespace of its own.
const INSIDE: &str = "PORTPOOL_TEST_NAMESPACE";

/// Whether this is the process with a network of its own, whose loopback is
/// up. If not, the test named `test` is run in one, and is over here.
pub fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        ip(&["link", "set", "lo", "up"]);
        return true;
    }
    let mut unshare = vec!["unshare", "--net"];
    if !rustix::process::geteuid().is_root() {
        unshare.push("--map-root-user");
    }
    let is_possible = Command::new(unshare[0])
        .args(&unshare[1..])
        .args(["ip", "link", "set", "lo", "up"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !is_possible {
        not_applicable(test, "needs `unshare --net` and `ip`");
        return false;
    }
    let status = Command::new(unshare[0])
        .args(&unshare[1..])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its own network");
    false
}

/// Runs `ip` with these arguments.
pub fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?}");
}
