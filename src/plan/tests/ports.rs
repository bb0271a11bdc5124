//! Which connection ports a slot gets, and keeps.

use proptest::prelude::*;

use super::*;
use crate::table::MAX_ENCODED_BYTES;

#[test]
fn a_replaced_server_keeps_its_slot_and_ports() {
    let mut world = World::default();
    world.settle(&pool(2, 4));
    let (before, uid) = (world.ports(Slot(1)), world.servers[&Slot(1)].uid.clone());
    world.servers.remove(&Slot(1));
    let plan = world.step(&pool(2, 4));
    assert_eq!(plan.start, [Slot(1)]);
    world.settle(&pool(2, 4));
    assert_eq!(world.ports(Slot(1)), before);
    assert_ne!(world.servers[&Slot(1)].uid, uid);
}

#[test]
fn a_changed_entry_moves_only_its_own_ports() {
    let mut world = World::default();
    let two = |count| {
        let entries = vec![entry("a", 7000, 4), entry("b", 8000, count)];
        ValidPool::new(&resource(2, entries, 20_099)).unwrap()
    };
    world.settle(&two(2));
    let a = |world: &World| {
        world
            .ports(Slot(0))
            .into_iter()
            .filter(|range| range.name == "a")
            .collect::<Vec<_>>()
    };
    let before = a(&world);
    world.settle(&two(5));
    assert_eq!(a(&world), before);
    assert_eq!(
        world
            .ports(Slot(0))
            .iter()
            .map(|range| range.count)
            .sum::<u16>(),
        9
    );
}

#[test]
fn fragments_are_used_when_no_run_is_long_enough() {
    let mut world = World::default();
    let with = |replicas, count, last| {
        ValidPool::new(&resource(replicas, vec![entry("main", 7000, count)], last)).unwrap()
    };
    world.settle(&with(4, 2, 20_007));
    for slot in [0, 2] {
        world.servers.get_mut(&Slot(slot)).unwrap().sessions = Some(0);
    }
    for slot in [1, 3] {
        world.servers.get_mut(&Slot(slot)).unwrap().sessions = Some(1);
    }
    world.settle(&with(2, 2, 20_007));
    // Slots 1 and 3 hold 20002-20003 and 20006-20007; the rest is in two pieces.
    let mut grown = with(2, 2, 20_007);
    grown.entries.push(crate::plan::validate::Entry {
        name: "wide".to_owned(),
        target: crate::plan::validate::Target::Offset(TargetPort::new(8000).unwrap()),
        count: 2,
        ..grown.entries[0].clone()
    });
    world.settle(&grown);
    assert!(world.ports(Slot(1)).len() >= 2);
}

/// The first connection port of each entry of every slot.
fn firsts(world: &World, replicas: u32) -> Vec<Vec<u16>> {
    let of_slot = |slot| {
        let ranges = world.ports(Slot(slot));
        let firsts = ranges.iter().map(|range| range.connection_port.get());
        firsts.collect()
    };
    (0..replicas).map(of_slot).collect()
}

#[test]
fn an_even_number_of_ports_begins_with_an_even_one_where_there_is_room() {
    let cases = [
        // Single ports fill the gaps.
        (
            1,
            3,
            20_009,
            vec![[20_000, 20_002], [20_001, 20_004], [20_006, 20_008]],
        ),
        // The others would leave no room for the last server's.
        (3, 2, 20_009, vec![[20_000, 20_003], [20_005, 20_008]]),
        (3, 2, 20_011, vec![[20_000, 20_004], [20_006, 20_010]]),
    ];
    for (odd, replicas, last, expected) in cases {
        let entries = vec![identity("odd", odd), identity("even", 2)];
        let pool = ValidPool::new(&resource(replicas, entries, last)).unwrap();
        let mut world = World::default();
        world.settle(&pool);
        let replicas = u32::try_from(replicas).unwrap();
        assert_eq!(firsts(&world, replicas), expected, "{odd}, up to {last}");
    }
}

#[test]
fn the_last_port_of_all_is_given_too() {
    for count in [1, 2] {
        let mut resource = resource(2 / count, vec![entry("main", 7000, count)], 0);
        resource.spec.connection_server.connection_ports.first = 65_534;
        resource.spec.connection_server.connection_ports.last = 65_535;
        let pool = ValidPool::new(&resource).unwrap();
        let mut world = World::default();
        world.settle(&pool);
        let ranges: Vec<_> = (0..2).flat_map(|slot| world.ports(Slot(slot))).collect();
        assert_eq!(ranges.iter().map(|range| range.count).sum::<u16>(), 2);
    }
}

#[derive(Clone, Debug)]
enum Change {
    Scale(i32),
    Crash(u32),
    Sessions(u32, u32),
    Template,
    Step,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0..9).prop_map(Change::Scale),
        (0..9u32).prop_map(Change::Crash),
        (0..9u32, 0..4u32).prop_map(|(slot, sessions)| Change::Sessions(slot, sessions)),
        Just(Change::Template),
        Just(Change::Step),
        Just(Change::Step),
    ]
}

proptest! {
    /// No port twice is checked by the table's encoder at every step.
    #[test]
    fn slots_keep_their_ports_and_the_pool_converges(changes in proptest::collection::vec(change(), 1..60), count in 1..11i32) {
        let mut world = World::default();
        let mut replicas = 3;
        let mut generation = 0;
        for change in changes {
            match change {
                Change::Scale(to) => replicas = to,
                Change::Crash(slot) => { world.servers.remove(&Slot(slot)); }
                Change::Sessions(slot, sessions) => {
                    if let Some(server) = world.servers.get_mut(&Slot(slot)) {
                        server.sessions = Some(sessions);
                    }
                }
                Change::Template => world.servers.values_mut().for_each(|server| server.is_outdated = true),
                Change::Step => {
                    let before = world.clone();
                    let plan = world.step(&pool(replicas, count));
                    prop_assert!(plan.table.generation >= generation);
                    generation = plan.table.generation;
                    for row in &plan.table.rows {
                        let had = before.ports(row.slot);
                        prop_assert!(had.is_empty() || had == row.ranges, "slot {} moved", row.slot);
                    }
                }
            }
        }
        for server in world.servers.values_mut() {
            server.sessions = Some(0);
        }
        world.settle(&pool(replicas, count));
        let active = world.states().len();
        prop_assert_eq!(active, usize::try_from(replicas).unwrap());
        prop_assert_eq!(world.servers.len(), active);
    }
}

#[test]
fn the_largest_table_fits_into_a_config_map() {
    let entries = (0..8).map(|index| PortEntry {
        protocol: PortProtocol::TCPUDP,
        mapping: Mapping::Shared,
        ..entry(&format!("fifteen-bytes-{index}"), 40_000 + index, 7)
    });
    let mut resource = resource(750, entries.collect(), 65_535);
    resource.spec.connection_server.connection_ports.first = 7_800;
    resource.metadata.name = Some("x".repeat(52));
    let mut too_large = resource.clone();
    too_large.spec.replicas = 751;
    let problems = ValidPool::new(&too_large).unwrap_err();
    assert_eq!(problems[0].path, "spec.ports", "{problems:?}");
    let pool = ValidPool::new(&resource).unwrap();
    let servers: Vec<ObservedServer> = (0..750)
        .map(|slot| ObservedServer {
            slot: Slot(slot),
            uid: "6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10".to_owned(),
            address: Some("2001:db8:1234:5678:9abc:def0:1234:5678".parse().unwrap()),
            not_ready: true,
            ..ObservedServer::default()
        })
        .collect();
    let observed = Observed {
        servers: &servers,
        ..Observed::nothing("6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10")
    };
    let table = plan(&pool, &observed, Timestamp::UNIX_EPOCH).table;
    assert_eq!(table.rows.len(), 750);
    let bytes = table.encode().unwrap().len();
    assert!(bytes < MAX_ENCODED_BYTES * 9 / 10, "{bytes} bytes");
}

/// A pool in which one entry has mapping Identity.
fn identity_pool(replicas: i32, count: i32, last: i32) -> ValidPool {
    let entries = vec![entry("main", 7000, 1), identity("data", count)];
    ValidPool::new(&resource(replicas, entries, last)).unwrap()
}

#[test]
fn identity_ports_are_their_own_on_each_server_and_adjacent() {
    let mut world = World::default();
    world.settle(&identity_pool(3, 4, 20_099));
    for (slot, first) in [(0, 20_002), (1, 20_006), (2, 20_012)] {
        let ranges = world.ports(Slot(slot));
        let data = &ranges[1];
        assert_eq!(data.connection_port.get(), first);
        assert_eq!(data.server_port.get(), first);
        assert_eq!((data.count, data.mapping), (4, Mapping::Identity));
    }
}

#[test]
fn a_server_that_was_told_other_ports_is_replaced() {
    let mut world = World::default();
    world.settle(&identity_pool(2, 4, 20_099));
    let before = world.servers.clone();
    world.settle(&identity_pool(3, 4, 20_099));
    assert_eq!(
        world.servers[&Slot(0)],
        before[&Slot(0)],
        "growth replaces none"
    );
    world.settle(&identity_pool(3, 6, 20_099));
    for (slot, server) in &world.servers {
        assert!(
            before
                .get(slot)
                .is_none_or(|former| former.uid != server.uid)
        );
        assert_eq!(server.ranges, world.ports(*slot), "it was told its ports");
    }
    // What leads elsewhere without a word to the workload replaces none.
    let before = world.servers.clone();
    let entries = vec![entry("main", 7001, 1), identity("data", 6)];
    world.settle(&ValidPool::new(&resource(3, entries, 20_099)).unwrap());
    let uids = |servers: &BTreeMap<Slot, ObservedServer>| -> Vec<String> {
        servers.values().map(|server| server.uid.clone()).collect()
    };
    assert_eq!(uids(&world.servers), uids(&before));
}

#[test]
fn a_server_without_adjacent_ports_gets_others_or_none_and_the_status_says_why() {
    let mut world = World::default();
    let single = |replicas| {
        let resource = resource(replicas, vec![entry("main", 7000, 1)], 20_007);
        ValidPool::new(&resource).unwrap()
    };
    world.settle(&single(4));
    world.servers.get_mut(&Slot(0)).unwrap().deletion_cost = 2;
    world.servers.get_mut(&Slot(3)).unwrap().deletion_cost = 1;
    world.settle(&single(2));
    assert_eq!(world.ports(Slot(3))[0].connection_port.get(), 20_003);
    // 20001, 20002 and 20004 to 20007 are free.
    let pool = identity_pool(2, 3, 20_007);
    world.settle(&pool);
    assert_eq!(world.ports(Slot(0))[1].connection_port.get(), 20_004);
    assert_eq!(world.states(), [(0, RowState::Active)]);
    let servers: Vec<ObservedServer> = world.servers.values().cloned().collect();
    let input = status::StatusInput {
        name: "pool",
        generation: 1,
        pool: Some(&pool),
        table: world.table.as_ref(),
        servers: &servers,
        deployment: status::ObservedDeployment::default(),
        live: None,
        address: None,
        hiding_service: None,
        blockers: &[],
    };
    let status = status::status(&input, None, Timestamp::UNIX_EPOCH);
    assert!(
        status
            .message
            .contains("widen connectionServer.connectionPorts")
    );
    // A server alone may take all.
    world.settle(&identity_pool(1, 7, 20_007));
    assert_eq!(world.ports(Slot(0))[1].connection_port.get(), 20_001);
}

#[test]
fn a_changed_offer_admission_or_replies_keep_ports_and_servers() {
    let mut world = World::default();
    let mut resource = resource(2, vec![entry("main", 7000, 4)], 20_099);
    resource.spec.ports[0].protocol = PortProtocol::UDP;
    world.settle(&ValidPool::new(&resource).unwrap());
    let before = world.clone();
    resource.spec.ports[0].offer = Offer::Always;
    resource.spec.ports[0].admission = Some(EntryAdmission::Open);
    resource.spec.ports[0].replies = Replies::AnyPort;
    world.settle(&ValidPool::new(&resource).unwrap());
    let expected = PortRange {
        offer: Offer::Always,
        admission: Some(EntryAdmission::Open),
        replies: Replies::AnyPort,
        ..before.ports(Slot(1))[0].clone()
    };
    assert_eq!(world.ports(Slot(1)), [expected]);
    assert_eq!(world.servers, before.servers);
}
