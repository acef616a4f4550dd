//! Messages with a descriptor, between the keeper and its worker, and from CRIU.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use longhaul_common::sys::adopt;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

use super::plan::SpaceId;

/// What keeper and worker tell each other.
#[derive(Debug)]
pub enum Message {
    /// Here is the userfaultfd of an address space.
    Add(SpaceId, OwnedFd),
    /// Fill in the background from now on.
    Go,
    /// No further address space will be restored.
    Restored,
    /// An address space is complete, or has ended: its descriptor is not needed any more.
    Done(SpaceId),
    /// A connection to fetch pages over; it has the place of the one before.
    Fetch(OwnedFd),
}

/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(one), Self(other)))
    }

    /// The end behind a descriptor.
    pub fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends one message.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        let (kind, space, fd) = match message {
            Message::Add(space, fd) => (1u8, *space, Some(fd.as_fd())),
            Message::Go => (2, 0, None),
            Message::Restored => (3, 0, None),
            Message::Done(space) => (4, *space, None),
            Message::Fetch(fd) => (5, 0, Some(fd.as_fd())),
        };
        let mut bytes = [kind; 9];
        bytes[1..].copy_from_slice(&space.to_le_bytes());
        send_with_fd(self.0.as_fd(), &bytes, fd)
    }

    /// Announces the descriptor of an address space without giving it away.
    pub fn send_add(&self, space: SpaceId, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut bytes = [1; 9];
        bytes[1..].copy_from_slice(&space.to_le_bytes());
        send_with_fd(self.0.as_fd(), &bytes, Some(fd))
    }

    /// Receives one; nothing when the other end is gone.
    pub fn receive(&self) -> io::Result<Option<Message>> {
        let mut bytes = [0; 9];
        let (length, fd) = receive_with_fd(self.0.as_fd(), &mut bytes)?;
        if length == 0 {
            return Ok(None);
        }
        let mut space = [0; 8];
        space.copy_from_slice(&bytes[1..]);
        let space = SpaceId::from_le_bytes(space);
        Ok(Some(match (bytes[0], fd) {
            (1, Some(fd)) => Message::Add(space, fd),
            (2, None) => Message::Go,
            (3, None) => Message::Restored,
            (4, None) => Message::Done(space),
            (5, Some(fd)) => Message::Fetch(fd),
            (kind, _) => return Err(io::Error::other(format!("message {kind} between keeper and worker"))),
        }))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn send_with_fd(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let raw: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives up to `buffer`'s length, and a descriptor if one comes along.
pub fn receive_with_fd(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!(RawFd);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let fd = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    Ok((message.bytes, fd.map(adopt)))
}
