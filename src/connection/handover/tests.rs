use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use tokio::time::Instant;

use super::state::{add, receive, send, send_server};
use super::*;
use crate::connection::agents::AgentsSnapshot;
use crate::connection::control::ControlSnapshot;
use crate::connection::sessions::snapshot::{CompanionSnapshot, SessionSnapshot, SessionsSnapshot};
use crate::connection::sessions::span::Carried;
use crate::forward::snapshot::{
    ClientSnapshot, ConnectionSnapshot, DirectionSnapshot, FlowSnapshot, ForwarderSnapshot,
    PortSnapshot,
};
use crate::forward::{SessionKey, Traffic, Transport};
use crate::pool::{LoadSharing, PortProtocol, Recycle, Sessions as Settings};
use crate::selection::{ConnectionServerId, Session};
use crate::session::{Metadata, OneOrMore, SessionId, SessionPort, SessionState};
use crate::table::{FORMAT_VERSION, ListenPort, Slot, Table, TargetPort};

/// A descriptor of a new file, which its inode identifies.
fn descriptor() -> OwnedFd {
    memfd_create("test", MemfdFlags::CLOEXEC).unwrap()
}

fn inode(descriptor: impl AsFd) -> u64 {
    fstat(descriptor).unwrap().st_ino
}

fn state(snapshot: ForwarderSnapshot, sessions: SessionsSnapshot) -> State {
    State {
        agents: AgentsSnapshot {
            id: ConnectionServerId::new("connection-server").unwrap(),
            host_identity: "somewhere".to_owned(),
            reached: HashMap::from([(Slot(3), Instant::now())]),
        },
        table: Arc::new(Table {
            format_version: FORMAT_VERSION,
            pool: "pool".to_owned(),
            pool_uid: "uid".to_owned(),
            generation: 7,
            advertised_address: None,
            agent_port: TargetPort::new(7070).unwrap(),
            load_sharing: LoadSharing::default(),
            sessions: Settings::default(),
            recycle: Recycle::default(),
            drain_seconds: None,
            rows: Vec::new(),
        }),
        load_sharing: descriptor(),
        admin: descriptor(),
        control: ControlSnapshot {
            sessions,
            forwarder: snapshot,
        },
    }
}

/// Everything in a state, with inodes for descriptors.
fn describe(state: &State) -> String {
    let snapshot = &state.control.forwarder;
    let ports = snapshot.ports.iter();
    let ports: Vec<_> = ports.map(|p| (v1::Port::from(p), inode(p))).collect();
    let connections = snapshot.connections.iter();
    let connections =
        connections.map(|c| (v1::Connection::from(c), inode(&c.client), inode(&c.server)));
    let connections: Vec<_> = connections.collect();
    let flows = snapshot.flows.iter();
    let flows: Vec<_> = flows
        .map(|f| (v1::Flow::from(f), inode(&f.server)))
        .collect();
    let clients = snapshot.clients.iter().map(|client| {
        let inode = match client {
            ClientSnapshot::Tcp { socket, .. } => inode(socket),
            ClientSnapshot::Udp { .. } => 0,
        };
        (v1::Client::from(client), inode)
    });
    let clients: Vec<_> = clients.collect();
    let own = (inode(&state.load_sharing), inode(&state.admin));
    let (agents, table, sessions) = (&state.agents, &state.table, &state.control.sessions);
    let (id, host, slots) = (&agents.id, &agents.host_identity, agents.reached.keys());
    format!(
        "{id} {host} {slots:?} {table:?} {own:?} {sessions:?} {ports:?} {connections:?} {flows:?} {clients:?}"
    )
}

fn port() -> impl Strategy<Value = ListenPort> {
    (1..=u16::MAX).prop_map(|port| ListenPort::new(port).unwrap())
}

fn idle() -> impl Strategy<Value = Duration> {
    (0..100_000_000u64).prop_map(Duration::from_millis)
}

fn direction() -> impl Strategy<Value = DirectionSnapshot> {
    let kept = vec(any::<u8>(), 0..2000);
    (kept, any::<[bool; 3]>(), any::<u64>()).prop_map(
        |(kept, [is_urgent, is_read, is_done], bytes)| DirectionSnapshot {
            kept,
            is_urgent,
            is_read,
            is_done,
            bytes,
        },
    )
}

fn snapshot() -> impl Strategy<Value = ForwarderSnapshot> {
    let ports = (port(), any::<bool>(), any::<bool>()).prop_map(|(port, is_udp, is_draining)| {
        let (transport, socket) = match is_udp {
            true => (
                Transport::Udp,
                UdpSocket::bind("127.0.0.1:0").unwrap().into(),
            ),
            false => (Transport::Tcp, descriptor()),
        };
        PortSnapshot::adopt(port, transport, is_draining, socket).unwrap()
    });
    let connections = (
        port(),
        any::<u64>(),
        any::<(bool, bool)>(),
        idle(),
        direction(),
        direction(),
    );
    let connections = connections.prop_map(
        |(port, session, (is_connecting, is_broken), idle, upstream, downstream)| {
            ConnectionSnapshot {
                port,
                session: SessionKey(session),
                client: descriptor(),
                server: descriptor(),
                is_connecting,
                is_broken,
                idle,
                upstream,
                downstream,
            }
        },
    );
    let flows = (
        port(),
        any::<u64>(),
        any::<SocketAddr>(),
        any::<Option<IpAddr>>(),
        any::<Option<SocketAddr>>(),
        idle(),
    );
    let flows = flows.prop_map(
        |(port, session, client, local, target, idle)| FlowSnapshot {
            port,
            session: SessionKey(session),
            client,
            local,
            server: descriptor(),
            target,
            idle,
            traffic: Traffic {
                upstream_bytes: session / 2,
                downstream_bytes: session / 3,
            },
            is_assured: session % 2 == 0,
        },
    );
    let datagrams = vec(vec(any::<u8>(), 0..100), 0..8);
    let clients = (
        port(),
        any::<SocketAddr>(),
        any::<Option<IpAddr>>(),
        datagrams,
        any::<bool>(),
    );
    let clients = clients.prop_map(|(port, address, local, datagrams, is_udp)| match is_udp {
        true => ClientSnapshot::Udp {
            port,
            address,
            local,
            datagrams,
        },
        false => ClientSnapshot::Tcp {
            port,
            socket: descriptor(),
            address,
        },
    });
    let parts = (
        vec(ports, 0..300),
        vec(connections, 0..200),
        vec(flows, 0..20),
        vec(clients, 0..9),
    );
    parts.prop_map(|(ports, connections, flows, clients)| ForwarderSnapshot {
        ports,
        connections,
        flows,
        clients,
    })
}

fn session_id() -> impl Strategy<Value = SessionId> {
    "\\PC{1,16}".prop_map(|text| SessionId::new(&text).unwrap())
}

fn session_ports() -> impl Strategy<Value = OneOrMore<SessionPort>> {
    vec(port(), 1..4).prop_map(|ports| {
        let ports = ports.into_iter().map(|port| SessionPort {
            port,
            port_name: "main".to_owned(),
            protocol: PortProtocol::TCP,
        });
        OneOrMore::new(ports).unwrap()
    })
}

fn sessions() -> impl Strategy<Value = SessionsSnapshot> {
    let live = (
        any::<u32>(),
        any::<u64>(),
        session_id(),
        session_ports(),
        any::<Option<IpAddr>>(),
        idle(),
        "[a-z]{0,9}".prop_map(|value| Metadata::new([("key", value)]).unwrap()),
    );
    let live = live.prop_map(
        |(slot, key, id, ports, client, age, metadata)| SessionSnapshot {
            slot: Slot(slot),
            key: SessionKey(key),
            session: Session {
                id,
                idempotency_key: None,
                ports,
                bound_client: client,
                clients: client.into_iter().collect(),
                state: SessionState::Busy,
                claim_deadline: jiff::Timestamp::UNIX_EPOCH,
                created: jiff::Timestamp::UNIX_EPOCH,
                lingering_since: None,
                is_claimed: false,
                open_here: false,
                metadata,
                expires: (key % 2 == 0).then(|| jiff::Timestamp::new(1_900_000_000, 0).unwrap()),
                has_own_expiry: key % 3 == 0,
                amended: (key % 3 == 0)
                    .then_some(jiff::Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(5)),
                workload_metadata: Metadata::default(),
                confirm_deadline: None,
            },
            carried: Carried {
                connections: key / 2,
                traffic: Traffic {
                    upstream_bytes: key / 3,
                    downstream_bytes: key / 4,
                },
            },
            client,
            age,
        },
    );
    let released = btree_map(session_id(), any::<u32>().prop_map(Slot), 0..5);
    let last_ended = btree_map(port(), session_id(), 0..5);
    let companion = (any::<u64>(), any::<u32>(), any::<IpAddr>());
    let companion = companion.prop_map(|(key, slot, client)| CompanionSnapshot {
        key: SessionKey(key),
        slot: Slot(slot),
        client,
    });
    let lists = (vec(live, 0..20), vec(companion, 0..5), released, last_ended);
    (any::<u64>(), lists).prop_map(|(last_key, (live, companions, released, last_ended))| {
        SessionsSnapshot {
            last_key,
            live,
            companions,
            released,
            last_ended,
        }
    })
}

type Predecessor = thread::JoinHandle<(Result<(), Error>, State)>;

/// A predecessor with `state`, and the stream of its successor.
fn predecessor(state: State) -> (UnixStream, Predecessor) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        let given = Export::accept(theirs).and_then(|mut export| export.complete(&state));
        (given, state)
    });
    set_deadline(&ours, FRAME_DEADLINE).unwrap();
    (ours, thread)
}

fn send_frame(stream: &UnixStream, content: Content) {
    wire::send(stream, content, &[]).unwrap();
}

const REQUEST: Content = Content::Request(v1::Request {
    version: VERSION,
    several_ports: true,
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn everything_arrives_as_it_was(snapshot in snapshot(), sessions in sessions()) {
        let (stream, thread) = predecessor(state(snapshot, sessions));
        send_frame(&stream, REQUEST);
        let state = receive(&stream).unwrap();
        let found = describe(&state);
        let taken = Import { stream, state }.complete().unwrap();
        let (given, before) = thread.join().unwrap();
        prop_assert!(given.is_ok(), "{given:?}");
        prop_assert_eq!(describe(&before), found);
        drop(taken);
    }

    #[test]
    fn a_successor_that_sends_anything_else_gets_nothing(bytes in vec(any::<u8>(), 0..64)) {
        use std::io::Write;
        let (mut stream, thread) = predecessor(state(ForwarderSnapshot::default(), SessionsSnapshot::default()));
        // The end of the stream cuts short what promised to be longer.
        let _ = stream.write_all(&bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        prop_assert!(thread.join().unwrap().0.is_err());
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in vec(any::<u8>(), 0..200)) {
        let mut state = state(ForwarderSnapshot::default(), SessionsSnapshot::default());
        if let Some(content) = wire::decode(&bytes) {
            let _ = add(&mut state, content, Vec::new());
        }
    }
}

#[test]
fn a_port_that_cannot_be_used_is_noticed_before_anything_is_taken() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let state = state(ForwarderSnapshot::default(), SessionsSnapshot::default());
    send_server(&theirs, &state).unwrap();
    let port = v1::Port {
        port: 20_000,
        is_udp: true,
        is_draining: false,
    };
    let ports = Content::Ports(v1::Ports { ports: vec![port] });
    let not_udp = descriptor();
    wire::send(&theirs, ports, &[not_udp.as_fd()]).unwrap();
    let received = receive(&ours).map(|_| ());
    assert!(matches!(received, Err(Error::Stream(_))), "{received:?}");
}

/// Reads frames up to and with the last one.
fn read_all(stream: &UnixStream) {
    while !matches!(wire::receive(stream).unwrap(), (Content::Done(_), _)) {}
}

fn some_state() -> State {
    let connection = |port| ConnectionSnapshot {
        port: ListenPort::new(port).unwrap(),
        session: SessionKey(1),
        client: descriptor(),
        server: descriptor(),
        is_connecting: false,
        is_broken: false,
        idle: Duration::ZERO,
        upstream: DirectionSnapshot {
            kept: vec![1; 70_000],
            ..DirectionSnapshot::default()
        },
        downstream: DirectionSnapshot::default(),
    };
    let snapshot = ForwarderSnapshot {
        connections: (1..500).map(connection).collect(),
        ..ForwarderSnapshot::default()
    };
    state(snapshot, SessionsSnapshot::default())
}

#[test]
fn a_successor_that_dies_before_it_takes_leaves_everything() {
    let die: [fn(&UnixStream); 6] = [
        |_| {},
        |stream| send_frame(stream, REQUEST),
        |stream| {
            send_frame(stream, REQUEST);
            wire::receive(stream).unwrap();
            wire::receive(stream).unwrap();
        },
        |stream| {
            send_frame(stream, REQUEST);
            read_all(stream);
        },
        |stream| {
            send_frame(stream, REQUEST);
            read_all(stream);
            send_frame(stream, Content::Ready(Empty {}));
        },
        |stream| {
            send_frame(stream, REQUEST);
            read_all(stream);
            send_frame(stream, Content::Ready(Empty {}));
            assert_eq!(wire::receive(stream).unwrap().0, Content::Go(Empty {}));
        },
    ];
    for (point, die) in die.iter().enumerate() {
        let (stream, thread) = predecessor(some_state());
        die(&stream);
        drop(stream);
        let (given, _) = thread.join().unwrap();
        assert!(given.is_err(), "it died at point {point}");
    }
}

#[test]
fn a_predecessor_that_dies_leaves_everything_to_a_successor_that_is_ready() {
    for says_go in [false, true] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(
            &theirs,
            &state(ForwarderSnapshot::default(), SessionsSnapshot::default()),
        )
        .unwrap();
        let import = Import {
            state: receive(&ours).unwrap(),
            stream: ours,
        };
        if says_go {
            send_frame(&theirs, Content::Go(Empty {}));
        }
        drop(theirs);
        assert!(import.complete().is_ok());
    }
}

#[test]
fn a_predecessor_that_gives_up_keeps_everything() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let small = || state(ForwarderSnapshot::default(), SessionsSnapshot::default());
    send(&theirs, &small()).unwrap();
    let import = Import {
        state: receive(&ours).unwrap(),
        stream: ours,
    };
    drop(Export {
        stream: theirs,
        is_settled: false,
        knows_several_ports: true,
    });
    assert!(matches!(import.complete(), Err(Error::Refused(_))));
}

#[test]
fn another_version_is_refused_with_the_reason() {
    let (stream, thread) = predecessor(some_state());
    send_frame(
        &stream,
        Content::Request(v1::Request {
            version: VERSION + 1,
            several_ports: true,
        }),
    );
    let refused = receive(&stream).map(|_| ());
    assert!(matches!(refused, Err(Error::Refused(reason)) if reason.contains("version 2")));
    let given = thread.join().unwrap().0;
    assert!(matches!(given, Err(Error::Version { found: 2 })));
}
