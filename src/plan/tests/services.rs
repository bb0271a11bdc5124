//! Rows whose connection ports no Service leads to.

use super::*;

/// The ports of the Services after all of `table` was applied.
fn services_of(table: &Table) -> ServicePorts {
    let mut services = ServicePorts::default();
    for range in table.rows.iter().flat_map(|row| &row.ranges) {
        for port in range.connection_ports() {
            services.add(port, false);
        }
    }
    services
}

fn hidden(table: &Table) -> Vec<bool> {
    table.rows.iter().map(|row| row.not_ready).collect()
}

#[test]
fn a_row_gets_sessions_once_services_lead_to_all_of_its_ports() {
    let mut world = World::default();
    world.settle(&pool(1, 4));
    let before = world.table.clone().unwrap();
    let servers: Vec<_> = world.servers.values().cloned().collect();
    let plan_next = |pool: &ValidPool, published: &Table, services: &ServicePorts| {
        let observed = Observed {
            published: Some(published),
            servers: &servers,
            // What is hidden is marked whenever that is found.
            may_mark: false,
            services: Some(services),
            ..Observed::nothing("uid")
        };
        plan(pool, &observed, Timestamp::UNIX_EPOCH)
    };
    let old = services_of(&before);
    assert_eq!(plan_next(&pool(1, 4), &before, &old).table, before);
    let none = ServicePorts::default();
    let hides = plan_next(&pool(1, 4), &before, &none);
    assert_eq!(hidden(&hides.table), [true]);
    assert!(!hides.takes_from_sessions(Some(&before)), "live ones go on");
    // A growing pool publishes the row, then makes the Services, then offers it.
    let grown = plan_next(&pool(2, 4), &before, &old);
    assert_eq!(hidden(&grown.table), [false, true]);
    assert_eq!(grown.start, [Slot(1)], "its server need not wait");
    // One port is missing: the range that it has is refused as a whole.
    let mut nearly = old.clone();
    for port in grown.table.rows[1].ranges[0].connection_ports().skip(1) {
        nearly.add(port, false);
    }
    let next = plan_next(&pool(2, 4), &grown.table, &nearly);
    assert_eq!(hidden(&next.table), [false, true]);
}

#[test]
fn a_port_for_both_protocols_needs_both() {
    let both = PortEntry {
        protocol: PortProtocol::TCPUDP,
        ..entry("main", 7000, 1)
    };
    let pool = ValidPool::new(&resource(1, vec![both], 20_099)).unwrap();
    let mut services = ServicePorts::default();
    let port = ListenPort::new(20_000).unwrap();
    for (is_udp, is_hidden) in [(false, true), (true, false)] {
        services.add(port, is_udp);
        let observed = Observed {
            services: Some(&services),
            ..Observed::nothing("uid")
        };
        let table = plan(&pool, &observed, Timestamp::UNIX_EPOCH).table;
        assert_eq!(hidden(&table), [is_hidden], "udp: {is_udp}");
    }
}
