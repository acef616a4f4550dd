//! The page connection: memory on its way from the source's tracker to the destination's page store.
//!
//! It is a TLS connection of its own, told from gRPC by its protocol name ([`ALPN`]), and carries plain frames: what moves
//! gigabytes must not be copied into messages on the way.
//!
//! ```text
//!  source                                 destination
//!    │── Hello{migration, stream} ───────────▶│
//!    │◀────────────── Welcome{last sequence} ─│   after a broken connection: what need not be sent again
//!    │── Object{sequence, what it is} ───────▶│   shared memory that batches will bring, over every stream
//!    │── Batch{sequence, records, pages} ────▶│   as often as wanted, without waiting
//!    │◀──────────────────────── Ack{sequence} │   after it is in the store
//!    │── Forget{sequence, space} ────────────▶│   an address space has ended: its pages make room
//!    │── Content{sequence, ranges} ──────────▶│   which pages count in the end, for each address space
//!    │── End{sequence} ──────────────────────▶│
//! ```
//!
//! A migration may have several, its streams, which carry different pages. Content goes over the first.
//!
//! Pages may be owed: named, and fetched after the container runs, over a connection of its own, the stream [`FETCH`]:
//!
//! ```text
//!    │── Hello{migration, FETCH} ────────────▶│
//!    │◀─────── Want{pages}, Want{pages} urgent│   all that has not arrived; then those that tasks wait for
//!    │── Batch{sequence, records, pages} ────▶│   urgent ones first
//!    │◀────────────────────────── Ack{sequence}
//!    │◀────────────────────────────── Complete│   the source's memory is not needed any more
//! ```
//!
//! An address space is a task's, or that of an *object*: memory that tasks share, numbered by its own offsets. Objects have
//! numbers from [`OBJECTS`] on.
//!
//! A frame is a header of 40 bytes, its records of 32 bytes each, and its payload. All numbers are little-endian.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

use crate::journal::is_migration_id;
use crate::sys::memory::PAGE;

/// The protocol's name in the TLS handshake.
pub const ALPN: &[u8] = b"longhaul-pages/1";
/// The most pages whose content one frame carries: 1 MiB, which a core encrypts in half a millisecond.
pub const MAX_PAGES: usize = 256;
/// The most page connections of one migration.
pub const MAX_STREAMS: u32 = 8;
/// The stream over which a destination fetches the pages that it is owed.
pub const FETCH: u32 = u32::MAX;
/// The most records of one frame.
pub const MAX_RECORDS: usize = 4096;
/// Address spaces from this number on are those of objects.
pub const OBJECTS: u32 = 1 << 31;
/// The longest description of an object, in bytes: its name has at most 249 (memfd_create(2)).
const MAX_OBJECT: u32 = 1024;
/// A header's bytes.
pub const HEADER: usize = 40;
/// A record's bytes.
pub const RECORD: usize = 32;
/// A hello's bytes.
pub const HELLO: usize = 84;
/// An answer's bytes, without the text of a refusal.
pub const REPLY: usize = 16;
/// The longest text of a refusal, in bytes.
pub const MAX_TEXT: usize = 4096;

const MAGIC: &[u8; 8] = b"LHPAGES1";
const PAGE_BYTES: usize = PAGE as usize;

/// What is not a frame of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// A field's value.
    #[error("the page connection's {what} is {got}, which is not allowed")]
    Field {
        /// Which.
        what: &'static str,
        /// What it is.
        got: u64,
    },
    /// A hello of something else.
    #[error("the page connection began with something else than its hello")]
    Hello,
    /// The checksum is another.
    #[error("frame {0} of the page connection arrived damaged: its checksum differs")]
    Damaged(u64),
    /// Its payload describes no object.
    #[error("the page connection's description of shared memory can't be read")]
    Object,
    /// It does not unpack.
    #[error("frame {0} of the page connection can't be unpacked")]
    Packed(u64),
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Pages.
    Batch,
    /// The ranges that have content in the end.
    Content,
    /// No more comes.
    End,
    /// An address space has ended: what came of it is not needed any more.
    Forget,
    /// What the object with this address space is, or what size it has now: the payload is an [`Object`].
    Object,
}

/// Memory that tasks share.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Object {
    /// Its inode's number on the source, by which CRIU calls it (`shmid`; criu/memfd.c, criu/proc_parse.c).
    #[prost(uint64, tag = "1")]
    pub inode: u64,
    /// In bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// What else it is.
    #[prost(oneof = "ObjectKind", tags = "3, 4")]
    pub kind: Option<ObjectKind>,
}

/// What shared memory is.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum ObjectKind {
    /// A file in memory, or an anonymous mapping, which becomes a file without a name.
    #[prost(message, tag = "3")]
    File(MemoryFile),
    /// A System V segment.
    #[prost(message, tag = "4")]
    Segment(Segment),
}

/// Of memfd_create(2).
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MemoryFile {
    /// Its name.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// `MFD_ALLOW_SEALING`.
    #[prost(bool, tag = "2")]
    pub may_be_sealed: bool,
}

/// Of shmget(2).
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Segment {
    /// Its number.
    #[prost(int32, tag = "1")]
    pub id: i32,
    /// Its key; 0 has none.
    #[prost(int32, tag = "2")]
    pub key: i32,
    /// Its permissions.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
}

/// What a record says of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Their content is next in the payload.
    Data,
    /// The next bytes of the payload, each combined by exclusive or with what it was before.
    Changed,
    /// They are zero.
    Zero,
    /// They are as those of another place are now.
    Same {
        /// Its address space.
        space: u32,
        /// Its first page's number.
        page: u64,
    },
    /// Their content is not sent now: the destination fetches it when it has restored the container.
    Owed,
    /// They have content in the end.
    Content,
    /// The same, and it must be in place before the container runs.
    AtOnce,
}

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The number of the first: its address divided by 4096.
    pub page: u64,
    /// How many.
    pub count: u32,
    /// What of them.
    pub what: What,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// The payload is packed with zstd.
    pub packed: bool,
    /// Records.
    pub records: u32,
    /// Bytes of the payload as it travels.
    pub payload: u32,
    /// Bytes of the payload unpacked.
    pub raw: u32,
    /// The address space: the container's own number of its task. Of an end: how many streams there are.
    pub space: u32,
    /// Counted from 1.
    pub sequence: u64,
    /// xxh3 (64 bit) of the records and the unpacked payload.
    pub checksum: u64,
}

/// Buffers that are used again: a new one of a MiB costs the kernel 256 page faults, a quarter of what it takes to encrypt it.
#[derive(Debug, Clone, Default)]
pub struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// Buffers kept for later, at most: those of the queues and the window.
const KEPT_BUFFERS: usize = 48;

impl Buffers {
    /// One of `length` bytes, of whatever content.
    pub fn take(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.lock().pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    /// Gives one back.
    pub fn give(&self, buffer: Vec<u8>) {
        let mut kept = self.lock();
        if kept.len() < KEPT_BUFFERS && buffer.capacity() > 0 {
            kept.push(buffer);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

impl Header {
    /// As it travels.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = match self.kind {
            Kind::Batch => 1,
            Kind::Content => 2,
            Kind::End => 3,
            Kind::Forget => 4,
            Kind::Object => 5,
        };
        bytes[1] = u8::from(self.packed);
        bytes[4..8].copy_from_slice(&self.records.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.raw.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.space.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    /// Reads one, with every length within its bounds.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, FrameError> {
        let field = |what, got: u64| FrameError::Field { what, got };
        let kind = match bytes[0] {
            1 => Kind::Batch,
            2 => Kind::Content,
            3 => Kind::End,
            4 => Kind::Forget,
            5 => Kind::Object,
            other => return Err(field("kind of frame", other.into())),
        };
        if bytes[1] > 1 {
            return Err(field("encoding", bytes[1].into()));
        }
        let header = Self {
            kind,
            packed: bytes[1] == 1,
            records: u32_at(bytes, 4),
            payload: u32_at(bytes, 8),
            raw: u32_at(bytes, 12),
            space: u32_at(bytes, 16),
            sequence: u64_at(bytes, 24),
            checksum: u64_at(bytes, 32),
        };
        if header.records as usize > MAX_RECORDS {
            return Err(field("number of records", header.records.into()));
        }
        let (most, unit) = match kind {
            Kind::Batch => ((MAX_PAGES * PAGE_BYTES) as u32, PAGE_BYTES as u32),
            Kind::Object => (MAX_OBJECT, 1),
            Kind::Content | Kind::End | Kind::Forget => (0, 1),
        };
        if header.raw > most || !header.raw.is_multiple_of(unit) {
            return Err(field("size of pages", header.raw.into()));
        }
        let fits = if header.packed { header.payload < header.raw } else { header.payload == header.raw };
        if !fits || (kind != Kind::Batch && header.packed) {
            return Err(field("size of payload", header.payload.into()));
        }
        Ok(header)
    }
}

/// The records, as they travel.
pub fn encode_records(records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(records.len() * RECORD);
    for record in records {
        let (what, space, page) = match record.what {
            What::Data => (1u32, 0, 0),
            What::Zero => (2, 0, 0),
            What::Same { space, page } => (3, space, page),
            What::Content => (4, 0, 0),
            What::AtOnce => (5, 0, 0),
            What::Owed => (6, 0, 0),
            What::Changed => (7, 0, 0),
        };
        bytes.extend(record.page.to_le_bytes());
        bytes.extend(page.to_le_bytes());
        bytes.extend(record.count.to_le_bytes());
        bytes.extend(space.to_le_bytes());
        bytes.extend(what.to_le_bytes());
        bytes.extend([0; 4]);
    }
    bytes
}

/// The highest page number of a 64-bit address space, with 57 bits of address.
const MAX_PAGE: u64 = 1 << 45;

/// Reads the records of a frame and checks that they fit its kind and its payload.
pub fn decode_records(header: &Header, bytes: &[u8]) -> Result<Vec<Record>, FrameError> {
    let field = |what, got: u64| FrameError::Field { what, got };
    let mut records = Vec::with_capacity(header.records as usize);
    let mut data = 0u64;
    for bytes in bytes.chunks_exact(RECORD) {
        let what = match (header.kind, u32_at(bytes, 24)) {
            (Kind::Batch, 1) => What::Data,
            (Kind::Batch, 2) => What::Zero,
            (Kind::Batch, 3) => What::Same { space: u32_at(bytes, 20), page: u64_at(bytes, 8) },
            (Kind::Batch, 6) => What::Owed,
            (Kind::Batch, 7) => What::Changed,
            (Kind::Content, 4) => What::Content,
            (Kind::Content, 5) => What::AtOnce,
            (_, other) => return Err(field("kind of record", other.into())),
        };
        let record = Record { page: u64_at(bytes, 0), count: u32_at(bytes, 16), what };
        let end = record.page.saturating_add(record.count.into());
        let from = if let What::Same { page, .. } = what { page } else { 0 };
        if record.count == 0 || end > MAX_PAGE || from > MAX_PAGE {
            return Err(field("range of pages", record.page));
        }
        match what {
            What::Data | What::Changed => data += u64::from(record.count),
            // The size of a frame bounds what it can make the store do.
            What::Same { .. } | What::Zero | What::Owed if record.count as usize > MAX_PAGES => {
                return Err(field("number of pages without content", record.count.into()));
            }
            _ => {}
        }
        records.push(record);
    }
    let pages = if header.kind == Kind::Batch { u64::from(header.raw) } else { 0 };
    if records.len() != header.records as usize || data * PAGE != pages {
        return Err(field("number of pages", data));
    }
    Ok(records)
}

/// The checksum of a frame.
pub fn checksum(records: &[u8], raw: &[u8]) -> u64 {
    let mut sum = Xxh3::new();
    sum.update(records);
    sum.update(raw);
    sum.digest()
}

/// The first thing a source says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The migration.
    pub migration: String,
    /// Which of its page connections.
    pub stream: u32,
}

impl Hello {
    /// As it travels.
    pub fn encode(&self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&self.stream.to_le_bytes());
        let id = self.migration.as_bytes();
        let length = id.len().min(HELLO - 13);
        bytes[12] = length as u8;
        bytes[13..13 + length].copy_from_slice(&id[..length]);
        bytes
    }

    /// Reads one.
    pub fn decode(bytes: &[u8; HELLO]) -> Result<Self, FrameError> {
        let length = usize::from(bytes[12]);
        let id = bytes.get(13..13 + length).and_then(|id| std::str::from_utf8(id).ok());
        match id {
            Some(id) if bytes.starts_with(MAGIC) && is_migration_id(id) => {
                Ok(Self { migration: id.to_owned(), stream: u32_at(bytes, 8) })
            }
            _ => Err(FrameError::Hello),
        }
    }
}

/// What a destination says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Everything up to this sequence is in the store.
    Ack(u64),
    /// It takes no more; a text of so many bytes follows.
    Refused(u32),
    /// Send these pages, which are owed.
    Want(Want),
    /// Nothing is owed any more.
    Complete,
}

/// Pages that a destination wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Their address space.
    pub space: u32,
    /// The first one's number.
    pub page: u64,
    /// How many.
    pub count: u16,
    /// A task waits for them.
    pub urgent: bool,
}

impl Reply {
    /// As it travels.
    pub fn encode(self) -> [u8; REPLY] {
        let mut bytes = [0; REPLY];
        match self {
            Self::Ack(sequence) => {
                bytes[0] = 1;
                bytes[8..].copy_from_slice(&sequence.to_le_bytes());
            }
            Self::Refused(length) => {
                bytes[0] = 2;
                bytes[4..8].copy_from_slice(&length.to_le_bytes());
            }
            Self::Want(want) => {
                bytes[0] = 3;
                bytes[1] = u8::from(want.urgent);
                bytes[2..4].copy_from_slice(&want.count.to_le_bytes());
                bytes[4..8].copy_from_slice(&want.space.to_le_bytes());
                bytes[8..].copy_from_slice(&want.page.to_le_bytes());
            }
            Self::Complete => bytes[0] = 4,
        }
        bytes
    }

    /// Reads one.
    pub fn decode(bytes: [u8; REPLY]) -> Result<Self, FrameError> {
        match bytes[0] {
            1 => Ok(Self::Ack(u64_at(&bytes, 8))),
            2 if u32_at(&bytes, 4) as usize <= MAX_TEXT => Ok(Self::Refused(u32_at(&bytes, 4))),
            3 => {
                let (count, page) = (u16::from_le_bytes([bytes[2], bytes[3]]), u64_at(&bytes, 8));
                if count == 0 || page.saturating_add(count.into()) > MAX_PAGE {
                    return Err(FrameError::Field { what: "range of pages", got: page });
                }
                Ok(Self::Want(Want { space: u32_at(&bytes, 4), page, count, urgent: bytes[1] == 1 }))
            }
            4 => Ok(Self::Complete),
            other => Err(FrameError::Field { what: "kind of answer", got: other.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(kind: Kind, records: u32, pages: u32) -> Header {
        let raw = pages * PAGE as u32;
        Header { kind, packed: false, records, payload: raw, raw, space: 7, sequence: 3, checksum: 9 }
    }

    #[test]
    fn what_is_sent_is_what_arrives() {
        let records = [
            Record { page: 5, count: 1, what: What::Data },
            Record { page: 6, count: 1, what: What::Changed },
            Record { page: 9, count: 256, what: What::Zero },
            Record { page: 700, count: 256, what: What::Owed },
            Record { page: 5000, count: 3, what: What::Same { space: 8, page: 77 } },
        ];
        let header = header(Kind::Batch, 5, 2);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        assert_eq!(decode_records(&header, &encode_records(&records)), Ok(records.to_vec()));
        let hello = Hello { migration: "web-1".into(), stream: 2 };
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        let want = Want { space: 7, page: 1 << 40, count: 9, urgent: true };
        for reply in [Reply::Ack(u64::MAX), Reply::Refused(12), Reply::Want(want), Reply::Complete] {
            assert_eq!(Reply::decode(reply.encode()), Ok(reply));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let data = [Record { page: 5, count: 2, what: What::Data }];
        decode_records(&header(Kind::Batch, 1, 3), &encode_records(&data)).expect_err("fewer pages than announced");
        decode_records(&header(Kind::Content, 1, 0), &encode_records(&data)).expect_err("data among ranges");
        let far = [Record { page: u64::MAX, count: 2, what: What::Zero }];
        decode_records(&header(Kind::Batch, 1, 0), &encode_records(&far)).expect_err("beyond the address space");
        let mut long = header(Kind::Batch, 1, 1).encode();
        long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        Header::decode(&long).expect_err("more than a frame holds");
        let mut packed = header(Kind::Batch, 1, 1);
        packed.packed = true;
        Header::decode(&packed.encode()).expect_err("packed to more than it was");
    }

    proptest! {
        #[test]
        fn noise_is_no_panic(bytes in proptest::array::uniform32(any::<u8>()), tail in any::<[u8; 8]>(), body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut whole = [0; HEADER];
            whole[..32].copy_from_slice(&bytes);
            whole[32..].copy_from_slice(&tail);
            if let Ok(header) = Header::decode(&whole) {
                let _ = decode_records(&header, &body);
            }
        }
    }
}
