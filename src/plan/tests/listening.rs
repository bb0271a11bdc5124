//! What the status says of workloads that do not listen.

use super::*;
use crate::plan::status::{NotListening, not_listening};

fn silent(entry: &str, count: u32) -> NotListening {
    NotListening {
        entry: entry.to_owned(),
        protocol: PortProtocol::TCP,
        count,
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
        (vec![silent("data", 1)], "7001/TCP"),
        (vec![silent("room", 4)], "8000-8003/TCP"),
        (vec![silent("room", 2)], "2 of the 4 ports 8000-8003/TCP"),
        (vec![silent("shared", 3)], "9000/TCP"),
        (
            vec![silent("main", 1), silent("data", 1)],
            "7000/TCP and 7001/TCP",
        ),
    ];
    for (ports, expected) in cases {
        let expected = format!("pool-1 does not listen on {expected}");
        assert_eq!(told([none(), ports, none()]), Some(expected));
    }
    let one = || vec![silent("data", 1)];
    let two = told([one(), one(), none()]).unwrap();
    let first = "pool-0 does not listen on 7001/TCP";
    assert_eq!(two, format!("{first}, and another server is like that"));
    let all = told([one(), one(), one()]).unwrap();
    assert_eq!(all, format!("{first}, and 2 other servers are like that"));
    // An entry that the pool no longer has.
    assert_eq!(told([vec![silent("gone", 1)], none(), none()]), None);
}
