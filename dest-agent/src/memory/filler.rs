//! The worker: answers page faults of a restored container and fills in the rest of its memory.
//!
//! It is a process of its own, for two reasons. The agent may be restarted or upgraded while memory is filled in. And a
//! task that waits for a page waits for this process alone: its [`keeper`](super::keeper) starts it again if it ends.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::sys::memory::{
    Mapping, PAGE, Placed, UffdEvent, copy_pages, next_event, wake, wake_all, zero_pages,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::channel::{Channel, Message};
use super::index::{Due, Index, SHARED, ZERO};
use super::plan::{EVENT, Event, FIRST_FORKED, Plan, Run, SpaceId, decode, encode};
use super::store::{SLOTS, free_slots};

/// Pages placed at once in the background: 256 KiB, 0.1 ms, which is how long a fault may have to wait.
const CHUNK: u64 = 64;
/// The same while faults come: the next one is near.
const CHUNK_BETWEEN_FAULTS: u64 = 16;
/// How long after a fault the next one is expected.
const FAULTS_EXPECTED: Duration = Duration::from_millis(1);
/// Pages placed for a fault: the one, and what a sequential reader wants next.
const FAULT_CHUNK: u64 = 16;
/// The pause when the container's memory limit is reached: its tasks free memory, or the kernel ends them.
const OUT_OF_MEMORY_PAUSE: Duration = Duration::from_millis(10);
/// The log of events.
const LOG: &str = "events";

/// See the module.
pub struct Filler {
    /// To the keeper, while it is there.
    channel: Option<Channel>,
    slots: Mapping,
    slots_file: File,
    log: File,
    plan: Plan,
    spaces: BTreeMap<SpaceId, OwnedFd>,
    faults: VecDeque<(SpaceId, u64)>,
    next_forked: SpaceId,
    dir: PathBuf,
    background: bool,
    restored: bool,
    short_of_memory: bool,
    last_fault: Option<Instant>,
}

impl Filler {
    /// For the store in `dir`. What an earlier worker logged is taken into account.
    pub fn open(dir: &Path, channel: Channel) -> io::Result<Self> {
        let slots_file = OpenOptions::new().read(true).write(true).open(dir.join(SLOTS))?;
        let slots = Mapping::of(&slots_file, slots_file.metadata()?.len())?;
        let log_path = dir.join(LOG);
        let log = OpenOptions::new().create(true).append(true).open(&log_path)?;
        let mut plan = Plan::default();
        for (space, path) in Index::all(dir, Due::Later)? {
            plan.add(space.into(), Arc::new(Index::read(&path)?));
        }
        let mut next_forked = FIRST_FORKED;
        let logged = std::fs::read(&log_path)?;
        // A worker may have ended in the middle of its last entry.
        log.set_len((logged.len() / EVENT * EVENT) as u64)?;
        for bytes in logged.chunks_exact(EVENT) {
            let (space, event) = decode(bytes)?;
            if let Event::Fork { child } = event {
                next_forked = next_forked.max(child + 1);
            }
            plan.apply(space, event);
        }
        Ok(Self {
            channel: Some(channel),
            slots,
            slots_file,
            log,
            plan,
            spaces: BTreeMap::new(),
            faults: VecDeque::new(),
            next_forked,
            dir: dir.to_owned(),
            background: false,
            restored: false,
            short_of_memory: false,
            last_fault: None,
        })
    }

    /// Works until every address space is complete.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            let busy = self.background && !self.spaces.is_empty();
            let timeout = if self.short_of_memory {
                PollTimeout::try_from(OUT_OF_MEMORY_PAUSE).unwrap_or(PollTimeout::ZERO)
            } else if busy || !self.faults.is_empty() {
                PollTimeout::ZERO
            } else {
                PollTimeout::NONE
            };
            self.short_of_memory = false;
            let (control, ready) = self.wait(timeout)?;
            if control && !self.control()? {
                // The keeper is gone, with its agent's will: there is nobody to start us again, so go on to the end.
                tracing::warn!("the keeper of this filler is gone");
                self.channel = None;
                self.background = true;
                self.restored = true;
            }
            for space in ready {
                self.events(space)?;
            }
            self.answer_faults()?;
            if self.background {
                self.fill_some()?;
            }
            if self.restored && self.background && self.spaces.is_empty() {
                return Ok(());
            }
        }
    }

    fn wait(&self, timeout: PollTimeout) -> io::Result<(bool, Vec<SpaceId>)> {
        let uffds = self.spaces.values().map(AsFd::as_fd);
        let mut polled: Vec<PollFd<'_>> =
            uffds.chain(self.channel.as_ref().map(AsFd::as_fd)).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let control = self.channel.is_some() && polled.last().is_some_and(is_ready);
        let ready = self.spaces.keys().zip(&polled).filter(|(_, fd)| is_ready(fd));
        Ok((control, ready.map(|(space, _)| *space).collect()))
    }

    /// Takes one message from the keeper; false if it is gone.
    fn control(&mut self) -> io::Result<bool> {
        let Some(channel) = &self.channel else { return Ok(true) };
        match channel.receive() {
            Ok(Some(Message::Add(space, fd))) => {
                if !self.plan.knows(space) {
                    // Nothing of it is in the store: its content came with CRIU's images.
                    self.plan.add(space, Arc::default());
                }
                self.next_forked =
                    if space >= FIRST_FORKED { self.next_forked.max(space + 1) } else { self.next_forked };
                // A fault that an earlier worker read is told of again only if its task is woken.
                let _ = wake_all(fd.as_fd());
                self.spaces.insert(space, fd);
            }
            Ok(Some(Message::Go)) => self.background = true,
            Ok(Some(Message::Restored)) => self.restored = true,
            Ok(Some(Message::Done(_))) => {}
            Ok(None) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Reads all events of an address space. Reading one lets the task that caused it go on, so it is logged at once.
    fn events(&mut self, space: SpaceId) -> io::Result<()> {
        loop {
            let Some(fd) = self.spaces.get(&space) else { return Ok(()) };
            let event = match next_event(fd.as_fd()) {
                Ok(Some(event)) => event,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // Out of descriptors or memory for a fork's: the kernel keeps the event.
                    tracing::warn!(space, %error, "can't read an event now");
                    self.short_of_memory = true;
                    return Ok(());
                }
            };
            let event = match event {
                UffdEvent::Fault(address) => {
                    self.faults.push_back((space, address / PAGE));
                    self.last_fault = Some(Instant::now());
                    continue;
                }
                UffdEvent::Fork(fd) => {
                    let child = self.next_forked;
                    self.next_forked += 1;
                    if let Some(channel) = &self.channel {
                        channel.send_add(child, fd.as_fd()).or_else(ignore_gone)?;
                    }
                    self.spaces.insert(child, fd);
                    Event::Fork { child }
                }
                UffdEvent::Remap { from, to, len } => {
                    Event::Move { from: from / PAGE, to: to / PAGE, count: len / PAGE }
                }
                UffdEvent::Remove { start, end } | UffdEvent::Unmap { start, end } => {
                    Event::Drop { start: start / PAGE, end: end.div_ceil(PAGE) }
                }
            };
            self.plan.apply(space, event);
            if let Err(error) = self.log.write_all(&encode(space, event)) {
                // What is known now stays right; only a worker after this one would not know it.
                tracing::error!(%error, "can't log what the container did to its memory");
            }
        }
    }

    fn answer_faults(&mut self) -> io::Result<()> {
        for _ in 0..self.faults.len() {
            let Some((space, page)) = self.faults.pop_front() else { break };
            let run = self.plan.find(space, page, FAULT_CHUNK).unwrap_or(Run { page, entry: ZERO, count: 1 });
            match self.place(space, run)? {
                Some(Placed::Event) => self.faults.push_back((space, page)),
                // Somebody else brought it, or it is gone, which the task will find out by itself.
                Some(Placed::Exists | Placed::Gone) => {
                    if let Some(fd) = self.spaces.get(&space) {
                        let _ = wake(fd.as_fd(), page * PAGE, PAGE);
                    }
                }
                Some(Placed::Bytes(_)) => {}
                Some(Placed::Ended) => self.done(space)?,
                None => self.faults.push_back((space, page)),
            }
        }
        Ok(())
    }

    /// One chunk of every address space.
    fn fill_some(&mut self) -> io::Result<()> {
        let spaces: Vec<SpaceId> = self.spaces.keys().copied().collect();
        let expecting = self.last_fault.is_some_and(|fault| fault.elapsed() < FAULTS_EXPECTED);
        let chunk = if expecting { CHUNK_BETWEEN_FAULTS } else { CHUNK };
        for space in spaces {
            let Some(run) = self.plan.next(space, chunk) else {
                if !self.faults.iter().any(|(waiting, _)| *waiting == space) {
                    self.done(space)?;
                }
                continue;
            };
            // Pages that stay zero need no page: they are the kernel's own zeroes once the area is let go.
            if run.entry == ZERO {
                continue;
            }
            match self.place(space, run)? {
                Some(Placed::Bytes(bytes)) => self.plan.come_back(space, run.page + bytes / PAGE),
                Some(Placed::Exists) => self.plan.come_back(space, run.page + 1),
                // Not registered: mapped anew since, and its own. The event that says so is under way.
                Some(Placed::Gone) => self.plan.come_back(space, run.page + 1),
                Some(Placed::Event) | None => self.plan.come_back(space, run.page),
                Some(Placed::Ended) => self.done(space)?,
            }
        }
        Ok(())
    }

    /// Puts a run in place; nothing if there is no memory for it now.
    fn place(&mut self, space: SpaceId, run: Run) -> io::Result<Option<Placed>> {
        match self.place_all(space, run)? {
            // The kernel takes nothing of a run that is not within one area, and areas are split without a word (mprotect,
            // madvise): only of a single page does it say that the page is gone.
            Some(Placed::Gone) if run.count > 1 => self.place_all(space, Run { count: 1, ..run }),
            placed => Ok(placed),
        }
    }

    fn place_all(&mut self, space: SpaceId, run: Run) -> io::Result<Option<Placed>> {
        let Some(fd) = self.spaces.get(&space) else { return Ok(Some(Placed::Ended)) };
        let address = run.page * PAGE;
        let placed = if run.entry == ZERO {
            zero_pages(fd.as_fd(), address, run.count * PAGE)
        } else {
            let from = u64::from(run.entry & !SHARED) * PAGE;
            let range = from as usize..(from + run.count * PAGE) as usize;
            let Some(content) = self.slots.bytes().get(range) else {
                return Err(io::Error::other(format!("the index in {} points outside the store", self.dir.display())));
            };
            copy_pages(fd.as_fd(), address, content)
        };
        match placed {
            Ok(placed) => {
                if let Placed::Bytes(bytes) = placed
                    && run.entry & SHARED == 0
                    && self.next_forked == FIRST_FORKED
                {
                    free_slots(&self.slots_file, run.entry, bytes);
                }
                Ok(Some(placed))
            }
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOMEM | nix::libc::EFAULT)) => {
                tracing::warn!("no memory for the container's pages now: it is at its limit, or the host is");
                self.short_of_memory = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn done(&mut self, space: SpaceId) -> io::Result<()> {
        self.plan.remove(space);
        self.faults.retain(|(waiting, _)| *waiting != space);
        // Closed on both sides, the kernel lets the areas go: what has no page is zero from now on.
        self.spaces.remove(&space);
        self.channel.as_ref().map_or(Ok(()), |channel| channel.send(&Message::Done(space)).or_else(ignore_gone))
    }
}

fn ignore_gone(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Ok(()),
        _ => Err(error),
    }
}
