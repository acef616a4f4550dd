//! A server that forks its workers once its memory is filled: they share it copy-on-write.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::check::Server;
use super::idle::xorshift;
use super::sys;
use super::sys::mem::{PAGE_WORDS, Region, Sharing};

/// Each worker, and the server, has one of so many pages for itself.
const OWN: usize = 101;
/// The next page that a worker gives up, one after the other, from so many after its first own one on.
const GIVEN_UP: usize = 50;
/// How long a worker waits for a request until it gives up another page: some seconds for all of 64 MiB.
const PAUSE: Duration = Duration::from_millis(40);
/// How often it is looked for a request to stop.
const TICK: Duration = Duration::from_millis(100);

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// How much to fill
    #[arg(long)]
    mib: usize,
    /// Workers to fork
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Where to answer `check` requests
    #[arg(long)]
    listen: SocketAddr,
}

/// What a page holds: the server's word, or that of a worker that wrote it later.
fn fill(page: &mut [u64], number: usize, writer: usize) {
    let mut state = seed(number, writer);
    page.fill_with(|| {
        state = xorshift(state);
        state
    });
}

fn is_right(page: &[u64], number: usize, writer: usize) -> bool {
    let mut state = seed(number, writer);
    page.iter().all(|word| {
        state = xorshift(state);
        *word == state
    })
}

fn seed(number: usize, writer: usize) -> u64 {
    (number as u64 + 1) << 8 | writer as u64
}

/// Writes the pages that are one process's own, by its number: the server's is 0.
fn write_own(memory: &mut Region, writer: usize) {
    for (number, page) in memory.words_mut().chunks_mut(PAGE_WORDS).enumerate().skip(writer).step_by(OWN) {
        fill(page, number, writer + 1);
    }
}

/// Pages that do not hold what they should, in the process with this number, which has given up so many.
fn wrong(memory: &mut Region, writer: usize, given_up: usize) -> usize {
    let pages = memory.words_mut().chunks_mut(PAGE_WORDS).enumerate();
    let is_wrong = |(number, page): &(usize, &mut [u64])| {
        if number % OWN == writer + GIVEN_UP && number / OWN < given_up {
            return page.iter().any(|word| *word != 0);
        }
        !is_right(page, *number, if number % OWN == writer { writer + 1 } else { 0 })
    };
    pages.filter(is_wrong).count()
}

/// Verifies when it is asked, and gives up a page when it is not, until the server ends.
fn work(memory: &mut Region, writer: usize, server: &mut UnixStream) -> std::io::Result<()> {
    let pages = memory.words_mut().len() / PAGE_WORDS;
    let mut given_up = 0;
    write_own(memory, writer);
    server.set_read_timeout(Some(PAUSE))?;
    loop {
        match server.read(&mut [0]) {
            Ok(0) => return Ok(()),
            Ok(_) => server.write_all(&(wrong(memory, writer, given_up) as u64).to_le_bytes())?,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                let page = given_up * OWN + writer + GIVEN_UP;
                if page < pages {
                    memory.discard_page(page)?;
                    given_up += 1;
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Fills, forks, and verifies in every process when it is asked to.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let mut memory = Region::anonymous(options.mib << 20, Sharing::Private)?;
    memory.words_mut().chunks_mut(PAGE_WORDS).enumerate().for_each(|(number, page)| fill(page, number, 0));
    let mut workers = Vec::new();
    for writer in 1..=options.workers {
        let (ours, mut theirs) = UnixStream::pair()?;
        sys::process::fork(|| i32::from(work(&mut memory, writer, &mut theirs).is_err()))?;
        workers.push(ours);
    }
    write_own(&mut memory, 0);
    sys::signal::stop_on_terminate()?;
    let server = Server::bind(options.listen)?;
    println!("ready");
    while !sys::signal::stop_requested() {
        server.serve(TICK, || {
            let mut failures = Vec::new();
            for (index, worker) in workers.iter_mut().enumerate() {
                let mut answer = [0; 8];
                let asked = worker.write_all(b"?").and_then(|()| worker.read_exact(&mut answer));
                match asked.map(|()| u64::from_le_bytes(answer)) {
                    Ok(0) => {}
                    Ok(wrong) => failures.push(format!("worker {}: {wrong} pages are wrong", index + 1)),
                    Err(error) => failures.push(format!("worker {}: {error}", index + 1)),
                }
            }
            match wrong(&mut memory, 0, 0) {
                0 => {}
                wrong => failures.push(format!("server: {wrong} pages are wrong")),
            }
            json!({"ok": failures.is_empty(), "failures": failures})
        })?;
    }
    Ok(true)
}
