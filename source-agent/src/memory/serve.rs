//! Post-copy: sends the pages that are owed to a destination which runs the container already, out of its frozen tasks.
//!
//! The destination asks for all that it lacks, and again for what its tasks wait for: that goes first, and what goes on in the
//! background goes on from there, since who wanted one page wants the next. So that an urgent page does not wait behind megabytes,
//! no more is on its way than the link needs to be busy. A connection that breaks is made again for as long as it takes;
//! what has arrived the destination does not ask for again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::Freezer;
use longhaul_common::pages::{FETCH, Hello, Kind, MAX_PAGES, Reply, Want, What, checksum, encode_records};
use longhaul_common::sys::memory::PAGE;
use longhaul_common::tasks::inner_pid;
use longhaul_common::tls::{Identity, PeerAddress};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_rustls::client::TlsStream;

use super::link::{Dialer, LinkError, Reading, head_of, read_answer};
use super::packing::Packing;
use super::pump::{Frame, PumpError, Tasks, add, read};
use super::sent::is_zero;

const PAGE_BYTES: usize = PAGE as usize;
/// Pages of one frame in the background: 128 KiB, a millisecond on a link of 1 Gbit/s.
const CHUNK: u64 = 32;
/// The least that may be on its way, in bytes.
const LEAST_WINDOW: usize = 256 << 10;
/// The most: enough for 10 Gbit/s at 12 ms.
const MOST_WINDOW: usize = 16 << 20;
/// Over so long a time it is measured how fast the link is.
const MEASURED: Duration = Duration::from_millis(20);
/// How long frames may go unacknowledged before the connection counts as broken.
const ACK_DEADLINE: Duration = Duration::from_secs(5);
/// Urgent requests that may wait: more than a container has threads.
const MOST_URGENT: usize = 1 << 20;
/// How often a connection is tried again, first and later.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a connection and its hello may take.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);

/// The tasks that pages are read from, by their address spaces.
pub type Sources = HashMap<u32, i32>;

/// The tasks of a frozen container whose first is `init`.
pub fn sources(freezer: &Freezer, init: i32) -> Sources {
    let tasks = freezer.tasks().unwrap_or_default();
    tasks.into_iter().filter_map(|pid| Some((inner_pid(pid, init)?, pid))).collect()
}

/// How far it is.
#[derive(Debug, Clone, Default)]
pub struct Served {
    /// Pages sent.
    pub pages: u64,
    /// Of those, asked for because a task waited.
    pub urgent: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Frames that have arrived.
    pub acknowledged: u64,
    /// Connections that broke.
    pub breaks: u32,
    /// Why there is no connection now, and since when.
    pub broken: Option<(String, Instant)>,
    /// The destination has everything.
    pub complete: bool,
}

/// See the module. It ends with its owner.
#[derive(Debug)]
pub struct Serving {
    /// How far it is.
    pub served: watch::Receiver<Served>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Serving {
    /// Connects, and sends what is asked for until the destination has everything.
    pub fn start(
        identity: &Identity,
        address: &PeerAddress,
        migration: &str,
        sources: Sources,
        may_pack: bool,
    ) -> Self {
        let hello = Hello { migration: migration.to_owned(), stream: FETCH };
        let dialer = Dialer { identity: identity.clone(), address: address.clone(), hello };
        let (report, served) = watch::channel(Served::default());
        let task = tokio::spawn(serve(dialer, sources, may_pack, report));
        Self { served, task }
    }
}

async fn serve(dialer: Dialer, sources: Sources, may_pack: bool, report: watch::Sender<Served>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let why = match tokio::time::timeout(DIAL_DEADLINE, dialer.dial()).await {
            Ok(Ok((connection, _))) => {
                let before = report.borrow().acknowledged;
                let ended = Sender::new(&sources, may_pack, &report).run(connection).await;
                // A connection that carries nothing is no connection.
                if report.borrow().acknowledged > before {
                    pause = FIRST_PAUSE;
                }
                match ended {
                    Ok(()) => {
                        report.send_modify(|served| (served.complete, served.broken) = (true, None));
                        return;
                    }
                    Err(why) => why,
                }
            }
            Ok(Err(error)) => error,
            Err(_) => LinkError::Connect(format!("no answer within {} s", DIAL_DEADLINE.as_secs())),
        };
        let why = why.to_string();
        report.send_modify(|served| {
            if served.broken.is_none() {
                tracing::warn!(why, "the connection for pages that are owed is down; connecting again");
                served.breaks += 1;
            }
            let since = served.broken.as_ref().map_or_else(Instant::now, |(_, since)| *since);
            served.broken = Some((why, since));
        });
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What was asked for and is not sent.
#[derive(Debug, Default)]
struct Asked {
    urgent: VecDeque<Want>,
    /// Ends of ranges of pages, by their address space and first page.
    ranges: BTreeMap<(u32, u64), u64>,
    /// Where the background goes on.
    cursor: (u32, u64),
}

impl Asked {
    fn add(&mut self, want: Want) {
        let end = want.page + u64::from(want.count);
        if want.urgent {
            self.take_out(want.space, want.page, end);
            self.cursor = (want.space, end);
            self.urgent.push_back(want);
        } else {
            self.ranges.insert((want.space, want.page), end);
        }
    }

    fn take_out(&mut self, space: u32, start: u64, end: u64) {
        let touched: Vec<_> = self
            .ranges
            .range((space, 0)..(space, end))
            .filter(|(_, range_end)| **range_end > start)
            .map(|((_, first), range_end)| (*first, *range_end))
            .collect();
        for (first, range_end) in touched {
            self.ranges.remove(&(space, first));
            if first < start {
                self.ranges.insert((space, first), start);
            }
            if end < range_end {
                self.ranges.insert((space, end), range_end);
            }
        }
    }

    /// The next pages of the background.
    fn next(&mut self) -> Option<Want> {
        let (space, page) = self.cursor;
        // A range that begins before the cursor ends there: it was cut when the cursor was set.
        let (first, end) = match self.ranges.range((space, page)..).next() {
            Some((first, end)) => (*first, *end),
            None => self.ranges.first_key_value().map(|(first, end)| (*first, *end))?,
        };
        self.ranges.remove(&first);
        let cut = end.min(first.1 + CHUNK);
        if cut < end {
            self.ranges.insert((first.0, cut), end);
        }
        self.cursor = (first.0, cut);
        Some(Want { space: first.0, page: first.1, count: (cut - first.1) as u16, urgent: false })
    }
}

/// How much may be on its way: twice what the link carries in one round trip.
#[derive(Debug)]
struct Window {
    bytes: usize,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    round_trip: Duration,
    /// Since when something has been on its way.
    since: Instant,
    /// For how long it has been before that, and what was delivered in all that time.
    busy: Duration,
    delivered: usize,
}

/// A frame that is not acknowledged.
#[derive(Debug, Clone, Copy)]
struct InFlight {
    sequence: u64,
    bytes: usize,
    at: Instant,
    pages: Want,
}

impl Window {
    fn new() -> Self {
        Self {
            bytes: LEAST_WINDOW,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            round_trip: Duration::MAX,
            since: Instant::now(),
            busy: Duration::ZERO,
            delivered: 0,
        }
    }

    fn sent(&mut self, sequence: u64, bytes: usize, pages: Want) {
        if self.in_flight.is_empty() {
            self.since = Instant::now();
        }
        self.in_flight.push_back(InFlight { sequence, bytes, at: Instant::now(), pages });
        self.in_flight_bytes += bytes;
    }

    /// Returns how fast the link is, when it has been measured again.
    fn acknowledged(&mut self, sequence: u64) -> Option<f64> {
        while let Some(first) = self.in_flight.front().copied().filter(|first| first.sequence <= sequence) {
            self.in_flight.pop_front();
            self.in_flight_bytes -= first.bytes;
            self.delivered += first.bytes;
            self.round_trip = self.round_trip.min(first.at.elapsed());
        }
        self.busy += self.since.elapsed();
        self.since = Instant::now();
        if self.busy < MEASURED {
            return None;
        }
        let rate = self.delivered as f64 / self.busy.as_secs_f64();
        self.bytes = ((2.0 * rate * self.round_trip.as_secs_f64()) as usize).clamp(LEAST_WINDOW, MOST_WINDOW);
        (self.busy, self.delivered) = (Duration::ZERO, 0);
        Some(rate)
    }

    /// Whether a page is on its way: it arrives before anything that is sent now.
    fn carries(&self, space: u32, page: u64) -> bool {
        let has =
            |pages: &Want| pages.space == space && (pages.page..pages.page + u64::from(pages.count)).contains(&page);
        self.in_flight.iter().any(|frame| has(&frame.pages))
    }

    fn has_room(&self) -> bool {
        self.in_flight_bytes < self.bytes
    }
}

/// One connection.
struct Sender<'a> {
    sources: &'a Sources,
    report: &'a watch::Sender<Served>,
    asked: Asked,
    window: Window,
    packing: Packing,
    pace: Option<f64>,
    sequence: u64,
}

impl<'a> Sender<'a> {
    fn new(sources: &'a Sources, may_pack: bool, report: &'a watch::Sender<Served>) -> Self {
        let (asked, window) = (Asked::default(), Window::new());
        Self { sources, report, asked, window, packing: Packing::new(may_pack), pace: None, sequence: 0 }
    }

    /// Sends until all is said to be there.
    async fn run(mut self, connection: TlsStream<TcpStream>) -> Result<(), LinkError> {
        let broken = |why: String| LinkError::Broken(why);
        let (mut reader, mut writer) = tokio::io::split(connection);
        let (answers, mut answered) = mpsc::channel(256);
        let reading = tokio::spawn(async move {
            loop {
                let answer = read_answer(&mut reader).await;
                let last = !matches!(answer, Ok(Ok(_)));
                if answers.send(answer).await.is_err() || last {
                    return;
                }
            }
        });
        let _reading = Reading(reading);
        let mut heard_at = Instant::now();
        loop {
            let has_work = !self.asked.urgent.is_empty() || (self.window.has_room() && !self.asked.ranges.is_empty());
            let late = self.window.in_flight.front().map(|first| first.at.max(heard_at) + ACK_DEADLINE);
            let answer = tokio::select! {
                biased;
                answer = answered.recv() => Some(answer),
                () = std::future::ready(()), if has_work => None,
                () = until(late) => return Err(broken(format!("no answer within {} s", ACK_DEADLINE.as_secs()))),
            };
            match answer {
                None => {
                    self.send_next(&mut writer).await?;
                }
                Some(Some(Ok(Ok(Reply::Ack(sequence))))) => {
                    // The window is kept full: what it lets through is what the link carries.
                    self.pace = self.window.acknowledged(sequence).or(self.pace);
                    heard_at = Instant::now();
                    if sequence > 0 {
                        self.report.send_modify(|served| {
                            served.acknowledged += 1;
                            served.broken = None;
                        });
                    }
                }
                Some(Some(Ok(Ok(Reply::Want(want))))) if want.urgent && self.window.carries(want.space, want.page) => {}
                Some(Some(Ok(Ok(Reply::Want(want))))) => {
                    if want.urgent && (usize::from(want.count) > MAX_PAGES || self.asked.urgent.len() > MOST_URGENT) {
                        return Err(broken("it asks for more than tasks can wait for".to_owned()));
                    }
                    self.asked.add(want);
                }
                Some(Some(Ok(Ok(Reply::Complete)))) => return Ok(()),
                Some(Some(Ok(Ok(Reply::Refused(_))))) => return Err(LinkError::Refused(String::new())),
                Some(Some(Ok(Err(reason)))) => return Err(LinkError::Refused(reason)),
                Some(Some(Err(error))) => return Err(broken(error.to_string())),
                Some(None) => return Err(broken("it was closed".to_owned())),
            }
        }
    }

    async fn send_next(&mut self, writer: &mut tokio::io::WriteHalf<TlsStream<TcpStream>>) -> Result<(), LinkError> {
        let Some(want) = self.asked.urgent.pop_front().or_else(|| self.asked.next()) else { return Ok(()) };
        let broken = |why: String| LinkError::Broken(why);
        let Some(&pid) = self.sources.get(&want.space) else {
            return Err(broken(format!("it asked for memory of task {}, which is not here", want.space)));
        };
        // Reading may have to wait for the swap.
        let frame = tokio::task::spawn_blocking(move || frame_of(pid, want)).await;
        let mut frame = frame.map_err(|error| broken(error.to_string()))?.map_err(|error| broken(error.to_string()))?;
        if let Some(packed) = self.packing.pack(&frame.payload) {
            (frame.payload, frame.packed) = (packed, true);
        }
        self.packing.note(self.pace);
        self.sequence += 1;
        let head = head_of(&frame, self.sequence);
        let bytes = head.len() + frame.payload.len();
        let write = async {
            writer.write_all(&head).await?;
            writer.write_all(&frame.payload).await?;
            writer.flush().await
        };
        let written = tokio::time::timeout(ACK_DEADLINE, write).await;
        written.map_err(|_| broken("nothing gets through".to_owned()))?.map_err(|error| broken(error.to_string()))?;
        self.window.sent(self.sequence, bytes, want);
        self.report.send_modify(|served| {
            served.pages += u64::from(want.count);
            served.urgent += if want.urgent { u64::from(want.count) } else { 0 };
            served.wire_bytes += bytes as u64;
        });
        Ok(())
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end.into()).await,
        None => std::future::pending().await,
    }
}

/// The pages, zero ones without content.
fn frame_of(pid: i32, want: Want) -> Result<Frame, PumpError> {
    let mut addresses: Vec<u64> = (0..u64::from(want.count)).map(|offset| (want.page + offset) * PAGE).collect();
    let mut payload = vec![0; addresses.len() * PAGE_BYTES];
    read(pid, &mut addresses, &mut payload, Tasks::Frozen)?;
    let mut records = Vec::new();
    let mut kept = 0;
    for (index, address) in addresses.iter().enumerate() {
        let bytes = index * PAGE_BYTES..(index + 1) * PAGE_BYTES;
        let is_zero = is_zero(&payload[bytes.clone()]);
        add(&mut records, address / PAGE, if is_zero { What::Zero } else { What::Data });
        if !is_zero {
            payload.copy_within(bytes, kept * PAGE_BYTES);
            kept += 1;
        }
    }
    payload.truncate(kept * PAGE_BYTES);
    let (raw, checksum) = (payload.len(), checksum(&encode_records(&records), &payload));
    Ok(Frame { kind: Kind::Batch, space: want.space, records, payload, raw, checksum, packed: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(page: u64, count: u16, urgent: bool) -> Want {
        Want { space: 1, page, count, urgent }
    }

    #[test]
    fn the_background_goes_on_behind_what_was_urgent() {
        let mut asked = Asked::default();
        asked.add(want(0, 100, false));
        assert_eq!(asked.next(), Some(want(0, 32, false)));
        asked.add(want(80, 4, true));
        assert_eq!(asked.urgent.pop_front(), Some(want(80, 4, true)));
        let rest: Vec<_> = std::iter::from_fn(|| asked.next()).map(|want| (want.page, want.count)).collect();
        // From there to the end, then from the beginning; what was urgent does not come twice.
        assert_eq!(rest, [(84, 16), (32, 32), (64, 16)]);
    }

    #[test]
    fn what_is_urgent_is_sent_even_if_it_was_sent() {
        let mut asked = Asked::default();
        asked.add(want(0, 10, false));
        assert_eq!(asked.next(), Some(want(0, 10, false)));
        // Asked for while it was on its way.
        asked.add(want(3, 2, true));
        assert_eq!((asked.urgent.len(), asked.next()), (1, None));
    }

    #[test]
    fn the_window_grows_with_what_the_link_carries() {
        let (mut window, mut largest) = (Window::new(), 0);
        for sequence in 1..200 {
            window.sent(sequence, 1 << 20, want(sequence, 1, false));
            assert!(window.carries(1, sequence) && !window.carries(2, sequence));
            std::thread::sleep(Duration::from_millis(1));
            window.acknowledged(sequence);
            largest = largest.max(window.bytes);
        }
        assert!(largest > 1 << 20, "{window:?}");
        assert!(window.has_room() && window.in_flight_bytes == 0);
    }
}
