//! System V shared memory, semaphores and message queues, all private to the process tree.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use super::check;

/// Permissions of all objects here.
const MODE: i32 = 0o600;

/// A segment of System V shared memory; removed on drop.
pub(crate) struct SharedMemory {
    id: i32,
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is only reached through atomics.
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    /// Creates and attaches `length` bytes of zeroes.
    pub(crate) fn create(length: usize) -> io::Result<Self> {
        // SAFETY: no pointers.
        let id = check(unsafe { libc::shmget(libc::IPC_PRIVATE, length, libc::IPC_CREAT | MODE) })?;
        // SAFETY: the kernel chooses unused addresses.
        let base = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if base as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { id, base, words: length / 8 })
    }

    /// The content.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the segment is attached, page-aligned and `words` long until drop.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }

    /// Size in bytes, attachments and creator, as the kernel knows them.
    pub(crate) fn status(&self) -> io::Result<(usize, u64, i32)> {
        // SAFETY: zeroes are a valid shmid_ds.
        let mut status: libc::shmid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: IPC_STAT fills one shmid_ds.
        check(unsafe { libc::shmctl(self.id, libc::IPC_STAT, &raw mut status) })?;
        Ok((status.shm_segsz, status.shm_nattch, i32::from(status.shm_perm.mode) & 0o777))
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the segment is ours, and no borrow of it is left.
        unsafe {
            libc::shmdt(self.base.as_ptr().cast());
            libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut());
        }
    }
}

/// A set of System V semaphores; removed on drop.
pub(crate) struct Semaphores {
    id: i32,
}

impl Semaphores {
    /// Creates a set with these values.
    pub(crate) fn create(values: &[i32]) -> io::Result<Self> {
        // SAFETY: no pointers.
        let id = check(unsafe { libc::semget(libc::IPC_PRIVATE, values.len() as i32, libc::IPC_CREAT | MODE) })?;
        let set = Self { id };
        for (index, value) in values.iter().enumerate() {
            // SAFETY: SETVAL takes an int.
            check(unsafe { libc::semctl(id, index as i32, libc::SETVAL, *value) })?;
        }
        Ok(set)
    }

    /// The value of one semaphore.
    pub(crate) fn value(&self, index: i32) -> io::Result<i32> {
        // SAFETY: GETVAL takes no argument.
        check(unsafe { libc::semctl(self.id, index, libc::GETVAL) })
    }

    /// Adds `delta` to one semaphore, without waiting.
    pub(crate) fn add(&self, index: u16, delta: i16) -> io::Result<()> {
        let mut operation = libc::sembuf { sem_num: index, sem_op: delta, sem_flg: libc::IPC_NOWAIT as i16 };
        // SAFETY: one initialised operation.
        check(unsafe { libc::semop(self.id, &raw mut operation, 1) }).map(drop)
    }
}

impl Drop for Semaphores {
    fn drop(&mut self) {
        // SAFETY: IPC_RMID takes no argument.
        unsafe { libc::semctl(self.id, 0, libc::IPC_RMID) };
    }
}

/// A System V message: type and 8 words.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Positive.
    pub(crate) kind: i64,
    /// The content.
    pub(crate) words: [u64; 8],
}

/// A System V message queue; removed on drop.
pub(crate) struct MessageQueue {
    id: i32,
}

impl MessageQueue {
    /// Creates a queue.
    pub(crate) fn create() -> io::Result<Self> {
        // SAFETY: no pointers.
        Ok(Self { id: check(unsafe { libc::msgget(libc::IPC_PRIVATE, libc::IPC_CREAT | MODE) })? })
    }

    /// Appends a message, without waiting.
    pub(crate) fn send(&self, message: &Message) -> io::Result<()> {
        let message: *const Message = message;
        // SAFETY: the layout is that of a msgbuf with 64 bytes of text.
        check(unsafe { libc::msgsnd(self.id, message.cast(), size_of::<[u64; 8]>(), libc::IPC_NOWAIT) }).map(drop)
    }

    /// Takes the first message, without waiting.
    pub(crate) fn take(&self) -> io::Result<Message> {
        let mut message = Message { kind: 0, words: [0; 8] };
        let place: *mut Message = &raw mut message;
        // SAFETY: the layout is that of a msgbuf with room for 64 bytes of text.
        check(unsafe { libc::msgrcv(self.id, place.cast(), size_of::<[u64; 8]>(), 0, libc::IPC_NOWAIT) })?;
        Ok(message)
    }
}

impl Drop for MessageQueue {
    fn drop(&mut self) {
        // SAFETY: IPC_RMID takes no argument.
        unsafe { libc::msgctl(self.id, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}
