//! The condition `ClientAddressesKept`.

use super::*;
use crate::plan::status::{ObservedDeployment, StatusInput, status};
use crate::pool::{ClientBinding, Exposure, ProcessingPoolSpec};

#[test]
fn pools_that_go_by_client_addresses_say_whether_they_have_them() {
    type Change = fn(&mut ProcessingPoolSpec);
    /// The status, and words of the message.
    type Expected = Option<(&'static str, &'static str)>;
    let companion: Change = |spec| spec.ports[1].admission = Some(EntryAdmission::Companion);
    let bound: Change = |spec| spec.sessions.client_binding = ClientBinding::Requester;
    let proxied: Change = |spec| spec.ports[1].proxy_protocol = ProxyProtocol::V2;
    let cases: [(Change, Exposure, Option<&str>, Expected); 8] = [
        (
            proxied,
            Exposure::NodePort,
            Some("pool"),
            Some(("False", "has a proxyProtocol")),
        ),
        (|_| {}, Exposure::NodePort, Some("pool"), None),
        (
            companion,
            Exposure::NodePort,
            Some("pool"),
            Some(("False", "entry \"data\" of ports")),
        ),
        (
            companion,
            Exposure::NodePort,
            None,
            Some(("True", "keep the addresses")),
        ),
        (
            companion,
            Exposure::HostNetwork,
            None,
            Some(("True", "directly")),
        ),
        (
            companion,
            Exposure::ClusterIP,
            None,
            Some(("True", "directly")),
        ),
        (
            bound,
            Exposure::LoadBalancer,
            Some("pool"),
            Some(("False", "sessions.clientBinding")),
        ),
        (
            bound,
            Exposure::LoadBalancer,
            None,
            Some(("True", "keep the addresses")),
        ),
    ];
    for (change, exposure, hiding_service, expected) in cases {
        let entries = vec![entry("main", 7000, 1), entry("data", 7100, 1)];
        let mut resource = resource(1, entries, 20_099);
        resource.spec.connection_server.exposure = exposure;
        change(&mut resource.spec);
        let pool = ValidPool::new(&resource).unwrap();
        let input = StatusInput {
            name: "pool",
            generation: 1,
            pool: Some(&pool),
            table: None,
            servers: &[],
            deployment: ObservedDeployment::default(),
            live: None,
            address: None,
            hiding_service,
            blockers: &[],
        };
        let status = status(&input, None, Timestamp::UNIX_EPOCH);
        let mut conditions = status.conditions.iter();
        let found = conditions.find(|condition| condition.type_ == "ClientAddressesKept");
        assert_eq!(found.is_some(), expected.is_some(), "{exposure:?}");
        if let Some((condition, (status, words))) = found.zip(expected) {
            assert_eq!(condition.status, status);
            assert!(condition.message.contains(words), "{}", condition.message);
        }
    }
}
