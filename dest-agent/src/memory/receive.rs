//! The destination's end of page connections (`longhaul_common::pages`).

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use longhaul_common::pages::{
    Buffers, FrameError, HEADER, HELLO, Header, Hello, Kind, MAX_STREAMS, MAX_TEXT, OBJECTS, Object, RECORD, Record,
    Reply, What, checksum, decode_records,
};
use longhaul_common::tls::TlsConnection;
use prost::Message;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use super::common::{COMMON, CommonRun, NotCommon};
use super::index::Due;
use super::objects::{HandOut, ObjectError, Objects};
use super::store::{PageStore, StoreError, Writes};

/// Frames between the connection and the thread that stores them: one to decrypt, one to store, and two for their
/// differences in pace.
const QUEUE: usize = 4;
/// How long a source may take for its hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Ranges of content in one address space: a container with more areas than the kernel's limit
/// (vm.max_map_count, 65,530) times the holes in them.
const MAX_RANGES: usize = 16 << 20;

/// Pages that can't be taken.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The connection.
    #[error("the page connection broke")]
    Connection(#[from] io::Error),
    /// Its frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Shared memory.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// A frame out of order.
    #[error("the page connection sent frame {got} where {expected} was due")]
    Order {
        /// What came.
        got: u64,
        /// What was due.
        expected: u64,
    },
    /// Too many ranges.
    #[error("the peer announced more than {MAX_RANGES} ranges of memory")]
    TooMany,
    /// Ranges out of order.
    #[error("the peer announced ranges of memory that overlap or are not in order")]
    Unsorted,
    /// A stream too many.
    #[error("stream {0} of the page connection: at most {MAX_STREAMS} are taken")]
    Stream(u32),
    /// Another connection of the same stream has come.
    #[error("another connection took this one's place")]
    Replaced,
    /// Not in this state of the migration.
    #[error("pages are not due now")]
    NotDue,
}

/// The memory of one arriving container, shared by its page connections and the migration's steps.
#[derive(Debug)]
pub struct Memory {
    shared: Mutex<Shared>,
    /// Each is held while a frame of the stream is stored: a connection that was replaced must not store late.
    streams: [Mutex<Stream>; MAX_STREAMS as usize],
}

/// What all streams share.
#[derive(Debug)]
struct Shared {
    /// Nothing once no more is taken.
    store: Option<PageStore>,
    /// Then those of the store.
    objects: Objects,
    content: HashMap<(u32, Due), Vec<Range<u64>>>,
    ranges: usize,
    /// Streams that have said that this is all.
    ended: u32,
    /// Once all pages that count are here and the indexes are written.
    arrived: Option<Arrived>,
}

/// Memory that is here.
#[derive(Debug, Clone, Default)]
pub struct Arrived {
    /// The pages that count.
    pub pages: u64,
    /// Where address spaces do not have what is in common, if anything is.
    pub not_common: Option<NotCommon>,
}

/// One of the streams, over however many connections.
#[derive(Debug, Default)]
struct Stream {
    /// The last frame stored.
    last: u64,
    /// The latest connection.
    connection: u64,
    /// A frame could not be stored: nothing more is taken.
    failed: bool,
}

impl Stream {
    /// Whether a frame is to be stored: not if it is, and was sent again over a new connection while it was on its way
    /// from the old one.
    fn is_due(&self, connection: u64, sequence: u64) -> Result<bool, ReceiveError> {
        if self.connection != connection {
            return Err(ReceiveError::Replaced);
        }
        if self.failed {
            return Err(ReceiveError::NotDue);
        }
        if sequence > self.last + 1 {
            return Err(ReceiveError::Order { got: sequence, expected: self.last + 1 });
        }
        Ok(sequence == self.last + 1)
    }
}

impl Memory {
    /// Into a store that is empty.
    pub fn new(store: PageStore) -> Arc<Self> {
        let shared = Shared {
            store: Some(store),
            objects: Objects::default(),
            content: HashMap::new(),
            ranges: 0,
            ended: 0,
            arrived: None,
        };
        Arc::new(Self { shared: Mutex::new(shared), streams: std::array::from_fn(|_| Mutex::default()) })
    }

    fn stream(&self, number: u32) -> Result<MutexGuard<'_, Stream>, ReceiveError> {
        let stream = self.streams.get(number as usize).ok_or(ReceiveError::Stream(number))?;
        Ok(stream.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection takes the place of the one before; its number, and the last frame that is stored.
    pub fn connect(&self, stream: u32) -> Result<(u64, u64), ReceiveError> {
        let mut stream = self.stream(stream)?;
        stream.connection += 1;
        Ok((stream.connection, stream.last))
    }

    /// Stores what a connection of a stream brought.
    pub fn apply(&self, stream: u32, connection: u64, frame: &Frame) -> Result<(), ReceiveError> {
        let mut stream = self.stream(stream)?;
        if !stream.is_due(connection, frame.header.sequence)? {
            return Ok(());
        }
        // Contents are written while other streams may use the store: no other stream has these pages.
        let mut shared = self.shared();
        let done = shared.apply(frame).and_then(|writes| {
            let at_once = writes.must_be_done_at_once();
            let kept = if at_once {
                Some(shared)
            } else {
                drop(shared);
                None
            };
            let written = writes.write(&frame.data);
            drop(kept);
            Ok(written?)
        });
        match &done {
            Ok(()) => stream.last = frame.header.sequence,
            // What was done of it must not be done twice.
            Err(_) => stream.failed = true,
        }
        done
    }

    /// What has arrived, if that is all.
    pub fn finish(&self) -> Result<Arrived, ReceiveError> {
        self.shared().arrived.clone().ok_or(ReceiveError::NotDue)
    }

    /// What tasks have in common, as far as it is here.
    pub fn find_common(&self) -> Result<Vec<CommonRun>, ReceiveError> {
        let mut shared = self.shared();
        Ok(shared.store.as_mut().ok_or(ReceiveError::NotDue)?.find_common()?)
    }

    /// Bytes that lie in the store.
    pub fn stored_bytes(&self) -> u64 {
        self.shared().store.as_ref().map_or(0, PageStore::bytes)
    }

    /// Gives CRIU the memory that tasks share, once this is closed.
    pub fn hand_out(&self, images: &Path) -> Result<HandOut, ReceiveError> {
        Ok(self.shared().objects.hand_out(images)?)
    }

    /// Takes no more, and lets the store go: what it wrote stays, if it is not removed.
    pub fn close(&self) {
        let mut shared = self.shared();
        if let Some(store) = shared.store.take() {
            shared.objects = store.into_objects();
        }
    }
}

impl Shared {
    /// Writes the indexes. Nothing may be missing.
    fn write_indexes(&self) -> Result<Arrived, ReceiveError> {
        let store = self.store.as_ref().ok_or(ReceiveError::NotDue)?;
        let mut pages = 0;
        for ((space, due), ranges) in &self.content {
            pages += store.write_index(*due, *space, ranges)?;
        }
        store.write_owed()?;
        let not_common = store.has_common().then(|| {
            let mut content: HashMap<u32, Vec<Range<u64>>> = HashMap::new();
            for ((space, _), ranges) in self.content.iter().filter(|((space, _), _)| *space < OBJECTS) {
                content.entry(*space).or_default().extend(ranges.iter().cloned());
            }
            let of_space = |(space, mut content): (u32, Vec<Range<u64>>)| {
                content.sort_unstable_by_key(|range| range.start);
                (space, store.not_common(space, &content))
            };
            content.into_iter().map(of_space).collect()
        });
        Ok(Arrived { pages, not_common })
    }

    /// Takes a frame in; what is to be written of its content.
    fn apply(&mut self, frame: &Frame) -> Result<Writes, ReceiveError> {
        let store = self.store.as_mut().filter(|_| self.arrived.is_none()).ok_or(ReceiveError::NotDue)?;
        let space = frame.header.space;
        if space == COMMON {
            return Err(FrameError::Field { what: "address space", got: space.into() }.into());
        }
        match frame.header.kind {
            Kind::Batch => return Ok(store.apply(space, &frame.records)?),
            Kind::Object => {
                if space < OBJECTS {
                    return Err(FrameError::Field { what: "object", got: space.into() }.into());
                }
                let about = Object::decode(frame.data.as_slice()).map_err(|_| FrameError::Object)?;
                store.objects().declare(space, about)?;
            }
            Kind::Content => self.add_content(space, &frame.records)?,
            Kind::Forget => store.forget(space),
            Kind::End => {
                // Said by each stream; content came over the first, before its end.
                self.ended += 1;
                if self.ended >= space {
                    // At once: the restore must not wait for it.
                    self.arrived = Some(self.write_indexes()?);
                }
            }
        }
        Ok(Writes::default())
    }

    fn add_content(&mut self, space: u32, records: &[Record]) -> Result<(), ReceiveError> {
        self.ranges += records.len();
        if self.ranges > MAX_RANGES || records.is_empty() {
            return Err(ReceiveError::TooMany);
        }
        for record in records {
            let due = if record.what == What::AtOnce { Due::AtOnce } else { Due::Later };
            let content = self.content.entry((space, due)).or_default();
            let range = record.page..record.page + u64::from(record.count);
            if content.last().is_some_and(|last| last.end > range.start) {
                return Err(ReceiveError::Unsorted);
            }
            content.push(range);
        }
        Ok(())
    }
}

/// A frame that is sound.
#[derive(Debug)]
pub struct Frame {
    header: Header,
    records: Vec<Record>,
    /// Unpacked.
    data: Vec<u8>,
}

impl Frame {
    /// Its address space, its records, and the content of its pages.
    pub fn parts(&self) -> (u32, &[Record], &[u8]) {
        (self.header.space, &self.records, &self.data)
    }

    /// Whether it brings pages.
    pub fn is_batch(&self) -> bool {
        self.header.kind == Kind::Batch
    }
}

/// Reads a connection's hello.
pub async fn hello(connection: &mut TlsConnection) -> Result<Hello, ReceiveError> {
    let mut bytes = [0; HELLO];
    let read = tokio::time::timeout(HELLO_DEADLINE, connection.read_exact(&mut bytes)).await;
    read.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(Hello::decode(&bytes)?)
}

/// Tells the source why nothing is taken.
pub async fn refuse(connection: &mut (impl AsyncWriteExt + Unpin), reason: &str) {
    let text: Vec<u8> = reason.bytes().take(MAX_TEXT).collect();
    let reply = Reply::Refused(text.len() as u32).encode();
    // The source may be gone; then nobody wants to know.
    let _ = connection.write_all(&[reply.as_slice(), &text].concat()).await;
    let _ = connection.flush().await;
    let _ = connection.shutdown().await;
}

/// Stores what comes over one connection, until it ends.
pub async fn receive(connection: TlsConnection, stream: u32, memory: Arc<Memory>) -> Result<(), ReceiveError> {
    let (reader, mut writer) = tokio::io::split(connection);
    let (number, last) = memory.connect(stream)?;
    writer.write_all(&Reply::Ack(last).encode()).await?;
    writer.flush().await?;
    let (frames, mut received) = mpsc::channel::<(Header, Vec<u8>, Vec<u8>)>(QUEUE);
    let (acks, acknowledged) = mpsc::channel(QUEUE);
    let buffers = Buffers::default();
    let used = buffers.clone();
    let stored = tokio::task::spawn_blocking(move || {
        while let Some((header, records, payload)) = received.blocking_recv() {
            let frame = check(header, &records, payload)?;
            memory.apply(stream, number, &frame)?;
            used.give(frame.data);
            if acks.blocking_send(frame.header.sequence).is_err() {
                break;
            }
        }
        Ok::<(), ReceiveError>(())
    });
    let reading = tokio::spawn(read_frames(reader, frames, buffers));
    let written = acknowledge(&mut writer, acknowledged).await;
    let stored = stored.await.map_err(io::Error::other)?;
    reading.abort();
    if let Err(error) = &stored {
        refuse(&mut writer, &longhaul_common::chain(error)).await;
    }
    stored.and(written)
}

async fn read_frames(
    mut reader: ReadHalf<TlsConnection>,
    frames: mpsc::Sender<(Header, Vec<u8>, Vec<u8>)>,
    buffers: Buffers,
) -> Result<(), ReceiveError> {
    loop {
        let mut bytes = [0; HEADER];
        reader.read_exact(&mut bytes).await?;
        let header = Header::decode(&bytes)?;
        let mut records = vec![0; header.records as usize * RECORD];
        reader.read_exact(&mut records).await?;
        let mut payload = buffers.take(header.payload as usize);
        reader.read_exact(&mut payload).await?;
        if frames.send((header, records, payload)).await.is_err() {
            return Ok(());
        }
    }
}

async fn acknowledge(
    writer: &mut WriteHalf<TlsConnection>,
    mut acknowledged: mpsc::Receiver<u64>,
) -> Result<(), ReceiveError> {
    while let Some(mut sequence) = acknowledged.recv().await {
        while let Ok(later) = acknowledged.try_recv() {
            sequence = later;
        }
        writer.write_all(&Reply::Ack(sequence).encode()).await?;
        writer.flush().await?;
    }
    Ok(())
}

/// Unpacks a frame and checks it.
pub fn check(header: Header, records: &[u8], payload: Vec<u8>) -> Result<Frame, ReceiveError> {
    let data = if header.packed {
        let unpacked = zstd::bulk::decompress(&payload, header.raw as usize);
        unpacked.ok().filter(|data| data.len() == header.raw as usize).ok_or(FrameError::Packed(header.sequence))?
    } else {
        payload
    };
    if checksum(records, &data) != header.checksum {
        return Err(FrameError::Damaged(header.sequence).into());
    }
    Ok(Frame { header, records: decode_records(&header, records)?, data })
}
