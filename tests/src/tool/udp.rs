//! A UDP server with a little state per client, and a client that notices when the state is gone.
//!
//! Request: client sequence (u64 LE), payload. Reply: server instance, server sequence for this client (u64 LE each),
//! the request. Datagrams may get lost; the server's sequence must not go back.

use std::collections::{HashMap, HashSet};
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::gap::{Events, GapMeter};
use super::pace::{RunTime, TICK};
use super::redis::is_timeout;
use super::report::{self, StatusFile};

/// The largest request that is echoed: below every MTU in the lab.
const MAX_DATAGRAM: usize = 1400;
/// Replies are compared with the last this many for repetitions: far more than can be in flight.
const REMEMBERED: u64 = 4096;

#[derive(Args, Debug)]
pub(crate) struct EchoOptions {
    /// The address to serve
    #[arg(long)]
    listen: SocketAddr,
    #[command(flatten)]
    run_time: RunTime,
}

#[derive(Args, Debug)]
pub(crate) struct PingOptions {
    /// The server
    #[arg(long)]
    addr: SocketAddr,
    /// Pause between two datagrams
    #[arg(long, default_value_t = 5)]
    interval_ms: u64,
    /// Rewritten every 100 ms with {sent, received}
    #[arg(long)]
    status_file: Option<PathBuf>,
    #[command(flatten)]
    events: Events,
    #[command(flatten)]
    run_time: RunTime,
}

/// Serves until the run is over.
pub(crate) fn echo(options: &EchoOptions) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let socket = UdpSocket::bind(options.listen).with_context(|| format!("listen on {}", options.listen))?;
    socket.set_read_timeout(Some(TICK))?;
    let instance = report::unix_ms();
    let mut clients: HashMap<SocketAddr, u64> = HashMap::new();
    let mut request = [0; MAX_DATAGRAM];
    while !deadline.is_over() {
        let (length, peer) = match socket.recv_from(&mut request) {
            Ok(received) => received,
            Err(error) if is_timeout(&error) => continue,
            Err(error) => return Err(error).context("receive a request"),
        };
        let sequence = clients.entry(peer).or_default();
        *sequence += 1;
        let mut reply = Vec::with_capacity(16 + length);
        reply.extend_from_slice(&instance.to_le_bytes());
        reply.extend_from_slice(&sequence.to_le_bytes());
        reply.extend_from_slice(&request[..length]);
        // A client that went away is no reason to stop serving the others.
        let _ = socket.send_to(&reply, peer);
    }
    let served: u64 = clients.values().sum();
    report::publish(&json!({"clients": clients.len(), "replies": served}), None)?;
    Ok(true)
}

/// What the replies tell about the server.
#[derive(Default)]
struct Watch {
    instance: Option<u64>,
    highest: u64,
    seen: HashSet<u64>,
    restarted: bool,
    repeated: u64,
    corrupt: u64,
}

impl Watch {
    /// Takes one reply. Reordered datagrams are no restart: only a step back beyond what was remembered is, or a
    /// new instance.
    fn take(&mut self, instance: u64, sequence: u64) {
        if self.instance.replace(instance).is_some_and(|known| known != instance) {
            self.restarted = true;
        }
        if !self.seen.insert(sequence) {
            self.repeated += 1;
        }
        if sequence + REMEMBERED < self.highest {
            self.restarted = true;
        }
        if sequence > self.highest {
            self.highest = sequence;
            let oldest = sequence.saturating_sub(REMEMBERED);
            if self.seen.len() as u64 > 2 * REMEMBERED {
                self.seen.retain(|seen| *seen >= oldest);
            }
        }
    }
}

/// Pings until the run is over; healthy means that the server kept its state and answered at all.
pub(crate) fn ping(options: &PingOptions) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let any = if options.addr.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(options.addr).with_context(|| format!("connect to {}", options.addr))?;
    let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let status = StatusFile::start(options.status_file.as_deref(), {
        let (sent, received) = (Arc::clone(&sent), Arc::clone(&received));
        move || json!({"sent": sent.load(Ordering::Relaxed), "received": received.load(Ordering::Relaxed)})
    })?;
    let interval = Duration::from_millis(options.interval_ms.max(1));
    let mut watch = Watch::default();
    let mut gap = GapMeter::new(options.events);
    let mut reply = [0; MAX_DATAGRAM];
    while !deadline.is_over() {
        let sequence = sent.fetch_add(1, Ordering::Relaxed);
        // While the server is away this may answer with an old ICMP error: a lost datagram, as any other.
        let _ = socket.send(&[sequence.to_le_bytes(), (!sequence).to_le_bytes()].concat());
        let next = Instant::now() + interval;
        loop {
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket.set_read_timeout(Some(left))?;
            let Ok(length) = socket.recv(&mut reply) else { continue };
            gap.mark();
            received.fetch_add(1, Ordering::Relaxed);
            let (words, rest) = reply[..length].as_chunks::<8>();
            match words {
                [instance, sequence, mine, inverse] if rest.is_empty() && invert(*mine) == *inverse => {
                    watch.take(u64::from_le_bytes(*instance), u64::from_le_bytes(*sequence));
                }
                _ => watch.corrupt += 1,
            }
        }
    }
    drop(status);
    gap.finish();
    let received = received.load(Ordering::Relaxed);
    let value = json!({
        "sent": sent.load(Ordering::Relaxed),
        "received": received,
        "longest_gap_ms": gap.longest_ms(),
        "gap_at_unix_ms": gap.at_unix_ms(),
        "server_restarted": watch.restarted,
        "repeated": watch.repeated,
        "corrupt": watch.corrupt,
    });
    report::publish(&value, None)?;
    Ok(received > 0 && !watch.restarted && watch.repeated == 0 && watch.corrupt == 0)
}

fn invert(bytes: [u8; 8]) -> [u8; 8] {
    bytes.map(|byte| !byte)
}

#[cfg(test)]
mod tests {
    use super::Watch;

    fn watch(replies: &[(u64, u64)]) -> (bool, u64) {
        let mut watch = Watch::default();
        for (instance, sequence) in replies {
            watch.take(*instance, *sequence);
        }
        (watch.restarted, watch.repeated)
    }

    #[test]
    fn a_server_restarts_by_instance_and_repeats_by_sequence() {
        assert_eq!(watch(&[(1, 1), (1, 3), (1, 2), (1, 9)]), (false, 0));
        assert_eq!(watch(&[(1, 1), (1, 2), (1, 2)]), (false, 1));
        assert_eq!(watch(&[(1, 5), (2, 6)]), (true, 0));
        assert_eq!(watch(&[(1, 9000), (1, 1)]), (true, 0));
    }
}
