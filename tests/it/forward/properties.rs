//! docs/forwarding.md: what a direct connection has, and what of it is kept
//! through the data plane. Each row names the test that shows it.

use crate::common::agree;

/// A property of a direct connection.
struct Property {
    name: &'static str,
    /// `yes`, `no`, or how it is kept in effect.
    is_kept: &'static str,
    what: &'static str,
    /// The test's name, in a file of this module.
    test: &'static str,
}

const fn property(
    name: &'static str,
    is_kept: &'static str,
    what: &'static str,
    test: &'static str,
) -> Property {
    Property {
        name,
        is_kept,
        what,
        test,
    }
}

const TCP: &[Property] = &[
    property(
        "bytes and their order",
        "yes",
        "TCP's own guarantees hold on each side, and nothing is changed in between.",
        "bytes_arrive_exactly_through_random_chunks_and_half_closes",
    ),
    property(
        "half-close",
        "yes",
        "The end of one side is passed on after its bytes; the other side goes on.",
        "after_one_side_has_ended_the_other_goes_on",
    ),
    property(
        "reset",
        "yes",
        "`SO_LINGER` 0, a crash: the other side is reset when it has the bytes that came before ([robustness](robustness.md)).",
        "a_reset_is_passed_on_both_ways",
    ),
    property(
        "reset of a peer that closes with unread bytes",
        "yes",
        "The peer's kernel resets, and that is passed on.",
        "closing_with_unread_bytes_resets_the_other_side",
    ),
    property(
        "urgent data",
        "yes",
        "The urgent byte arrives as one, in its place. It is not announced ahead of bytes that wait before it. If it is the first byte of all that a client sends, it may arrive as an ordinary one.",
        "an_urgent_byte_arrives_at_its_place_both_ways",
    ),
    property(
        "back-pressure, zero window",
        "yes",
        "A reader that stops stops its sender, after at most 64 KiB (512 KiB in a stream that is spliced) beside what the kernels hold.",
        "a_slow_reader_stops_its_sender",
    ),
    property(
        "keep-alive, user timeout",
        "in effect",
        "Probes are answered by the connection server. It probes both sides itself (`--peer-timeout-seconds`), and resets the other side of a peer that is gone.",
        "both_sides_of_a_connection_are_probed",
    ),
    property(
        "refusal to connect",
        "no",
        "A client's connection is accepted before its server is asked. If that refuses, or does not answer within 3 s, the client is reset.",
        "a_server_that_refuses_or_has_no_address_resets_the_client",
    ),
    property(
        "acknowledgement",
        "no",
        "An acknowledged byte is in the connection server's kernel, not yet in the peer's. Protocols that must know more have an answer of their own.",
        "bytes_are_acknowledged_before_the_server_has_them",
    ),
    property(
        "address of the client, as its server sees it",
        "no",
        "The server sees the connection server's address. `proxyProtocol: V2` sends the client's address first.",
        "the_server_gets_the_clients_address_first",
    ),
    property(
        "Nagle's algorithm, sizes of segments",
        "no",
        "Bytes are sent on at once (`TCP_NODELAY` on both sides), in segments of other sizes. A busy stream is read once a millisecond.",
        "bytes_are_sent_on_without_delay",
    ),
    property(
        "options: MSS, window scale, timestamps, SACK, ECN",
        "no",
        "Each side negotiates its own with the connection server's kernel, also the path MTU and the congestion control.",
        "each_side_has_its_own_segment_size",
    ),
    property(
        "TCP Fast Open",
        "no",
        "The client's kernel falls back to a usual handshake. Nothing is lost.",
        "fast_open_falls_back_to_a_handshake",
    ),
    property(
        "TTL or hop limit, DSCP",
        "no",
        "Segments leave with the values of the connection server.",
        "segments_leave_with_the_ttl_and_tos_of_the_connection_server",
    ),
    property(
        "silence for as long as one likes",
        "no",
        "A connection without a byte for `sessions.idleTimeoutSeconds` is reset; 0 turns that off.",
        "a_silent_connection_is_reset_after_its_idle_time",
    ),
];

const UDP: &[Property] = &[
    property(
        "boundaries and sizes of datagrams",
        "yes",
        "From empty ones to 65,507 bytes.",
        "datagrams_of_every_size_come_back_to_their_own_client",
    ),
    property(
        "order, and each one once",
        "yes",
        "Datagrams between one client and its server are not reordered or repeated. Those that find a full socket buffer are dropped, as in any network, and counted in `portpool_datagrams_dropped_total`.",
        "datagrams_keep_their_order_and_come_once",
    ),
    property(
        "segmentation by the kernel (GSO, GRO)",
        "yes",
        "Datagrams may be received and sent together, but arrive one by one.",
        "datagrams_that_were_sent_together_arrive_one_by_one",
    ),
    property(
        "source of an answer",
        "yes",
        "The address and port that the client asked, also where the connection server has several addresses.",
        "each_answer_comes_from_the_address_that_was_asked",
    ),
    property(
        "ICMP: the client's port is closed",
        "yes",
        "The flow ends, and the server's next datagram is answered with port unreachable.",
        "a_client_whose_port_is_closed_is_gone_at_once",
    ),
    property(
        "ICMP: the server's port is closed",
        "no",
        "The flow ends, but its client gets no report. Its next datagram begins a new flow.",
        "a_client_gets_no_report_of_a_closed_server_port",
    ),
    property(
        "address of the client, as its server sees it",
        "no",
        "The server sees the connection server's address. Each client is a port of it, the same one while the flow lives; there is no PROXY protocol for UDP.",
        "each_client_is_a_port_of_the_connection_server",
    ),
    property(
        "answers from another port or address of the server",
        "no",
        "Only what comes from the server port is forwarded: the kernel drops the rest. `portpool_flows_unanswered_total` counts the flows that ended without an answer.",
        "answers_from_another_port_of_the_server_are_dropped",
    ),
    property(
        "answers from another port of the server, with `replies: AnyPort`",
        "yes",
        "They come from the connection port, and the client's next datagrams go to the port that has answered last, as TFTP needs. So a client asks anew from another port of its own. A flow does not end when the server's port is closed: the kernel reports that for connected sockets only.",
        "a_flow_goes_on_with_the_port_that_has_answered_last",
    ),
    property(
        "answers from another host, with `replies: AnyPort`",
        "no",
        "They are dropped, and counted in `portpool_datagrams_dropped_total`. Every program at the server's address may answer, also one that pretends to have that address, if the network lets it.",
        "a_flow_takes_nothing_from_another_host_than_its_server",
    ),
    property(
        "fragmentation, DF, path MTU",
        "no",
        "A datagram is put together and fragmented again as each hop needs. A client that probes the path MTU with DF finds that of its own hop.",
        "datagrams_may_be_fragmented",
    ),
    property(
        "TTL or hop limit, DSCP, ECN",
        "no",
        "Datagrams leave with the values of the connection server. To read and set them for each would cost every datagram. QUIC finds out that ECN does not pass, and does without.",
        "datagrams_leave_with_the_ttl_and_tos_of_the_connection_server",
    ),
    property(
        "broadcast, multicast",
        "no",
        "Connection ports take datagrams to addresses of the connection server.",
        "a_broadcast_reaches_no_server",
    ),
    property(
        "silence for as long as one likes",
        "no",
        "A client that sends nothing for `sessions.udpIdleTimeoutSeconds` counts as gone, whatever it is sent, unless its session has a TCP connection ([reference](reference.md#sessions)).",
        "what_a_server_sends_does_not_keep_the_flow_of_a_silent_client",
    ),
];

const HEAD: &str = "# What forwarding keeps and what it does not

A client of a connection port has two connections instead of one: its own, which ends at the connection server, and that of the connection server with the processing server. These tables list what a direct connection has, and whether it is kept. Each row is a test of `tests/it/forward`, whose name is in the last column; `make generate` writes this page from them.

Connection ports are for TCP and UDP. SCTP, DCCP and UDP-Lite are not forwarded; MPTCP falls back to TCP.
";

fn table(properties: &[Property]) -> String {
    let mut table = String::from("| property | kept | how | test |\n|---|---|---|---|\n");
    for Property {
        name,
        is_kept,
        what,
        test,
    } in properties
    {
        table += &format!("| {name} | {is_kept} | {what} | `{test}` |\n");
    }
    table
}

#[test]
fn generated_page_lists_what_forwarding_keeps() {
    const FILES: &[&str] = &[
        include_str!("../forward.rs"),
        include_str!("admission.rs"),
        include_str!("ends.rs"),
        include_str!("ports.rs"),
        include_str!("properties_tcp.rs"),
        include_str!("properties_udp.rs"),
        include_str!("replies.rs"),
        include_str!("udp.rs"),
        include_str!("udp_ends.rs"),
        include_str!("urgent.rs"),
    ];
    for Property { name, test, .. } in TCP.iter().chain(UDP) {
        let beginning = format!("#[test]\nfn {test}() {{");
        let is_there = FILES.iter().any(|file| file.contains(&beginning));
        assert!(is_there, "the row '{name}' has no test {test}");
    }
    let (tcp, udp) = (table(TCP), table(UDP));
    agree(
        "docs/forwarding.md",
        &format!("{HEAD}\n## TCP\n\n{tcp}\n## UDP\n\n{udp}"),
    );
}
