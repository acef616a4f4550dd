//! A robust, process-shared pthread mutex around one counter in shared memory.

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;

use super::mem::{Region, Sharing};

#[repr(C)]
struct Content {
    mutex: UnsafeCell<libc::pthread_mutex_t>,
    counter: UnsafeCell<u64>,
}

/// The mutex and its counter; made before `fork`, used on both sides.
pub(crate) struct SharedCounter {
    region: Region,
}

/// How a lock was got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Locked {
    /// Nobody held it.
    Free,
    /// Somebody holds it.
    Busy,
    /// Its holder died with it.
    Abandoned,
}

impl SharedCounter {
    /// A counter at 0 behind a free mutex.
    pub(crate) fn create() -> io::Result<Self> {
        let region = Region::anonymous(size_of::<Content>(), Sharing::Shared)?;
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the attributes are initialised before use, and the mutex lies in zeroed memory of our own.
        let result = unsafe {
            libc::pthread_mutexattr_init(attributes.as_mut_ptr());
            libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED);
            libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
            let content: *const Content = region.place();
            libc::pthread_mutex_init((*content).mutex.get(), attributes.as_ptr())
        };
        if result == 0 { Ok(Self { region }) } else { Err(io::Error::from_raw_os_error(result)) }
    }

    fn content(&self) -> &Content {
        let content: *const Content = self.region.place();
        // SAFETY: `create` initialised it, and it lives as long as the region.
        unsafe { &*content }
    }

    /// Adds 1 under the mutex and returns the new count.
    pub(crate) fn increment(&self) -> io::Result<u64> {
        self.with_lock(|count| {
            *count += 1;
            *count
        })
    }

    /// Does something with the count, and with what else is guarded, under the mutex.
    pub(crate) fn with_lock<T>(&self, work: impl FnOnce(&mut u64) -> T) -> io::Result<T> {
        let content = self.content();
        // SAFETY: the mutex is initialised; the counter is only touched while it is held.
        unsafe {
            match libc::pthread_mutex_lock(content.mutex.get()) {
                0 => {}
                error => return Err(io::Error::from_raw_os_error(error)),
            }
            let result = work(&mut *content.counter.get());
            libc::pthread_mutex_unlock(content.mutex.get());
            Ok(result)
        }
    }

    /// Tries to take the mutex and keeps it if it was free.
    pub(crate) fn try_lock(&self) -> io::Result<Locked> {
        // SAFETY: the mutex is initialised.
        match unsafe { libc::pthread_mutex_trylock(self.content().mutex.get()) } {
            0 => Ok(Locked::Free),
            libc::EBUSY => Ok(Locked::Busy),
            libc::EOWNERDEAD => Ok(Locked::Abandoned),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// The head of the calling thread's robust futex list, as the kernel knows it.
pub(crate) fn robust_list() -> io::Result<usize> {
    let (mut head, mut length) = (0_usize, 0_usize);
    // SAFETY: the kernel writes two words.
    super::check(unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length) })?;
    Ok(head)
}
