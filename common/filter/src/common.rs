//! Pages that tasks share copy-on-write, because one was forked off the other.
//!
//! Only fork(2) gives two tasks one page, and CRIU forks tasks when nothing is there yet of memory that is filled in later: each
//! would end with pages of its own. So what several tasks have in common is there before them. The agent names it, it is read from the
//! page store into **CRIU's own process** while that waits for its request, which is before the container is frozen, and every task is
//! forked off that process. When a task maps its areas (`premap_priv_vmas` in criu/mem.c, 4.2: where memory is filled in later, all private ones, in
//! their order), the pages take the place of the empty area that they belong to; a task that has the area from its parent
//! gets it with them, as CRIU does it with every area. Of both, each task gives up what is not its own.
//!
//! Two files, of lines; all numbers are hexadecimal. The first is beside the page store and says which pages; the second is among the images, for
//! each task:
//!
//! ```text
//! area 7f0000000000 7f0040000000        area 7f0000000000 7f0020000000 3 c
//! pages 7f0000000000 4711 100           gone 7f0000001000 7f0000003000
//! ```
//!
//! An `area` of the second is one of the task's, with its protection; `c` if such pages may take its place, `f` if it is a file's, privately mapped:
//! then they are written over the file's own. What is not as the file says (another CRIU) is left as CRIU made it, without pages from anywhere
//! but the images. Of a file's area nobody relies on what was written: the agent looks at it afterwards.

use std::ffi::{CStr, CString, c_int, c_void};
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use super::pages::parts_within;

/// In the environment: the page store's directory, if there are such pages.
const STORE: &str = "LONGHAUL_COMMON";
/// The file that names them.
const TABLE: &str = "common";
/// The file of slots.
const SLOTS: &str = "slots";
/// The file that says that they are there: `ok`, or why they are not.
const DONE: &str = "common-done";
/// The file that says that nobody waits any more: the container is about to be frozen.
const STOP: &str = "common-stop";
/// Among the images, with the task's number.
const OF_TASK: &str = "common-";
/// What images of a task's pages are called.
const PAGES_OF: &[u8] = b"pagemap-";
const PAGE: usize = 4096;

/// Pages of the container's addresses, at a place in this process.
#[derive(Debug, Clone)]
struct Piece {
    range: Range<usize>,
    place: usize,
}

/// An area that a task is about to map.
#[derive(Debug)]
struct Area {
    range: Range<usize>,
    protection: c_int,
    kind: Kind,
}

/// What may be done with an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Pages take its place.
    Anonymous,
    /// Pages are written into it.
    File,
    /// Nothing.
    Other,
}

/// A task that maps its areas, one after the other.
#[derive(Debug)]
struct Task {
    areas: std::vec::IntoIter<Area>,
    /// In order.
    gone: Vec<Range<usize>>,
    /// Where the next one goes, once the first is mapped.
    next: Option<usize>,
    /// It does something else than the file says.
    strange: bool,
}

#[derive(Debug, Default)]
struct State {
    pieces: Vec<Piece>,
    /// Which pages there are, in order.
    runs: Vec<Range<usize>>,
    task: Option<Task>,
}

static STATE: Mutex<State> = Mutex::new(State { pieces: Vec::new(), runs: Vec::new(), task: None });
/// There were pieces once: a task's parent may have had some.
static HAD: AtomicBool = AtomicBool::new(false);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the pages there, the first time.
pub(crate) fn take_in() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Some(store) = std::env::var_os(STORE) else { return };
        // SAFETY: CRIU has no other thread yet.
        unsafe { std::env::remove_var(STORE) };
        let store = Path::new(&store);
        let said = match read_in(store) {
            Ok((pieces, runs)) => {
                HAD.store(true, Ordering::Relaxed);
                let mut state = state();
                (state.pieces, state.runs) = (pieces, runs);
                "ok".to_owned()
            }
            Err(error) => error,
        };
        let _ = fs::write(store.join(DONE), said);
    });
}

fn read_in(store: &Path) -> Result<(Vec<Piece>, Vec<Range<usize>>), String> {
    let failed = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let table = fs::read_to_string(store.join(TABLE)).map_err(|error| failed(TABLE, error))?;
    let slots = File::open(store.join(SLOTS)).map_err(|error| failed(SLOTS, error))?;
    // A huge page would bring others with it.
    super::keep_pages_small();
    let (mut pieces, mut runs): (Vec<Piece>, Vec<Range<usize>>) = (Vec::new(), Vec::new());
    let read = || {
        for line in table.lines() {
            let words = line.split(' ').collect::<Vec<_>>();
            match words.as_slice() {
                ["area", start, end] => {
                    let range = number(start)?..number(end)?;
                    let place = reserve(range.len())?;
                    pieces.push(Piece { range, place });
                }
                ["pages", ..] if store.join(STOP).exists() => return Err("it takes too long".to_owned()),
                ["pages", address, slot, count] => {
                    let (address, length) = (number(address)?, number(count)? * PAGE);
                    let piece = pieces.last().filter(|piece| holds(&piece.range, &(address..address + length)));
                    let piece = piece.ok_or_else(|| format!("{line}: in no area"))?;
                    let place = (piece.place + address - piece.range.start) as *mut u8;
                    // SAFETY: within the piece, which is this function's alone and writable.
                    let content = unsafe { std::slice::from_raw_parts_mut(place, length) };
                    let offset = (number(slot)? * PAGE) as u64;
                    slots.read_exact_at(content, offset).map_err(|error| failed(line, error))?;
                    match runs.last_mut() {
                        // In one piece: that is how they are written.
                        Some(run) if run.end == address && address > piece.range.start => run.end += length,
                        _ => runs.push(address..address + length),
                    }
                }
                _ => return Err(format!("{line}: not understood")),
            }
        }
        Ok(())
    };
    match { read }() {
        Ok(()) => Ok((pieces, runs)),
        Err(error) => {
            for Piece { range, place } in pieces {
                // SAFETY: nobody else knows it.
                unsafe { libc::munmap(place as *mut c_void, range.len()) };
            }
            Err(error)
        }
    }
}

fn reserve(length: usize) -> Result<usize, String> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new place.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
    if place == libc::MAP_FAILED { Err(std::io::Error::last_os_error().to_string()) } else { Ok(place as usize) }
}

fn number(word: &str) -> Result<usize, String> {
    usize::from_str_radix(word, 16).map_err(|_| format!("{word}: no number"))
}

fn holds(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// CRIU has opened an image in a directory: with that of its pages a task begins to map its areas.
pub(crate) fn opened(dir: c_int, path: &CStr) {
    let number = |path: &[u8]| {
        let number = path.strip_prefix(PAGES_OF)?.strip_suffix(b".img")?;
        number.iter().all(u8::is_ascii_digit).then(|| String::from_utf8_lossy(number).into_owned())
    };
    if HAD.load(Ordering::Relaxed) {
        // CRIU has tried out meanwhile whether it may ask for it, and taken it back (`kerndat_has_thp_disable`, criu/kerndat.c).
        super::keep_pages_small();
    }
    // What is opened below, with the state locked, ends here.
    let Some(task) = number(path.to_bytes()) else { return };
    if HAD.load(Ordering::Relaxed) {
        let mut state = state();
        match read_task(dir, &task) {
            Some((areas, gone)) => {
                state.task = Some(Task { areas: areas.into_iter(), gone, next: None, strange: false });
            }
            // It may have what is not its own from its parent.
            None => super::end_at_once(),
        }
    }
}

fn read_task(dir: c_int, task: &str) -> Option<(Vec<Area>, Vec<Range<usize>>)> {
    let path = CString::new(format!("{OF_TASK}{task}")).ok()?;
    // SAFETY: a C string.
    let fd = unsafe { libc::openat(dir, path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    let mut text = String::new();
    // SAFETY: just opened, and nobody else's.
    unsafe { File::from_raw_fd(fd) }.read_to_string(&mut text).ok()?;
    let (mut areas, mut gone) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let words = line.split(' ').collect::<Vec<_>>();
        match words.as_slice() {
            ["area", start, end, protection, rest @ ..] => areas.push(Area {
                range: number(start).ok()?..number(end).ok()?,
                protection: number(protection).ok()? as c_int,
                kind: match rest {
                    ["c"] => Kind::Anonymous,
                    ["f"] => Kind::File,
                    _ => Kind::Other,
                },
            }),
            ["gone", start, end] => gone.push(number(start).ok()?..number(end).ok()?),
            _ => return None,
        }
    }
    Some((areas, gone))
}

impl Task {
    /// The area that is mapped at a place, if all is as it should be.
    fn mapped(&mut self, place: usize, length: usize) -> Option<Area> {
        let area = self.areas.next().filter(|area| area.range.len() == length);
        self.strange |= area.is_none();
        self.next = Some(place + length);
        area.filter(|_| !self.strange)
    }

    /// Whether it may be one of its areas that is mapped at a place: they are side by side.
    fn expects(&self, place: usize) -> bool {
        self.areas.len() > 0 && self.next.is_none_or(|next| next == place)
    }

    /// Gives up what is not the task's of an area that is at a place now.
    fn give_up(&self, area: &Area, place: usize) {
        for gone in parts_within(&self.gone, &area.range) {
            discard(place + gone.start - area.range.start, gone.len());
        }
    }
}

/// What must not stay.
fn discard(place: usize, length: usize) {
    // SAFETY: CRIU has just mapped it, and has put nothing there yet that it does not put there again.
    if unsafe { libc::madvise(place as *mut c_void, length, libc::MADV_DONTNEED) } < 0 {
        super::end_at_once();
    }
}

/// CRIU has mapped an area at a place of its choice. False if that is gone now.
pub(crate) fn mapped(place: usize, length: usize, protection: c_int) -> bool {
    let mut state = state();
    let State { pieces, runs, task: current } = &mut *state;
    let Some(task) = current.as_mut().filter(|task| task.expects(place)) else { return true };
    let Some(area) = task.mapped(place, length) else { return true };
    if area.kind == Kind::Other || protection != area.protection | libc::PROT_WRITE {
        return true;
    }
    if area.kind == Kind::File {
        for pages in parts_within(runs, &area.range) {
            write_over(pieces, &pages, place + pages.start - area.range.start);
        }
        task.give_up(&area, place);
        return true;
    }
    let Some(index) = pieces.iter().position(|piece| holds(&piece.range, &area.range)) else { return true };
    let piece = pieces.swap_remove(index);
    let from = piece.place + area.range.start - piece.range.start;
    // SAFETY: the pages are this library's, and the place is that of an area that nobody has used yet.
    let taken = unsafe { super::move_pages(from as *mut c_void, length, place as *mut c_void) };
    let rest = [piece.range.start..area.range.start, area.range.end..piece.range.end];
    for range in rest.into_iter().filter(|range| !range.is_empty()) {
        let place = piece.place + range.start - piece.range.start;
        pieces.push(Piece { range, place });
    }
    if taken as usize != place {
        return false;
    }
    // SAFETY: it has just been mapped.
    if unsafe { libc::mprotect(taken, length, protection) } < 0 {
        super::end_at_once();
    }
    task.give_up(&area, place);
    true
}

/// Writes pages over those of a file that is mapped at a place. By the kernel: a page beyond the file's end would be the end of CRIU.
fn write_over(pieces: &[Piece], pages: &Range<usize>, place: usize) {
    // One that an area was made of is not there any more.
    let Some(piece) = pieces.iter().find(|piece| holds(&piece.range, pages)) else { return };
    let from =
        libc::iovec { iov_base: (piece.place + pages.start - piece.range.start) as *mut c_void, iov_len: pages.len() };
    let to = libc::iovec { iov_base: place as *mut c_void, iov_len: pages.len() };
    // SAFETY: both are mapped, as long as the kernel finds them to be; the place is an area that nobody has used yet.
    unsafe { libc::process_vm_writev(libc::getpid(), &raw const from, 1, &raw const to, 1, 0) };
}

/// CRIU has moved to a place what a task has from its parent.
pub(crate) fn inherited(place: usize, length: usize) {
    let mut state = state();
    let Some(task) = state.task.as_mut().filter(|task| task.expects(place)) else { return };
    match task.mapped(place, length) {
        Some(area) => task.give_up(&area, place),
        None => discard(place, length),
    }
}
