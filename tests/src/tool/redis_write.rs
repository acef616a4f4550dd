//! Writes to random keys of a redis at a fixed rate: each write dirties a page.

use std::io::{BufReader, BufWriter, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use super::pace::RunTime;
use super::{idle, report};

/// Writes are sent in batches this long: short against any downtime, long against a system call.
const BATCH: Duration = Duration::from_millis(5);

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The redis server
    #[arg(long)]
    addr: SocketAddr,
    /// Writes a second
    #[arg(long)]
    rate: u64,
    /// Keys, as `DEBUG POPULATE` names them: key:0, key:1, …
    #[arg(long)]
    keys: u64,
    #[command(flatten)]
    run_time: RunTime,
}

/// Writes until told to end, and reports the rate that was reached.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let stream = TcpStream::connect(options.addr).with_context(|| format!("connect to {}", options.addr))?;
    stream.set_nodelay(true)?;
    let mut replies = BufReader::new(stream.try_clone()?);
    let mut requests = BufWriter::new(stream);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let start = Instant::now();
    let mut written = 0;
    while !deadline.is_over() {
        let due = (start.elapsed().as_secs_f64() * options.rate as f64) as u64;
        // After a pause the missed writes are not made up for: that would be a burst no client sends.
        let count = (due - written.min(due)).min(options.rate / 50);
        written = due.max(written);
        for _ in 0..count {
            state = idle::xorshift(state);
            let key = format!("key:{}", state % options.keys);
            let offset = (state >> 40) % 512;
            let offset = offset.to_string();
            write!(
                requests,
                "*4\r\n$8\r\nSETRANGE\r\n${}\r\n{key}\r\n${}\r\n{offset}\r\n$8\r\n{:08x}\r\n",
                key.len(),
                offset.len(),
                state >> 32
            )?;
        }
        requests.flush()?;
        for _ in 0..count {
            read_integer(&mut replies)?;
        }
        deadline.sleep(BATCH);
    }
    let rate = written as f64 / start.elapsed().as_secs_f64();
    report::publish(&json!({ "writes": written, "writes_per_s": rate }), None)?;
    Ok(true)
}

fn read_integer(replies: &mut impl Read) -> anyhow::Result<()> {
    let mut byte = [0];
    replies.read_exact(&mut byte)?;
    if byte[0] != b':' {
        bail!("redis answered with {:?}", char::from(byte[0]));
    }
    while byte[0] != b'\n' {
        replies.read_exact(&mut byte)?;
    }
    Ok(())
}
