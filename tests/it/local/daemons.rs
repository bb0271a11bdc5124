//! What a workload starts does not outlive its pool, whatever it does to leave it.

use super::*;

/// Daemons in one pool, or programs that start one each.
const DAEMONS: usize = 60;

/// A number of seconds that only one test's daemons sleep.
fn marker(test: u32) -> String {
    format!("{}", 200_000 + test * 100_000 + std::process::id())
}

fn kill(pids: &[String]) {
    let status = Command::new("kill").arg("-KILL").args(pids).status();
    assert!(status.unwrap().success());
}

#[test]
fn a_daemon_ends_with_the_program_that_started_it() {
    let marker = marker(1);
    let daemon = format!("(setsid sleep {marker} &)");
    for _ in 0..DAEMONS {
        let status = Command::new(PORTPOOL)
            .args(["run-program", "--", "sh", "-c", &daemon])
            .status();
        assert!(status.unwrap().success());
        assert_eq!(processes(&marker), 0);
    }
}

#[test]
fn a_program_ends_with_its_killed_supervisor() {
    let marker = marker(2);
    let mut supervisor = Command::new(PORTPOOL)
        .args(["run-program", "--", "sleep", &marker])
        .spawn()
        .unwrap();
    until(|| processes(&marker) == 2);
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    until(|| processes(&marker) == 0);
}

/// A workload that serves, and starts [`DAEMONS`] daemons the first time.
fn daemons(marker: &str, folder: &Path) -> String {
    format!(
        "if mkdir {}/started; then for i in $(seq {DAEMONS}); do (setsid sleep {marker} &); done; fi; {}",
        folder.display(),
        echo_command()
    )
}

/// The sleeping daemons. The command line of their supervisor has the text too.
fn sleepers(marker: &str) -> Vec<String> {
    let mut all = pids(&format!("sleep {marker}"));
    all.retain(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n")
    });
    all
}

/// A pool with [`DAEMONS`] daemons, and the folder whose path is in the command line of
/// its supervisor.
fn pool_with_daemons(marker: &str) -> (Local, tempfile::TempDir) {
    let flag = tempfile::tempdir().unwrap();
    let (_folder, file) = pool_of(&daemons(marker, flag.path()));
    let local = Local::start(&file);
    local.until("4 ports free");
    until(|| sleepers(marker).len() == DAEMONS);
    (local, flag)
}

/// The supervisor. Its program has become another one by now.
fn supervisor(flag: &tempfile::TempDir) -> Vec<String> {
    pids(&flag.path().display().to_string())
}

#[test]
fn daemons_end_with_their_pool() {
    let marker = marker(3);
    let (local, _flag) = pool_with_daemons(&marker);
    local.stop();
    assert!(sleepers(&marker).is_empty());
}

#[test]
fn daemons_end_with_a_killed_supervisor() {
    let marker = marker(4);
    let (local, flag) = pool_with_daemons(&marker);
    kill(&supervisor(&flag));
    local.until("signal: 9");
    until(|| sleepers(&marker).is_empty());
    local.stop();
}

#[test]
fn daemons_end_with_a_killed_local_pool() {
    let marker = marker(5);
    let (local, _flag) = pool_with_daemons(&marker);
    local.signal("-KILL");
    until(|| sleepers(&marker).is_empty());
}

/// Ends the daemons of a test, also when it fails.
struct Cleaned<'a>(&'a str);

impl Drop for Cleaned<'_> {
    fn drop(&mut self) {
        for pid in sleepers(self.0) {
            // It may have ended already.
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
        }
    }
}

#[test]
fn a_program_ends_although_pool_and_supervisor_are_killed_at_once() {
    let marker = marker(6);
    let _cleaned = Cleaned(&marker);
    let (local, flag) = pool_with_daemons(&marker);
    let is_serving = || TcpStream::connect("127.0.0.2:7000").is_ok();
    assert!(is_serving());
    let mut both = supervisor(&flag);
    both.push(local.child.id().to_string());
    kill(&both);
    until(|| !is_serving());
}
