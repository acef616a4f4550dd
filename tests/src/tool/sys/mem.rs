//! Memory mappings that are owned by a value.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use super::check;

/// The page size of every machine the lab runs on.
pub(crate) const PAGE: usize = 4096;
/// The size of the huge pages that are asked for.
pub(crate) const HUGE_PAGE: usize = 2 << 20;
/// 64-bit words in a page.
pub(crate) const PAGE_WORDS: usize = PAGE / 8;

/// Whether writes are seen by forked children and by other mappings of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Copy on write.
    Private,
    /// One memory for all.
    Shared,
}

/// A readable and writable mapping; unmapped on drop.
pub(crate) struct Region {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: a region is plain memory without affinity to a thread; `&mut` access follows the borrow rules.
unsafe impl Send for Region {}
// SAFETY: shared access only reads, or goes through atomics.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `length` bytes of zeroes, rounded up to whole pages.
    pub(crate) fn anonymous(length: usize, sharing: Sharing) -> io::Result<Self> {
        Self::map(length, sharing, libc::MAP_ANONYMOUS, -1)
    }

    /// The same as private memory in a mapping that grows downwards, as a stack does.
    pub(crate) fn growing_down(length: usize) -> io::Result<Self> {
        Self::map(length, Sharing::Private, libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN, -1)
    }

    /// The same as private memory in pages of [`HUGE_PAGE`] bytes, which the machine must have set aside.
    pub(crate) fn huge_pages(pages: usize) -> io::Result<Self> {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        Self::map(pages * HUGE_PAGE, Sharing::Private, flags, -1)
    }

    /// Maps the first `length` bytes of a file. Nobody may truncate it while it is mapped.
    pub(crate) fn file(file: BorrowedFd<'_>, length: usize, sharing: Sharing) -> io::Result<Self> {
        Self::map(length, sharing, 0, file.as_raw_fd())
    }

    fn map(length: usize, sharing: Sharing, flags: i32, fd: i32) -> io::Result<Self> {
        let length = length.max(1).next_multiple_of(PAGE);
        let flags = flags
            | match sharing {
                Sharing::Private => libc::MAP_PRIVATE,
                Sharing::Shared => libc::MAP_SHARED,
            };
        // SAFETY: without MAP_FIXED the kernel chooses unused addresses.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, length })
    }

    /// The first address, as `/proc/self/maps` shows it.
    pub(crate) fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// The length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The memory as 64-bit words.
    pub(crate) fn words(&self) -> &[u64] {
        // SAFETY: the mapping is readable, page-aligned, `length` long and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.length / 8) }
    }

    /// The memory as 64-bit words.
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `words`; `&mut self` excludes other slices of this mapping in this process.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().cast(), self.length / 8) }
    }

    /// The memory as atomic words, for mappings that other processes write too.
    pub(crate) fn atomics(&self) -> &[AtomicU64] {
        // SAFETY: as in `words`; atomics allow concurrent writers.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.length / 8) }
    }

    /// The place of a value at the start of the mapping, uninitialised by Rust (zeroes at first).
    pub(super) fn place<T>(&self) -> *mut T {
        assert!(size_of::<T>() <= self.length, "the value fits the mapping");
        self.base.as_ptr().cast()
    }

    /// `madvise` on the whole mapping. Advices that change content leave words that are valid in any pattern.
    pub(crate) fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is our own mapping, and any content is a valid u64.
        check(unsafe { libc::madvise(self.base.as_ptr().cast(), self.length, advice) }).map(drop)
    }

    /// Drops the content of one page: it reads as zeroes afterwards, if the memory is not shared.
    pub(crate) fn discard_page(&mut self, page: usize) -> io::Result<()> {
        self.advise_page(page, libc::MADV_DONTNEED)
    }

    /// Makes a page of shared memory a hole: it reads as zeroes afterwards, for everybody.
    pub(crate) fn remove_page(&mut self, page: usize) -> io::Result<()> {
        self.advise_page(page, libc::MADV_REMOVE)
    }

    /// Lets nobody touch a page (`MADV_GUARD_INSTALL`, Linux 6.13; of shared memory, 6.15): of private memory, it loses its content.
    pub(crate) fn guard_page(&mut self, page: usize) -> io::Result<()> {
        self.advise_page(page, 102)
    }

    /// The reverse.
    pub(crate) fn unguard_page(&mut self, page: usize) -> io::Result<()> {
        self.advise_page(page, 103)
    }

    /// A page's content, as the kernel reads it: `EFAULT` of a guard.
    pub(crate) fn read_page(&self, page: usize) -> io::Result<Vec<u64>> {
        assert!((page + 1) * PAGE <= self.length, "the page is within the mapping");
        let mut words = vec![0; PAGE_WORDS];
        let to = libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: PAGE };
        // SAFETY: the kernel reads from our own mapping and writes to a vector of that length.
        check(unsafe {
            let from = libc::iovec { iov_base: self.base.add(page * PAGE).as_ptr().cast(), iov_len: PAGE };
            libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) as i32
        })?;
        Ok(words)
    }

    fn advise_page(&mut self, page: usize, advice: i32) -> io::Result<()> {
        assert!((page + 1) * PAGE <= self.length, "the page is within the mapping");
        // SAFETY: the page is part of our own mapping, checked above; any content is a valid u64.
        check(unsafe { libc::madvise(self.base.add(page * PAGE).as_ptr().cast(), PAGE, advice) }).map(drop)
    }

    /// `mlock` on the whole mapping.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is our own mapping.
        check(unsafe { libc::mlock(self.base.as_ptr().cast(), self.length) }).map(drop)
    }

    /// Makes the mapping inaccessible. It consumes the region, so that nobody can touch it; returns its address.
    pub(crate) fn into_guard(self) -> io::Result<usize> {
        self.leave_with(libc::PROT_NONE)
    }

    /// Makes the mapping read-only. It consumes the region, so that nobody can write to it; returns its address.
    pub(crate) fn into_read_only(self) -> io::Result<usize> {
        self.leave_with(libc::PROT_READ)
    }

    fn leave_with(self, protection: i32) -> io::Result<usize> {
        // SAFETY: the range is our own mapping and no slice of it is left.
        check(unsafe { libc::mprotect(self.base.as_ptr().cast(), self.length, protection) })?;
        let address = self.address();
        std::mem::forget(self);
        Ok(address)
    }

    /// `mremap` to another length, at another place if need be.
    pub(crate) fn resize(&mut self, length: NonZeroUsize) -> io::Result<()> {
        let length = length.get().next_multiple_of(PAGE);
        // SAFETY: the range is our own mapping; `&mut self` says that no slice of it is left.
        let base = unsafe { libc::mremap(self.base.as_ptr().cast(), self.length, length, libc::MREMAP_MAYMOVE) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        self.length = length;
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range is our own mapping and this is its last use.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// Memory from the program break, never given back.
pub(crate) struct BreakMemory {
    base: NonNull<u64>,
    words: usize,
}

// SAFETY: plain memory without affinity to a thread.
unsafe impl Send for BreakMemory {}

impl BreakMemory {
    /// Moves the break up by `length` bytes. The C allocator copes with others' use of the break.
    pub(crate) fn take(length: usize) -> io::Result<Self> {
        // SAFETY: `sbrk` extends the heap by memory that nobody owns yet.
        let base = unsafe { libc::sbrk(length as isize + 8) };
        if base as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        let aligned = (base as usize).next_multiple_of(8) as *mut u64;
        let base = NonNull::new(aligned).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, words: length / 8 })
    }

    /// The memory as 64-bit words.
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: `take` reserved this range for this value alone, aligned, and it is never given back.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.words) }
    }

    /// Whether the current break still lies above this memory.
    pub(crate) fn is_below_break(&self) -> bool {
        // SAFETY: an increment of 0 only reads the break.
        let now = unsafe { libc::sbrk(0) } as usize;
        now >= self.base.as_ptr() as usize + self.words * 8
    }
}

/// Creates a memfd that can be sealed.
pub(crate) fn memfd(name: &std::ffi::CStr) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: `name` is a C string for the time of the call.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) })?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}
