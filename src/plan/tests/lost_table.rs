//! What continues a table that is lost, or older than what readers have seen.

use super::*;

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
    let of_agent = PortRange {
        server_port: TargetPort::new(7070).unwrap(),
        connection_port: ListenPort::new(20_050).unwrap(),
        ..claimed[0].clone()
    };
    let carried = vec![wrong, claimed[0].clone(), of_agent];
    let server = world.servers.get_mut(&Slot(1)).unwrap();
    (server.ranges, server.sessions) = (carried, Some(0));
    let mut drained = world.clone();
    assert_eq!(drained.step(&pool(1, 4)).stop, []);
    assert_eq!(
        drained.ports(Slot(1)),
        [],
        "it drains, with what it may have"
    );
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
