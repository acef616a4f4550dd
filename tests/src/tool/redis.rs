//! A redis client that never reconnects: INCR shows lost or repeated commands, PING only the gap.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};

use super::gap::{Events, GapMeter};
use super::histogram::Histogram;
use super::pace::{Deadline, RunTime, TICK};
use super::report::{self, StatusFile};

/// How long an outstanding reply is awaited after the run is over: longer than any downtime the lab accepts.
const LAST_REPLY_GRACE: Duration = Duration::from_secs(5);
/// Connecting is not what is measured; a server that needs longer than this is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The redis server
    #[arg(long)]
    addr: SocketAddr,
    /// The key to increment; nobody else may touch it
    #[arg(long, default_value = "longhaul")]
    key: String,
    /// Send PING instead of INCR
    #[arg(long)]
    ping: bool,
    /// Pause between a reply and the next command
    #[arg(long, default_value_t = 0)]
    interval_us: u64,
    /// Rewritten every 100 ms with {operations, last_reply_unix_ms}
    #[arg(long)]
    status_file: Option<PathBuf>,
    #[command(flatten)]
    events: Events,
    #[command(flatten)]
    run_time: RunTime,
}

#[derive(Args, Debug)]
pub(crate) struct ProbeOptions {
    /// The redis server
    #[arg(long)]
    addr: SocketAddr,
    /// Pause between a reply and the next PING
    #[arg(long, default_value_t = 1)]
    interval_ms: u64,
    /// Rewritten every 100 ms with {operations, last_reply_unix_ms}
    #[arg(long)]
    status_file: Option<PathBuf>,
    #[command(flatten)]
    events: Events,
    #[command(flatten)]
    run_time: RunTime,
}

impl From<ProbeOptions> for Options {
    fn from(probe: ProbeOptions) -> Self {
        Self {
            addr: probe.addr,
            key: String::new(),
            ping: true,
            interval_us: probe.interval_ms * 1000,
            status_file: probe.status_file,
            events: probe.events,
            run_time: probe.run_time,
        }
    }
}

/// Runs the client and reports; healthy means that no command was lost or repeated and the connection survived.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let progress = Arc::new(Progress::default());
    let status = StatusFile::start(options.status_file.as_deref(), {
        let progress = Arc::clone(&progress);
        move || progress.snapshot()
    })?;
    let stream = TcpStream::connect_timeout(&options.addr, CONNECT_TIMEOUT)
        .with_context(|| format!("connect to {}", options.addr))?;
    let mut client = Client::new(stream, options, progress)?;
    let error = client.operate(deadline, Duration::from_micros(options.interval_us)).err();
    drop(status);
    client.gap.finish();
    let healthy = error.is_none() && client.order.lost == 0 && client.order.repeated == 0;
    report::publish(&client.report(error.map(|error| format!("{error:#}")).as_deref()), None)?;
    Ok(healthy)
}

#[derive(Default)]
struct Progress {
    operations: AtomicU64,
    last_reply_unix_ms: AtomicU64,
}

impl Progress {
    fn snapshot(&self) -> Value {
        json!({
            "operations": self.operations.load(Ordering::Relaxed),
            "last_reply_unix_ms": self.last_reply_unix_ms.load(Ordering::Relaxed),
        })
    }
}

/// What the values of INCR tell about the commands.
#[derive(Default)]
struct Order {
    last: Option<i64>,
    lost: u64,
    repeated: u64,
}

impl Order {
    /// A value that skips says that a command was executed without our seeing its reply; one that does not grow
    /// says that the server forgot a command it had answered.
    fn take(&mut self, value: i64) {
        if let Some(last) = self.last.replace(value) {
            if value <= last {
                self.repeated += 1;
            } else {
                self.lost += (value - last - 1).unsigned_abs();
            }
        }
    }
}

struct Client {
    stream: TcpStream,
    command: Vec<u8>,
    ping: bool,
    received: Vec<u8>,
    order: Order,
    gap: GapMeter,
    latency: Histogram,
    progress: Arc<Progress>,
}

impl Client {
    fn new(stream: TcpStream, options: &Options, progress: Arc<Progress>) -> anyhow::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        let command = if options.ping {
            b"*1\r\n$4\r\nPING\r\n".to_vec()
        } else {
            format!("*2\r\n$4\r\nINCR\r\n${}\r\n{}\r\n", options.key.len(), options.key).into_bytes()
        };
        Ok(Self {
            stream,
            command,
            ping: options.ping,
            received: Vec::new(),
            order: Order::default(),
            gap: GapMeter::new(options.events),
            latency: Histogram::default(),
            progress,
        })
    }

    fn operate(&mut self, deadline: Deadline, pause: Duration) -> anyhow::Result<()> {
        self.gap.mark();
        while !deadline.is_over() {
            let sent = Instant::now();
            self.stream.write_all(&self.command).context("send a command")?;
            let reply = self.read_line(deadline)?;
            self.accept(&reply)?;
            self.gap.mark();
            self.latency.record(sent.elapsed().as_micros() as u64);
            self.progress.operations.fetch_add(1, Ordering::Relaxed);
            self.progress.last_reply_unix_ms.store(report::unix_ms(), Ordering::Relaxed);
            if !pause.is_zero() {
                deadline.sleep(pause);
            }
        }
        Ok(())
    }

    fn accept(&mut self, reply: &str) -> anyhow::Result<()> {
        if self.ping {
            if reply != "+PONG" {
                bail!("PING was answered by {reply:?}");
            }
            return Ok(());
        }
        let Some(value) = reply.strip_prefix(':').and_then(|digits| digits.parse().ok()) else {
            bail!("INCR was answered by {reply:?}");
        };
        self.order.take(value);
        Ok(())
    }

    fn read_line(&mut self, deadline: Deadline) -> anyhow::Result<String> {
        let mut over_since = None;
        let mut chunk = [0; 512];
        loop {
            if let Some(end) = self.received.windows(2).position(|pair| pair == b"\r\n") {
                let line = String::from_utf8_lossy(&self.received[..end]).into_owned();
                self.received.drain(..end + 2);
                return Ok(line);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("the server closed the connection"),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error).context("read a reply"),
            }
            if deadline.is_over() && over_since.get_or_insert_with(Instant::now).elapsed() > LAST_REPLY_GRACE {
                bail!("a command is still unanswered {} s after the end of the run", LAST_REPLY_GRACE.as_secs());
            }
        }
    }

    fn report(&self, error: Option<&str>) -> Value {
        json!({
            "operations": self.progress.operations.load(Ordering::Relaxed),
            "lost": self.order.lost,
            "repeated": self.order.repeated,
            "connections": 1,
            "connection_survived": error.is_none(),
            "error": error,
            "longest_gap_ms": self.gap.longest_ms(),
            "gap_at_unix_ms": self.gap.at_unix_ms(),
            "p50_us": self.latency.permille(500),
            "p99_us": self.latency.permille(990),
            "p999_us": self.latency.permille(999),
        })
    }
}

/// Whether a read only ended because of its timeout, or of a signal.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::Order;

    #[test]
    fn skipped_values_are_lost_and_old_values_are_repeated() {
        let mut order = Order::default();
        for value in [7, 8, 11, 11, 12] {
            order.take(value);
        }
        assert_eq!((order.lost, order.repeated), (2, 1));
    }
}
