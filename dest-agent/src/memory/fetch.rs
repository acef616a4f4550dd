//! The worker's end of the connection over which it fetches pages that are owed: the agent passes its bytes on from the
//! source (`longhaul_common::pages`).

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use longhaul_common::pages::{HEADER, Header, RECORD, Reply, Want};

use super::receive::{Frame, check};

/// Bytes read at once.
const READ: usize = 256 << 10;

/// See the module.
#[derive(Debug)]
pub struct Fetch {
    socket: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    completed: bool,
}

impl Fetch {
    /// Takes the connection; its first answer is due at once.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let mut fetch = Self { socket, incoming: Vec::new(), outgoing: Vec::new(), completed: false };
        fetch.say(Reply::Ack(0));
        Ok(fetch)
    }

    fn say(&mut self, reply: Reply) {
        self.outgoing.extend(reply.encode());
    }

    /// Asks for pages.
    pub fn want(&mut self, want: Want) {
        self.say(Reply::Want(want));
    }

    /// A frame has been taken in.
    pub fn acknowledge(&mut self, sequence: u64) {
        self.say(Reply::Ack(sequence));
    }

    /// Nothing more is needed; said once.
    pub fn complete(&mut self) {
        if !std::mem::replace(&mut self.completed, true) {
            self.say(Reply::Complete);
        }
    }

    /// Whether something waits to be written.
    pub fn has_to_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Writes what can be written now.
    pub fn write(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.socket.write(&self.outgoing) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => drop(self.outgoing.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes everything, before the worker ends.
    pub fn finish(mut self) -> io::Result<()> {
        self.socket.set_nonblocking(false)?;
        self.socket.write_all(&self.outgoing)
    }

    /// Reads what is there; frames that are whole.
    pub fn read(&mut self) -> io::Result<Vec<(u64, Frame)>> {
        let old = self.incoming.len();
        self.incoming.resize(old + READ, 0);
        let read = self.socket.read(&mut self.incoming[old..]);
        self.incoming.truncate(old + read.as_ref().copied().unwrap_or(0));
        match read {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        let mut frames = Vec::new();
        let mut at = 0;
        while let Some((sequence, frame, length)) = parse(&self.incoming[at..])? {
            frames.push((sequence, frame));
            at += length;
        }
        self.incoming.drain(..at);
        Ok(frames)
    }
}

impl AsFd for Fetch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The first frame, with its number and its length; nothing if it is not all there.
fn parse(bytes: &[u8]) -> io::Result<Option<(u64, Frame, usize)>> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let header = Header::decode(header).map_err(io::Error::other)?;
    let records = HEADER + header.records as usize * RECORD;
    let end = records + header.payload as usize;
    let (Some(records), Some(payload)) = (bytes.get(HEADER..records), bytes.get(records..end)) else { return Ok(None) };
    let frame = check(header, records, payload.to_vec()).map_err(io::Error::other)?;
    Ok(Some((header.sequence, frame, end)))
}
