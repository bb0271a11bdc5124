//! What must hold before anything is started: everything that would fail
//! later is named now.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use super::{CONNECTION_ADMIN_PORT, Error, connection_address, container, server_address};
use crate::connection::forward::{check_open_files, ephemeral_overlap};
use crate::plan::{Problem, ValidPool};
use crate::pool::AGENT_PORT;
use crate::table::{PortRange, Table};

/// Checks that `pool` with `table` can run on this machine.
pub(super) fn can_run(pool: &ValidPool, table: &Table) -> Result<(), Error> {
    let mut problems = programs(pool);
    let path = "spec.connectionServer.connectionPorts";
    if let Some(overlap) = ephemeral_overlap(table) {
        problems.push(Problem::new(path, format!(
            "ports {overlap} lie inside net.ipv4.ip_local_port_range, so any outgoing connection may take them: choose ports outside, or narrow the range with sysctl"
        )));
    }
    let listeners = table.connection_port_count();
    if let Err(error) = check_open_files(listeners) {
        problems.push(Problem::new(path, error.to_string()));
    }
    problems.extend(ports_in_use(pool, table));
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Unsatisfiable(problems))
    }
}

/// Checks that the running pool `current` can become `next` without a restart.
pub(super) fn can_become(current: &ValidPool, next: &ValidPool) -> Result<(), Error> {
    let mut problems = programs(next);
    let mut fixed = |is_same: bool, path: &str| {
        if !is_same {
            problems.push(Problem::new(
                path,
                "cannot change while the pool runs: stop portpool local and start it again",
            ));
        }
    };
    fixed(current.name == next.name, "metadata.name");
    fixed(
        current.load_sharing_port == next.load_sharing_port,
        "spec.connectionServer.loadSharingPort",
    );
    fixed(
        current.connection_servers == next.connection_servers,
        "spec.connectionServer.replicas",
    );
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Unsatisfiable(problems))
    }
}

/// Containers that cannot run here, and programs that are not there.
fn programs(pool: &ValidPool) -> Vec<Problem> {
    let pod = container::Pod {
        name: format!("{}-0", pool.name),
        uid: String::new(),
        address: server_address(0),
    };
    let processes = match container::processes(&pool.template, &pod) {
        Ok(processes) => processes,
        Err(problems) => return problems,
    };
    let missing = processes
        .iter()
        .filter(|process| !is_there(&process.arguments[0]));
    let missing = missing.map(|process| {
        let program = &process.arguments[0];
        let hint = match program.as_str() {
            "iperf3" => ": install it with apt-get install iperf3",
            "redis-server" => ": install it with apt-get install redis-server",
            _ => "",
        };
        let message = format!(
            "program {program:?} of container {:?} is not in PATH{hint}",
            process.name
        );
        Problem::new(format!("{}.command", process.path), message)
    });
    missing.collect()
}

fn is_there(program: &str) -> bool {
    if program == "portpool" || program.contains('/') {
        return program == "portpool" || Path::new(program).is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Ports that other programs have.
fn ports_in_use(pool: &ValidPool, table: &Table) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut check = |address: IpAddr, port: u16, path: &str| {
        let address = SocketAddr::new(address, port);
        if let Err(error) = TcpListener::bind(address) {
            problems.push(Problem::new(path, format!("{address} cannot be listened on: {error}; stop what uses it, or choose another port")));
        }
    };
    for index in 0..pool.connection_servers {
        let address = connection_address(index);
        check(
            address,
            pool.load_sharing_port,
            "spec.connectionServer.loadSharingPort",
        );
        check(address, CONNECTION_ADMIN_PORT, "admin port");
    }
    for row in &table.rows {
        let address = server_address(row.slot);
        check(address, AGENT_PORT, "agent port");
        for port in row.ranges.iter().flat_map(PortRange::connection_ports) {
            check(
                connection_address(0),
                port.get(),
                "spec.connectionServer.connectionPorts",
            );
        }
        for (range, target) in targets(&row.ranges) {
            if range.protocol.has_tcp() {
                check(address, target, "spec.ports");
            }
        }
    }
    for row in &table.rows {
        for (range, target) in targets(&row.ranges) {
            let address = SocketAddr::new(server_address(row.slot), target);
            if range.protocol.has_udp()
                && let Err(error) = UdpSocket::bind(address)
            {
                problems.push(Problem::new(
                    "spec.ports",
                    format!("UDP {address} cannot be used: {error}"),
                ));
            }
        }
    }
    problems.truncate(10);
    problems
}

/// The server ports of `ranges`, each once.
fn targets(ranges: &[PortRange]) -> impl Iterator<Item = (&PortRange, u16)> {
    ranges.iter().flat_map(|range| {
        let ports = range
            .connection_ports()
            .take(if range.shared { 1 } else { usize::MAX });
        ports.filter_map(move |port| Some((range, range.target(port)?.get())))
    })
}
