//! Looking at, and filling, the memory of other tasks: `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst) and
//! userfaultfd (userfaultfd(2), linux/userfaultfd.h). One small function for each request.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

/// A page, in bytes. The kernels this is built for have no other size.
pub const PAGE: u64 = 4096;

/// Pages by what the kernel says of them (`PAGE_IS_*`, linux/fs.h).
pub mod category {
    /// Written since it was last write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// A file's: what it shows was not written by the task.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In swap.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeroes.
    pub const ZERO: u64 = 1 << 5;
    /// A guard (`MADV_GUARD_INSTALL`): looks like swapped, and can't be read. Linux 6.15.
    pub const GUARD: u64 = 1 << 8;
}

/// `PM_SCAN_WP_MATCHING`: write-protect what is reported, at once.
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`: fail where an area is not registered for it.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// Regions one call reports at most; more take another call.
const REGIONS: usize = 512;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<PageRegion>() == 24);

/// Which pages a scan reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// Pages that have content of the task's own: what CRIU would save (`pmc_fill` in criu/pagemap-cache.c, 4.2).
    Content,
    /// Of those, the ones written since they were last protected; each is protected again in the same step.
    TakeWritten,
    /// The same, and they stay as they are.
    Written,
    /// Pages with content that are not in memory.
    Swapped,
}

/// What an area shows where the task has written nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Zeroes. No page of a file can be there, and the scan does not ask: to find out, the kernel reads each page's
    /// descriptor, which takes ten times as long as all the rest.
    Zeroes,
    /// A file.
    File,
}

/// Calls `found` with every range of pages in `[start, end)`, one private area, that matches, in order. `pagemap` is
/// `/proc/<pid>/pagemap`.
///
/// # Errors
/// `EPERM` for `TakeWritten` where an area is not registered for asynchronous write protection: what was
/// found until then may not be all. `ENOTTY` before Linux 6.7.
pub fn scan(
    pagemap: &File,
    area: (u64, u64),
    backing: Backing,
    what: Scan,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let (flags, written) = match what {
        Scan::Content | Scan::Swapped => (0, 0),
        Scan::Written => (PM_SCAN_CHECK_WPASYNC, category::WRITTEN),
        Scan::TakeWritten => (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, category::WRITTEN),
    };
    let present = if what == Scan::Swapped { 0 } else { category::PRESENT };
    let query = Query::content(backing, flags, written, present);
    walk(pagemap, area, &query, |region| found(region.start, region.end))
}

/// Pages of a private area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrivatePages {
    /// With content that was written since they were last protected.
    Written,
    /// With content that was not.
    Unwritten,
    /// Guards, which nobody can touch: they have no content. Not told before Linux 6.15.
    Guard,
}

/// Calls `found` with every range of pages that have content, and of guards, in order: one walk over the page tables for all.
///
/// # Errors
/// As of [`scan`] for `TakeWritten`.
pub fn scan_frozen(
    pagemap: &File,
    area: (u64, u64),
    backing: Backing,
    mut found: impl FnMut(u64, u64, PrivatePages),
) -> io::Result<()> {
    let mut query = Query::content(backing, PM_SCAN_CHECK_WPASYNC, 0, category::PRESENT);
    query.inverted &= !category::GUARD;
    query.all_of &= !category::GUARD;
    query.told |= guard();
    walk(pagemap, area, &query, |region| {
        let pages = if region.categories & category::GUARD != 0 {
            PrivatePages::Guard
        } else if region.categories & category::WRITTEN != 0 {
            PrivatePages::Written
        } else {
            PrivatePages::Unwritten
        };
        found(region.start, region.end, pages);
    })
}

/// Whether this kernel tells of guards.
pub fn tells_guards() -> bool {
    no_content() & category::GUARD != 0
}

/// The category of guards, where the kernel has it.
fn guard() -> u64 {
    no_content() & category::GUARD
}

/// Pages of a mapping of shared memory that the task may have written since they were last protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedPages {
    /// It has: they are mapped, and not protected.
    Written,
    /// They are not mapped, and nothing says why. Once all pages of a mapping were protected, also those the task had not mapped, this
    /// means that the kernel took them out of the task's page tables since, and with them the mark of having been written:
    /// after `MADV_DONTNEED`, or to swap them out.
    Unknown,
    /// Guards, which are told beside one of the others: what was written there before may not be known. Not told before Linux 6.15.
    Guard,
}

/// Calls `found` with every range of pages in `[start, end)`, a part of a mapping of shared memory, that the task may have written, in order.
/// With `take`, what was written is protected again in the same step; what is unknown is not always.
///
/// # Errors
/// As of [`scan`] for `TakeWritten`.
pub fn scan_shared(
    pagemap: &File,
    (start, end): (u64, u64),
    take: bool,
    mut found: impl FnMut(u64, u64, SharedPages),
) -> io::Result<()> {
    let query = Query {
        flags: PM_SCAN_CHECK_WPASYNC | if take { PM_SCAN_WP_MATCHING } else { 0 },
        inverted: category::PRESENT,
        all_of: 0,
        any_of: category::WRITTEN | category::PRESENT,
        told: category::WRITTEN | category::SWAPPED | guard(),
    };
    walk(pagemap, (start, end), &query, |region| {
        if region.categories & category::GUARD != 0 {
            found(region.start, region.end, SharedPages::Guard);
        }
        if region.categories & category::WRITTEN != 0 {
            found(region.start, region.end, SharedPages::Written);
        } else if region.categories & category::SWAPPED == 0 {
            found(region.start, region.end, SharedPages::Unknown);
        }
    })
}

/// What a scan asks for (`struct pm_scan_arg`): pages whose categories, the `inverted` ones turned round, have `all_of` and `any_of`.
struct Query {
    flags: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    told: u64,
}

impl Query {
    /// For pages with content of a private area.
    fn content(backing: Backing, flags: u64, written: u64, present: u64) -> Self {
        let absent = no_content() | if backing == Backing::File { category::FILE } else { 0 };
        let told = if flags & PM_SCAN_CHECK_WPASYNC == 0 { 0 } else { category::WRITTEN };
        Self {
            flags,
            inverted: absent,
            all_of: absent | written,
            any_of: present | category::SWAPPED,
            told: category::PRESENT | category::SWAPPED | told,
        }
    }
}

fn walk(pagemap: &File, (start, end): (u64, u64), query: &Query, mut found: impl FnMut(&PageRegion)) -> io::Result<()> {
    let mut regions = [PageRegion::default(); REGIONS];
    let mut at = start;
    while at < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: query.flags,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: query.inverted,
            category_mask: query.all_of,
            category_anyof_mask: query.any_of,
            return_mask: query.told,
            ..ScanArg::default()
        };
        // SAFETY: the argument and the vector it points to outlive the call and have the sizes they say.
        let count = unsafe { request::pagemap_scan(pagemap.as_raw_fd(), &raw mut arg) }?;
        for region in regions.iter().take(usize::try_from(count).unwrap_or(0)) {
            found(region);
        }
        if arg.walk_end <= at {
            return Err(io::Error::other("the kernel's page scan does not get on"));
        }
        at = arg.walk_end;
    }
    Ok(())
}

/// Categories of pages that have no content of their own, as far as this kernel knows them.
fn no_content() -> u64 {
    static KNOWN: OnceLock<u64> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let all = category::ZERO | category::GUARD;
        let Ok(pagemap) = File::open("/proc/self/pagemap") else { return category::ZERO };
        let mut arg =
            ScanArg { size: size_of::<ScanArg>() as u64, end: PAGE, category_mask: all, ..ScanArg::default() };
        // SAFETY: the argument outlives the call; it asks for no region.
        let known = unsafe { request::pagemap_scan(pagemap.as_raw_fd(), &raw mut arg) }.is_ok();
        if known { all } else { category::ZERO }
    })
}

/// `UFFD_API`.
const UFFD_API: u64 = 0xaa;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_PAGEFAULT_FLAG_WP`.
const FEATURES_WP_ASYNC: u64 = (1 << 12) | (1 << 13) | (1 << 15) | (1 << 0);
/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const MODE_WP: u64 = 1 << 0;

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdRegister {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdWriteprotect {
    range: UffdRange,
    mode: u64,
}

#[repr(C)]
struct UffdCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdZeropage {
    range: UffdRange,
    mode: u64,
    zeropage: i64,
}

const _: () = assert!(size_of::<UffdCopy>() == 40 && size_of::<UffdRegister>() == 32);

/// The requests themselves.
mod request {
    #![allow(missing_docs, unreachable_pub, reason = "what the macros make; the functions below say what they do")]
    use super::{ScanArg, UffdApi, UffdCopy, UffdRange, UffdRegister, UffdWriteprotect, UffdZeropage};

    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArg);
    nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdApi);
    nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, UffdRegister);
    nix::ioctl_read!(uffdio_wake, 0xaa, 0x02, UffdRange);
    nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, UffdCopy);
    nix::ioctl_readwrite!(uffdio_zeropage, 0xaa, 0x04, UffdZeropage);
    nix::ioctl_readwrite!(uffdio_writeprotect, 0xaa, 0x06, UffdWriteprotect);
}

/// Turns a fresh userfaultfd, of whatever task, into one for asynchronous write protection: the kernel resolves such
/// faults by itself, nobody has to read them.
///
/// # Errors
/// `EINVAL` before Linux 6.7.
pub fn begin_write_tracking(uffd: BorrowedFd<'_>) -> io::Result<()> {
    let mut api = UffdApi { api: UFFD_API, features: FEATURES_WP_ASYNC, ioctls: 0 };
    // SAFETY: the argument outlives the call.
    unsafe { request::uffdio_api(uffd.as_raw_fd(), &raw mut api) }?;
    Ok(())
}

/// Whether this kernel can protect pages asynchronously, which a userfaultfd of this process is asked.
pub fn tracks_writes() -> bool {
    // SAFETY: plain system call; the descriptor is new.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    i32::try_from(fd).is_ok_and(|fd| fd >= 0 && begin_write_tracking(super::adopt(fd).as_fd()).is_ok())
}

/// Registers an area for write protection.
///
/// # Errors
/// `EBUSY`: another userfaultfd has it; `EINVAL`: there is no such area, or of a kind that can't be tracked; `ENOMEM`, `ESRCH`: the
/// address space is gone.
pub fn register_write_tracking(uffd: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    let mut register = UffdRegister { range: UffdRange { start, len: end - start }, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the argument outlives the call.
    unsafe { request::uffdio_register(uffd.as_raw_fd(), &raw mut register) }?;
    Ok(())
}

/// Protects a part of a registered area: also pages that the task has not mapped, if the area is of shared memory.
///
/// # Errors
/// `ENOENT`: it is not registered, or not any more.
pub fn protect(uffd: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    let mut protect = UffdWriteprotect { range: UffdRange { start, len: end - start }, mode: MODE_WP };
    // SAFETY: the argument outlives the call.
    unsafe { request::uffdio_writeprotect(uffd.as_raw_fd(), &raw mut protect) }?;
    Ok(())
}

/// What became of an attempt to put pages in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// So many bytes from the beginning.
    Bytes(u64),
    /// There is a page already at the beginning.
    Exists,
    /// The beginning is in no registered area any more, or the pages are in more than one area.
    Gone,
    /// An event has to be read first.
    Event,
    /// The address space is gone.
    Ended,
}

fn placed(result: nix::Result<i32>, done: i64, len: u64) -> io::Result<Placed> {
    use nix::errno::Errno;
    match result {
        Ok(_) => Ok(Placed::Bytes(len)),
        Err(Errno::EAGAIN) if done > 0 => Ok(Placed::Bytes(done.unsigned_abs())),
        Err(Errno::EAGAIN) => Ok(Placed::Event),
        Err(Errno::EEXIST) => Ok(Placed::Exists),
        Err(Errno::ENOENT | Errno::EINVAL) => Ok(Placed::Gone),
        Err(Errno::ESRCH) => Ok(Placed::Ended),
        Err(errno) => Err(errno.into()),
    }
}

/// Copies `source`, whole pages, to `address` in the address space of `uffd` and wakes who waits for them.
///
/// # Errors
/// `ENOMEM`: the container's memory limit, or the host's memory, is used up. `EFAULT`: the source could not be brought back
/// from swap, for the same reason.
pub fn copy_pages(uffd: BorrowedFd<'_>, address: u64, source: &[u8]) -> io::Result<Placed> {
    let len = source.len() as u64;
    let mut copy = UffdCopy { dst: address, src: source.as_ptr() as u64, len, mode: 0, copy: 0 };
    // SAFETY: the source is readable for its length during the call; the destination is the kernel's to check.
    let result = unsafe { request::uffdio_copy(uffd.as_raw_fd(), &raw mut copy) };
    placed(result, copy.copy, len)
}

/// Puts pages of zeroes at `address` and wakes who waits for them.
///
/// # Errors
/// As of [`copy_pages`].
pub fn zero_pages(uffd: BorrowedFd<'_>, address: u64, len: u64) -> io::Result<Placed> {
    let mut zero = UffdZeropage { range: UffdRange { start: address, len }, mode: 0, zeropage: 0 };
    // SAFETY: the argument outlives the call.
    let result = unsafe { request::uffdio_zeropage(uffd.as_raw_fd(), &raw mut zero) };
    placed(result, zero.zeropage, len)
}

/// Whether the address space of `uffd` has ended: nothing tells, one has to ask.
pub fn has_ended(uffd: BorrowedFd<'_>) -> bool {
    /// The last page below the smallest limit of address spaces, where no system puts anything (`TASK_SIZE_MAX` leaves out the one after it).
    const NOWHERE: u64 = (1 << 47) - 2 * PAGE;
    matches!(zero_pages(uffd, NOWHERE, PAGE), Ok(Placed::Ended))
}

/// Wakes whoever waits in an address space: who still has to wait will say so again.
///
/// # Errors
/// None that matters.
pub fn wake_all(uffd: BorrowedFd<'_>) -> io::Result<()> {
    /// Above what may be mapped at all (vm.mmap_min_addr), below the end of the smaller kind of address space.
    const FIRST: u64 = 1 << 16;
    const END: u64 = (1 << 47) - PAGE;
    wake(uffd, FIRST, END - FIRST)
}

/// Wakes who waits for pages that are there already.
///
/// # Errors
/// None that matters: a range nobody waits for is fine.
pub fn wake(uffd: BorrowedFd<'_>, address: u64, len: u64) -> io::Result<()> {
    let mut range = UffdRange { start: address, len };
    // SAFETY: the argument outlives the call.
    unsafe { request::uffdio_wake(uffd.as_raw_fd(), &raw mut range) }?;
    Ok(())
}

/// What a userfaultfd tells (`struct uffd_msg`).
#[derive(Debug)]
pub enum UffdEvent {
    /// A task waits for the page at this address.
    Fault(u64),
    /// The task forked; the child's memory comes with a descriptor of its own.
    Fork(OwnedFd),
    /// An area moved.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Its length at its new place, in bytes.
        len: u64,
    },
    /// Content was given up: zeroes from now on.
    Remove {
        /// From.
        start: u64,
        /// To.
        end: u64,
    },
    /// Unmapped.
    Unmap {
        /// From.
        start: u64,
        /// To.
        end: u64,
    },
}

/// Bytes of one message.
const MESSAGE: usize = 32;

/// Where events are read to: a file of memory, which has an event before the task that caused it goes on.
///
/// Reading an event lets that task go on, before the reader has it (`userfaultfd_event_complete` in fs/userfaultfd.c), and often in its place on
/// the processor: a reader that is killed just then can write nothing down. The kernel ends the call first, though, and so the message is in
/// this file when the process is gone.
#[derive(Debug)]
pub struct EventSlot {
    start: *mut u8,
}

/// An event that a reader has left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftEvent {
    /// What [`EventSlot::next`] was told of it.
    pub space: u64,
    /// The same.
    pub sequence: u64,
    /// What it was. Of a fork the descriptor is gone.
    pub kind: LeftKind,
}

/// What a reader has left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in UffdEvent")]
pub enum LeftKind {
    Fork,
    Remap { from: u64, to: u64, len: u64 },
    Remove { start: u64, end: u64 },
    Unmap { start: u64, end: u64 },
}

// SAFETY: a mapping is memory like any other, and nobody else has this one.
unsafe impl Send for EventSlot {}

impl EventSlot {
    const FAULT: u8 = 0x12;
    const FORK: u8 = 0x13;
    const REMAP: u8 = 0x14;
    const REMOVE: u8 = 0x15;
    const UNMAP: u8 = 0x16;
    /// Whose event it is and its number come before it.
    const HEAD: usize = 16;

    /// In a file, of which nobody else writes.
    ///
    /// # Errors
    /// Those of ftruncate(2) and mmap(2).
    pub fn open(file: &File) -> io::Result<Self> {
        file.set_len(PAGE)?;
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_fd().as_raw_fd());
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), PAGE as usize, protection, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start: start.cast() }) }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped as long as `self` lives, and only used through it.
        unsafe { std::slice::from_raw_parts_mut(self.start, Self::HEAD + MESSAGE) }
    }

    /// Reads the next event of an address space; nothing if there is none now. `sequence` is what the reader counts what it has written down by.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn next(&mut self, uffd: BorrowedFd<'_>, space: u64, sequence: u64) -> io::Result<Option<UffdEvent>> {
        let bytes = self.bytes();
        bytes.fill(0);
        bytes[..8].copy_from_slice(&space.to_ne_bytes());
        bytes[8..Self::HEAD].copy_from_slice(&sequence.to_ne_bytes());
        match nix::unistd::read(uffd, &mut bytes[Self::HEAD..]) {
            Ok(MESSAGE) => {}
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        let message = &self.bytes()[Self::HEAD..];
        Ok(Some(match (message[0], Self::left_kind(message)) {
            (Self::FAULT, _) => UffdEvent::Fault(word_of(message, 1)),
            (_, Some(LeftKind::Fork)) => {
                let fd = RawFd::from_ne_bytes([message[8], message[9], message[10], message[11]]);
                // SAFETY: the kernel has just installed this descriptor for the reader of the event.
                UffdEvent::Fork(unsafe { OwnedFd::from_raw_fd(fd) })
            }
            (_, Some(LeftKind::Remap { from, to, len })) => UffdEvent::Remap { from, to, len },
            (_, Some(LeftKind::Remove { start, end })) => UffdEvent::Remove { start, end },
            (_, Some(LeftKind::Unmap { start, end })) => UffdEvent::Unmap { start, end },
            (other, None) => return Err(io::Error::other(format!("userfaultfd event {other:#x} is not known"))),
        }))
    }

    /// What the last reader read last, whatever became of it. Faults are not kept: they are told again.
    pub fn left(&mut self) -> Option<LeftEvent> {
        let bytes = self.bytes();
        let kind = Self::left_kind(&bytes[Self::HEAD..])?;
        Some(LeftEvent { space: number_at(bytes, 0), sequence: number_at(bytes, 8), kind })
    }

    fn left_kind(message: &[u8]) -> Option<LeftKind> {
        let word = |index| word_of(message, index);
        match message[0] {
            Self::FORK => Some(LeftKind::Fork),
            Self::REMAP => Some(LeftKind::Remap { from: word(0), to: word(1), len: word(2) }),
            Self::REMOVE => Some(LeftKind::Remove { start: word(0), end: word(1) }),
            Self::UNMAP => Some(LeftKind::Unmap { start: word(0), end: word(1) }),
            _ => None,
        }
    }
}

fn word_of(message: &[u8], index: usize) -> u64 {
    number_at(message, 8 + index * 8)
}

fn number_at(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

impl Drop for EventSlot {
    fn drop(&mut self) {
        // SAFETY: mapped by `open` with this length.
        unsafe { libc::munmap(self.start.cast(), PAGE as usize) };
    }
}

/// A file of memory, mapped.
#[derive(Debug)]
pub struct Mapping {
    start: *mut libc::c_void,
    length: usize,
}

// SAFETY: a mapping is memory like any other; this type gives out shared views of it only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `file` for reading. The file must be nobody else's to write or cut: the agent's own, on its
    /// memory filesystem.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn of(file: &File, length: u64) -> io::Result<Self> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        if length == 0 {
            return Ok(Self { start: std::ptr::NonNull::dangling().as_ptr(), length });
        }
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_fd().as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start, length }) }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self` lives, and the file's owner keeps it as long.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: mapped by `of` with this length.
            unsafe { libc::munmap(self.start, self.length) };
        }
    }
}

/// Has a part of a file in memory, by pages, as if it had just been read (`MADV_POPULATE_READ`, madvise(2), Linux 5.14). Older kernels are told
/// that it will be wanted.
///
/// # Errors
/// Those of mmap(2) and madvise(2).
pub fn populate(file: &File, part: std::ops::Range<u64>) -> io::Result<()> {
    let (offset, length) = (part.start.cast_signed(), (part.end - part.start) as usize);
    let (protection, fd) = (libc::PROT_READ, file.as_fd().as_raw_fd());
    // SAFETY: a new mapping, that nobody reads: the kernel says so if the file has become shorter.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_PRIVATE, fd, offset) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: what has just been mapped.
    let mut advised = unsafe { libc::madvise(start, length, libc::MADV_POPULATE_READ) };
    if advised < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        // SAFETY: as above.
        advised = unsafe { libc::madvise(start, length, libc::MADV_WILLNEED) };
    }
    let error = io::Error::last_os_error();
    // SAFETY: as above; nobody else knows it.
    unsafe { libc::munmap(start, length) };
    if advised < 0 { Err(error) } else { Ok(()) }
}

/// How long after a migration memory is given back: the container that has just begun to run again needs the processors more.
const TRIM_AFTER: Duration = Duration::from_secs(5);

/// Gives the kernel back before long what this process has freed. The C library keeps most of it, in an arena for each thread that has ever
/// asked: after a large container an agent kept 1.5 GB.
pub fn trim_soon() {
    tokio::spawn(async {
        tokio::time::sleep(TRIM_AFTER).await;
        tokio::task::spawn_blocking(trim).await
    });
}

fn trim() {
    // SAFETY: takes no pointer, and is safe beside other threads (malloc_trim(3)).
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A page of this process between two that can't be touched: no area that another thread maps or makes larger joins it.
#[derive(Debug)]
pub struct LonePage {
    start: *mut libc::c_void,
}

impl LonePage {
    /// Maps it.
    ///
    /// # Errors
    /// Those of mmap(2) and mprotect(2).
    pub fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), 3 * PAGE as usize, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = Self { start };
        // SAFETY: the page in the middle of what was just mapped.
        let done = unsafe { libc::mprotect(page.place().cast(), PAGE as usize, libc::PROT_READ | libc::PROT_WRITE) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(page) }
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.place() as u64
    }

    /// Writes to it.
    pub fn write(&mut self, value: u8) {
        // SAFETY: mapped, writable, and this value's alone.
        unsafe { self.place().write_volatile(value) };
    }

    fn place(&self) -> *mut u8 {
        // SAFETY: within the three pages.
        unsafe { self.start.cast::<u8>().add(PAGE as usize) }
    }
}

impl Drop for LonePage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length.
        unsafe { libc::munmap(self.start, 3 * PAGE as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_there_when_its_reader_is_gone() {
        let file = tempfile::tempfile().expect("a file");
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).expect("a pipe");
        let send = |kind: u8, words: [u64; 3]| {
            let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
            message.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
            nix::unistd::write(&write, &message).expect("writes");
        };
        let mut slot = EventSlot::open(&file).expect("maps");
        assert_eq!(slot.left(), None);
        send(EventSlot::REMOVE, [0x1000, 0x3000, 0]);
        let event = slot.next(read.as_fd(), 7, 3).expect("reads");
        assert!(matches!(event, Some(UffdEvent::Remove { start: 0x1000, end: 0x3000 })), "{event:?}");
        drop(slot);
        let mut slot = EventSlot::open(&file).expect("maps again");
        let kind = LeftKind::Remove { start: 0x1000, end: 0x3000 };
        assert_eq!(slot.left(), Some(LeftEvent { space: 7, sequence: 3, kind }));
        send(EventSlot::REMAP, [1, 2, 3]);
        slot.next(read.as_fd(), 8, 4).expect("reads");
        let kind = LeftKind::Remap { from: 1, to: 2, len: 3 };
        assert_eq!(slot.left(), Some(LeftEvent { space: 8, sequence: 4, kind }));
        // Nothing is left of a fault, nor where there was nothing to read.
        send(EventSlot::FAULT, [0, 0x5000, 0]);
        assert!(matches!(slot.next(read.as_fd(), 8, 5), Ok(Some(UffdEvent::Fault(0x5000)))));
        assert_eq!(slot.left(), None);
        assert!(matches!(slot.next(read.as_fd(), 8, 5), Ok(None)));
        assert_eq!(slot.left(), None);
    }
}
