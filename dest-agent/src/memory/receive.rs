//! The destination's end of page connections (`longhaul_common::pages`).

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longhaul_common::pages::{
    Buffers, FrameError, HEADER, HELLO, Header, Hello, Kind, MAX_TEXT, RECORD, Record, Reply, What, checksum,
    decode_records,
};
use longhaul_common::tls::TlsConnection;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use super::index::Due;
use super::store::{PageStore, StoreError};

/// Frames between the connection and the thread that stores them: one to decrypt, one to store, and two for their
/// differences in pace.
const QUEUE: usize = 4;
/// How long a source may take for its hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Ranges of content in one address space: a container with more areas than the kernel's limit
/// (vm.max_map_count, 65,530) times the holes in them.
const MAX_RANGES: usize = 16 << 20;
/// Page connections of one migration at a time.
const MAX_STREAMS: u32 = 8;

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

/// The memory of one arriving container.
#[derive(Debug)]
pub struct Memory {
    /// Nothing once the migration has ended.
    store: Option<PageStore>,
    /// The last frame stored, by stream.
    last: HashMap<u32, u64>,
    content: HashMap<(u32, Due), Vec<Range<u64>>>,
    ranges: usize,
    /// The pages that count, once all of them are here and the indexes are written.
    arrived: Option<u64>,
    /// Which connection each stream has: the latest.
    connections: HashMap<u32, u64>,
}

/// Shared by the page connections and the migration's steps.
pub type SharedMemory = Arc<Mutex<Memory>>;

impl Memory {
    /// Into a store that is empty.
    pub fn new(store: PageStore) -> SharedMemory {
        Arc::new(Mutex::new(Self {
            store: Some(store),
            last: HashMap::new(),
            content: HashMap::new(),
            ranges: 0,
            arrived: None,
            connections: HashMap::new(),
        }))
    }

    /// A new connection takes the place of the one before; its number, and the last frame that is stored.
    fn connect(&mut self, stream: u32) -> (u64, u64) {
        let number = self.connections.entry(stream).or_default();
        *number += 1;
        (*number, self.last.get(&stream).copied().unwrap_or(0))
    }

    /// Writes the indexes. Nothing may be missing.
    fn write_indexes(&self) -> Result<u64, ReceiveError> {
        let store = self.store.as_ref().ok_or(ReceiveError::NotDue)?;
        let mut pages = 0;
        for ((space, due), ranges) in &self.content {
            pages += store.write_index(*due, *space, ranges)?;
        }
        Ok(pages)
    }

    fn apply(&mut self, stream: u32, connection: u64, frame: &Frame) -> Result<(), ReceiveError> {
        if self.connections.get(&stream) != Some(&connection) {
            return Err(ReceiveError::Replaced);
        }
        let last = self.last.get(&stream).copied().unwrap_or(0);
        if frame.header.sequence <= last {
            // Sent again over a new connection, while it was on its way from the old one into the store.
            return Ok(());
        }
        if frame.header.sequence != last + 1 {
            return Err(ReceiveError::Order { got: frame.header.sequence, expected: last + 1 });
        }
        let store = self.store.as_mut().filter(|_| self.arrived.is_none()).ok_or(ReceiveError::NotDue)?;
        let space = frame.header.space;
        match frame.header.kind {
            Kind::Batch => store.apply(space, &frame.records, &frame.data)?,
            Kind::Content => {
                self.ranges += frame.records.len();
                if self.ranges > MAX_RANGES || frame.records.is_empty() {
                    return Err(ReceiveError::TooMany);
                }
                for record in &frame.records {
                    let due = if record.what == What::AtOnce { Due::AtOnce } else { Due::Later };
                    let content = self.content.entry((space, due)).or_default();
                    let range = record.page..record.page + u64::from(record.count);
                    if content.last().is_some_and(|last| last.end > range.start) {
                        return Err(ReceiveError::Unsorted);
                    }
                    content.push(range);
                }
            }
            // At once: the restore must not wait for it.
            Kind::End => self.arrived = Some(self.write_indexes()?),
        }
        self.last.insert(stream, frame.header.sequence);
        Ok(())
    }
}

/// How many pages count, if all of them are here.
pub fn finish(memory: &SharedMemory) -> Result<u64, ReceiveError> {
    lock(memory).arrived.ok_or(ReceiveError::NotDue)
}

/// Bytes that lie in the store.
pub fn stored_bytes(memory: &SharedMemory) -> u64 {
    lock(memory).store.as_ref().map_or(0, PageStore::bytes)
}

/// Takes no more, and lets the store go: what it wrote stays, if it is not removed.
pub fn close(memory: &SharedMemory) {
    lock(memory).store = None;
}

struct Frame {
    header: Header,
    records: Vec<Record>,
    /// Unpacked.
    data: Vec<u8>,
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
pub async fn receive(connection: TlsConnection, stream: u32, memory: SharedMemory) -> Result<(), ReceiveError> {
    if stream >= MAX_STREAMS {
        return Err(ReceiveError::Stream(stream));
    }
    let (reader, mut writer) = tokio::io::split(connection);
    let (number, last) = lock(&memory).connect(stream);
    writer.write_all(&Reply::Ack(last).encode()).await?;
    writer.flush().await?;
    let (frames, mut received) = mpsc::channel::<(Header, Vec<u8>, Vec<u8>)>(QUEUE);
    let (acks, acknowledged) = mpsc::channel(QUEUE);
    let buffers = Buffers::default();
    let used = buffers.clone();
    let stored = tokio::task::spawn_blocking(move || {
        while let Some((header, records, payload)) = received.blocking_recv() {
            let frame = check(header, &records, payload)?;
            lock(&memory).apply(stream, number, &frame)?;
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

fn lock(memory: &SharedMemory) -> std::sync::MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
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

fn check(header: Header, records: &[u8], payload: Vec<u8>) -> Result<Frame, ReceiveError> {
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
