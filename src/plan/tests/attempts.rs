//! Servers that fail, and when the next one of their slot comes.

use super::*;

pub(super) fn crash() -> End {
    End {
        is_success: false,
        cause: "container main ended with exit code 3".to_owned(),
    }
}

/// Fails the server in slot 0 as soon as it is there, and plans for `duration`;
/// returns the seconds at which it was started.
fn starts_within(world: &mut World, pool: &ValidPool, duration: Duration) -> Vec<u64> {
    let begin = world.elapsed;
    let mut starts = Vec::new();
    while world.elapsed < begin + duration {
        let now = world.elapsed - begin;
        if world.step(pool).start.contains(&Slot(0)) {
            starts.push(now.as_secs());
            let server = world.servers.get_mut(&Slot(0)).unwrap();
            (server.end, server.is_ready, server.not_ready) = (Some(crash()), false, true);
        }
    }
    starts
}

fn attempts_of(world: &World) -> Attempts {
    world.table.as_ref().unwrap().rows[0].attempts
}

#[test]
fn a_slot_whose_servers_fail_at_once_waits_longer_and_longer_for_the_next_one() {
    let pool = pool(2, 4);
    let mut world = World::default();
    let starts = starts_within(&mut world, &pool, Duration::from_secs(2000));
    assert_eq!(
        starts,
        [0, 1, 12, 33, 74, 155, 316, 617, 918, 1219, 1520, 1821]
    );
    assert_eq!(attempts_of(&world).failures, 12);
    let other = world.table.as_ref().unwrap().rows[1].attempts;
    assert_eq!(other, Attempts::default(), "the other slot goes on");
}

#[test]
fn a_failed_server_stays_as_the_record_and_is_tried_at_once_when_it_is_removed() {
    let pool = pool(1, 4);
    let mut world = World::default();
    starts_within(&mut world, &pool, Duration::from_secs(8));
    assert!(world.servers.contains_key(&Slot(0)), "its logs can be read");
    let plan = world.step(&pool);
    assert_eq!((plan.start, plan.stop), (vec![], vec![]));
    let wait = plan.next_after.unwrap();
    assert!(
        wait > Duration::ZERO && wait < Duration::from_secs(10),
        "{wait:?}"
    );
    // Someone removes it.
    world.servers.clear();
    assert_eq!(world.step(&pool).start, [Slot(0)]);
    assert_eq!(attempts_of(&world).failures, 2, "that it failed is known");
}

#[test]
fn failures_are_forgotten_when_a_server_was_ready_for_a_minute() {
    let pool = pool(1, 4);
    let mut world = World::default();
    starts_within(&mut world, &pool, Duration::from_secs(40));
    while world.step(&pool).start.is_empty() {}
    let started = world.elapsed;
    let server = world.servers.get_mut(&Slot(0)).unwrap();
    server.ready_since = Some(Timestamp::UNIX_EPOCH + started);
    let wait = world.step(&pool).next_after.unwrap();
    assert_eq!(wait, Duration::from_secs(60));
    assert!(attempts_of(&world).failures > 0);
    world.elapsed = started + wait;
    assert_eq!(world.step(&pool).next_after, None);
    assert_eq!(attempts_of(&world), Attempts::default());
}

#[test]
fn a_corrected_template_is_tried_at_once() {
    let pool = pool(1, 4);
    let mut world = World::default();
    starts_within(&mut world, &pool, Duration::from_secs(300));
    world.servers.get_mut(&Slot(0)).unwrap().is_outdated = true;
    assert_eq!(world.step(&pool).stop, [Slot(0)]);
    assert_eq!(world.step(&pool).start, [Slot(0)]);
    assert_eq!(attempts_of(&world).failures, 0);
}

#[test]
fn a_program_that_serves_one_client_and_ends_is_started_again_at_once() {
    let pool = pool(1, 4);
    let mut world = World::default();
    let finish = |world: &mut World, is_ready: bool| {
        let server = world.servers.get_mut(&Slot(0)).unwrap();
        (server.not_ready, server.is_ready) = (!is_ready, is_ready);
        world.step(&pool);
        let server = world.servers.get_mut(&Slot(0)).unwrap();
        (server.not_ready, server.is_ready) = (true, false);
        server.end = Some(End {
            is_success: true,
            ..crash()
        });
        world.step(&pool);
        world.step(&pool);
    };
    world.settle(&pool);
    for served in 0..20 {
        finish(&mut world, true);
        assert!(
            world.servers.contains_key(&Slot(0)),
            "after {served} clients"
        );
        assert_eq!(attempts_of(&world).failures, 0);
    }
    // One that was never ready served no one.
    finish(&mut world, false);
    finish(&mut world, false);
    assert_eq!(attempts_of(&world).failures, 2);
}

#[test]
fn a_server_that_vanishes_before_it_was_ready_counts_as_failed() {
    let pool = pool(1, 4);
    let mut world = World::default();
    let mut starts = 0;
    for _ in 0..120 {
        starts += world.step(&pool).start.len();
        if let Some(server) = world.servers.get_mut(&Slot(0)) {
            server.not_ready = true;
            world.step(&pool);
            world.servers.clear();
        }
    }
    assert!(starts < 6, "{starts} in a minute");
    // There is no pod whose removal would end the pause, so it is short.
    let words = "pod pool-0 failed 4 times in a row: it was removed before it was ready; it is";
    let (mut longest, mut was_told) = (Duration::ZERO, false);
    let mut last = world.elapsed;
    for _ in 0..2000 {
        let is_started = !world.step(&pool).start.is_empty();
        let told = failing(world.table.as_ref().unwrap(), &[]);
        was_told |= told.is_some_and(|it| it.message.starts_with(words));
        if is_started {
            longest = longest.max(world.elapsed - last);
            last = world.elapsed;
            world.servers.get_mut(&Slot(0)).unwrap().not_ready = true;
            world.step(&pool);
            world.servers.clear();
        }
    }
    assert!(attempts_of(&world).failures > 20);
    assert!(longest <= Duration::from_secs(32), "{longest:?}");
    assert!(was_told, "with the cause");
    // One that was ready may be deleted as often as someone likes.
    let mut world = World::default();
    world.settle(&pool);
    for _ in 0..5 {
        world.servers.clear();
        assert_eq!(world.step(&pool).start, [Slot(0)]);
        world.step(&pool);
    }
}

#[test]
fn the_status_says_which_pod_fails_why_and_when_it_is_tried_again() {
    let pool = pool(3, 4);
    let mut world = World::default();
    let told = |world: &World| {
        let servers: Vec<_> = world.servers.values().cloned().collect();
        failing(world.table.as_ref().unwrap(), &servers).map(|blocker| blocker.message)
    };
    world.settle(&pool);
    let fail = |world: &mut World, slot: u32| {
        world.servers.get_mut(&Slot(slot)).unwrap().end = Some(crash());
    };
    fail(&mut world, 1);
    world.step(&pool);
    assert_eq!(told(&world), None, "it is replaced at once");
    world.step(&pool);
    fail(&mut world, 1);
    world.step(&pool);
    let message = "pod pool-1 failed 2 times in a row: container main ended with exit code 3; it is created again at 00:00:12 UTC";
    assert_eq!(told(&world).as_deref(), Some(message));
    for _ in 0..2 {
        fail(&mut world, 2);
        world.step(&pool);
        world.step(&pool);
    }
    assert_eq!(
        told(&world),
        Some(format!("{message}; another pod fails, too"))
    );
    while !world.step(&pool).start.contains(&Slot(1)) {}
    let words = "pod pool-1 failed 2 times in a row; it is being tried again";
    assert!(told(&world).unwrap().starts_with(words), "steady");
}
