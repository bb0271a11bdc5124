//! Which pools are refused, and how. The rules about several fields have their table
//! in `tests/it/manifest.rs`, where each is compared with its CEL.

use super::*;

#[test]
fn wrong_specs_are_refused_with_field_and_remedy() {
    type Change = fn(&mut ProcessingPoolSpec);
    let cases: [(Change, &str, &str); 5] = [
        (|spec| spec.replicas = -1, "spec.replicas", "0 to 1000"),
        (|spec| spec.ports.clear(), "spec.ports", "1 to 8 entries"),
        (
            |spec| spec.ports[0].count = 0,
            "spec.ports[0].count",
            "1 to 10000",
        ),
        (
            |spec| spec.ports.push(entry("main", 9000, 1)),
            "spec.ports[1].name",
            "unique",
        ),
        // One of the rules about several fields.
        (
            |spec| spec.replicas = 26,
            "spec.connectionServer.connectionPorts",
            "need 104 connection ports",
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
