use super::*;
use crate::pool::{
    Admission, ConnectionPorts, Mapping, Offer, PortEntry, PortProtocol, ProcessingPool,
    ProcessingPoolSpec, ProxyProtocol, Replies,
};
use crate::table::{MAX_ENCODED_BYTES, Slot};
use proptest::prelude::*;

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

use crate::table::PortRange;

#[test]
fn a_growing_pool_has_its_row_before_its_server_and_its_address_after() {
    let mut world = World::default();
    let first = world.step(&pool(2, 4));
    assert_eq!(first.start, [Slot(0), Slot(1)]);
    assert!(first.table.rows.iter().all(|row| row.address.is_none()));
    let second = world.step(&pool(2, 4));
    assert_eq!(second.start, []);
    assert!(second.table.rows.iter().all(|row| row.address.is_some()));
    assert_eq!(second.table.generation, 2);
    assert_eq!(
        world.step(&pool(2, 4)),
        Plan {
            start: vec![],
            ..second
        },
        "nothing changes any more"
    );
}

#[test]
fn a_shrinking_pool_drains_then_stops_then_drops_the_row() {
    let mut world = World::default();
    world.settle(&pool(3, 4));
    world.servers.get_mut(&Slot(2)).unwrap().sessions = Some(1);
    let plan = world.step(&pool(1, 4));
    assert_eq!(plan.stop, []);
    assert_eq!(
        world.states(),
        [
            (0, RowState::Draining),
            (1, RowState::Draining),
            (2, RowState::Active)
        ]
    );
    let plan = world.step(&pool(1, 4));
    assert_eq!(plan.stop, [Slot(0), Slot(1)], "both are empty");
    world.step(&pool(1, 4));
    assert_eq!(
        world.states(),
        [(2, RowState::Active)],
        "the one with a session stays"
    );
}

#[test]
fn a_server_with_sessions_is_kept_until_the_limit() {
    let mut world = World::default();
    world.settle(&pool(1, 4));
    world.servers.get_mut(&Slot(0)).unwrap().sessions = Some(3);
    for _ in 0..100 {
        assert_eq!(world.step(&pool(0, 4)).stop, []);
    }
    world.elapsed += LIMIT;
    assert_eq!(world.step(&pool(0, 4)).stop, [Slot(0)]);
}

/// Each step is one of a new controller: a plan has no other memory than the table.
#[test]
fn nothing_renews_the_drain_limit() {
    type Change = fn(&mut World);
    let changes: [(&str, Change); 5] = [
        ("nothing", |_| {}),
        ("sessions come and go", |world| {
            let server = world.servers.get_mut(&Slot(0)).unwrap();
            server.sessions = server.sessions.map(|sessions| 1 + sessions % 3);
        }),
        ("it is out of reach now and then", |world| {
            let server = world.servers.get_mut(&Slot(0)).unwrap();
            server.sessions = match server.sessions {
                Some(_) => None,
                None => Some(1),
            };
        }),
        ("its template changes", |world| {
            world.servers.get_mut(&Slot(0)).unwrap().is_outdated ^= true;
        }),
        ("other parts read a newer table", |world| {
            world.seen_generation += 2;
        }),
    ];
    for (what, change) in changes {
        let mut world = World::default();
        world.settle(&pool(2, 4));
        world.servers.get_mut(&Slot(0)).unwrap().sessions = Some(1);
        world.servers.get_mut(&Slot(1)).unwrap().sessions = Some(2);
        let begun = world.elapsed;
        let mut pools = [pool(1, 4), pool(1, 3)].into_iter().cycle();
        let stopped = loop {
            let now = world.elapsed;
            if world.step(&pools.next().unwrap()).stop.contains(&Slot(0)) {
                break now - begun;
            }
            assert!(now < begun + 2 * LIMIT, "{what}: it is never stopped");
            change(&mut world);
        };
        assert!(
            (LIMIT..LIMIT + 2 * SETTLE).contains(&stopped),
            "{what}: {stopped:?}"
        );
    }
}

#[test]
fn not_ready_servers_go_first() {
    let mut world = World::default();
    world.settle(&pool(3, 4));
    world.servers.get_mut(&Slot(0)).unwrap().is_ready = false;
    world.step(&pool(2, 4));
    assert_eq!(world.states()[0], (0, RowState::Draining));
}

#[test]
fn servers_of_the_lowest_deletion_cost_go_first() {
    let mut world = World::default();
    world.settle(&pool(3, 4));
    for (slot, cost) in [(0, 5), (1, -5), (2, 0)] {
        let server = world.servers.get_mut(&Slot(slot)).unwrap();
        (server.deletion_cost, server.sessions) = (cost, Some(9 - slot));
    }
    let mut replaced = world.clone();
    world.step(&pool(2, 4));
    assert_eq!(world.states()[1], (1, RowState::Draining));
    for server in replaced.servers.values_mut() {
        server.is_outdated = true;
    }
    replaced.step(&pool(3, 4));
    assert_eq!(replaced.states()[1], (1, RowState::Draining));
}

#[test]
fn a_new_template_replaces_a_quarter_at_a_time_in_place() {
    let mut world = World::default();
    world.settle(&pool(8, 4));
    let before: Vec<_> = (0..8).map(|slot| world.ports(Slot(slot))).collect();
    let former: Vec<String> = world
        .servers
        .values()
        .map(|server| server.uid.clone())
        .collect();
    for server in world.servers.values_mut() {
        server.is_outdated = true;
    }
    for _ in 0..40 {
        world.step(&pool(8, 4));
        let away = world
            .states()
            .iter()
            .filter(|(_, state)| *state == RowState::Draining)
            .count();
        assert!(away <= 2, "{away} at once");
    }
    assert!(
        world
            .servers
            .values()
            .all(|server| !former.contains(&server.uid))
    );
    assert_eq!(
        (0..8)
            .map(|slot| world.ports(Slot(slot)))
            .collect::<Vec<_>>(),
        before
    );
}

#[test]
fn a_template_that_does_not_work_stops_a_quarter_and_can_be_corrected() {
    let mut world = World::default();
    world.settle(&pool(4, 4));
    world
        .servers
        .values_mut()
        .for_each(|server| server.is_outdated = true);
    world.is_broken = true;
    for _ in 0..40 {
        world.step(&pool(4, 4));
    }
    let ready = |world: &World| {
        world
            .servers
            .values()
            .filter(|server| server.is_ready)
            .count()
    };
    assert_eq!(ready(&world), 3, "the others keep running");
    world
        .servers
        .values_mut()
        .for_each(|server| server.is_outdated = true);
    world.is_broken = false;
    for _ in 0..40 {
        world.step(&pool(4, 4));
    }
    assert_eq!(ready(&world), 4);
    assert!(world.servers.values().all(|server| !server.is_outdated));
}

#[test]
fn a_failed_server_is_stopped_and_a_stopping_one_is_waited_for() {
    let mut world = World::default();
    world.settle(&pool(2, 4));
    world.servers.get_mut(&Slot(0)).unwrap().has_failed = true;
    assert_eq!(world.clone().step(&pool(2, 4)).stop, [Slot(0)]);
    world.servers.get_mut(&Slot(0)).unwrap().is_stopping = true;
    let plan = world.step(&pool(2, 4));
    assert_eq!((plan.stop.len(), plan.start.len()), (0, 0));
}

#[test]
fn a_row_follows_the_readiness_of_its_server_while_it_may() {
    let pool = pool(2, 4);
    let mut world = World::default();
    world.settle(&pool);
    let table = world.table.clone().unwrap();
    assert!(table.rows.iter().all(|row| !row.not_ready));
    let mut servers: Vec<_> = world.servers.values().cloned().collect();
    let plan_next = |published: &Table, servers: &[ObservedServer], may_mark| {
        let observed = Observed {
            published: Some(published),
            servers,
            may_mark,
            ..Observed::nothing("uid")
        };
        plan(&pool, &observed, Timestamp::UNIX_EPOCH)
    };
    servers[1].not_ready = true;
    assert_eq!(plan_next(&table, &servers, false).table, table);
    let next = plan_next(&table, &servers, true);
    assert!(next.start.is_empty() && next.stop.is_empty());
    assert!(!next.takes_from_sessions(Some(&table)), "live ones go on");
    let marked = next.table;
    assert_eq!(marked.generation, table.generation + 1);
    assert_eq!(
        [marked.rows[0].not_ready, marked.rows[1].not_ready],
        [false, true]
    );
    assert_eq!(marked.rows[1].ranges, table.rows[1].ranges);
    assert_eq!(marked.rows[1].state, RowState::Active);
    // It may change again when it may.
    servers[1].not_ready = false;
    assert_eq!(plan_next(&marked, &servers, false).table, marked);
    assert_eq!(plan_next(&marked, &servers, true).table.rows, table.rows);
    // Another server in the slot is never taken for the former one.
    servers[1].uid = "another".to_owned();
    servers[0].uid = "another, not ready yet".to_owned();
    servers[0].not_ready = true;
    let rows = plan_next(&marked, &servers, false).table.rows;
    assert_eq!([rows[0].not_ready, rows[1].not_ready], [true, false]);
}

#[test]
fn a_lost_table_goes_on_above_its_generation() {
    let observed = Observed {
        seen_generation: 41,
        ..Observed::nothing("uid")
    };
    let plan = plan(&pool(2, 4), &observed, Timestamp::UNIX_EPOCH);
    assert_eq!(plan.table.generation, 42);
}

#[test]
fn a_lost_table_is_derived_again_from_the_servers() {
    let mut world = World::default();
    world.settle(&pool(6, 4));
    // Slots that were drained in another order than that of their numbers.
    for slot in [1, 3, 4] {
        world.servers.get_mut(&Slot(slot)).unwrap().is_ready = false;
    }
    world.settle(&pool(3, 4));
    let (before, servers) = (world.table.take().unwrap(), world.servers.clone());
    let slots: Vec<u32> = before.rows.iter().map(|row| row.slot.0).collect();
    assert_eq!(slots, [0, 2, 5]);
    for server in world.servers.values_mut() {
        server.sessions = Some(1);
    }
    world.seen_generation = before.generation;
    let plan = world.step(&pool(3, 4));
    assert_eq!((plan.start, plan.stop), (vec![], vec![]));
    assert_eq!(plan.table.generation, before.generation + 1);
    assert_eq!(plan.table.rows, before.rows, "the same ports and servers");
    assert!(world.servers.keys().eq(servers.keys()));
}

#[test]
fn servers_keep_their_slots_when_a_lost_table_is_planned_for_fewer() {
    let mut world = World::default();
    world.settle(&pool(6, 4));
    for server in world.servers.values_mut() {
        server.sessions = Some(2);
    }
    world.servers.get_mut(&Slot(3)).unwrap().sessions = Some(0);
    let before = world.table.take().unwrap();
    world.seen_generation = before.generation;
    assert_eq!(
        world.step(&pool(4, 4)).stop,
        [],
        "all of them may be in use"
    );
    let ranges =
        |table: &Table| -> Vec<_> { table.rows.iter().map(|row| row.ranges.clone()).collect() };
    assert_eq!(ranges(world.table.as_ref().unwrap()), ranges(&before));
    assert_eq!(world.step(&pool(4, 4)).stop, [Slot(3)]);
}

#[test]
fn ports_that_two_servers_carry_are_given_to_one() {
    let mut world = World::default();
    world.settle(&pool(2, 4));
    world.table = None;
    let claimed = world.servers[&Slot(0)].ranges.clone();
    let wrong = PortRange {
        count: 0,
        ..claimed[0].clone()
    };
    world.servers.get_mut(&Slot(1)).unwrap().ranges = vec![wrong, claimed[0].clone()];
    assert_eq!(world.step(&pool(2, 4)).stop, []);
    assert_eq!(world.ports(Slot(0)), claimed);
    assert_eq!(world.ports(Slot(1))[0].connection_port.get(), 20_004);
}

#[test]
fn the_newest_known_table_is_continued_above_what_readers_have_seen() {
    let pool = pool(2, 4);
    let table = |generation| {
        let first = plan(&pool, &Observed::nothing("uid"), Timestamp::UNIX_EPOCH);
        Table {
            generation,
            ..first.table
        }
    };
    let stranger = Table {
        pool_uid: "another".to_owned(),
        ..table(99)
    };
    // Published, last written, seen; the next generation.
    let cases = [
        (Some(table(7)), Some(table(7)), 7, 7),
        (Some(table(7)), None, 0, 7),
        (Some(table(5)), Some(table(7)), 0, 8),
        (None, Some(table(7)), 6, 8),
        (Some(table(5)), None, 7, 8),
        (Some(stranger), None, 0, 1),
        (None, None, 0, 1),
    ];
    for (published, last_written, seen_generation, next) in cases {
        let observed = Observed {
            published: published.as_ref(),
            last_written: last_written.as_ref(),
            seen_generation,
            ..Observed::nothing("uid")
        };
        let plan = plan(&pool, &observed, Timestamp::UNIX_EPOCH);
        assert_eq!(plan.table.generation, next, "{observed:?}");
    }
}

#[test]
fn spent_servers_are_replaced_at_once_and_keep_their_ports() {
    let mut world = World::default();
    world.settle(&pool(8, 4));
    let before: Vec<_> = (0..8).map(|slot| world.ports(Slot(slot))).collect();
    for slot in 0..4 {
        world.servers.get_mut(&Slot(slot)).unwrap().is_spent = true;
    }
    let draining = world.step(&pool(8, 4)).table;
    let is_draining = |row: &&Row| row.state == RowState::Draining;
    assert_eq!(draining.rows.iter().filter(is_draining).count(), 4);
    world.settle(&pool(8, 4));
    assert!(world.servers.values().all(|server| !server.is_spent));
    assert!(world.servers.keys().copied().eq((0..8).map(Slot)));
    let after: Vec<_> = (0..8).map(|slot| world.ports(Slot(slot))).collect();
    assert_eq!(after, before);
}

#[test]
fn a_shrinking_pool_loses_its_spent_servers_first() {
    let mut world = World::default();
    world.settle(&pool(3, 4));
    world.servers.get_mut(&Slot(0)).unwrap().is_spent = true;
    world.step(&pool(3, 4));
    world.settle(&pool(2, 4));
    assert_eq!(
        world.states(),
        [(1, RowState::Active), (2, RowState::Active)]
    );
}

#[test]
fn nothing_is_started_or_replaced_while_the_template_is_refused() {
    let mut world = World::default();
    world.settle(&pool(3, 4));
    world.servers.remove(&Slot(1));
    for server in world.servers.values_mut() {
        server.is_outdated = true;
    }
    let before = world.table.clone().unwrap();
    let servers: Vec<ObservedServer> = world.servers.values().cloned().collect();
    let observed = Observed {
        published: Some(&before),
        servers: &servers,
        may_start: false,
        ..Observed::nothing("uid")
    };
    let plan = plan(&pool(3, 4), &observed, Timestamp::UNIX_EPOCH);
    assert_eq!((plan.start, plan.stop), (vec![], vec![]));
    let mut rows = plan.table.rows.iter();
    assert!(rows.all(|row| row.state == RowState::Active));
}

#[test]
fn a_draining_server_comes_back_when_the_pool_grows_again() {
    let mut world = World::default();
    world.settle(&pool(2, 4));
    world.servers.get_mut(&Slot(1)).unwrap().sessions = Some(1);
    world.servers.get_mut(&Slot(0)).unwrap().sessions = Some(2);
    world.step(&pool(1, 4));
    assert_eq!(
        world.states(),
        [(0, RowState::Active), (1, RowState::Draining)]
    );
    world.step(&pool(2, 4));
    assert_eq!(
        world.states(),
        [(0, RowState::Active), (1, RowState::Active)]
    );
}

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
        count: 2,
        ..grown.entries[0].clone()
    });
    world.settle(&grown);
    assert!(world.ports(Slot(1)).len() >= 2);
}

#[test]
fn wrong_specs_are_refused_with_field_and_remedy() {
    type Change = fn(&mut ProcessingPoolSpec);
    let cases: [(Change, &str, &str); 13] = [
        (|spec| spec.replicas = -1, "spec.replicas", "0 to 1000"),
        (
            |spec| spec.replicas = 26,
            "spec.connectionServer.connectionPorts",
            "need 104 connection ports",
        ),
        (|spec| spec.ports.clear(), "spec.ports", "1 to 8 entries"),
        (
            |spec| spec.ports[0].count = 0,
            "spec.ports[0].count",
            "1 to 10000",
        ),
        (
            |spec| spec.ports[0].port = Some(65_534),
            "spec.ports[0].count",
            "above 65535",
        ),
        (
            |spec| spec.ports[0].port = Some(7067),
            "spec.ports[0].port",
            "belongs to portpool's agent",
        ),
        (
            |spec| spec.ports[0].port = None,
            "spec.ports[0].port",
            "is missing",
        ),
        (
            |spec| spec.ports[0].mapping = Mapping::Identity,
            "spec.ports[0].port",
            "must be absent with mapping Identity",
        ),
        (
            |spec| {
                spec.ports.push(identity("data", 2));
                spec.connection_server.connection_ports.first = 6000;
                spec.connection_server.connection_ports.last = 7070;
                spec.ports[0].port = Some(100);
            },
            "spec.connectionServer.connectionPorts",
            "must not include 7070 to 7073",
        ),
        (
            |spec| {
                spec.ports.push(identity("data", 2));
                spec.ports[0].port = Some(20_010);
            },
            "spec.ports[1].mapping",
            "any of connectionPorts",
        ),
        (
            |spec| spec.ports.push(entry("main", 9000, 1)),
            "spec.ports[1].name",
            "unique",
        ),
        (
            |spec| spec.ports.push(entry("other", 7003, 1)),
            "spec.ports[1].port",
            "overlap",
        ),
        (
            |spec| spec.connection_server.load_sharing_port = 20_005,
            "spec.connectionServer.loadSharingPort",
            "outside",
        ),
    ];
    for (change, path, message) in cases {
        let mut resource = resource(2, vec![entry("main", 7000, 4)], 20_099);
        change(&mut resource.spec);
        let problems = ValidPool::new(&resource).unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].path, path);
        assert!(problems[0].message.contains(message), "{problems:?}");
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

fn identity(name: &str, count: i32) -> PortEntry {
    PortEntry {
        port: None,
        mapping: Mapping::Identity,
        ..entry(name, 0, count)
    }
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
    for slot in 0..3u16 {
        let ranges = world.ports(Slot(slot.into()));
        let first = 20_001 + 5 * slot;
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
        let resource = resource(replicas, vec![entry("main", 7000, 1)], 20_005);
        ValidPool::new(&resource).unwrap()
    };
    world.settle(&single(3));
    world.servers.get_mut(&Slot(0)).unwrap().deletion_cost = 2;
    world.servers.get_mut(&Slot(2)).unwrap().deletion_cost = 1;
    world.settle(&single(2));
    assert_eq!(world.ports(Slot(2))[0].connection_port.get(), 20_002);
    // 20001 and 20003 to 20005 are free.
    let pool = identity_pool(2, 2, 20_005);
    world.settle(&pool);
    assert_eq!(world.ports(Slot(0))[1].connection_port.get(), 20_003);
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
        blockers: &[],
    };
    let status = status::status(&input, None, Timestamp::UNIX_EPOCH);
    assert!(
        status
            .message
            .contains("widen connectionServer.connectionPorts")
    );
    // A server alone may take all.
    world.settle(&identity_pool(1, 5, 20_005));
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
    resource.spec.ports[0].admission = Some(Admission::Open);
    resource.spec.ports[0].replies = Replies::AnyPort;
    world.settle(&ValidPool::new(&resource).unwrap());
    let expected = PortRange {
        offer: Offer::Always,
        admission: Some(Admission::Open),
        replies: Replies::AnyPort,
        ..before.ports(Slot(1))[0].clone()
    };
    assert_eq!(world.ports(Slot(1)), [expected]);
    assert_eq!(world.servers, before.servers);
}
