//! The run's own network namespace, and the clean-up after the run.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use rustix::process::{Pid, Signal, kill_current_process_group, kill_process_group};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::process::{Tree, command, is_root};

/// Set in the process that runs inside.
const INSIDE: &str = "PORTPOOL_BENCH_NAMESPACE";

/// Settings inside, with reasons.
const SETTINGS: &[(&str, &str)] = &[
    // BBR paces by timers, which halves what one core can send.
    ("net/ipv4/tcp_congestion_control", "reno"),
    // Above all connection ports: connect() skips ports that are bound.
    ("net/ipv4/ip_local_port_range", "40000 65535"),
    ("net/ipv4/tcp_max_tw_buckets", "262144"),
];

/// As root, runs this program once more in namespaces of its own, for network
/// and processes: whatever happens, nothing of the run is left. `None` when it
/// is to go on here.
pub fn enter() -> Option<ExitCode> {
    if std::env::var_os(INSIDE).is_some() {
        if let Err(error) = set_up() {
            eprintln!("warning: {error}; the machine's own settings are in force");
        }
        return None;
    }
    if !is_root() {
        println!("not root: measuring in the machine's own network, with its settings");
        return None;
    }
    let program = std::env::current_exe().ok()?;
    let flags = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let can = Command::new("unshare").args(flags).arg("true").status();
    if !can.is_ok_and(|status| status.success()) {
        println!("unshare is refused: measuring in the machine's own network, with its settings");
        return None;
    }
    let child = Command::new("unshare")
        .args(flags)
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .process_group(0)
        .spawn();
    let status = child.and_then(|mut child| {
        pass_signals_on(&child)?;
        child.wait()
    });
    Some(match status {
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: failed to start unshare: {error}");
            ExitCode::FAILURE
        }
    })
}

/// Passes SIGINT and SIGTERM on: the process inside cleans up and ends, and this
/// one waits for that.
fn pass_signals_on(inside: &Child) -> io::Result<()> {
    let group = Pid::from_child(inside);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::spawn(move || {
        for _ in &mut signals {
            let _ = kill_process_group(group, Signal::TERM);
        }
    });
    Ok(())
}

pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

fn set_up() -> io::Result<()> {
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    if !status.success() {
        return Err(io::Error::other(
            "failed to bring up the loopback interface",
        ));
    }
    for (name, value) in SETTINGS {
        let path = format!("/proc/sys/{name}");
        fs::write(&path, value).map_err(|error| {
            io::Error::other(format!("failed to set {path} to {value}: {error}"))
        })?;
    }
    Ok(())
}

/// At SIGINT and SIGTERM removes `folder` and ends, and with this process
/// everything in its namespace; without one, what is in its process group.
pub fn end_with_signals(folder: PathBuf) {
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) else {
        return;
    };
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            let _ = fs::remove_dir_all(&folder);
            if !is_inside() {
                let _ = kill_current_process_group(Signal::TERM);
            }
            std::process::exit(130);
        }
    });
}

/// Idle-class threads on `processors` while the result is held: waking a
/// virtual processor that halts takes longer than what is measured.
pub fn keep_awake(processors: &[usize]) -> io::Result<Vec<Tree>> {
    let program = std::env::current_exe()?;
    let trees = processors.iter().map(|processor| {
        let mut command = command("chrt".as_ref(), &[*processor]);
        command.args(["--idle", "0"]).arg(&program).arg("--spin");
        command.stdin(Stdio::null());
        Tree::spawn(&mut command)
    });
    trees.collect()
}
