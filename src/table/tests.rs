use proptest::prelude::*;

use super::*;

pub(crate) fn range(first: u16, count: u16) -> PortRange {
    PortRange {
        name: "main".to_owned(),
        connection_port: ListenPort::new(first).unwrap(),
        server_port: TargetPort::new(7000).unwrap(),
        count,
        protocol: PortProtocol::TCP,
        mapping: Mapping::Offset,
        offer: Offer::WhenListening,
        admission: None,
        proxy_protocol: ProxyProtocol::None,
        replies: Replies::ServerPort,
    }
}

pub(crate) fn row(slot: Slot, ranges: Vec<PortRange>) -> Row {
    Row {
        slot,
        server: format!("a-pool-with-a-long-name-{slot}"),
        server_uid: Some("6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10".to_owned()),
        address: Some("2001:db8:1234:5678:9abc:def0:1234:5678".parse().unwrap()),
        state: RowState::Active,
        not_ready: false,
        draining_since: None,
        attempts: Attempts::default(),
        ranges,
    }
}

pub(crate) fn table(rows: Vec<Row>) -> Table {
    Table {
        format_version: FORMAT_VERSION,
        pool: "pool".to_owned(),
        pool_uid: "uid".to_owned(),
        generation: 3,
        advertised_address: Some("games.example.org".to_owned()),
        agent_port: TargetPort::new(7070).unwrap(),
        load_sharing: LoadSharing::default(),
        sessions: Sessions::default(),
        recycle: Recycle::default(),
        drain_seconds: None,
        rows,
    }
}

#[test]
fn sixty_four_thousand_ports_stay_far_below_a_config_map() {
    let rows = (0..1000).map(|slot| {
        row(
            Slot(slot),
            vec![range(1024 + 64 * u16::try_from(slot).unwrap(), 64)],
        )
    });
    let table = table(rows.collect());
    assert_eq!(table.connection_port_count(), 64_000);
    let text = table.encode().unwrap();
    assert!(text.len() < MAX_ENCODED_BYTES / 2, "{} bytes", text.len());
    assert_eq!(Table::decode(&text).unwrap(), table);
}

#[test]
fn the_encoding_is_as_committed() {
    let golden = r#"{"formatVersion":2,"pool":"pool","poolUid":"uid","generation":3,"advertisedAddress":"games.example.org","agentPort":7070,"loadSharing":{"policy":"LeastSessions"},"sessions":{"claimSeconds":30,"idleTimeoutSeconds":3600,"udpIdleTimeoutSeconds":60,"maxDurationSeconds":0,"lingerSeconds":5,"admission":"Session","confirm":"Never","confirmSeconds":3,"clientBinding":"Any"},"rows":[{"slot":0,"server":"a-pool-with-a-long-name-0","serverUid":"6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10","address":"2001:db8:1234:5678:9abc:def0:1234:5678","state":"Active","ranges":[{"name":"main","connectionPort":20000,"serverPort":7000,"count":4,"protocol":"TCP"}]}]}"#;
    assert_eq!(
        table(vec![row(Slot(0), vec![range(20_000, 4)])])
            .encode()
            .unwrap(),
        golden
    );
}

#[test]
fn what_a_row_does_not_say_is_as_before_there_was_a_field_for_it() {
    let mut marked = table(vec![row(Slot(0), vec![range(20_000, 4)])]);
    marked.rows[0].not_ready = true;
    let text = marked.encode().unwrap();
    assert_eq!(Table::decode(&text).unwrap(), marked);
    // Older writers have no such field, and older readers ignore it, as this one
    // ignores another.
    let older = text.replace(r#""notReady":true,"#, "");
    assert!(!Table::decode(&older).unwrap().rows[0].not_ready);
    let newer = text.replace("notReady", "notYetKnown");
    assert!(!Table::decode(&newer).unwrap().rows[0].not_ready);
}

#[test]
fn a_table_without_a_drain_limit_has_that_of_a_pool_that_names_none() {
    let mut table = table(Vec::new());
    for (told, seconds) in [(None, 600), (Some(0), 0), (Some(9), 9)] {
        table.drain_seconds = told;
        assert_eq!(table.drain_limit(), Duration::from_secs(seconds));
    }
}

#[test]
fn a_wrong_table_is_refused_with_the_reason() {
    let good = table(vec![
        row(Slot(0), vec![range(20_000, 4)]),
        row(Slot(1), vec![range(20_010, 4)]),
    ]);
    type Change = fn(&mut Table);
    let cases: [(Change, &str); 8] = [
        (|table| table.format_version = 3, "format version 3"),
        (|table| table.format_version = 0, "format version 0"),
        (|table| table.generation = 0, "generation 0"),
        (|table| table.rows.swap(0, 1), "slot 0 is out of order"),
        (
            |table| table.rows[1].ranges[0].connection_port = ListenPort::new(20_003).unwrap(),
            "20003 is given to slot 0 and to slot 1",
        ),
        (|table| table.rows[1].ranges[0].count = 0, "1 or more ports"),
        (
            |table| table.rows[1].ranges[0].server_port = TargetPort::new(65_534).unwrap(),
            "none above 65535",
        ),
        (
            |table| table.rows[1].ranges[0].mapping = Mapping::Identity,
            "the same ones on the server",
        ),
    ];
    let of_entries: [(Change, &str); 6] = [
        (
            |table| table.rows[0].ranges[0].offer = Offer::WhenAnyListens,
            r#"slot 0, port "main": offer: WhenAnyListens needs protocol TCPUDP"#,
        ),
        (
            |table| {
                let range = &mut table.rows[0].ranges[0];
                (range.admission, range.offer) = (Some(EntryAdmission::Companion), Offer::Always);
            },
            "offer: does not apply with admission Companion",
        ),
        (
            |table| {
                let range = &mut table.rows[0].ranges[0];
                (range.proxy_protocol, range.protocol) = (ProxyProtocol::V2, PortProtocol::UDP);
            },
            "proxyProtocol: V2 needs protocol TCP",
        ),
        (
            |table| table.rows[0].ranges[0].replies = Replies::AnyPort,
            "replies: AnyPort needs protocol UDP",
        ),
        (
            |table| {
                let range = &mut table.rows[0].ranges[0];
                range.mapping = Mapping::Identity;
                range.connection_port = ListenPort::new(7073).unwrap();
                range.server_port = TargetPort::new(7073).unwrap();
            },
            "port: includes 7073, which belongs to portpool's agent",
        ),
        (
            |table| {
                let other = PortRange {
                    name: "other".to_owned(),
                    server_port: TargetPort::new(7003).unwrap(),
                    ..range(21_000, 1)
                };
                table.rows[0].ranges.push(other);
            },
            r#"slot 0, port "other": port: ports 7003 to 7003 overlap those of entry "main""#,
        ),
    ];
    for (change, words) in cases.into_iter().chain(of_entries) {
        let mut table = good.clone();
        change(&mut table);
        let text = serde_json::to_string(&table).unwrap();
        let error = Table::decode(&text).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    assert!(
        Table::decode(&" ".repeat(MAX_ENCODED_BYTES + 1))
            .unwrap_err()
            .to_string()
            .contains("1048577 bytes")
    );
}

#[test]
fn ports_go_in_step_or_are_shared_or_the_same() {
    let port = |number| ListenPort::new(number).unwrap();
    let in_step = range(20_000, 4);
    assert_eq!(in_step.target(port(20_003)), TargetPort::new(7003));
    assert_eq!(in_step.target(port(20_004)), None);
    assert_eq!(in_step.target(port(19_999)), None);
    let shared = PortRange {
        mapping: Mapping::Shared,
        ..in_step.clone()
    };
    let same = PortRange {
        server_port: TargetPort::new(20_000).unwrap(),
        mapping: Mapping::Identity,
        ..in_step
    };
    assert_eq!(same.target(port(20_003)), TargetPort::new(20_003));
    assert_eq!(same.target(port(20_004)), None);
    assert_eq!(shared.target(port(20_003)), TargetPort::new(7000));
}

#[test]
fn a_table_of_format_1_means_the_same() {
    let former = r#"{"formatVersion":1,"pool":"pool","poolUid":"uid","generation":3,"advertisedAddress":"games.example.org","agentPort":7070,"loadSharing":{"policy":"LeastSessions"},"sessions":{"claimSeconds":30,"idleTimeoutSeconds":3600,"udpIdleTimeoutSeconds":60,"maxDurationSeconds":0,"lingerSeconds":5,"admission":"Reserved","clientBinding":"Any"},"rows":[{"slot":0,"server":"a-pool-with-a-long-name-0","serverUid":"6f1c2e1a-6f0e-4d27-9d5e-0c8f2a7b9e10","address":"2001:db8:1234:5678:9abc:def0:1234:5678","state":"Active","ranges":[{"name":"main","connectionPort":20000,"serverPort":7000,"count":4,"protocol":"TCP"},{"name":"main","connectionPort":20010,"serverPort":7000,"count":4,"protocol":"TCP","shared":true}]}]}"#;
    let shared = PortRange {
        mapping: Mapping::Shared,
        ..range(20_010, 4)
    };
    let same = table(vec![row(Slot(0), vec![range(20_000, 4), shared])]);
    let decoded = Table::decode(former).unwrap();
    assert_eq!(decoded, same);
    // Whoever receives it from us reads the format that it says it has.
    assert_eq!(decoded.encode().unwrap(), same.encode().unwrap());
}

fn mapping() -> impl Strategy<Value = Mapping> {
    prop::sample::select(vec![Mapping::Offset, Mapping::Shared])
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = Table::decode(&text);
    }

    #[test]
    fn decoding_is_the_inverse_of_encoding(
        rows in proptest::collection::btree_map(0u32..500, (1u16..60, mapping()), 0..40), generation in 1u64..,
    ) {
        let mut next = 1024;
        let rows = rows.into_iter().map(|(slot, (count, mapping))| {
            next += count;
            row(Slot(slot), vec![PortRange { mapping, ..range(next - count, count) }])
        });
        let table = Table { generation, ..table(rows.collect()) };
        prop_assert_eq!(Table::decode(&table.encode().unwrap()).unwrap(), table);
    }
}
