//! The tables that tests and benchmarks begin with: every field has a plain
//! value, and the caller changes what matters to it. This file uses the table's
//! types and nothing else, so that tests/robustness and bench/ include it by its
//! path.

#![allow(dead_code, reason = "each program uses a part of it")]

use std::net::IpAddr;

use portpool::pool::{
    LoadSharing, Mapping, Offer, PortProtocol, ProxyProtocol, Recycle, Replies, Sessions,
};
use portpool::table::{
    FORMAT_VERSION, ListenPort, PortRange, Row, RowState, Slot, Table, TargetPort,
};

/// The first table of pool `test`.
pub fn table(sessions: Sessions, rows: Vec<Row>) -> Table {
    Table {
        format_version: FORMAT_VERSION,
        pool: "test".to_owned(),
        pool_uid: "uid".to_owned(),
        generation: 1,
        advertised_address: None,
        agent_port: TargetPort::new(7070).expect("not 0"),
        load_sharing: LoadSharing::default(),
        sessions,
        recycle: Recycle::default(),
        drain_seconds: None,
        rows,
    }
}

/// Server `test-SLOT` of that pool.
pub fn row(slot: u32, address: Option<IpAddr>, range: PortRange) -> Row {
    Row {
        slot: Slot(slot),
        server: format!("test-{slot}"),
        server_uid: None,
        not_ready: false,
        draining_since: None,
        attempts: portpool::table::Attempts::default(),
        address,
        state: RowState::Active,
        ranges: vec![range],
    }
}

/// `count` connection ports from `first` on that lead to as many server ports
/// from `server_port` on, TCP and UDP.
pub fn range(first: u16, server_port: u16, count: u16) -> PortRange {
    PortRange {
        name: "main".to_owned(),
        connection_port: ListenPort::new(first).expect("not 0"),
        server_port: TargetPort::new(server_port).expect("not 0"),
        count,
        protocol: PortProtocol::TCPUDP,
        mapping: Mapping::Offset,
        offer: Offer::WhenListening,
        admission: None,
        proxy_protocol: ProxyProtocol::None,
        replies: Replies::ServerPort,
    }
}
