//! Two verified byte streams over one TCP connection, one each way.
//!
//! A stream is u64 counters, little endian, from 0. `FAREWELL` ends it, so that a FIN which a killed process or a
//! host sent for it is told apart from a peer that stopped on purpose.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::{Value, json};

use super::gap::{Events, GapMeter};
use super::pace::{Deadline, RunTime, TICK};
use super::redis::is_timeout;
use super::report::{self, StatusFile};

/// The last word of a stream that ended on purpose.
const FAREWELL: u64 = u64::MAX;
/// Pause between two chunks: 100 small writes a second keep the stream moving without a flood.
const CHUNK_INTERVAL: Duration = Duration::from_millis(10);
/// How long a side that said farewell waits for the other's: longer than any downtime the lab accepts.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
pub(crate) struct SinkOptions {
    /// Where to accept the one connection
    #[arg(long)]
    listen: SocketAddr,
    #[command(flatten)]
    common: CommonOptions,
}

#[derive(Args, Debug)]
pub(crate) struct SourceOptions {
    /// The address of the sink
    #[arg(long)]
    connect: SocketAddr,
    #[command(flatten)]
    common: CommonOptions,
}

#[derive(Args, Debug)]
struct CommonOptions {
    /// Bytes a second this side writes
    #[arg(long, default_value_t = 1 << 20)]
    rate: u64,
    /// Also write the final report to this file
    #[arg(long)]
    report: Option<PathBuf>,
    /// Rewritten every 100 ms with {bytes_in, bytes_out, last_received_unix_ms}
    #[arg(long)]
    status_file: Option<PathBuf>,
    #[command(flatten)]
    events: Events,
    #[command(flatten)]
    run_time: RunTime,
}

/// Accepts one connection and exchanges streams on it.
pub(crate) fn sink(options: &SinkOptions) -> anyhow::Result<bool> {
    let deadline = options.common.run_time.start()?;
    let listener = TcpListener::bind(options.listen).with_context(|| format!("listen on {}", options.listen))?;
    listener.set_nonblocking(true)?;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if is_timeout(&error) && !deadline.is_over() => thread::sleep(CHUNK_INTERVAL),
            Err(error) => return Err(error).context("accept the source"),
        }
    };
    drop(listener);
    stream.set_nonblocking(false)?;
    exchange(stream, &options.common, deadline)
}

/// Connects to the sink and exchanges streams with it.
pub(crate) fn source(options: &SourceOptions) -> anyhow::Result<bool> {
    let deadline = options.common.run_time.start()?;
    let stream = TcpStream::connect(options.connect).with_context(|| format!("connect to {}", options.connect))?;
    exchange(stream, &options.common, deadline)
}

#[derive(Default)]
struct Counters {
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    corrupt: AtomicU64,
    last_received_unix_ms: AtomicU64,
    finished: AtomicBool,
    error: Mutex<Option<String>>,
}

impl Counters {
    fn snapshot(&self) -> Value {
        json!({
            "bytes_in": self.bytes_in.load(Ordering::Relaxed),
            "bytes_out": self.bytes_out.load(Ordering::Relaxed),
            "last_received_unix_ms": self.last_received_unix_ms.load(Ordering::Relaxed),
        })
    }

    /// Keeps the first error: later ones follow from it.
    fn fail(&self, error: &anyhow::Error) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| format!("{error:#}"));
        self.finished.store(true, Ordering::Relaxed);
    }
}

fn exchange(stream: TcpStream, options: &CommonOptions, deadline: Deadline) -> anyhow::Result<bool> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(TICK))?;
    let counters = Arc::new(Counters::default());
    let status = status_file(options.status_file.as_deref(), &counters)?;
    let writer = thread::Builder::new().name("stream-out".into()).spawn({
        let (stream, counters, rate) = (stream.try_clone()?, Arc::clone(&counters), options.rate);
        move || {
            if let Err(error) = write_stream(stream, rate, deadline, &counters) {
                counters.fail(&error);
            }
        }
    })?;
    let mut gap = GapMeter::new(options.events);
    if let Err(error) = read_stream(stream, deadline, &counters, &mut gap) {
        counters.fail(&error);
    }
    counters.finished.store(true, Ordering::Relaxed);
    writer.join().map_err(|_| anyhow!("the writing thread panicked"))?;
    drop(status);
    finish(&counters, &gap, options.report.as_deref())
}

fn finish(counters: &Counters, gap: &GapMeter, path: Option<&Path>) -> anyhow::Result<bool> {
    let error = counters.error.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let corrupt = counters.corrupt.load(Ordering::Relaxed);
    let healthy = error.is_none() && corrupt == 0;
    let value = json!({
        "bytes_in": counters.bytes_in.load(Ordering::Relaxed),
        "bytes_out": counters.bytes_out.load(Ordering::Relaxed),
        "corrupt": corrupt,
        "connection_survived": error.is_none(),
        "error": error,
        "longest_gap_ms": gap.longest_ms(),
        "gap_at_unix_ms": gap.at_unix_ms(),
    });
    report::publish(&value, path)?;
    Ok(healthy)
}

fn status_file(path: Option<&Path>, counters: &Arc<Counters>) -> anyhow::Result<StatusFile> {
    let counters = Arc::clone(counters);
    StatusFile::start(path, move || counters.snapshot())
}

/// Writes chunks until the run is over or the other side is done, then the farewell.
fn write_stream(mut stream: TcpStream, rate: u64, deadline: Deadline, counters: &Counters) -> anyhow::Result<()> {
    let words = (rate / 8 * CHUNK_INTERVAL.as_millis() as u64 / 1000).max(1);
    let mut next = 0_u64;
    while !deadline.is_over() && !counters.finished.load(Ordering::Relaxed) {
        let chunk: Vec<u8> = (next..next + words).flat_map(u64::to_le_bytes).collect();
        next += words;
        write_all(&mut stream, &chunk, counters)?;
        thread::sleep(CHUNK_INTERVAL);
    }
    if counters.error.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
        write_all(&mut stream, &FAREWELL.to_le_bytes(), counters)?;
    }
    stream.shutdown(Shutdown::Write).or_else(|error| match error.kind() {
        // The peer said farewell and closed before us.
        io::ErrorKind::NotConnected => Ok(()),
        _ => Err(error).context("end the stream"),
    })
}

/// `write_all` that survives write timeouts, which a full window during the downtime causes.
fn write_all(stream: &mut TcpStream, mut bytes: &[u8], counters: &Counters) -> anyhow::Result<()> {
    let mut stuck_since = None;
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(count) => {
                stuck_since = None;
                bytes = &bytes[count..];
                counters.bytes_out.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if is_timeout(&error) => {
                let stuck = stuck_since.get_or_insert_with(Instant::now).elapsed();
                if counters.finished.load(Ordering::Relaxed) && stuck > FAREWELL_TIMEOUT {
                    bail!("the peer takes no more data");
                }
            }
            Err(error) => return Err(error).context("write to the stream"),
        }
    }
    Ok(())
}

/// Verifies the peer's stream up to its farewell.
fn read_stream(
    mut stream: TcpStream,
    deadline: Deadline,
    counters: &Counters,
    gap: &mut GapMeter,
) -> anyhow::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut pending = 0;
    let mut expected = 0_u64;
    let mut over_since = None;
    gap.mark();
    loop {
        match stream.read(&mut buffer[pending..]) {
            Ok(0) => bail!("the peer's end of the connection was closed without a farewell"),
            Ok(count) => {
                gap.mark();
                counters.bytes_in.fetch_add(count as u64, Ordering::Relaxed);
                counters.last_received_unix_ms.store(report::unix_ms(), Ordering::Relaxed);
                pending += count;
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error).context("read from the stream"),
        }
        let (words, _) = buffer[..pending].as_chunks::<8>();
        for word in words {
            let got = u64::from_le_bytes(*word);
            if got == FAREWELL {
                return Ok(());
            }
            if got != expected {
                counters.corrupt.fetch_add(1, Ordering::Relaxed);
            }
            expected = got.wrapping_add(1);
        }
        let used = words.len() * 8;
        buffer.copy_within(used..pending, 0);
        pending -= used;
        if deadline.is_over() && over_since.get_or_insert_with(Instant::now).elapsed() > FAREWELL_TIMEOUT {
            gap.finish();
            bail!("no farewell from the peer within {} s", FAREWELL_TIMEOUT.as_secs());
        }
    }
}
