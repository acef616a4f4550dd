//! The line protocol between a workload that verifies itself and a test: `check\n` → one line of JSON.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use super::report;

/// A verification takes at most 2 s by contract; the rest is for a machine under load.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// A client has this long to send its request: requests are one line, sent at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Failures kept between two requests; more of them say nothing new.
const MAX_FAILURES: usize = 50;

/// Failures found so far, each once, by name and message.
#[derive(Default)]
pub(crate) struct Failures(Vec<String>);

impl Failures {
    /// Keeps a failure and prints it on stderr, unless it is known or there are enough.
    pub(crate) fn add(&mut self, failure: String) {
        if self.0.len() < MAX_FAILURES && !self.0.contains(&failure) {
            eprintln!("{}: {failure}", report::unix_ms());
            self.0.push(failure);
        }
    }

    /// All failures so far.
    pub(crate) fn all(&self) -> &[String] {
        &self.0
    }
}

/// Answers `check` requests.
pub(crate) struct Server {
    listener: TcpListener,
}

impl Server {
    /// Listens on `addr`.
    pub(crate) fn bind(addr: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(addr).with_context(|| format!("listen on {addr}"))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener })
    }

    /// Waits for clients at most `wait` and answers them with what `verify` returns. A client's misbehaviour is the
    /// client's problem.
    pub(crate) fn serve(&self, wait: Duration, mut verify: impl FnMut() -> Value) -> anyhow::Result<()> {
        let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(wait)?) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error).context("wait for a check request"),
        }
        while let Ok((stream, _)) = self.listener.accept() {
            if let Err(error) = answer(stream, &mut verify) {
                eprintln!("check request: {error:#}");
            }
        }
        Ok(())
    }
}

fn answer(stream: TcpStream, verify: &mut impl FnMut() -> Value) -> anyhow::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        if line.trim() != "check" {
            bail!("unknown request {line:?}");
        }
        line.clear();
        let reply = verify();
        writeln!(reader.get_mut(), "{reply}")?;
    }
    Ok(())
}

#[derive(Args, Debug)]
pub(crate) struct QueryOptions {
    /// The workload's --listen address
    #[arg(long)]
    addr: SocketAddr,
}

/// Asks a workload to verify itself and prints the reply; healthy is what the workload says.
pub(crate) fn query(options: &QueryOptions) -> anyhow::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&options.addr, REPLY_TIMEOUT)
        .with_context(|| format!("connect to the workload at {}", options.addr))?;
    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
    stream.write_all(b"check\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("read the verdict")?;
    let verdict: Value = serde_json::from_str(&line).with_context(|| format!("not a verdict: {line:?}"))?;
    println!("{verdict}");
    Ok(verdict["ok"] == true)
}
