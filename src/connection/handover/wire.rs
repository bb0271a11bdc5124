//! Frames on the hand-over's socket, each with the descriptors that it names.
//! `handover.proto` documents what they hold.
//!
//! ```text
//! ┌──────────────┬───────────────────┬──────────────────────┐
//! │ length (u32) │ descriptors (u32) │ Frame (protobuf)     │
//! └──────────────┴───────────────────┴──────────────────────┘
//!   big-endian, and the descriptors ride on these eight bytes (SCM_RIGHTS)
//! ```
//!
//! Source: unix(7), `SCM_RIGHTS`: at most 253 descriptors a message.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::error::Error;
use super::v1::{Frame, frame::Content};

/// How long the other side may take for its next frame. Streams stand still
/// meanwhile, so a successor that hangs is given up soon.
pub(super) const FRAME_DEADLINE: Duration = Duration::from_secs(3);

/// Most descriptors of a frame.
pub(super) const MAX_DESCRIPTORS: usize = 253;

/// Longest frame in bytes: what a frame's connections may have kept, and room.
const MAX_FRAME_BYTES: usize = 64 * 1024 * 1024;

const HEAD_BYTES: usize = 8;

/// Has every read and write of `stream` fail after `deadline`.
pub(super) fn set_deadline(stream: &UnixStream, deadline: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))
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
    if sent.map_err(io::Error::from)? != HEAD_BYTES {
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
    let received = received.map_err(io::Error::from)?;
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

/// The content of a frame's body; `None` when it does not parse or is empty.
pub(super) fn decode(body: &[u8]) -> Option<Content> {
    Frame::decode(body).ok()?.content
}
