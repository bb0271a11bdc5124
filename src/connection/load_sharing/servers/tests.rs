use super::*;
use crate::session::PortFilter;

fn ports(name: &str, protocol: PortProtocol, free: u32, busy: u32) -> PortState {
    PortState {
        name: name.to_owned(),
        protocol,
        free,
        held: 0,
        busy,
        lingering: 0,
        not_listening: 0,
    }
}

fn counts(ports: &[PortState]) -> Counts {
    Counts {
        ports: ports.to_vec(),
        draining: false,
        returning: 0,
        spent: false,
        not_ready: false,
        further: 0,
    }
}

fn pool(content: &[(u32, &[PortState])]) -> Servers {
    let mut servers = Servers::default();
    for (slot, ports) in content {
        servers.attach(Slot(*slot), true);
        servers.counted(Slot(*slot), counts(ports));
    }
    servers
}

fn reserve(servers: &mut Servers, filter: &PortFilter) -> Option<Reservation> {
    servers.reserve(&single(filter), None, |_, _| false)
}

fn single(filter: &PortFilter) -> OneOrMore<Block> {
    OneOrMore::one(Block::single(filter.clone()))
}

fn reason(servers: &Servers, filter: &PortFilter) -> Refusal {
    servers.reason(&single(filter), None, None)
}

fn named(name: &str) -> PortFilter {
    PortFilter {
        port_name: Some(name.to_owned()),
        protocol: None,
    }
}

fn speaking(protocol: PortProtocol) -> PortFilter {
    PortFilter {
        port_name: None,
        protocol: Some(protocol),
    }
}

#[test]
fn a_last_port_is_reserved_once() {
    let mut servers = pool(&[(0, &[ports("main", PortProtocol::TCP, 1, 0)])]);
    let any = PortFilter::default();
    let reservation = reserve(&mut servers, &any).unwrap();
    assert_eq!(reservation.slot, Slot(0));
    assert_eq!(reserve(&mut servers, &any), None);
    servers.settle(&reservation);
    assert!(reserve(&mut servers, &any).is_some());
}

#[test]
fn a_spent_server_gets_nothing_and_its_sessions_are_in_use() {
    let mut servers = pool(&[(0, &[ports("main", PortProtocol::TCP, 3, 1)])]);
    let any = PortFilter::default();
    let spent = Counts {
        spent: true,
        ..counts(&[ports("main", PortProtocol::TCP, 3, 1)])
    };
    servers.counted(Slot(0), spent);
    assert_eq!(reserve(&mut servers, &any), None);
    assert_eq!(servers.free_ports(), 0);
    let Refusal::AllInUse { in_use: 1, .. } = reason(&servers, &any) else {
        panic!("{:?}", reason(&servers, &any));
    };
    // Its successor in the slot is not.
    servers.detach(Slot(0));
    servers.attach(Slot(0), true);
    servers.counted(Slot(0), counts(&[ports("main", PortProtocol::TCP, 4, 0)]));
    assert!(reserve(&mut servers, &any).is_some());
}

#[test]
fn a_server_that_is_not_ready_gets_nothing_and_the_refusals_say_so() {
    let one = [ports("main", PortProtocol::TCP, 1, 0)];
    let mut servers = pool(&[(0, &one), (1, &one)]);
    let any = PortFilter::default();
    servers.server(Slot(0)).row_not_ready = true;
    let mut reserved = reserve(&mut servers, &any).unwrap();
    assert_eq!(reserved.slot, Slot(1));
    assert_eq!(reserve(&mut servers, &any), None);
    assert_eq!(servers.free_ports(), 0);
    let text = reason(&servers, &any).to_string();
    let words = "the only matching port is in use, and 1 processing server is not ready: the workload says so";
    assert!(text.starts_with(words), "{text}");
    servers.settle(&reserved);
    // Its agent may know a newer row than this connection server.
    let not_ready = Counts {
        not_ready: true,
        ..counts(&one)
    };
    servers.counted(Slot(1), not_ready);
    assert_eq!(reserve(&mut servers, &any), None);
    assert_eq!(reason(&servers, &any), Refusal::NotReady(2));
    let text = reason(&servers, &any).to_string();
    let words = "2 processing servers are not ready: the workload says so";
    assert!(text.starts_with(words), "{text}");
    // One that is removed does not come back.
    servers.server(Slot(0)).row_draining = true;
    assert_eq!(reason(&servers, &any), Refusal::NotReady(1));
    servers.counted(Slot(1), counts(&one));
    reserved = reserve(&mut servers, &any).unwrap();
    assert_eq!(reserved.slot, Slot(1));
}

#[test]
fn detached_draining_and_excluded_servers_get_nothing() {
    let one = [ports("main", PortProtocol::TCP, 9, 0)];
    let mut servers = pool(&[(0, &one), (1, &one), (2, &one)]);
    servers.detach(Slot(0));
    servers.server(Slot(1)).row_draining = true;
    let any = PortFilter::default();
    let excluded = |slot, _| slot == Slot(2);
    assert_eq!(servers.reserve(&single(&any), None, excluded), None);
    assert_eq!(reserve(&mut servers, &any).unwrap().slot, Slot(2));
}

#[test]
fn a_port_on_its_way_counts_once_and_against_its_own_entry() {
    let (tcp, udp) = (PortProtocol::TCP, PortProtocol::UDP);
    let both = [ports("game", tcp, 2, 0), ports("voice", udp, 1, 0)];
    let mut servers = pool(&[(0, &both)]);
    // It could be of either entry, and counts against one.
    assert!(reserve(&mut servers, &PortFilter::default()).is_some());
    assert_eq!(servers.free_ports(), 2);
    assert!(reserve(&mut servers, &speaking(udp)).is_some());
    assert!(reserve(&mut servers, &speaking(udp)).is_none());
    assert!(reserve(&mut servers, &named("game")).is_some());
    assert!(reserve(&mut servers, &speaking(tcp)).is_none());
    assert_eq!(servers.free_ports(), 0);
}

#[test]
fn a_filter_admits_ports_that_forward_its_protocol() {
    let (tcp, udp, both) = (PortProtocol::TCP, PortProtocol::UDP, PortProtocol::TCPUDP);
    for (wanted, port, admits) in [
        (tcp, tcp, true),
        (tcp, udp, false),
        (tcp, both, true),
        (udp, both, true),
        (udp, tcp, false),
        (both, both, true),
        (both, tcp, false),
    ] {
        assert_eq!(
            speaking(wanted).admits("x", port),
            admits,
            "{wanted:?} on {port:?}"
        );
    }
}

#[test]
fn the_reason_is_that_servers_start_that_workloads_are_silent_or_that_all_is_in_use() {
    let (tcp, any) = (PortProtocol::TCP, PortFilter::default());
    let silent = |count| PortState {
        not_listening: count,
        ..ports("main", tcp, 0, 0)
    };
    let not_listening = |ports, not_ready| Refusal::NotListening {
        ports,
        listening: 0,
        not_ready,
    };
    let mut servers = Servers::default();
    assert_eq!(reason(&servers, &any), Refusal::Starting);
    servers.attach(Slot(0), true);
    assert_eq!(reason(&servers, &any), Refusal::Starting);
    servers.counted(Slot(0), counts(&[silent(4)]));
    assert_eq!(reason(&servers, &any), not_listening(4, 0));
    let one_busy = PortState {
        busy: 1,
        ..silent(3)
    };
    servers.counted(Slot(0), counts(&[one_busy]));
    let in_use = |in_use, not_listening| Refusal::AllInUse {
        in_use,
        not_listening,
        not_ready: 0,
    };
    assert_eq!(reason(&servers, &any), in_use(1, 3));
    servers.counted(Slot(0), counts(&[ports("main", tcp, 1, 3)]));
    assert_eq!(reason(&servers, &any), Refusal::NotSelected);
    reserve(&mut servers, &any).unwrap();
    assert_eq!(reason(&servers, &any), in_use(4, 0));
    servers.server(Slot(0)).row_draining = true;
    assert_eq!(reason(&servers, &any), Refusal::Draining);
}

#[test]
fn a_request_for_several_ports_goes_to_a_server_that_has_them_all() {
    let (tcp, udp) = (PortProtocol::TCP, PortProtocol::UDP);
    let content = [
        (0, [ports("control", tcp, 9, 0), ports("rtp", udp, 1, 0)]),
        (1, [ports("control", tcp, 0, 9), ports("rtp", udp, 8, 0)]),
        (2, [ports("control", tcp, 2, 9), ports("rtp", udp, 3, 9)]),
    ];
    let content: Vec<(u32, &[PortState])> = content
        .iter()
        .map(|(slot, ports)| (*slot, &ports[..]))
        .collect();
    let mut servers = pool(&content);
    let call = OneOrMore::example(&[("rtp", 2), ("control", 1)]);
    let first = servers.reserve(&call, None, |_, _| false).unwrap();
    assert_eq!(first.slot, Slot(2));
    // What is on its way counts with all its ports.
    assert_eq!(servers.reserve(&call, None, |_, _| false), None);
    let refusal = servers.reason(&call, None, None);
    let not_together = Refusal::NotTogether {
        ports: 3,
        not_listening: 0,
        not_ready: 0,
    };
    assert_eq!(refusal, not_together);
    servers.settle(&first);
    servers.attach(Slot(2), false);
    assert_eq!(servers.reserve(&call, None, |_, _| false), None);
    for slot in 0..2 {
        servers.attach(Slot(slot), false);
    }
    assert_eq!(servers.reason(&call, None, None), Refusal::AgentsTooOld);
}

#[test]
fn a_request_for_several_ports_is_told_which_ports_do_not_listen() {
    let udp = PortProtocol::UDP;
    let silent = |free, not_listening| PortState {
        not_listening,
        ..ports("sip", udp, free, 0)
    };
    let call = OneOrMore::example(&[("sip", 1), ("rtp", 2)]);
    let mut servers = pool(&[(0, &[silent(0, 3), ports("rtp", udp, 4, 2)])]);
    let not_listening = Refusal::NotListening {
        ports: 3,
        listening: 6,
        not_ready: 0,
    };
    assert_eq!(servers.reason(&call, None, None), not_listening);
    let message = not_listening.to_string();
    assert!(message.contains("3 of the 9 matching ports"), "{message}");
    // A session's end would help.
    servers.counted(Slot(0), counts(&[silent(1, 2), ports("rtp", udp, 1, 1)]));
    let not_together = Refusal::NotTogether {
        ports: 3,
        not_listening: 2,
        not_ready: 0,
    };
    assert_eq!(servers.reason(&call, None, None), not_together);
    // Only a server that is not ready has both.
    servers.counted(Slot(0), counts(&[silent(1, 0), ports("rtp", udp, 1, 0)]));
    servers.attach(Slot(1), true);
    servers.counted(Slot(1), counts(&[silent(1, 0), ports("rtp", udp, 4, 0)]));
    servers.server(Slot(1)).row_not_ready = true;
    assert_eq!(servers.reason(&call, None, None), Refusal::NotReady(1));
}

#[test]
fn a_server_that_is_spent_and_empty_is_being_replaced() {
    let tcp = PortProtocol::TCP;
    let mut servers = pool(&[(0, &[ports("main", tcp, 2, 0)])]);
    let spent = |ports: &[PortState]| Counts {
        spent: true,
        ..counts(ports)
    };
    servers.counted(Slot(0), spent(&[ports("main", tcp, 2, 0)]));
    for wanted in [
        single(&PortFilter::default()),
        OneOrMore::example(&[("main", 2)]),
    ] {
        let refusal = servers.reason(&wanted, None, None);
        assert_eq!(refusal, Refusal::BeingReplaced);
        assert_eq!(refusal.name(), "no-server");
        assert!(refusal.to_string().contains("waitSeconds"));
    }
    // Its row drains while its successor is awaited.
    servers.server(Slot(0)).row_draining = true;
    let refusal = reason(&servers, &PortFilter::default());
    assert_eq!(refusal, Refusal::BeingReplaced);
}

#[test]
fn a_server_is_asked_if_the_blocks_fit_in_some_arrangement() {
    let udp = PortProtocol::UDP;
    let mut servers = pool(&[(0, &[ports("a", udp, 5, 0), ports("b", udp, 4, 0)])]);
    let any = |count: u8| Block {
        filter: PortFilter::default(),
        count: count.try_into().unwrap(),
    };
    // One after another, 4 and 2 ports would leave 1 and 2.
    let wanted = OneOrMore::new([any(4), any(3), any(2)]).unwrap();
    let reservation = servers.reserve(&wanted, None, |_, _| false).unwrap();
    servers.settle(&reservation);
    assert_eq!(servers.free_ports(), 9);
    let wanted = OneOrMore::new([any(4), any(4), any(2)]).unwrap();
    assert_eq!(servers.reserve(&wanted, None, |_, _| false), None);
}

#[test]
fn a_session_of_several_ports_counts_as_one() {
    let mut servers = pool(&[(0, &[ports("rtp", PortProtocol::UDP, 2, 6)])]);
    let two_sessions = Counts {
        further: 4,
        ..counts(&[ports("rtp", PortProtocol::UDP, 2, 6)])
    };
    servers.counted(Slot(0), two_sessions);
    assert_eq!(servers.get(Slot(0)).unwrap().sessions(), 2);
}
