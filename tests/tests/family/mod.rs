//! Processes that change their memory at command (`lab-tool memory-subject`), and the destination that it is sent to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use longhaul_common::pages::{Buffers, Kind};
use longhaul_dest::memory::store::PageStore;
use longhaul_source::memory::link::LinkPace;
use longhaul_source::memory::pump::{Frame, Pump, Stop, Tasks};
use longhaul_source::memory::tracker::SpacePages;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process, and what the test knows of its mappings.
pub(crate) struct Subject<M> {
    pub(crate) pid: i32,
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    pub(crate) slots: BTreeMap<usize, M>,
}

impl<M> Subject<M> {
    pub(crate) fn accept(listener: &UnixListener, slots: BTreeMap<usize, M>) -> Self {
        let (stream, _) = listener.accept().expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("is set");
        let mut lines = BufReader::new(stream.try_clone().expect("clones"));
        let mut pid = String::new();
        lines.read_line(&mut pid).expect("says who it is");
        Self { pid: pid.trim().parse().expect("a number"), stream, lines, slots }
    }

    /// The last word of the answer.
    pub(crate) fn tell(&mut self, command: &str) -> String {
        writeln!(self.stream, "{command}").expect("is told");
        let mut answer = String::new();
        self.lines.read_line(&mut answer).expect("answers");
        assert!(answer.starts_with("ok"), "{command}: {answer}");
        answer.trim().rsplit(' ').next().unwrap_or_default().to_owned()
    }

    /// Until it goes on, nothing of it changes.
    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGSTOP, |stat| stat.contains(") T "));
    }

    /// Sends a signal, and waits until its `/proc/<pid>/stat` shows it.
    pub(crate) fn signal(&self, signal: Signal, is_done: fn(&str) -> bool) {
        kill(Pid::from_raw(self.pid), signal).expect("is told");
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        while !is_done(&stat()) {
            std::thread::yield_now();
        }
    }
}

/// Ends what was started, however the test ends.
pub(crate) struct Family<M> {
    first: Child,
    pub(crate) members: Vec<Subject<M>>,
}

impl<M> Family<M> {
    /// One process, with a file to map.
    pub(crate) fn start(listener: &UnixListener, socket: &Path, file: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab-tool"));
        command.args(["memory-subject", "--connect"]).arg(socket).arg("--file").arg(file);
        let first = command.spawn().expect("starts");
        Self { first, members: vec![Subject::accept(listener, BTreeMap::new())] }
    }

    pub(crate) fn tasks(&self) -> Vec<i32> {
        self.members.iter().map(|member| member.pid).collect()
    }
}

impl<M> Drop for Family<M> {
    fn drop(&mut self) {
        for member in self.members.iter().skip(1) {
            let _ = kill(Pid::from_raw(member.pid), Signal::SIGKILL);
        }
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

/// The destination: what arrives goes into a page store.
pub(crate) struct Arriving {
    pub(crate) store: PageStore,
    pub(crate) pump: Pump,
}

impl Arriving {
    pub(crate) fn new(pages: &Path) -> Self {
        let store = PageStore::create(pages, 64 << 20).expect("creates");
        Self { store, pump: Pump::new(Buffers::default(), LinkPace::default(), true, 1, Stop::default()) }
    }

    /// Sends pages; those that could not be read now.
    pub(crate) fn take(&mut self, pages: &[SpacePages], tasks: Tasks) -> Vec<SpacePages> {
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Frame>(4);
        std::thread::scope(|scope| {
            let store = &mut self.store;
            let stored = scope.spawn(move || {
                while let Some(frame) = receiver.blocking_recv() {
                    assert_eq!(frame.kind, Kind::Batch);
                    let data = if frame.packed {
                        zstd::bulk::decompress(&frame.payload, frame.raw).expect("unpacks")
                    } else {
                        frame.payload
                    };
                    store.apply(frame.space, &frame.records).expect("fits").write(&data).expect("is written");
                }
            });
            let pumped = self.pump.send(pages, tasks, &sender).expect("is sent");
            drop(sender);
            stored.join().expect("stores");
            pumped.skipped
        })
    }
}
