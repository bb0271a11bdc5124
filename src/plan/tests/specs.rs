//! Which pools are refused, and how.

use super::*;

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
