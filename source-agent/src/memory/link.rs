//! The source's end of a page connection: writes frames, counts answers, and connects again where it broke.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use longhaul_common::pages::{Buffers, Header, Hello, Kind, MAX_TEXT, REPLY, Reply, encode_records};
use longhaul_common::tls::{Identity, PeerAddress, TlsError, connect_pages};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_rustls::client::TlsStream;

use super::pump::Frame;

/// Frames between the thread that reads memory and the connection: enough to hide each other's pauses. What waits there gets old, and what comes
/// after it later.
const QUEUE: usize = 2;
/// Content that was sent and not acknowledged, in bytes: it has to be kept until it is. Enough for 10 Gbit/s at 25 ms.
const WINDOW_BYTES: usize = 32 << 20;
/// How long a broken connection may take to come back.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// The same while the container is frozen.
const RECONNECT_FROZEN: Duration = Duration::from_secs(1);
/// How long a connection and its hello may take.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// How long frames may go unacknowledged before the connection counts as broken: storing 32 MiB takes a fraction of it.
const ACK_DEADLINE: Duration = Duration::from_secs(5);
/// How long writing one frame may take.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a broken connection's last answer is waited for.
const LAST_WORD: Duration = Duration::from_millis(200);
/// How often it is tried.
const RECONNECT_EVERY: Duration = Duration::from_millis(100);

/// A page connection that can't be used.
#[derive(Debug, Error, Clone)]
pub enum LinkError {
    /// It can't be made.
    #[error("{0}")]
    Connect(String),
    /// The destination refuses.
    #[error("the destination refused the container's memory: {0}")]
    Refused(String),
    /// It broke and did not come back.
    #[error("the page connection to the destination broke and did not come back within 10 s: {0}")]
    Broken(String),
}

impl From<TlsError> for LinkError {
    fn from(error: TlsError) -> Self {
        Self::Connect(longhaul_common::chain(&error))
    }
}

/// How fast a link is, once that has been seen.
#[derive(Debug, Clone, Default)]
pub struct LinkPace(Arc<AtomicU64>);

impl LinkPace {
    /// Bytes a second that were stored while more waited; nothing if none ever did.
    pub fn get(&self) -> Option<f64> {
        let pace = self.0.load(Ordering::Relaxed);
        (pace > 0).then_some(pace as f64)
    }

    fn set(&self, pace: f64) {
        self.0.store((pace as u64).max(1), Ordering::Relaxed);
    }
}

/// Measures it: over a time in which there was always something on its way.
#[derive(Debug, Default)]
struct Stopwatch {
    pace: LinkPace,
    since: Option<Instant>,
    bytes: usize,
}

/// Over so long a time it is measured.
const PACED_OVER: Duration = Duration::from_millis(40);
/// With less than this on its way, in bytes, the link may be waiting for frames.
const BACKLOG: usize = 512 << 10;

impl Stopwatch {
    /// So many bytes are stored, and so many are on their way.
    fn stored(&mut self, bytes: usize, on_their_way: usize) {
        let Some(since) = self.since.filter(|_| on_their_way >= BACKLOG) else {
            self.since = (on_their_way >= BACKLOG).then(Instant::now);
            self.bytes = 0;
            return;
        };
        self.bytes += bytes;
        let took = since.elapsed();
        if took >= PACED_OVER {
            self.pace.set(self.bytes as f64 / took.as_secs_f64());
            (self.since, self.bytes) = (Some(Instant::now()), 0);
        }
    }
}

/// How far a link is.
#[derive(Debug, Clone, Default)]
struct Progress {
    acknowledged: u64,
    /// Pages that frames named which are acknowledged.
    stored_pages: u64,
    /// Bytes written to the connection, headers included.
    wire_bytes: u64,
    failed: Option<LinkError>,
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    frames: mpsc::Sender<Frame>,
    progress: watch::Receiver<Progress>,
    barrier: mpsc::Sender<watch::Sender<u64>>,
    pace: Arc<watch::Sender<Pace>>,
    link_pace: LinkPace,
    task: tokio::task::JoinHandle<()>,
}

/// Reads how much a link has written.
#[derive(Debug, Clone)]
pub struct Meter(watch::Receiver<Progress>);

impl Meter {
    /// Bytes so far, headers included.
    pub fn bytes(&self) -> u64 {
        self.0.borrow().wire_bytes
    }

    /// Pages that were named and are stored.
    pub fn stored_pages(&self) -> u64 {
        self.0.borrow().stored_pages
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Connects one stream of a migration. `limit` is the most bytes a second, if there is one; buffers of what has arrived
    /// go back to `buffers`.
    pub async fn connect(
        identity: &Identity,
        address: &PeerAddress,
        (migration, stream): (&str, u32),
        limit: Option<u64>,
        buffers: Buffers,
    ) -> Result<Self, LinkError> {
        let hello = Hello { migration: migration.to_owned(), stream };
        let dialer = Dialer { identity: identity.clone(), address: address.clone(), hello };
        let (connection, last) = dialer.dial().await?;
        let (frames, queue) = mpsc::channel(QUEUE);
        let (barrier, barriers) = mpsc::channel(1);
        let (report, progress) = watch::channel(Progress::default());
        let (pace, paces) = watch::channel(Pace { limit, reconnect: RECONNECT_DEADLINE });
        let stopwatch = Stopwatch::default();
        let link_pace = stopwatch.pace.clone();
        let writer = Writer {
            dialer,
            queue,
            barriers,
            report,
            paces,
            broken_since: None,
            unacknowledged: VecDeque::new(),
            unacknowledged_bytes: 0,
            stopwatch,
            buffers,
            sequence: last,
            not_before: Instant::now(),
        };
        let task = tokio::spawn(writer.run(connection));
        Ok(Self { frames, progress, barrier, pace: Arc::new(pace), link_pace, task })
    }

    /// Where frames go.
    pub fn frames(&self) -> mpsc::Sender<Frame> {
        self.frames.clone()
    }

    /// How fast it is.
    pub fn link_pace(&self) -> LinkPace {
        self.link_pace.clone()
    }

    /// The container is frozen: from now on as fast as it can, and without patience.
    pub fn hurry(&self) {
        self.pace.send_replace(Pace { limit: None, reconnect: RECONNECT_FROZEN });
    }

    /// Changes how fast it may be, until it has to hurry.
    pub fn pacer(&self) -> Pacer {
        Pacer(self.pace.clone())
    }

    /// For others to read.
    pub fn meter(&self) -> Meter {
        Meter(self.progress.clone())
    }

    /// Waits until everything that was given to it has been stored.
    pub async fn settle(&self) -> Result<(), LinkError> {
        let broken = || {
            let failed = self.progress.borrow().failed.clone();
            failed.unwrap_or_else(|| LinkError::Broken("it ended".to_owned()))
        };
        let (answer, mut sequence) = watch::channel(0);
        self.barrier.send(answer).await.map_err(|_| broken())?;
        sequence.changed().await.map_err(|_| broken())?;
        let wanted = *sequence.borrow();
        let mut progress = self.progress.clone();
        let reached = progress.wait_for(|progress| progress.failed.is_some() || progress.acknowledged >= wanted).await;
        match reached.map_err(|_| broken())?.failed.clone() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Why it ended.
    pub async fn failure(&self) -> LinkError {
        let mut progress = self.progress.clone();
        match progress.wait_for(|progress| progress.failed.is_some()).await {
            Ok(progress) => progress.failed.clone().unwrap_or_else(|| LinkError::Broken("it ended".to_owned())),
            Err(_) => LinkError::Broken("it ended".to_owned()),
        }
    }
}

/// Changes how fast a link may be.
#[derive(Debug, Clone)]
pub struct Pacer(Arc<watch::Sender<Pace>>);

impl Pacer {
    /// To so many bytes a second; nothing for no limit.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.0.send_modify(|pace| pace.limit = limit);
    }
}

/// How a link behaves.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// The most bytes a second.
    limit: Option<u64>,
    /// How long a broken connection may take to come back.
    reconnect: Duration,
}

/// Makes connections.
pub(super) struct Dialer {
    pub(super) identity: Identity,
    pub(super) address: PeerAddress,
    pub(super) hello: Hello,
}

impl Dialer {
    /// A connection, and the last frame the destination has stored.
    pub(super) async fn dial(&self) -> Result<(TlsStream<TcpStream>, u64), LinkError> {
        let mut connection = connect_pages(&self.identity, &self.address).await?;
        let failed = |error: io::Error| LinkError::Connect(format!("the page connection was not taken: {error}"));
        connection.write_all(&self.hello.encode()).await.map_err(failed)?;
        connection.flush().await.map_err(failed)?;
        match read_reply(&mut connection).await.map_err(failed)? {
            Ok(last) => Ok((connection, last)),
            Err(reason) => Err(LinkError::Refused(reason)),
        }
    }

    /// Tries until a moment that is given.
    async fn dial_again(&self, why: &str, end: Instant) -> Result<(TlsStream<TcpStream>, u64), LinkError> {
        tracing::warn!(why, "the page connection broke; connecting again");
        loop {
            if Instant::now() > end {
                return Err(LinkError::Broken(why.to_owned()));
            }
            match tokio::time::timeout(DIAL_DEADLINE, self.dial()).await {
                Ok(Ok(dialed)) => return Ok(dialed),
                Ok(Err(refused @ LinkError::Refused(_))) => return Err(refused),
                Ok(Err(_)) | Err(_) => tokio::time::sleep(RECONNECT_EVERY).await,
            }
        }
    }
}

/// One answer: the frame it acknowledges, or the text of a refusal.
async fn read_reply(reader: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Result<u64, String>> {
    match read_answer(reader).await? {
        Ok(Reply::Ack(sequence)) => Ok(Ok(sequence)),
        Ok(_) => Err(io::Error::other("the destination asked for pages over a connection that is not for that")),
        Err(reason) => Ok(Err(reason)),
    }
}

/// One answer, or the text of a refusal.
pub(super) async fn read_answer(reader: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Result<Reply, String>> {
    let mut bytes = [0; REPLY];
    reader.read_exact(&mut bytes).await?;
    match Reply::decode(bytes).map_err(io::Error::other)? {
        Reply::Refused(length) => {
            let mut text = vec![0; (length as usize).min(MAX_TEXT)];
            reader.read_exact(&mut text).await?;
            Ok(Err(String::from_utf8_lossy(&text).into_owned()))
        }
        reply => Ok(Ok(reply)),
    }
}

/// A frame's header and records, as they travel.
pub(super) fn head_of(frame: &Frame, sequence: u64) -> Vec<u8> {
    let header = Header {
        kind: frame.kind,
        packed: frame.packed,
        records: frame.records.len() as u32,
        payload: frame.payload.len() as u32,
        raw: frame.raw as u32,
        space: frame.space,
        sequence,
        checksum: frame.checksum,
    };
    [header.encode().as_slice(), &encode_records(&frame.records)].concat()
}

/// A frame as it travels, kept until it is acknowledged.
struct Sent {
    sequence: u64,
    head: Vec<u8>,
    payload: Vec<u8>,
    pages: u64,
}

struct Writer {
    dialer: Dialer,
    queue: mpsc::Receiver<Frame>,
    barriers: mpsc::Receiver<watch::Sender<u64>>,
    report: watch::Sender<Progress>,
    paces: watch::Receiver<Pace>,
    broken_since: Option<Instant>,
    unacknowledged: VecDeque<Arc<Sent>>,
    unacknowledged_bytes: usize,
    stopwatch: Stopwatch,
    buffers: Buffers,
    sequence: u64,
    not_before: Instant,
}

impl Writer {
    async fn run(mut self, connection: TlsStream<TcpStream>) {
        let mut connection = connection;
        loop {
            let why = match self.write(connection).await {
                Ok(()) => return,
                Err(Ended::Refused(reason)) => return self.fail(LinkError::Refused(reason)),
                Err(Ended::Broken(why)) => why,
            };
            // Counted from when frames last arrived: a destination that takes connections and nothing else is no way out.
            let since = *self.broken_since.get_or_insert_with(Instant::now);
            let end = since + self.paces.borrow().reconnect;
            match self.dialer.dial_again(&why, end).await {
                Ok((again, last)) => {
                    self.acknowledge(last);
                    connection = again;
                }
                Err(error) => return self.fail(error),
            }
        }
    }

    fn fail(&mut self, error: LinkError) {
        self.report.send_modify(|progress| progress.failed = Some(error));
        self.queue.close();
    }

    fn acknowledge(&mut self, sequence: u64) {
        if self.unacknowledged.front().is_some_and(|sent| sent.sequence <= sequence) {
            self.broken_since = None;
        }
        let mut stored = 0;
        while self.unacknowledged.front().is_some_and(|sent| sent.sequence <= sequence) {
            if let Some(sent) = self.unacknowledged.pop_front() {
                self.unacknowledged_bytes -= sent.payload.len();
                stored += sent.pages;
                self.stopwatch.stored(sent.head.len() + sent.payload.len(), self.unacknowledged_bytes);
                if let Some(sent) = Arc::into_inner(sent) {
                    self.buffers.give(sent.payload);
                }
            }
        }
        self.report.send_modify(|progress| {
            progress.acknowledged = progress.acknowledged.max(sequence);
            progress.stored_pages += stored;
        });
    }

    /// Writes to one connection until the queue or the connection ends.
    async fn write(&mut self, connection: TlsStream<TcpStream>) -> Result<(), Ended> {
        let (reader, mut writer) = tokio::io::split(connection);
        let (acks, mut acknowledged) = mpsc::channel(64);
        let reading = Reading(tokio::spawn(read_acks(reader, acks)));
        let ended = self.write_frames(&mut writer, &mut acknowledged).await;
        if let Err(Ended::Broken(_)) = &ended {
            // A destination that refuses closes the connection, which may be seen before its reason is.
            let reason = async {
                while let Some(ack) = acknowledged.recv().await {
                    if let Err(refused @ Ended::Refused(_)) = ack {
                        return Some(refused);
                    }
                }
                None
            };
            if let Ok(Some(refused)) = tokio::time::timeout(LAST_WORD, reason).await {
                return Err(refused);
            }
        }
        drop(reading);
        ended
    }

    async fn write_frames(
        &mut self,
        writer: &mut WriteHalf<TlsStream<TcpStream>>,
        acknowledged: &mut mpsc::Receiver<Result<u64, Ended>>,
    ) -> Result<(), Ended> {
        for sent in self.unacknowledged.clone() {
            self.write_one(writer, &sent).await?;
        }
        loop {
            let full = self.unacknowledged_bytes >= WINDOW_BYTES;
            tokio::select! {
                biased;
                ack = acknowledged.recv() => match ack {
                    Some(Ok(sequence)) => self.acknowledge(sequence),
                    Some(Err(ended)) => return Err(ended),
                    None => return Err(Ended::Broken("it was closed".to_owned())),
                },
                () = tokio::time::sleep(ACK_DEADLINE), if !self.unacknowledged.is_empty() => {
                    return Err(Ended::Broken(format!("no answer within {} s", ACK_DEADLINE.as_secs())));
                }
                frame = self.queue.recv(), if !full => {
                    let Some(frame) = frame else { return Ok(()) };
                    let sent = self.number(frame);
                    self.write_one(writer, &sent).await?;
                }
                // After the queue: everything that was in it has its number now.
                Some(barrier) = self.barriers.recv(), if self.queue.is_empty() => { barrier.send_replace(self.sequence); }
            }
        }
    }

    fn number(&mut self, frame: Frame) -> Arc<Sent> {
        self.sequence += 1;
        let head = head_of(&frame, self.sequence);
        // What a record names is there once the frame is stored.
        let pages = if frame.kind == Kind::Batch {
            frame.records.iter().map(|record| u64::from(record.count)).sum()
        } else {
            0
        };
        let sent = Arc::new(Sent { sequence: self.sequence, head, payload: frame.payload, pages });
        self.unacknowledged_bytes += sent.payload.len();
        self.unacknowledged.push_back(sent.clone());
        if frame.kind == Kind::End {
            tracing::debug!(frames = self.sequence, "all memory was given to the connection");
        }
        sent
    }

    async fn write_one(&mut self, writer: &mut WriteHalf<TlsStream<TcpStream>>, sent: &Sent) -> Result<(), Ended> {
        let bytes = sent.head.len() + sent.payload.len();
        let limit = self.paces.borrow_and_update().limit;
        if let Some(limit) = limit {
            tokio::select! {
                () = tokio::time::sleep_until(self.not_before.into()) => {}
                _ = self.paces.changed() => {}
            }
            let pause = Duration::from_secs_f64(bytes as f64 / limit.max(1) as f64);
            self.not_before = self.not_before.max(Instant::now()) + pause;
        }
        let broken = |error: io::Error| Ended::Broken(error.to_string());
        let write = async {
            writer.write_all(&sent.head).await?;
            writer.write_all(&sent.payload).await?;
            writer.flush().await
        };
        // A MiB takes longer only on a link that could not move a container anyway.
        let written = tokio::time::timeout(WRITE_DEADLINE, write).await;
        written.map_err(|_| Ended::Broken("nothing gets through".to_owned()))?.map_err(broken)?;
        self.report.send_modify(|progress| progress.wire_bytes += bytes as u64);
        Ok(())
    }
}

enum Ended {
    Refused(String),
    Broken(String),
}

/// A task that ends with its owner.
pub(super) struct Reading(pub(super) tokio::task::JoinHandle<()>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn read_acks(mut reader: ReadHalf<TlsStream<TcpStream>>, acks: mpsc::Sender<Result<u64, Ended>>) {
    loop {
        let answer = match read_reply(&mut reader).await {
            Ok(Ok(sequence)) => Ok(sequence),
            Ok(Err(reason)) => Err(Ended::Refused(reason)),
            Err(error) => Err(Ended::Broken(error.to_string())),
        };
        let last = answer.is_err();
        if acks.send(answer).await.is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_waits_for_frames_says_nothing_of_its_pace() {
        let mut stopwatch = Stopwatch::default();
        for _ in 0..10 {
            stopwatch.stored(1 << 20, 0);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(stopwatch.pace.get(), None);
        for _ in 0..20 {
            stopwatch.stored(1 << 20, BACKLOG);
            std::thread::sleep(Duration::from_millis(5));
        }
        let pace = stopwatch.pace.get().expect("measured");
        // A MiB each 5 ms, or more on a machine that is busy.
        assert!((1e6..210.0 * f64::from(1 << 20)).contains(&pace), "{pace}");
    }
}
