//! Waits for a server to accept connections.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::report;

/// Pause between two attempts: a refused connection answers at once, so this bounds the load, not the delay.
const RETRY: Duration = Duration::from_millis(20);
/// A port whose packets vanish must not take the whole budget in one attempt.
const ATTEMPT: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The address to connect to
    addr: SocketAddr,
    /// Give up after this many seconds
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
}

/// Returns whether the port accepted a connection in time.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let started = Instant::now();
    let budget = Duration::from_secs_f64(options.seconds);
    let mut last_error = None;
    while started.elapsed() < budget {
        match TcpStream::connect_timeout(&options.addr, ATTEMPT) {
            Ok(_) => {
                last_error = None;
                break;
            }
            Err(error) => last_error = Some(error.to_string()),
        }
        std::thread::sleep(RETRY);
    }
    let waited_ms = started.elapsed().as_millis() as u64;
    let open = last_error.is_none();
    report::publish(&json!({"open": open, "waited_ms": waited_ms, "error": last_error}), None)?;
    Ok(open)
}
