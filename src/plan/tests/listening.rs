//! What the status says of workloads that do not listen.

use super::*;
use crate::plan::status::{NotListening, ObservedDeployment, StatusInput, not_listening, status};

fn silent(entry: &str, is_partial: bool) -> NotListening {
    NotListening {
        entry: entry.to_owned(),
        protocol: PortProtocol::TCP,
        is_partial,
    }
}

#[test]
fn the_server_and_the_ports_on_which_it_does_not_listen_are_named() {
    let shared = PortEntry {
        mapping: Mapping::Shared,
        ..entry("shared", 9000, 3)
    };
    let entries = vec![
        entry("main", 7000, 1),
        entry("data", 7001, 1),
        entry("room", 8000, 4),
        shared,
    ];
    let pool = ValidPool::new(&resource(3, entries, 20_099)).unwrap();
    let mut world = World::default();
    world.settle(&pool);
    let end = ": compare spec.ports with what the workload opens on the address of its pod";
    let told = |silent: [Vec<NotListening>; 3]| {
        let mut servers: Vec<_> = world.servers.values().cloned().collect();
        for (server, silent) in servers.iter_mut().zip(silent) {
            server.not_listening = silent;
        }
        let blocker = not_listening(world.table.as_ref().unwrap(), &servers)?;
        Some(blocker.message.strip_suffix(end).unwrap().to_owned())
    };
    let none = Vec::new;
    assert_eq!(told([none(), none(), none()]), None);
    let cases = [
        (vec![silent("data", false)], "7001/TCP"),
        (vec![silent("room", false)], "8000-8003/TCP"),
        (vec![silent("shared", false)], "9000/TCP"),
        (
            vec![silent("main", false), silent("data", false)],
            "7000/TCP and 7001/TCP",
        ),
        (
            vec![silent("main", false), silent("room", true)],
            "7000/TCP",
        ),
    ];
    for (ports, expected) in cases {
        let expected = format!("pool-1 does not listen on {expected}");
        assert_eq!(told([none(), ports, none()]), Some(expected));
    }
    let one = || vec![silent("data", false)];
    let two = told([one(), one(), none()]).unwrap();
    let first = "pool-0 does not listen on 7001/TCP";
    assert_eq!(two, format!("{first}, and other servers are like that"));
    let all = told([one(), one(), one()]).unwrap();
    assert_eq!(all, two, "the number of others is not in it");
    // An entry that the pool no longer has.
    assert_eq!(told([vec![silent("gone", false)], none(), none()]), None);
}

#[test]
fn a_workload_that_listens_on_some_ports_of_an_entry_leaves_its_pool_ready() {
    let pool = pool(1, 4);
    let mut world = World::default();
    world.settle(&pool);
    let mut servers: Vec<_> = world.servers.values().cloned().collect();
    servers[0].not_listening = vec![silent("main", true)];
    let table = world.table.as_ref().unwrap();
    assert_eq!(not_listening(table, &servers), None);
    let input = StatusInput {
        name: "pool",
        generation: 1,
        pool: Some(&pool),
        table: Some(table),
        servers: &servers,
        deployment: ObservedDeployment {
            available: i32::MAX,
            is_current: true,
        },
        live: None,
        address: None,
        hiding_service: None,
        blockers: &[],
    };
    let status = status(&input, None, Timestamp::UNIX_EPOCH);
    let ready = &status.conditions[0];
    assert_eq!(
        (&*ready.type_, &*ready.status, &*ready.reason),
        ("Ready", "True", "PartlyListening")
    );
    assert_eq!(
        ready.message,
        "all 1 processing servers are ready; pool-0 does not listen on some of the ports 7000-7003/TCP"
    );
}
