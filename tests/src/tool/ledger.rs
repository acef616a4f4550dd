//! A ledger that shows whether a container ran once, and only once.
//!
//! The container counts: each count goes over one TCP connection to a server, which appends it to a file, makes that
//! durable, and answers; then comes the next. A count that is missing or comes again shows a container that was set back. That alone
//! would not show two copies that run at once: they share the connection, and the server's kernel drops what it has seen before. So the
//! container also sends a *beat* every 5 ms, a number and a random word, in datagrams: two copies agree on the number and not on the
//! word.
//!
//! A line of the file: `epoch host count`. The host is what the container reads, each time anew, from a file that is each
//! host's own; the epoch is what the server is told by another file.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::pace::RunTime;
use super::report::{self, StatusFile};

/// Between two beats.
const BEAT: Duration = Duration::from_millis(5);
/// Between an answer and the next count.
const PAUSE: Duration = Duration::from_millis(2);
/// Bytes of a host's name in a record.
const HOST: usize = 16;

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Count, in a container
    Run(RunOptions),
    /// Keep the ledger
    Serve(ServeOptions),
}

#[derive(Args, Debug)]
pub(crate) struct RunOptions {
    /// The server
    #[arg(long)]
    to: SocketAddr,
    /// A file that says which host this is
    #[arg(long)]
    host_file: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct ServeOptions {
    /// The address to serve, TCP and UDP
    #[arg(long)]
    listen: SocketAddr,
    /// The ledger
    #[arg(long)]
    file: PathBuf,
    /// A file with the epoch's number
    #[arg(long)]
    epoch_file: PathBuf,
    /// Rewritten every 100 ms with {counts, doubled, lost, repeated, host}
    #[arg(long)]
    status_file: Option<PathBuf>,
    #[command(flatten)]
    run_time: RunTime,
}

pub(crate) fn run(command: &Command) -> anyhow::Result<bool> {
    match command {
        Command::Run(options) => count(options),
        Command::Serve(options) => serve(options),
    }
}

fn count(options: &RunOptions) -> anyhow::Result<bool> {
    let mut server = TcpStream::connect(options.to).with_context(|| format!("connect to {}", options.to))?;
    server.set_nodelay(true)?;
    let beats = UdpSocket::bind("0.0.0.0:0")?;
    beats.connect(options.to)?;
    thread::spawn(move || beat(&beats));
    for number in 1u64.. {
        let name = std::fs::read(&options.host_file).with_context(|| format!("{}", options.host_file.display()))?;
        let mut host = [0; HOST];
        host.iter_mut().zip(name.trim_ascii()).for_each(|(to, from)| *to = *from);
        server.write_all(&[number.to_le_bytes().as_slice(), &host].concat())?;
        let mut answer = [0; 8];
        server.read_exact(&mut answer)?;
        if u64::from_le_bytes(answer) != number {
            bail!("count {number} was answered with {}", u64::from_le_bytes(answer));
        }
        thread::sleep(PAUSE);
    }
    Ok(true)
}

fn beat(to: &UdpSocket) {
    for number in 1u64.. {
        let mut word = [0; 8];
        // From the kernel, at that moment: what is kept in memory, both copies would have.
        if File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut word)).is_err() {
            eprintln!("no random words: no beats");
            return;
        }
        // A network that is cut, or no server yet, is no reason to stop.
        let _ = to.send(&[number.to_le_bytes(), word].concat());
        thread::sleep(BEAT);
    }
}

/// What the server concludes.
#[derive(Default)]
struct Ledger {
    counts: u64,
    lost: u64,
    repeated: u64,
    connections: u64,
    host: String,
    beats: HashMap<u64, u64>,
    doubled: u64,
}

impl Ledger {
    fn count(&mut self, number: u64) {
        if number <= self.counts {
            self.repeated += 1;
        } else {
            self.lost += number - self.counts - 1;
            self.counts = number;
        }
    }

    fn beat(&mut self, number: u64, word: u64) {
        self.doubled += u64::from(*self.beats.entry(number).or_insert(word) != word);
    }

    fn report(&self) -> Value {
        json!({
            "counts": self.counts,
            "lost": self.lost,
            "repeated": self.repeated,
            "connections": self.connections,
            "host": self.host,
            "beats": self.beats.len(),
            "doubled": self.doubled,
        })
    }
}

fn serve(options: &ServeOptions) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let listener = TcpListener::bind(options.listen).with_context(|| format!("listen on {}", options.listen))?;
    let beats = UdpSocket::bind(options.listen)?;
    beats.set_read_timeout(Some(Duration::from_millis(50)))?;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let lock = |ledger: &Arc<Mutex<Ledger>>| ledger.lock().unwrap_or_else(PoisonError::into_inner).report();
    let status = StatusFile::start(options.status_file.as_deref(), {
        let ledger = ledger.clone();
        move || lock(&ledger)
    })?;
    let (file, epoch_file, taken) = (options.file.clone(), options.epoch_file.clone(), ledger.clone());
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            if let Err(error) = keep(connection, &file, &epoch_file, &taken) {
                eprintln!("the connection ended: {error:#}");
            }
        }
    });
    while !deadline.is_over() {
        let mut datagram = [0; 16];
        if let Ok(16) = beats.recv(&mut datagram) {
            let (number, word) = datagram.split_at(8);
            let word_of = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            ledger.lock().unwrap_or_else(PoisonError::into_inner).beat(word_of(number), word_of(word));
        }
    }
    drop(status);
    let value = lock(&ledger);
    report::publish(&value, None)?;
    Ok(value["lost"] == 0 && value["repeated"] == 0 && value["doubled"] == 0)
}

/// Takes the counts of one connection.
fn keep(mut connection: TcpStream, file: &PathBuf, epoch_file: &PathBuf, ledger: &Mutex<Ledger>) -> anyhow::Result<()> {
    let lock = || ledger.lock().unwrap_or_else(PoisonError::into_inner);
    connection.set_nodelay(true)?;
    // Only who counts is counted: others ask whether anybody listens.
    if connection.peek(&mut [0])? == 0 {
        return Ok(());
    }
    lock().connections += 1;
    let mut file = OpenOptions::new().create(true).append(true).open(file).context("open the ledger")?;
    let mut record = [0; 8 + HOST];
    loop {
        connection.read_exact(&mut record)?;
        let (number, host) = record.split_at(8);
        let number = u64::from_le_bytes(number.try_into()?);
        let host = String::from_utf8_lossy(host).trim_end_matches('\0').to_owned();
        let epoch = std::fs::read_to_string(epoch_file).unwrap_or_default();
        writeln!(file, "{} {host} {number}", epoch.trim())?;
        file.sync_data()?;
        {
            let mut ledger = lock();
            ledger.count(number);
            ledger.host = host;
        }
        connection.write_all(&number.to_le_bytes())?;
    }
}

#[cfg(test)]
mod tests {
    use super::Ledger;

    #[test]
    fn what_is_missing_or_comes_again_is_counted() {
        let mut ledger = Ledger::default();
        [1, 2, 3].into_iter().for_each(|number| ledger.count(number));
        assert_eq!((ledger.lost, ledger.repeated), (0, 0));
        ledger.count(6);
        ledger.count(4);
        assert_eq!((ledger.counts, ledger.lost, ledger.repeated), (6, 2, 1));
    }

    #[test]
    fn two_copies_differ_in_a_word() {
        let mut ledger = Ledger::default();
        ledger.beat(1, 7);
        ledger.beat(3, 9);
        // The network may repeat a datagram.
        ledger.beat(3, 9);
        assert_eq!(ledger.doubled, 0);
        ledger.beat(3, 8);
        assert_eq!(ledger.doubled, 1);
    }
}
