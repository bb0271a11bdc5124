//! What is said on the hand-over's socket: frames, each with the descriptors
//! that it speaks of.
//!
//! ```text
//! ┌──────────────┬───────────────────┬──────────────────────┐
//! │ length (u32) │ descriptors (u32) │ Frame (protobuf)     │
//! └──────────────┴───────────────────┴──────────────────────┘
//!   big-endian, and the descriptors ride on these eight bytes (SCM_RIGHTS)
//! ```
//!
//! Source: unix(7), `SCM_RIGHTS`: at most 253 descriptors a message.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use prost::{Message, Oneof};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::Error;
use crate::selection::v1;

/// Most descriptors of a frame.
pub(super) const MAX_DESCRIPTORS: usize = 253;

/// Longest frame in bytes: what a frame's connections may have kept, and room.
const MAX_FRAME_BYTES: usize = 64 * 1024 * 1024;

const HEAD_BYTES: usize = 8;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Frame {
    #[prost(oneof = "Content", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub(super) content: Option<Content>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(super) enum Content {
    /// From the successor, first.
    #[prost(message, tag = "1")]
    Ask(Ask),
    /// No hand-over, or no more; the predecessor goes on.
    #[prost(message, tag = "2")]
    Abort(Abort),
    /// Two descriptors: the load-sharing port and the admin port.
    #[prost(message, tag = "3")]
    Server(Server),
    /// One descriptor each.
    #[prost(message, tag = "4")]
    Ports(Ports),
    /// Two descriptors each: client, server.
    #[prost(message, tag = "5")]
    Connections(Connections),
    /// One descriptor each.
    #[prost(message, tag = "6")]
    Flows(Flows),
    /// One descriptor for each TCP client.
    #[prost(message, tag = "7")]
    Clients(Clients),
    #[prost(message, tag = "8")]
    Sessions(Sessions),
    /// That was all.
    #[prost(message, tag = "9")]
    Done(Empty),
    /// From the successor: all is here and can be taken.
    #[prost(message, tag = "10")]
    Ready(Empty),
    /// It is yours.
    #[prost(message, tag = "11")]
    Go(Empty),
    /// From the successor, before it touches anything.
    #[prost(message, tag = "12")]
    Taken(Empty),
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Empty {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Ask {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Abort {
    #[prost(string, tag = "1")]
    pub(super) reason: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Server {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    /// As in the ConfigMap.
    #[prost(string, tag = "2")]
    pub(super) table: String,
    #[prost(uint64, tag = "3")]
    pub(super) last_key: u64,
    #[prost(message, repeated, tag = "4")]
    pub(super) reached: Vec<Reached>,
    /// Empty from a predecessor that did not know its own.
    #[prost(string, tag = "5")]
    pub(super) place: String,
}

/// When an agent was last in reach.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Reached {
    #[prost(uint32, tag = "1")]
    pub(super) slot: u32,
    #[prost(uint64, tag = "2")]
    pub(super) ago_ms: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Ports {
    #[prost(message, repeated, tag = "1")]
    pub(super) ports: Vec<Port>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Port {
    #[prost(uint32, tag = "1")]
    pub(super) port: u32,
    #[prost(bool, tag = "2")]
    pub(super) is_udp: bool,
    #[prost(bool, tag = "3")]
    pub(super) is_draining: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Connections {
    #[prost(message, repeated, tag = "1")]
    pub(super) connections: Vec<Connection>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Connection {
    #[prost(uint32, tag = "1")]
    pub(super) port: u32,
    #[prost(uint64, tag = "2")]
    pub(super) session: u64,
    #[prost(bool, tag = "3")]
    pub(super) is_connecting: bool,
    #[prost(uint64, tag = "4")]
    pub(super) idle_ms: u64,
    #[prost(message, required, tag = "5")]
    pub(super) upstream: Direction,
    #[prost(message, required, tag = "6")]
    pub(super) downstream: Direction,
    #[prost(bool, tag = "7")]
    pub(super) is_broken: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Direction {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) kept: Vec<u8>,
    #[prost(bool, tag = "2")]
    pub(super) is_read: bool,
    #[prost(bool, tag = "3")]
    pub(super) is_done: bool,
    #[prost(uint64, tag = "4")]
    pub(super) bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Flows {
    #[prost(message, repeated, tag = "1")]
    pub(super) flows: Vec<Flow>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Flow {
    #[prost(uint32, tag = "1")]
    pub(super) port: u32,
    #[prost(uint64, tag = "2")]
    pub(super) session: u64,
    /// `IP:PORT`.
    #[prost(string, tag = "3")]
    pub(super) client: String,
    /// An IP address, or empty.
    #[prost(string, tag = "4")]
    pub(super) local: String,
    #[prost(uint64, tag = "5")]
    pub(super) idle_ms: u64,
    #[prost(uint64, tag = "6")]
    pub(super) upstream_bytes: u64,
    #[prost(uint64, tag = "7")]
    pub(super) downstream_bytes: u64,
    #[prost(bool, tag = "8")]
    pub(super) is_assured: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Clients {
    #[prost(message, repeated, tag = "1")]
    pub(super) clients: Vec<Client>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Client {
    #[prost(uint32, tag = "1")]
    pub(super) port: u32,
    #[prost(bool, tag = "2")]
    pub(super) is_udp: bool,
    #[prost(string, tag = "3")]
    pub(super) address: String,
    #[prost(string, tag = "4")]
    pub(super) local: String,
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub(super) datagrams: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Sessions {
    #[prost(message, repeated, tag = "1")]
    pub(super) live: Vec<Session>,
    #[prost(message, repeated, tag = "2")]
    pub(super) released: Vec<Released>,
    #[prost(message, repeated, tag = "3")]
    pub(super) over: Vec<Over>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Session {
    #[prost(uint32, tag = "1")]
    pub(super) slot: u32,
    #[prost(uint64, tag = "2")]
    pub(super) key: u64,
    #[prost(message, required, tag = "3")]
    pub(super) session: v1::Session,
    #[prost(uint64, tag = "4")]
    pub(super) connections: u64,
    #[prost(uint64, tag = "5")]
    pub(super) upstream_bytes: u64,
    #[prost(uint64, tag = "6")]
    pub(super) downstream_bytes: u64,
    /// An IP address, or empty.
    #[prost(string, tag = "7")]
    pub(super) client: String,
    #[prost(uint64, tag = "8")]
    pub(super) age_ms: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Released {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(uint32, tag = "2")]
    pub(super) slot: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Over {
    #[prost(uint32, tag = "1")]
    pub(super) port: u32,
    #[prost(string, tag = "2")]
    pub(super) id: String,
}

/// Sends a frame with at most [`MAX_DESCRIPTORS`].
pub(super) fn send(
    mut stream: &UnixStream,
    content: Content,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let body = Frame {
        content: Some(content),
    }
    .encode_to_vec();
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    let head = [count(body.len()), count(descriptors.len())].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Error::Malformed("too many descriptors for a frame"));
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(&head)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    if sent.map_err(std::io::Error::from)? != HEAD_BYTES {
        return Err(Error::Malformed("a frame's head was cut"));
    }
    stream.write_all(&body)?;
    Ok(())
}

/// Receives a frame with as many descriptors as its head says.
pub(super) fn receive(mut stream: &UnixStream) -> Result<(Content, Vec<OwnedFd>), Error> {
    let mut head = [0; HEAD_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut head)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    let received = received.map_err(std::io::Error::from)?;
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let descriptors: Vec<OwnedFd> = rights.flatten().collect();
    if received.bytes == 0 {
        return Err(Error::Vanished);
    }
    stream.read_exact(&mut head[received.bytes..])?;
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let (length, count) = (number(&head[..4]), number(&head[4..]));
    if received.flags.contains(ReturnFlags::CTRUNC) || count != descriptors.len() {
        return Err(Error::Malformed(
            "descriptors are missing: the limit of open files may be too low (ulimit -Hn)",
        ));
    }
    if length > MAX_FRAME_BYTES {
        return Err(Error::Malformed("a frame is too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let content = decode(&body).ok_or(Error::Malformed("a frame makes no sense"))?;
    Ok((content, descriptors))
}

/// The content of a frame's body; `None` when it has none.
pub(super) fn decode(body: &[u8]) -> Option<Content> {
    Frame::decode(body).ok()?.content
}
