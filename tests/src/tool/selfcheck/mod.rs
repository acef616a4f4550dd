//! A workload that holds kernel objects of all kinds and verifies all of them, again and again.
//!
//! Every check compares with what was set up before, then changes the content to a next generation, so that a stale copy
//! is noticed as well as a lost one. A failure is kept for ever: one in the background fails the next `check` too.
//!
//! Not included, because CRIU 4.2.1 is known not to take it: io_uring, userfaultfd, MPTCP, SCTP, vsock, raw and packet
//! sockets with data, fds in flight over seqpacket sockets, unread inotify events ("inotify events will be dropped"),
//! unread UDP datagrams, aio with requests in flight, leases with a break pending, semaphore undo lists, perf and bpf
//! descriptors, pidfds of foreign processes, timer slack, CPU affinity, I/O priorities. Unix connections in a backlog
//! and closed ones there: see [`sockets::named_server`].
//!
//! Included, but only with `--with`: see [`LOST_BY_CRIU`]. What needs something of the host or of CRIU's options:
//!
//! - `worker-user`: CAP_SYS_RESOURCE for CRIU, else "Can't get rlimit 0: Operation not permitted" (prlimit across users);
//! - `sysv`: an IPC namespace of the container's own, else "Task 33 with SysVIPC shmem map doesn't live in IPC ns";
//! - `tcp-loopback`: `--tcp-established`; `session-locks`: `--file-locks`; `unlinked-4m`: `--ghost-limit` above 4 MiB
//!   (CRIU's default is 1 MiB); `link-remap`: `--link-remap`.

mod events;
mod files;
mod identity;
mod locks;
mod memory;
mod pattern;
mod pipes;
mod shared;
mod signals;
mod sockets;
mod suite;
mod threads;
mod timers;
mod tree;
mod worker;

use std::cell::Cell;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use nix::sys::socket::SockType;
use serde_json::{Value, json};

use self::shared::{Shared, Side};
use self::suite::Suite;
use self::worker::Worker;
use super::check::{self, Failures, Server};
use super::{report, sys};

/// Checks of what CRIU 4.2.1 loses, seen by these very checks; left out without `--with`.
///
/// - `eventfd-semaphore`: the mode is gone ("one unit is 7, it was 1"); CRIU takes the flags from `F_GETFL` only;
/// - `timerfd-periodic`: comes back disarmed if it expired before the dump came to it, so nearly always if its period is
///   shorter than the freeze; the restore log says `ticks 1 it_value(0, 0) it_interval(0, 50000000)`;
/// - `personality`: dumped, not restored; `core-filter`: not dumped;
/// - `inotify-dir`: on overlayfs the file's handle cannot be opened ("Handle 0x56:0x1a cannot be opened", "Can't dump
///   that handle"); with `--irmap-scan-path` CRIU compares the overlay's inode numbers with those of other layers and
///   silently watches another file. On other file systems it works.
const LOST_BY_CRIU: [&str; 5] = ["eventfd-semaphore", "timerfd-periodic", "personality", "core-filter", "inotify-dir"];

/// Pause between two verifications in the background.
const ROUND_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Set everything up and verify it until SIGTERM
    Run(RunOptions),
    /// Ask a running self-check to verify itself; exits 1 if anything is wrong
    Query(check::QueryOptions),
}

#[derive(Args, Debug)]
pub(crate) struct RunOptions {
    /// A directory for files, sockets and FIFOs; its own subdirectory `selfcheck` is made anew
    #[arg(long)]
    dir: PathBuf,
    /// A directory on a tmpfs
    #[arg(long, default_value = "/tmp")]
    tmpfs: PathBuf,
    /// Where to answer `check` requests
    #[arg(long)]
    listen: SocketAddr,
    /// Write the final report to this file on SIGTERM
    #[arg(long)]
    report: Option<PathBuf>,
    /// Checks to leave out, by name; also `sysv` for all of System V IPC, and worker-group, worker-powerless and
    /// worker-user for child processes
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// Checks to make although CRIU 4.2.1 loses what they check: eventfd-semaphore, timerfd-periodic, personality,
    /// core-filter, inotify-dir
    #[arg(long, value_delimiter = ',')]
    with: Vec<String>,
}

impl RunOptions {
    fn left_out(&self) -> Vec<String> {
        let lost = LOST_BY_CRIU.into_iter().map(str::to_owned).filter(|name| !self.with.contains(name));
        lost.chain(self.without.iter().cloned()).collect()
    }
}

/// Runs the workload, or asks one.
pub(crate) fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Run(options) => run_workload(&options),
        Command::Query(options) => check::query(&options),
    }
}

fn run_workload(options: &RunOptions) -> anyhow::Result<bool> {
    sys::signal::stop_on_terminate()?;
    let server = Server::bind(options.listen)?;
    let mut workload = Workload::set_up(options)?;
    println!("ready");
    while !sys::signal::stop_requested() {
        workload.round();
        server.serve(ROUND_INTERVAL, || workload.verdict())?;
    }
    let verdict = workload.verdict();
    report::publish(&verdict, options.report.as_deref())?;
    Ok(verdict["ok"] == true)
}

struct Workload {
    suite: Suite,
    workers: Rc<Vec<Worker>>,
    failures: Failures,
    ticks: u64,
    clock_jump_ms: Rc<Cell<u64>>,
}

impl Workload {
    /// Builds everything: what children inherit first, then the children, then threads.
    fn set_up(options: &RunOptions) -> anyhow::Result<Self> {
        let dir = fresh_directory(&options.dir)?;
        signals::prepare()?;
        let without = options.left_out();
        let mut suite = Suite::new(&without);
        let shared = Shared::create(&dir, &without)?;
        let mut own = Suite::new(&without);
        let workers = Rc::new(tree::fork(&dir, &shared, &mut own)?);
        // Children are asked first: some of the main process's checks compare with what they have just done.
        for (index, worker) in workers.iter().enumerate() {
            let workers = Rc::clone(&workers);
            suite.add(&worker.check_name(), || Ok(move || workers[index].ask()))?;
        }
        suite.append(own);
        let holder = workers[0].pid();
        add_shared(&mut suite, &shared)?;
        suite.add("file-locks", || locks::feel(&dir, holder))?;
        suite.add("unix-named", || sockets::named_client(&dir))?;
        add_descriptors(&mut suite, &dir)?;
        add_files(&mut suite, &dir, &options.tmpfs)?;
        add_memory(&mut suite, &dir)?;
        let clock_jump_ms = Rc::new(Cell::new(0));
        add_execution(&mut suite, &clock_jump_ms)?;
        Ok(Self { suite, workers, failures: Failures::default(), ticks: 0, clock_jump_ms })
    }

    fn round(&mut self) {
        for failure in self.suite.verify() {
            self.failures.add(failure);
        }
        self.ticks += 1;
    }

    fn verdict(&mut self) -> Value {
        self.round();
        let failures = self.failures.all();
        json!({
            "ok": failures.is_empty(),
            "failures": failures,
            "checks": self.suite.len() + self.workers.iter().map(Worker::checks).sum::<usize>(),
            "uptime_ticks": self.ticks,
            "clock_jump_ms": self.clock_jump_ms.get(),
        })
    }
}

fn fresh_directory(parent: &Path) -> anyhow::Result<PathBuf> {
    let dir = parent.join("selfcheck");
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("clean the directory"),
        _ => {}
    }
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    Ok(fs::canonicalize(dir)?)
}

fn add_shared(suite: &mut Suite, shared: &Rc<Shared>) -> anyhow::Result<()> {
    suite.add("shared-memory", || shared::memories(Rc::clone(shared), Side::Parent))?;
    suite.add("shared-mutex", || shared::counter(Rc::clone(shared)))?;
    suite.add("robust-mutex", || shared::feels_mutex(Rc::clone(shared)))?;
    if !suite.without().iter().any(|name| name == "sysv") {
        suite.add("sysv-shm", || shared::system_v_status(Rc::clone(shared)))?;
        suite.add("sysv-sem", shared::semaphores)?;
        suite.add("sysv-msg", shared::messages)?;
    }
    Ok(())
}

fn add_descriptors(suite: &mut Suite, dir: &Path) -> anyhow::Result<()> {
    suite.add("pipe-unread", pipes::unread)?;
    suite.add("pipe-large", pipes::large)?;
    suite.add("fifo", || pipes::fifo(dir))?;
    suite.add("unix-stream", sockets::stream_pair)?;
    suite.add("unix-half-closed", sockets::half_closed)?;
    suite.add("unix-dgram", || sockets::message_pair(SockType::Datagram, 20))?;
    suite.add("unix-seqpacket", || sockets::message_pair(SockType::SeqPacket, 21))?;
    suite.add("tcp-loopback", sockets::tcp)?;
    suite.add("udp-loopback", sockets::udp)?;
    suite.add("epoll", events::epoll)?;
    suite.add("eventfd", events::eventfd)?;
    suite.add("eventfd-semaphore", events::semaphore)?;
    suite.add("signalfd", || events::signalfd(signals::numbers::signalfd()))?;
    suite.add("fd-numbers", || events::descriptors(dir))
}

fn add_files(suite: &mut Suite, dir: &Path, tmpfs: &Path) -> anyhow::Result<()> {
    suite.add("unlinked-64k", || files::unlinked(dir, 80, 64 << 10))?;
    suite.add("unlinked-4m", || files::unlinked(dir, 86, 4 << 20))?;
    suite.add("link-remap", || files::unlinked_name(dir))?;
    suite.add("append", || files::append(dir))?;
    suite.add("inotify", || events::inotify(tmpfs))?;
    suite.add("inotify-dir", || events::inotify(dir))?;
    suite.add("tmpfs", || files::tmpfs(tmpfs))?;
    suite.add("directories", || files::directories(dir))
}

fn add_memory(suite: &mut Suite, dir: &Path) -> anyhow::Result<()> {
    suite.add("memory-anonymous", memory::anonymous)?;
    suite.add("memory-private-file", || memory::private_file(dir))?;
    suite.add("memory-shared-file", || memory::shared_file(dir))?;
    suite.add("memfd", memory::memfd)?;
    suite.add("memory-flags", memory::flags)?;
    suite.add("memory-guards", memory::guards)?;
    suite.add("heap", memory::heap)?;
    suite.add("stack", memory::stack)
}

fn add_execution(suite: &mut Suite, clock_jump_ms: &Rc<Cell<u64>>) -> anyhow::Result<()> {
    suite.add("signal-queue", signals::queue)?;
    suite.add("signal-thread", signals::for_thread)?;
    suite.add("signal-stack", signals::alternate_stack)?;
    suite.add("timerfd-periodic", timers::periodic)?;
    suite.add("timerfd-one-shot", timers::one_shot)?;
    suite.add("timerfd-far", timers::far)?;
    suite.add("timer-posix", || timers::posix(signals::numbers::timer()))?;
    suite.add("timer-interval", timers::interval)?;
    suite.add("clocks", || timers::clocks(Rc::clone(clock_jump_ms)))?;
    suite.add("threads", threads::team)?;
    suite.add("registers", threads::registers)?;
    suite.add("identity", identity::unchanged)
}
