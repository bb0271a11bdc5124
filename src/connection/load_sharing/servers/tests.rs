use super::*;
use crate::pool::PortProtocol;

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

fn pool(content: &[(u32, Vec<PortState>)]) -> Servers {
    let mut servers = Servers::default();
    for (slot, ports) in content {
        let server = servers.server(Slot(*slot));
        server.attached = true;
        server.ports.clone_from(ports);
    }
    servers
}

fn woken(servers: &mut Servers) -> Vec<(QueuePosition, u32)> {
    let woken = servers.wake();
    woken
        .into_iter()
        .map(|woken| (woken.position, woken.slot.0))
        .collect()
}

fn named(name: &str) -> PortFilter {
    PortFilter {
        port_name: Some(name.to_owned()),
        protocol: None,
    }
}

#[test]
fn a_last_port_is_reserved_once() {
    let mut servers = pool(&[(0, vec![ports("main", PortProtocol::TCP, 1, 0)])]);
    let any = PortFilter::default();
    assert_eq!(servers.reserve(&any, None, &[]), Some(Slot(0)));
    assert_eq!(servers.reserve(&any, None, &[]), None);
    servers.settle(Slot(0), &any);
    assert_eq!(servers.reserve(&any, None, &[]), Some(Slot(0)));
}

#[test]
fn detached_draining_and_excluded_servers_get_nothing() {
    let one = vec![ports("main", PortProtocol::TCP, 9, 0)];
    let mut servers = pool(&[(0, one.clone()), (1, one.clone()), (2, one)]);
    servers.server(Slot(0)).attached = false;
    servers.server(Slot(1)).row_draining = true;
    assert_eq!(
        servers.reserve(&PortFilter::default(), None, &[Slot(2)]),
        None
    );
    assert_eq!(
        servers.reserve(&PortFilter::default(), None, &[]),
        Some(Slot(2))
    );
}

#[test]
fn reservations_of_another_port_name_do_not_count() {
    let both = vec![
        ports("a", PortProtocol::TCP, 1, 0),
        ports("b", PortProtocol::UDP, 1, 0),
    ];
    let mut servers = pool(&[(0, both)]);
    assert_eq!(servers.reserve(&named("a"), None, &[]), Some(Slot(0)));
    assert_eq!(servers.reserve(&named("a"), None, &[]), None);
    assert_eq!(servers.reserve(&named("b"), None, &[]), Some(Slot(0)));
}

#[test]
fn a_filter_admits_ports_that_forward_its_protocol() {
    let filter = |protocol: PortProtocol| PortFilter {
        port_name: None,
        protocol: Some(protocol),
    };
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
            filter(wanted).admits("x", port),
            admits,
            "{wanted:?} on {port:?}"
        );
    }
}

#[test]
fn requests_are_woken_in_order_and_newcomers_do_not_overtake() {
    let mut servers = pool(&[(0, vec![ports("main", PortProtocol::TCP, 0, 4)])]);
    let any = PortFilter::default();
    let first = servers.wait(&any, None, None).unwrap();
    let second = servers.wait(&named("main"), None, None).unwrap();
    let third = servers.wait(&any, None, None).unwrap();
    servers.server(Slot(0)).ports[0].free = 2;
    assert_eq!(servers.reserve(&any, None, &[]), None, "others were first");
    assert_eq!(woken(&mut servers), [(first, 0), (second, 0)]);
    assert_eq!(woken(&mut servers), []);
    servers.settle(Slot(0), &any);
    assert_eq!(woken(&mut servers), [(third, 0)]);
    assert_eq!(servers.waiting(), 0);
}

#[test]
fn a_stuck_name_does_not_block_another_one() {
    let mut servers = pool(&[(
        0,
        vec![
            ports("a", PortProtocol::TCP, 0, 0),
            ports("b", PortProtocol::TCP, 0, 0),
        ],
    )]);
    servers.wait(&named("a"), None, None).unwrap();
    let b = servers.wait(&named("b"), None, None).unwrap();
    servers.server(Slot(0)).ports[1].free = 1;
    assert_eq!(woken(&mut servers), [(b, 0)]);
}

#[test]
fn a_request_that_waited_keeps_its_place() {
    let mut servers = pool(&[(0, vec![ports("main", PortProtocol::TCP, 0, 0)])]);
    let any = PortFilter::default();
    let first = servers.wait(&any, None, None).unwrap();
    let second = servers.wait(&any, None, None).unwrap();
    servers.leave(&any, first);
    assert_eq!(servers.wait(&any, None, Some(first)), Some(first));
    servers.server(Slot(0)).ports[0].free = 2;
    assert_eq!(woken(&mut servers), [(first, 0), (second, 0)]);
}

#[test]
fn the_queue_is_bounded() {
    let mut servers = Servers::default();
    for _ in 0..MAX_WAITING {
        servers.wait(&PortFilter::default(), None, None).unwrap();
    }
    assert_eq!(servers.wait(&PortFilter::default(), None, None), None);
}
