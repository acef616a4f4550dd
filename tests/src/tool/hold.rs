//! Many idle TCP connections, and the echo server they are held against.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use super::pace::{RunTime, TICK};
use super::redis::is_timeout;
use super::report;
use super::sys;

/// How long one echo may take at the end: retransmission timers of a held connection may have backed off.
const ECHO_TIMEOUT: Duration = Duration::from_secs(5);
/// Errors beyond these first few say nothing new.
const REPORTED_ERRORS: usize = 5;

#[derive(Args, Debug)]
pub(crate) struct EchoOptions {
    /// The address to serve
    #[arg(long)]
    listen: SocketAddr,
    #[command(flatten)]
    run_time: RunTime,
}

#[derive(Args, Debug)]
pub(crate) struct HoldOptions {
    /// The echo server
    #[arg(long)]
    addr: SocketAddr,
    /// How many connections to hold
    #[arg(long)]
    conns: usize,
    /// Written with {connected} once all connections stand
    #[arg(long)]
    status_file: Option<PathBuf>,
    #[command(flatten)]
    run_time: RunTime,
}

/// Echoes until the run is over.
pub(crate) fn echo(options: &EchoOptions) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let listener = TcpListener::bind(options.listen).with_context(|| format!("listen on {}", options.listen))?;
    listener.set_nonblocking(true)?;
    let mut clients: Vec<TcpStream> = Vec::new();
    let mut accepted = 0_u64;
    while !deadline.is_over() {
        let ready = readable(&listener, &clients)?;
        let mut position = 0;
        clients.retain_mut(|client| {
            position += 1;
            !ready.get(position).copied().unwrap_or(false) || echo_once(client).is_ok()
        });
        if ready.first() == Some(&true) {
            while let Ok((client, _)) = listener.accept() {
                client.set_read_timeout(Some(TICK))?;
                clients.push(client);
                accepted += 1;
            }
        }
    }
    report::publish(&json!({"accepted": accepted, "open": clients.len()}), None)?;
    Ok(true)
}

/// Which of the listener and the clients, in this order, have something to read.
fn readable(listener: &TcpListener, clients: &[TcpStream]) -> anyhow::Result<Vec<bool>> {
    let fds = std::iter::once(listener.as_fd()).chain(clients.iter().map(AsFd::as_fd));
    let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    match poll(&mut fds, PollTimeout::try_from(TICK)?) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error).context("wait for clients"),
    }
    Ok(fds.iter().map(|fd| fd.any().unwrap_or(false)).collect())
}

fn echo_once(client: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    match client.read(&mut buffer) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => client.write_all(&buffer[..count]),
        Err(error) if is_timeout(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Holds the connections until SIGUSR1, the end of stdin or of the run, then checks each one; healthy means that all
/// of them still echo.
pub(crate) fn hold(options: &HoldOptions) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    sys::signal::stop_on(libc::SIGUSR1)?;
    let mut connections = Vec::with_capacity(options.conns);
    for index in 0..options.conns {
        let mut stream = TcpStream::connect(options.addr).with_context(|| format!("connection {index}"))?;
        stream.set_read_timeout(Some(ECHO_TIMEOUT))?;
        round_trip(&mut stream, index as u64).with_context(|| format!("first echo of connection {index}"))?;
        connections.push(stream);
    }
    if let Some(path) = &options.status_file {
        report::write(path, &json!({"connected": connections.len()}))?;
    }
    while !deadline.is_over() && !at_end(io::stdin().as_fd())? {}
    let mut errors = Vec::new();
    for (index, stream) in connections.iter_mut().enumerate() {
        if let Err(error) = round_trip(stream, !(index as u64)) {
            errors.push(format!("connection {index}: {error:#}"));
        }
    }
    let failed = errors.len();
    errors.truncate(REPORTED_ERRORS);
    let value = json!({
        "connections": connections.len(),
        "survived": connections.len() - failed,
        "failed": failed,
        "errors": errors,
    });
    report::publish(&value, None)?;
    Ok(failed == 0)
}

fn round_trip(stream: &mut TcpStream, word: u64) -> anyhow::Result<()> {
    stream.write_all(&word.to_le_bytes()).context("send")?;
    let mut echoed = [0; 8];
    stream.read_exact(&mut echoed).context("read the echo")?;
    if echoed != word.to_le_bytes() {
        bail!("the echo differs");
    }
    Ok(())
}

/// Waits one tick for `input` to end; what is typed into it is ignored.
fn at_end(input: BorrowedFd<'_>) -> anyhow::Result<bool> {
    let mut fds = [PollFd::new(input, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::try_from(TICK)?) {
        Ok(0) | Err(nix::errno::Errno::EINTR) => Ok(false),
        Ok(_) => Ok(nix::unistd::read(input, &mut [0; 256]).context("read stdin")? == 0),
        Err(error) => Err(error).context("wait for stdin"),
    }
}
