//! An agent where the kernel answers no `sock_diag` request, as in gVisor: it reads
//! `/proc/net` instead.

use std::process::{Command, Stdio};

use crate::common::{COUNT, Pool, connect, echo};

/// Runs a program whose every attempt to open a netlink socket fails.
///
/// Source: Linux `Documentation/userspace-api/seccomp_filter.rst`; the numbers are
/// those of `socket`, `AF_NETLINK` and `EPROTONOSUPPORT`.
const WITHOUT_NETLINK: &str = r#"
import ctypes, os, platform, struct, sys
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
program = b"".join(struct.pack("HBBI", *step) for step in [
    (0x20, 0, 0, 0), (0x15, 0, 3, number),
    (0x20, 0, 0, 16), (0x15, 0, 1, 16),
    (0x06, 0, 0, 0x00050000 | 93), (0x06, 0, 0, 0x7FFF0000),
])
steps = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
filter = Program(6, ctypes.addressof(steps))
prctl = ctypes.CDLL(None).prctl
assert prctl(38, 1, 0, 0, 0) == 0
assert prctl(22, 2, ctypes.byref(filter), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"#;

#[tokio::test]
async fn an_agent_without_sock_diag_offers_what_the_workload_listens_on() {
    let mut pool = Pool::new(1, |_| {});
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("python3");
    command
        .args(["-c", WITHOUT_NETLINK, env!("CARGO_BIN_EXE_portpool")])
        .args(pool.agent_arguments(0))
        .env("PORTPOOL_LOG", "info")
        .stdin(Stdio::null())
        .stderr(log.reopen().unwrap());
    pool.agents.push(command.into());
    pool.start_connection_server(0);
    pool.until(|state| state.servers.iter().any(|server| server.attached))
        .await;
    pool.start_workload(0);
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
    let text = std::fs::read_to_string(log.path()).unwrap();
    assert!(text.contains("reading /proc/net"), "{text}");
    let session = pool.request().await.unwrap();
    // The session must not end with its connection before it is given back.
    let mut stream = connect(&session);
    echo(&mut stream, "through");
    // What ends is noticed too.
    pool.client().release(&session.id).await.unwrap();
    pool.workloads[0].kill();
    pool.until(|state| state.free_ports == 0).await;
    pool.workloads.clear();
    pool.start_workload(0);
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;
}
