use std::net::IpAddr;

use super::*;
use crate::pool::{
    ConnectionPorts, EntryAdmission, Mapping, Offer, PortEntry, PortProtocol, ProcessingPool,
    ProcessingPoolSpec, ProxyProtocol, Replies,
};
use crate::table::{ListenPort, PortRange, Slot};

mod attempts;
mod client_addresses;
mod listening;
mod lost_table;
mod ports;
mod servers;
mod services;
mod specs;

const LIMIT: Duration = Duration::from_secs(60);

fn entry(name: &str, port: i32, count: i32) -> PortEntry {
    PortEntry {
        name: name.to_owned(),
        port: Some(port),
        count,
        protocol: PortProtocol::TCP,
        mapping: Mapping::Offset,
        offer: Offer::WhenListening,
        admission: None,
        proxy_protocol: ProxyProtocol::None,
        replies: Replies::ServerPort,
    }
}

fn identity(name: &str, count: i32) -> PortEntry {
    PortEntry {
        port: None,
        mapping: Mapping::Identity,
        ..entry(name, 0, count)
    }
}

fn resource(replicas: i32, ports: Vec<PortEntry>, last: i32) -> ProcessingPool {
    let mut spec = ProcessingPoolSpec {
        replicas,
        ports,
        connection_server: crate::pool::ConnectionServer::default(),
        load_sharing: crate::pool::LoadSharing::default(),
        sessions: crate::pool::Sessions::default(),
        recycle: crate::pool::Recycle::default(),
        drain_seconds: 60,
        template: crate::pool::PodTemplate(serde_json::json!({})),
    };
    spec.connection_server.connection_ports = ConnectionPorts {
        first: 20_000,
        last,
    };
    ProcessingPool::new("pool", spec)
}

fn pool(replicas: i32, count: i32) -> ValidPool {
    ValidPool::new(&resource(
        replicas,
        vec![entry("main", 7000, count)],
        20_099,
    ))
    .unwrap()
}

/// A world that carries plans out at once.
#[derive(Clone, Default)]
struct World {
    table: Option<Table>,
    servers: BTreeMap<Slot, ObservedServer>,
    next_uid: u32,
    elapsed: Duration,
    /// The generation that readers have seen of a table that is lost.
    seen_generation: u64,
    /// Whether servers that start are not ready.
    is_broken: bool,
}

impl World {
    fn step(&mut self, pool: &ValidPool) -> Plan {
        let servers: Vec<ObservedServer> = self.servers.values().cloned().collect();
        let observed = Observed {
            published: self.table.as_ref(),
            servers: &servers,
            seen_generation: self.seen_generation,
            ..Observed::nothing("uid")
        };
        let now = Timestamp::UNIX_EPOCH + self.elapsed;
        self.elapsed += SETTLE;
        let plan = plan(pool, &observed, now);
        plan.table.encode().expect("every planned table is valid");
        for slot in &plan.stop {
            self.servers.remove(slot);
        }
        for &slot in &plan.start {
            self.next_uid += 1;
            let server = ObservedServer {
                slot,
                uid: self.next_uid.to_string(),
                address: Some(IpAddr::from([127, 0, 0, 2])),
                is_ready: !self.is_broken,
                sessions: Some(0),
                ranges: plan.table.row(slot).unwrap().ranges.clone(),
                ..ObservedServer::default()
            };
            self.servers.insert(slot, server);
        }
        self.table = Some(plan.table.clone());
        plan
    }

    fn settle(&mut self, pool: &ValidPool) {
        for _ in 0..300 {
            let before = self.table.clone();
            let plan = self.step(pool);
            if plan.start.is_empty() && plan.stop.is_empty() && before == self.table {
                return;
            }
        }
        panic!("does not converge");
    }

    fn ports(&self, slot: Slot) -> Vec<PortRange> {
        self.table
            .as_ref()
            .and_then(|table| table.row(slot))
            .map(|row| row.ranges.clone())
            .unwrap_or_default()
    }

    fn states(&self) -> Vec<(u32, RowState)> {
        let rows = self.table.iter().flat_map(|table| &table.rows);
        rows.map(|row| (row.slot.0, row.state)).collect()
    }
}
