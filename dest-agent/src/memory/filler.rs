//! The worker: answers page faults of a restored container and fills in the rest of its memory.
//!
//! It is a process of its own, for two reasons. The agent may be restarted or upgraded while memory is filled in. And a
//! task that waits for a page waits for this process alone: its [`keeper`](super::keeper) starts it again if it ends.
//!
//! Pages that the source still owes are asked for, over a connection that may break and come again: those that tasks wait
//! for first, with what follows them. They are put in place as they come.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::pages::What;
use longhaul_common::sys::memory::{
    EventSlot, LeftKind, Mapping, PAGE, Placed, UffdEvent, copy_pages, has_ended, wake, wake_all, zero_pages,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::channel::{Channel, Message};
use super::fetch::Fetch;
use super::index::{Due, Index, SHARED, ZERO};
use super::owed::Owed;
use super::plan::{EVENT, Event, FIRST_FORKED, Plan, Run, SpaceId, decode, encode};
use super::receive::Frame;
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
/// How often it is looked, while there is nothing to do, whether address spaces have ended.
const LOOK_FOR_ENDS: Duration = Duration::from_millis(500);
/// The log of events.
const LOG: &str = "events";
/// The event that was read last.
const LAST_EVENT: &str = "last-event";
/// The file that says that a filler has come to its end.
const COMPLETED: &str = "completed";

/// Whether the filler of the store in `dir` has come to its end: the container has all its memory, or has ended.
pub fn was_completed(dir: &Path) -> bool {
    dir.join(COMPLETED).exists()
}

fn moved_pages(from: u64, to: u64, len: u64) -> Event {
    Event::Move { from: from / PAGE, to: to / PAGE, count: len / PAGE }
}

fn dropped_pages(start: u64, end: u64) -> Event {
    Event::Drop { start: start / PAGE, end: end.div_ceil(PAGE) }
}

/// See the module.
pub struct Filler {
    /// To the keeper, while it is there.
    channel: Option<Channel>,
    slots: Mapping,
    slots_file: File,
    log: File,
    /// How many entries it has.
    logged: u64,
    last_event: EventSlot,
    plan: Plan,
    spaces: BTreeMap<SpaceId, OwnedFd>,
    faults: VecDeque<(SpaceId, u64)>,
    next_forked: SpaceId,
    dir: PathBuf,
    background: bool,
    restored: bool,
    short_of_memory: bool,
    last_fault: Option<Instant>,
    owed: Owed,
    fetch: Option<Fetch>,
    /// Tasks that wait for pages which are owed, by the pages' slots.
    waiting: BTreeMap<u32, BTreeSet<(SpaceId, u64)>>,
    /// Address spaces in which the background has nothing to do until pages come.
    idle: BTreeSet<SpaceId>,
    /// Content has moved or was forked: a page that comes may belong elsewhere than where it was on the source.
    moved: bool,
    /// Pages have come that are not in place.
    behind: bool,
    looked_for_ends: Instant,
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
        let owed = Owed::open(dir)?;
        let mut moved = false;
        let mut next_forked = FIRST_FORKED;
        let logged = std::fs::read(&log_path)?;
        // A worker may have ended in the middle of its last entry.
        log.set_len((logged.len() / EVENT * EVENT) as u64)?;
        for bytes in logged.chunks_exact(EVENT) {
            let (space, event) = decode(bytes)?;
            if let Event::Fork { child } = event {
                next_forked = next_forked.max(child + 1);
            }
            moved |= !matches!(event, Event::Drop { .. });
            plan.apply(space, event);
        }
        let mut log = log;
        let mut logged = (logged.len() / EVENT) as u64;
        let slot = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(LAST_EVENT))?;
        let mut last_event = EventSlot::open(&slot)?;
        // An earlier worker was killed when it had read it and not yet logged it.
        if let Some(left) = last_event.left().filter(|left| left.sequence == logged) {
            let event = match left.kind {
                // The keeper has its descriptor, unless the worker was killed before it could hand that over.
                LeftKind::Fork => {
                    next_forked += 1;
                    Event::Fork { child: next_forked - 1 }
                }
                LeftKind::Remap { from, to, len } => moved_pages(from, to, len),
                LeftKind::Remove { start, end } | LeftKind::Unmap { start, end } => dropped_pages(start, end),
            };
            tracing::warn!(space = left.space, ?event, "an earlier worker ended when it had just read an event");
            moved |= !matches!(event, Event::Drop { .. });
            plan.apply(left.space, event);
            log.write_all(&encode(left.space, event))?;
            logged += 1;
        }
        Ok(Self {
            channel: Some(channel),
            slots,
            slots_file,
            log,
            logged,
            last_event,
            plan,
            spaces: BTreeMap::new(),
            faults: VecDeque::new(),
            next_forked,
            dir: dir.to_owned(),
            background: false,
            restored: false,
            short_of_memory: false,
            last_fault: None,
            owed,
            fetch: None,
            waiting: BTreeMap::new(),
            idle: BTreeSet::new(),
            moved,
            behind: false,
            looked_for_ends: Instant::now(),
        })
    }

    /// Works until every address space is complete.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            let busy = self.background && self.spaces.keys().any(|space| !self.idle.contains(space));
            let timeout = if self.short_of_memory {
                PollTimeout::try_from(OUT_OF_MEMORY_PAUSE).unwrap_or(PollTimeout::ZERO)
            } else if busy || !self.faults.is_empty() {
                PollTimeout::ZERO
            } else if self.background {
                PollTimeout::try_from(LOOK_FOR_ENDS).unwrap_or(PollTimeout::NONE)
            } else {
                PollTimeout::NONE
            };
            self.short_of_memory = false;
            let ready = self.wait(timeout)?;
            if !busy && self.background {
                self.drop_ended()?;
            }
            if ready.control && !self.control()? {
                // The keeper is gone, with its agent's will: there is nobody to start us again, so go on to the end.
                tracing::warn!("the keeper of this filler is gone");
                self.channel = None;
                self.background = true;
                self.restored = true;
            }
            for space in ready.spaces {
                self.events(space)?;
            }
            if ready.fetch
                && let Err(error) = self.fetch()
            {
                let missing = self.owed.missing();
                if missing > 0 {
                    tracing::warn!(%error, missing, "the connection to the source broke: tasks wait for it to come again");
                }
                self.fetch = None;
            }
            self.answer_faults()?;
            if self.background {
                self.fill_some()?;
            }
            if self.restored && self.background && self.spaces.is_empty() {
                return self.end();
            }
            if self.owed.missing() == 0
                && let Some(fetch) = &mut self.fetch
            {
                fetch.complete();
            }
        }
    }

    /// Containers end, also while they wait for pages.
    fn drop_ended(&mut self) -> io::Result<()> {
        if self.looked_for_ends.elapsed() < LOOK_FOR_ENDS {
            return Ok(());
        }
        self.looked_for_ends = Instant::now();
        let ended: Vec<SpaceId> =
            self.spaces.iter().filter(|(_, fd)| has_ended(fd.as_fd())).map(|(space, _)| *space).collect();
        ended.into_iter().try_for_each(|space| self.done(space))
    }

    /// All is in place, or nobody is there any more who could want it.
    fn end(mut self) -> io::Result<()> {
        File::create(self.dir.join(COMPLETED))?;
        if let Some(mut fetch) = self.fetch.take() {
            fetch.complete();
            if let Err(error) = fetch.finish() {
                tracing::debug!(%error, "the source will be told by the agent");
            }
        }
        Ok(())
    }

    fn wait(&self, timeout: PollTimeout) -> io::Result<Ready> {
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut polled: Vec<PollFd<'_>> = self.spaces.values().map(|fd| read(fd.as_fd())).collect();
        if let Some(channel) = &self.channel {
            polled.push(read(channel.as_fd()));
        }
        if let Some(fetch) = &self.fetch {
            let write = if fetch.has_to_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
            polled.push(PollFd::new(fetch.as_fd(), PollFlags::POLLIN | write));
        }
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        let spaces = self.spaces.keys().zip(&mut ready).filter(|(_, ready)| *ready).map(|(space, _)| *space).collect();
        let control = self.channel.is_some() && ready.next().unwrap_or(false);
        Ok(Ready { spaces, control, fetch: ready.next().unwrap_or(false) })
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
            Ok(Some(Message::Fetch(connection))) => self.begin_to_fetch(connection)?,
            Ok(None) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Reads all events of an address space. Reading one lets the task that caused it go on, so it is logged at once.
    fn events(&mut self, space: SpaceId) -> io::Result<()> {
        loop {
            let Some(fd) = self.spaces.get(&space) else { return Ok(()) };
            let event = match self.last_event.next(fd.as_fd(), space, self.logged) {
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
                UffdEvent::Remap { from, to, len } => moved_pages(from, to, len),
                UffdEvent::Remove { start, end } | UffdEvent::Unmap { start, end } => dropped_pages(start, end),
            };
            self.moved |= !matches!(event, Event::Drop { .. });
            self.idle.remove(&space);
            self.plan.apply(space, event);
            match self.log.write_all(&encode(space, event)) {
                Ok(()) => self.logged += 1,
                // What is known now stays right; only a worker after this one would not know it.
                Err(error) => tracing::error!(%error, "can't log what the container did to its memory"),
            }
        }
    }

    fn answer_faults(&mut self) -> io::Result<()> {
        for _ in 0..self.faults.len() {
            let Some((space, page)) = self.faults.pop_front() else { break };
            let mut run = self.plan.find(space, page, FAULT_CHUNK).unwrap_or(Run { page, entry: ZERO, count: 1 });
            if run.entry != ZERO {
                let (missing, count) = self.owed.leading(run.entry, run.count);
                run.count = count;
                if missing {
                    self.ask_for(space, run);
                    continue;
                }
            }
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
            let Some(mut run) = self.plan.next(space, chunk) else {
                if self.owed.missing() > 0 {
                    self.idle.insert(space);
                } else if !self.faults.iter().any(|(waiting, _)| *waiting == space) {
                    self.done(space)?;
                }
                continue;
            };
            // Pages that stay zero need no page: they are the kernel's own zeroes once the area is let go.
            if run.entry == ZERO {
                continue;
            }
            let (missing, count) = self.owed.leading(run.entry, run.count);
            if count < run.count {
                self.plan.come_back(space, run.page + count);
                run.count = count;
            }
            if missing {
                continue;
            }
            let mut placed = self.place(space, run)?;
            // One after the other is there already where tasks have pages in common.
            while let Some(Placed::Exists) = placed
                && run.count > 1
            {
                let entry = if run.entry == ZERO { ZERO } else { run.entry + 1 };
                run = Run { page: run.page + 1, entry, count: run.count - 1 };
                placed = self.place(space, run)?;
            }
            match placed {
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
        let placed = self.unless_short_of_memory(placed)?;
        // Until the container runs, what may come later is also written where it has a page already (`at_once`), from its slot.
        if let Some(Placed::Bytes(bytes)) = placed
            && self.background
            && run.entry & SHARED == 0
            && self.next_forked == FIRST_FORKED
        {
            free_slots(&self.slots_file, run.entry, bytes);
        }
        Ok(placed)
    }

    fn unless_short_of_memory(&mut self, placed: io::Result<Placed>) -> io::Result<Option<Placed>> {
        match placed {
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOMEM | nix::libc::EFAULT)) => {
                tracing::warn!("no memory for the container's pages now: it is at its limit, or the host is");
                self.short_of_memory = true;
                Ok(None)
            }
            placed => placed.map(Some),
        }
    }

    /// A connection to the source: it is told what is missing, and first what tasks wait for.
    fn begin_to_fetch(&mut self, connection: OwnedFd) -> io::Result<()> {
        let mut fetch = Fetch::new(connection)?;
        self.owed.wants().into_iter().for_each(|want| fetch.want(want));
        for slot in self.waiting.keys() {
            self.owed.want(*slot, 1).into_iter().for_each(|want| fetch.want(want));
        }
        self.fetch = Some(fetch);
        Ok(())
    }

    /// A task waits for a page that is owed: it is asked for, with those that a sequential reader wants next.
    fn ask_for(&mut self, space: SpaceId, run: Run) {
        let slot = run.entry & !SHARED;
        if let Some(waiting) = self.waiting.get_mut(&slot) {
            waiting.insert((space, run.page));
            return;
        }
        self.waiting.insert(slot, BTreeSet::from([(space, run.page)]));
        if let (Some(fetch), Some(want)) = (&mut self.fetch, self.owed.want(slot, FAULT_CHUNK)) {
            fetch.want(want);
            // Now: a task waits.
            if let Err(error) = fetch.write() {
                tracing::debug!(%error, "asked again over the next connection");
            }
        }
    }

    fn fetch(&mut self) -> io::Result<()> {
        let Some(fetch) = &mut self.fetch else { return Ok(()) };
        fetch.write()?;
        for (sequence, frame) in fetch.read()? {
            self.take_in(&frame)?;
            if let Some(fetch) = &mut self.fetch {
                fetch.acknowledge(sequence);
                fetch.write()?;
            }
        }
        Ok(())
    }

    /// Pages that were owed.
    fn take_in(&mut self, frame: &Frame) -> io::Result<()> {
        let (space, records, mut data) = frame.parts();
        if !frame.is_batch() {
            return Err(io::Error::other("the source sent something else than the pages it owes"));
        }
        for record in records {
            let pages = u64::from(record.count);
            let content = match record.what {
                What::Data => {
                    let (own, rest) = data.split_at((pages * PAGE) as usize);
                    data = rest;
                    Some(own)
                }
                What::Zero => None,
                _ => return Err(io::Error::other("the source sent something else than the pages it owes")),
            };
            let mut done = 0;
            while done < pages {
                let page = record.page + done;
                let Some((slot, count)) = self.owed.slot_of(space, page, pages - done) else {
                    if !self.owed.knows(space, page) {
                        return Err(io::Error::other(format!(
                            "the source sent page {page:#x} of task {space}, which it does not owe"
                        )));
                    }
                    done += 1;
                    continue;
                };
                let own = content.map(|content| &content[(done * PAGE) as usize..((done + count) * PAGE) as usize]);
                self.arrived(space, page, slot, count, own)?;
                done += count;
            }
        }
        Ok(())
    }

    /// Pages of consecutive slots have come: to where they were on the source, if they still belong there, and else into the
    /// store.
    fn arrived(&mut self, space: u32, page: u64, slot: u32, count: u64, content: Option<&[u8]>) -> io::Result<()> {
        let in_place = self.background
            && !self.moved
            // An address space that has ended is not in the plan; one that is not here yet is.
            && (!self.plan.knows(space.into())
                || self.place_fresh(space.into(), page, slot, count, content)?);
        if in_place {
            // What an earlier round brought.
            free_slots(&self.slots_file, slot, count * PAGE);
        } else {
            let zeroes;
            let content = match content {
                Some(content) => content,
                None => {
                    zeroes = vec![0; (count * PAGE) as usize];
                    &zeroes
                }
            };
            self.slots_file.write_all_at(content, u64::from(slot) * PAGE)?;
            self.behind = true;
        }
        self.owed.arrive(slot, count)?;
        let waiting: Vec<u32> = self.waiting.range(slot..slot + count as u32).map(|(slot, _)| *slot).collect();
        for slot in waiting {
            let tasks = self.waiting.remove(&slot).unwrap_or_default();
            if !in_place {
                self.faults.extend(tasks);
            }
        }
        if self.owed.missing() == 0 {
            if std::mem::take(&mut self.behind) {
                self.spaces.keys().for_each(|space| self.plan.come_back(*space, 0));
            }
            self.idle.clear();
        }
        Ok(())
    }

    /// Puts pages in place without the store; whether all of them are, or belong nowhere any more.
    fn place_fresh(
        &mut self,
        space: SpaceId,
        page: u64,
        slot: u32,
        count: u64,
        content: Option<&[u8]>,
    ) -> io::Result<bool> {
        let mut done = 0;
        while done < count {
            let at = page + done;
            // What the container has dropped since is not in the plan.
            let Some(run) =
                self.plan.find(space, at, count - done).filter(|run| run.entry & !SHARED == slot + done as u32)
            else {
                // Who waits for it finds out by itself what is there now.
                if let Some(fd) = self.spaces.get(&space) {
                    let _ = wake(fd.as_fd(), at * PAGE, PAGE);
                }
                done += 1;
                continue;
            };
            let mut pages = run.count;
            let placed = loop {
                let Some(fd) = self.spaces.get(&space) else { return Ok(false) };
                let placed = match content {
                    Some(content) => copy_pages(
                        fd.as_fd(),
                        at * PAGE,
                        &content[(done * PAGE) as usize..((done + pages) * PAGE) as usize],
                    ),
                    None => zero_pages(fd.as_fd(), at * PAGE, pages * PAGE),
                };
                match self.unless_short_of_memory(placed)? {
                    Some(Placed::Gone) if pages > 1 => pages = 1,
                    placed => break placed,
                }
            };
            match placed {
                Some(Placed::Bytes(bytes)) => done += bytes / PAGE,
                Some(Placed::Exists | Placed::Gone) => {
                    if let Some(fd) = self.spaces.get(&space) {
                        let _ = wake(fd.as_fd(), at * PAGE, PAGE);
                    }
                    done += 1;
                }
                Some(Placed::Ended) => {
                    self.done(space)?;
                    return Ok(true);
                }
                Some(Placed::Event) | None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn done(&mut self, space: SpaceId) -> io::Result<()> {
        self.plan.remove(space);
        self.idle.remove(&space);
        for waiting in self.waiting.values_mut() {
            waiting.retain(|(waiting, _)| *waiting != space);
        }
        self.faults.retain(|(waiting, _)| *waiting != space);
        // Closed on both sides, the kernel lets the areas go: what has no page is zero from now on.
        self.spaces.remove(&space);
        self.channel.as_ref().map_or(Ok(()), |channel| channel.send(&Message::Done(space)).or_else(ignore_gone))
    }
}

/// What there is to do.
struct Ready {
    spaces: Vec<SpaceId>,
    control: bool,
    fetch: bool,
}

fn ignore_gone(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Ok(()),
        _ => Err(error),
    }
}
