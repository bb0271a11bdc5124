//! Conditions that must hold before anything starts. Problems that would
//! appear later are reported now, all at once.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use rustix::fs::{Access, access};

use super::addresses::Addresses;
use super::container::{self, Process};
use crate::forward::{check_open_files, ephemeral_overlap};
use crate::plan::{FieldProblem, ValidPool, empty_row};
use crate::pool::{AGENT_ADMIN_PORT, AGENT_API_PORT, AGENT_PORT, CONNECTION_ADMIN_PORT, Mapping};
use crate::table::{PortRange, Slot, Table};

/// Most ports in use that are reported, because one program may use a whole
/// range.
const MAX_PROBLEMS: usize = 10;

/// Reports why `pool` with `table` cannot run on this machine. Chooses the
/// addresses of its connection servers: they leave localhost when another pool
/// uses their ports there.
pub(super) fn can_run(
    pool: &ValidPool,
    table: &Table,
    addresses: &mut Addresses,
) -> Result<(), Vec<FieldProblem>> {
    let mut problems = programs(pool, table, addresses);
    problems.extend(limits(table));
    let none = HashSet::new();
    if !ports_in_use(connection_sockets(pool, table, addresses), &none).is_empty()
        && addresses.has_company()
    {
        // Without another network, what is in use is reported below.
        let _ = addresses.leave_localhost();
    }
    problems.extend(ports_in_use(sockets(pool, table, addresses), &none));
    ok_if_empty(problems)
}

/// Reports why the running pool `current`, with `table`, cannot become `next`
/// without a restart; `planned` is a table for `next`.
pub(super) fn can_become(
    (current, table): (&ValidPool, &Table),
    (next, planned): (&ValidPool, &Table),
    addresses: &Addresses,
) -> Result<(), Vec<FieldProblem>> {
    let mut problems = programs(next, planned, addresses);
    let mut fixed = |is_same: bool, path: &str| {
        if !is_same {
            problems.push(FieldProblem::new(
                path,
                "cannot change while the pool runs: stop portpool local and start it again",
            ));
        }
    };
    fixed(current.name == next.name, "metadata.name");
    fixed(current.namespace == next.namespace, "metadata.namespace");
    fixed(
        current.load_sharing_port == next.load_sharing_port,
        "spec.connectionServer.loadSharingPort",
    );
    fixed(
        current.connection_servers == next.connection_servers,
        "spec.connectionServer.replicas",
    );
    problems.extend(limits(planned));
    let ours = sockets(current, table, addresses);
    let ours = ours.map(|(socket, _)| socket).collect();
    problems.extend(ports_in_use(sockets(next, planned, addresses), &ours));
    ok_if_empty(problems)
}

fn ok_if_empty(problems: Vec<FieldProblem>) -> Result<(), Vec<FieldProblem>> {
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

/// Settings of this machine that are too narrow for `table`.
fn limits(table: &Table) -> Vec<FieldProblem> {
    let path = "spec.connectionServer.connectionPorts";
    let overlap = ephemeral_overlap(table).map(|overlap| format!(
        "ports {overlap} lie inside net.ipv4.ip_local_port_range, so any outgoing connection may take them: choose ports outside, or narrow the range with sysctl"
    ));
    let files = check_open_files(table.connection_port_count()).err();
    let files = files.map(|error| error.to_string());
    let messages = overlap.into_iter().chain(files);
    messages
        .map(|message| FieldProblem::new(path, message))
        .collect()
}

/// Containers that cannot run here, and programs that are missing.
fn programs(pool: &ValidPool, table: &Table, addresses: &Addresses) -> Vec<FieldProblem> {
    // A pool of no servers is checked as one with a server without ports.
    let none = empty_row(pool, Slot(0));
    let row = table.rows.first().unwrap_or(&none);
    let pod = container::Pod::new(pool, row, String::new(), addresses);
    let processes = match &pool.template {
        Ok(template) => container::processes(template, &pod),
        Err(problem) => Err(vec![problem.clone()]),
    };
    let processes = match processes {
        Ok(processes) => processes,
        Err(problems) => return problems,
    };
    let problems = processes.iter().flat_map(|process| {
        let folder = folder_problem(process).map(|message| ("workingDir", message));
        let program = program_problem(process).map(|message| ("command", message));
        let problems = program.into_iter().chain(folder);
        problems
            .map(|(field, message)| FieldProblem::new(format!("{}.{field}", process.path), message))
    });
    problems.collect()
}

fn folder_problem(process: &Process) -> Option<String> {
    let folder = process.folder.as_ref()?;
    (!Path::new(folder).is_dir()).then(|| format!("{folder:?} is not a folder of this machine"))
}

/// Why the program of `process` cannot be started. It is searched as container
/// runtimes do: a name by the PATH of the container, another relative path from
/// its working directory.
///
/// Source: opencontainers/runc, `libcontainer/standard_init_linux.go`, which looks
/// the program up after it has changed to the directory and set the environment.
fn program_problem(process: &Process) -> Option<String> {
    let program = &process.arguments[0];
    let is_executable = |path: &Path| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    let container = &process.name;
    if program == "portpool" {
        return None;
    }
    if program.contains('/') {
        // An absolute path replaces the folder.
        let path = Path::new(process.folder.as_deref().unwrap_or("")).join(program);
        let reason = match path.is_file() {
            _ if is_executable(&path) => return None,
            true => "is not executable: change that with chmod +x",
            false => "does not exist",
        };
        return Some(format!(
            "program {path:?} of container {container:?} {reason}"
        ));
    }
    let own = process.environment.iter().rev();
    let own = own.clone().find(|(name, _)| name == "PATH");
    let path = match own {
        Some((_, path)) => path.into(),
        None => std::env::var_os("PATH").unwrap_or_default(),
    };
    if std::env::split_paths(&path).any(|folder| is_executable(&folder.join(program))) {
        return None;
    }
    let whose = own.map_or("PATH".to_owned(), |(_, path)| {
        format!("the container's PATH, {path:?}")
    });
    let hint = match program.as_str() {
        "iperf3" => ": install it with apt-get install iperf3",
        "redis-server" => ": install it with apt-get install redis-server",
        _ => "",
    };
    Some(format!(
        "program {program:?} of container {container:?} is not in {whose}{hint}"
    ))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Socket {
    Tcp(SocketAddr),
    Udp(SocketAddr),
}

/// Every socket that `pool` with `table` listens on, and the field or purpose
/// that it serves.
fn sockets<'a>(
    pool: &'a ValidPool,
    table: &'a Table,
    addresses: &'a Addresses,
) -> impl Iterator<Item = (Socket, &'static str)> + 'a {
    let admin = (0..pool.connection_servers).map(|index| {
        let address = SocketAddr::new(addresses.admin(index), CONNECTION_ADMIN_PORT);
        (Socket::Tcp(address), "admin port")
    });
    let processing_servers = table.rows.iter().flat_map(|row| {
        let address = addresses.server(row.slot);
        let tcp = |port| Socket::Tcp(SocketAddr::new(address, port));
        let targets = targets(&row.ranges)
            .flat_map(move |(range, target)| sockets_of(range, address, target));
        [
            (tcp(AGENT_PORT), "agent port"),
            (tcp(AGENT_ADMIN_PORT), "agent admin port"),
            (tcp(AGENT_API_PORT), "agent API port"),
        ]
        .into_iter()
        .chain(targets.map(|socket| (socket, "spec.ports")))
    });
    connection_sockets(pool, table, addresses)
        .chain(admin)
        .chain(processing_servers)
}

/// The sockets of the connection servers that clients use.
fn connection_sockets<'a>(
    pool: &'a ValidPool,
    table: &'a Table,
    addresses: &'a Addresses,
) -> impl Iterator<Item = (Socket, &'static str)> + 'a {
    (0..pool.connection_servers).flat_map(move |index| {
        let address = addresses.connection(index);
        let load_sharing = SocketAddr::new(address, pool.load_sharing_port);
        let ranges = table.rows.iter().flat_map(|row| &row.ranges);
        let ports = ranges.flat_map(move |range| {
            let ports = range.connection_ports();
            ports.flat_map(move |port| sockets_of(range, address, port.get()))
        });
        let load_sharing = (
            Socket::Tcp(load_sharing),
            "spec.connectionServer.loadSharingPort",
        );
        let ports = ports.map(|socket| (socket, "spec.connectionServer.connectionPorts"));
        std::iter::once(load_sharing).chain(ports)
    })
}

/// Sockets on `port` of `address` for the protocols of `range`.
fn sockets_of(
    range: &PortRange,
    address: IpAddr,
    port: u16,
) -> impl Iterator<Item = Socket> + use<> {
    let address = SocketAddr::new(address, port);
    let tcp = range.protocol.has_tcp().then_some(Socket::Tcp(address));
    let udp = range.protocol.has_udp().then_some(Socket::Udp(address));
    tcp.into_iter().chain(udp)
}

/// The `needed` sockets, except `ours`, that other programs use. No socket is
/// needed twice: a valid pool keeps its ports apart, and each server has its own
/// address.
fn ports_in_use(
    needed: impl Iterator<Item = (Socket, &'static str)>,
    ours: &HashSet<Socket>,
) -> Vec<FieldProblem> {
    let problems = needed.filter_map(|(socket, path)| {
        let (transport, address, bound) = match socket {
            _ if ours.contains(&socket) => return None,
            Socket::Tcp(address) => ("TCP", address, TcpListener::bind(address).map(drop)),
            Socket::Udp(address) => ("UDP", address, UdpSocket::bind(address).map(drop)),
        };
        let error = bound.err()?;
        // Other ports than those of fields are fixed.
        let choice = if path.starts_with("spec.") {
            ", or choose another port"
        } else {
            ""
        };
        let remedy = match error.kind() {
            ErrorKind::PermissionDenied => "this user may not open ports so low: run portpool as root, or lower net.ipv4.ip_unprivileged_port_start with sysctl",
            _ => "stop what uses it",
        };
        let message =
            format!("{transport} {address} cannot be listened on: {error}; {remedy}{choice}");
        Some(FieldProblem::new(path, message))
    });
    problems.take(MAX_PROBLEMS).collect()
}

/// The server ports of `ranges`, each once.
fn targets(ranges: &[PortRange]) -> impl Iterator<Item = (&PortRange, u16)> {
    ranges.iter().flat_map(|range| {
        let ports = range
            .connection_ports()
            .take(if range.mapping == Mapping::Shared {
                1
            } else {
                usize::MAX
            });
        ports.filter_map(move |port| Some((range, range.target(port)?.get())))
    })
}
