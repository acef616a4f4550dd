//! Memory that two processes write: each side sees the other's progress, and both keep a common pattern.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail};

use super::pattern;
use super::suite::{same, same_content};
use crate::tool::sys::ipc::{Message, MessageQueue, Semaphores, SharedMemory};
use crate::tool::sys::mem::{self, PAGE, Region, Sharing};
use crate::tool::sys::mutex::{Locked, SharedCounter};

/// Each shared memory has this size.
const LENGTH: usize = 16 * PAGE;
/// The words at the start that are each side's own.
const OWN_WORDS: usize = 2;

/// Which of the two processes this is.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// The one that forked.
    Parent,
    /// The forked one.
    Child,
}

/// All memory that the parent shares with its first child, made before the fork.
pub(super) struct Shared {
    anonymous: Region,
    memfd: Region,
    file: Region,
    posix: Region,
    posix_path: PathBuf,
    system_v: Option<SharedMemory>,
    counter: SharedCounter,
    held: SharedCounter,
}

impl Shared {
    /// Creates and fills everything. `without` may name `sysv`, for containers with the host's IPC namespace.
    pub(super) fn create(dir: &Path, without: &[String]) -> anyhow::Result<Rc<Self>> {
        let map = |file: &File| -> anyhow::Result<Region> {
            file.set_len(LENGTH as u64)?;
            Ok(Region::file(file.as_fd(), LENGTH, Sharing::Shared)?)
        };
        let posix_path = PathBuf::from(format!("/dev/shm/selfcheck-{}", std::process::id()));
        let create = |path: &Path| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)
                .with_context(|| format!("create {}", path.display()))
        };
        let system_v = !without.iter().any(|name| name == "sysv");
        let shared = Self {
            anonymous: Region::anonymous(LENGTH, Sharing::Shared)?,
            memfd: map(&File::from(mem::memfd(c"shared")?))?,
            file: map(&create(&dir.join("shared-memory"))?)?,
            posix: map(&create(&posix_path)?)?,
            posix_path,
            system_v: if system_v { Some(SharedMemory::create(LENGTH)?) } else { None },
            counter: SharedCounter::create()?,
            held: SharedCounter::create()?,
        };
        for (seed, _, words) in shared.memories() {
            for (word, value) in words[OWN_WORDS..].iter().zip(pattern::words(seed, 0, words.len())) {
                word.store(value, Ordering::Relaxed);
            }
        }
        Ok(Rc::new(shared))
    }

    fn memories(&self) -> Vec<(u64, &'static str, &[AtomicU64])> {
        let mut memories = vec![
            (70, "anonymous", self.anonymous.atomics()),
            (71, "memfd", self.memfd.atomics()),
            (72, "file", self.file.atomics()),
            (73, "POSIX", self.posix.atomics()),
        ];
        memories.extend(self.system_v.as_ref().map(|memory| (74, "System V", memory.words())));
        memories
    }
}

/// Every shared memory shows the other side's progress since the last verification, and the common pattern.
pub(super) fn memories(shared: Rc<Shared>, side: Side) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let (mine, theirs) = match side {
        Side::Parent => (0, 1),
        Side::Child => (1, 0),
    };
    let mut round = 0;
    let mut seen = [0; 5];
    Ok(move || {
        round += 1;
        for ((seed, kind, words), seen) in shared.memories().into_iter().zip(&mut seen) {
            let own = words[mine].swap(round, Ordering::Relaxed);
            same(&format!("this process's word in {kind} memory"), &own, &(round - 1))?;
            let other = words[theirs].load(Ordering::Relaxed);
            // In the first round the other side may not have begun.
            if round > 1 && other <= *seen {
                bail!("the other process's word in {kind} memory stays {other}");
            }
            *seen = other;
            let content: Vec<u64> = words[OWN_WORDS..].iter().map(|word| word.load(Ordering::Relaxed)).collect();
            let wanted = &pattern::words(seed, 0, words.len())[..content.len()];
            same_content(&format!("{kind} memory"), &content, wanted)?;
        }
        let length = fs::metadata(&shared.posix_path).context("the file of the POSIX memory")?.len();
        same("its length", &length, &(LENGTH as u64))
    })
}

/// Both processes count under one robust, process-shared mutex: in each round the count grows by one for each side.
pub(super) fn counter(shared: Rc<Shared>) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut last = None;
    Ok(move || {
        let count = shared.counter.increment().context("lock the shared mutex")?;
        match last.replace(count) {
            Some(last) => same("the count", &count, &(last + 2)),
            None => Ok(()),
        }
    })
}

/// The child holds a second mutex for ever.
pub(super) fn holds_mutex(shared: &Shared) -> anyhow::Result<()> {
    same("the mutex before the child takes it", &shared.held.try_lock()?, &Locked::Free)
}

/// The parent finds the mutex that the child holds.
pub(super) fn feels_mutex(shared: Rc<Shared>) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    Ok(move || same("the mutex that the child holds", &shared.held.try_lock()?, &Locked::Busy))
}

/// A System V shared memory's size, attachments and mode.
pub(super) fn system_v_status(shared: Rc<Shared>) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let status = |shared: &Shared| shared.system_v.as_ref().map(SharedMemory::status).transpose();
    let mut wanted = None;
    Ok(move || {
        let now = status(&shared)?;
        same("its size, attachments and mode", &now, wanted.get_or_insert(now))
    })
}

/// System V semaphores with values.
pub(super) fn semaphores() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut values = [3, 0, 12];
    let set = Semaphores::create(&values)?;
    Ok(move || {
        for (index, value) in values.iter().enumerate() {
            same("a semaphore", &set.value(index as i32)?, value)?;
        }
        let delta = if values[1] == 0 { 5 } else { -5 };
        values[1] += i32::from(delta);
        Ok(set.add(1, delta)?)
    })
}

/// A System V message queue with three messages.
pub(super) fn messages() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let queue = MessageQueue::create()?;
    let message = |kind: i64, generation: u64| Message {
        kind,
        words: std::array::from_fn(|index| pattern::words(kind as u64, generation, 8)[index]),
    };
    let mut generation = 0;
    for kind in [9, 1, 5] {
        queue.send(&message(kind, generation))?;
    }
    Ok(move || {
        for kind in [9, 1, 5] {
            same("a message", &queue.take()?, &message(kind, generation))?;
        }
        same("is there a fourth message, which", &queue.take().is_ok(), &false)?;
        generation += 1;
        for kind in [9, 1, 5] {
            queue.send(&message(kind, generation))?;
        }
        Ok(())
    })
}
