//! Which servers start, drain and stop, and when.

use super::*;

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
    world.servers.get_mut(&Slot(0)).unwrap().end = Some(attempts::crash());
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
fn servers_that_are_not_ready_may_go_while_none_can_have_a_session() {
    let down = |sessions: Option<u32>, is_running: bool| ObservedServer {
        sessions,
        is_running,
        ..ObservedServer::default()
    };
    let empty = down(Some(0), true);
    let cases = [
        ("known to be empty", down(Some(0), true), true, true),
        ("with sessions", down(Some(1), true), true, false),
        ("nothing of it runs", down(None, false), true, true),
        ("it runs out of reach", down(None, true), true, false),
        ("no one has answered", down(None, false), false, false),
    ];
    for (what, server, is_counted, expected) in cases {
        let servers = [empty.clone(), server.clone()];
        assert_eq!(unready_may_go(&servers, is_counted), expected, "{what}");
        assert!(!unready_may_go(&[server], is_counted), "{what}: only one");
    }
}
