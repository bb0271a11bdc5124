//! UDP through a connection port: one flow per client and address that it sends
//! to, each with a socket of its own that is connected to the server.
//!
//! ```text
//!   first datagram ──Refuse, no place, loop, draining port──→ dropped
//!    │   │                                                       ↑
//!    │   └─Ask─→ pending ──Refuse, 2 s, cut──────────────────────┘
//!    │ Admit        │ Admit
//!    ↓              ↓
//!   new ───────── client or server gone, idle time, cut ─────→ ended
//!    │   └─────────── evicted: the longest silent ──────────────↑ ↑
//!    │ the client sends after a reply                           │ │
//!    ↓                                                          │ │
//!   assured ───── client or server gone, idle time, cut ────────┘ │
//!        └─────────── evicted: without new ones ──────────────────┘
//! ```
//!
//! - *pending*: the gate asks control for the client's session. Its next
//!   datagrams are kept, 8 at most, and sent when it is admitted.
//!   `Forwarder::answer` decides.
//! - *new*: datagrams pass both ways. The client's address may be forged.
//! - *assured*: the client has received a reply, so its address is real.
//! - *ended*: the socket is closed, and then `Gate::closed` reports the end. The
//!   client's next datagram is a first one again.
//!
//! A datagram moves the arrows without a time, and the thread's tick those
//! with one. The idle time counts from the client's last datagram: a server may
//! send for ever to a client that is gone. While its port has a TCP connection
//! too, whose peer the kernel probes, it counts from the last datagram either
//! way. ICMP reports a server, or a client, whose port is closed. A thread that
//! has its share of flows evicts one for each new one. `Flows::end` is the only
//! way out of *new* and *assured*; an export takes out all of them, as they are.
//!
//! A port that the table no longer has *drains*: it takes no new flows, and is
//! closed at a tick after its last flow has ended. Until then the table can
//! have it again.
//!
//! - `datagrams`: where each datagram goes; `flows`: the begin and the end of
//!   flows; `flow`: one flow, which its `addresses` name; `port`: receiving and
//!   sending; `ports`: opening, draining and closing; `batch`: receiving several
//!   datagrams in one call; `reports`: ICMP about clients; `eviction`: the choice
//!   of a flow.

pub(super) mod addresses;
mod batch;
pub(super) mod datagrams;
mod eviction;
mod flow;
mod flows;
mod port;
pub(super) mod ports;
mod reports;
