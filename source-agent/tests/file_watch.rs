//! Large files that are watched by the kernel: what changes in them between passes, and during them.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use longhaul_common::tree::{Scanner, TreeItem, TreeKind, Writer};
use longhaul_source::file_watch::FileWatch;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::statfs::{EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};

const SIZE: u64 = 16 << 20;
/// Of what is changed: in the middle of a unit.
const AT: u64 = 5 << 20;
const PAGE: usize = 4096;

/// Watches, where this host allows it: `cargo lab test` has root.
fn watch(dir: &Path) -> Option<Arc<FileWatch>> {
    let watch = FileWatch::begin(dir);
    if watch.is_none() {
        // Not asked of the code under test, which was wrong about that once.
        let filesystem = fstatfs(File::open(dir).expect("opens")).expect("a filesystem").filesystem_type();
        let is_watchable = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC].contains(&filesystem);
        assert!(!is_watchable || !nix::unistd::geteuid().is_root(), "this host's files are not watched");
    }
    watch.map(Arc::new)
}

/// A large file, what finds its changes, and its copy.
struct Pair {
    from: PathBuf,
    to: PathBuf,
    scanner: Scanner,
    writer: Writer,
    items: Vec<TreeItem>,
}

impl Pair {
    fn new(dir: &Path, watch: Arc<FileWatch>) -> Self {
        let (from, to) = (dir.join("from"), dir.join("to"));
        [&from, &to].into_iter().for_each(|path| std::fs::create_dir_all(path).expect("a directory"));
        std::fs::write(from.join("table"), (0..SIZE / 8).flat_map(u64::to_le_bytes).collect::<Vec<_>>())
            .expect("writes");
        let mut scanner = Scanner::new(&from, TreeKind::Plain, Vec::new()).expect("opens");
        scanner.watched_by(watch);
        let writer = Writer::open(&to, TreeKind::Plain).expect("opens");
        Self { from, to, scanner, writer, items: Vec::new() }
    }

    fn path(&self) -> PathBuf {
        self.from.join("table")
    }

    fn pass(&mut self, is_last: bool) {
        let mut take = |item| {
            self.items.push(item);
            Ok(())
        };
        let done = if is_last { self.scanner.last_pass(&mut take) } else { self.scanner.pass(&mut take) };
        done.expect("passes");
    }

    fn assert_equal(&mut self, after: &str) {
        self.items.drain(..).for_each(|item| self.writer.apply(item).expect("applies"));
        self.writer.finish().expect("ends");
        let read = |dir: &Path| std::fs::read(dir.join("table")).expect("reads");
        assert!(read(&self.from) == read(&self.to), "{after}: the copy differs");
    }
}

/// Page-aligned memory.
#[repr(align(4096))]
struct Page([u8; PAGE]);

type Change = fn(&Path, &File) -> io::Result<()>;

#[test]
fn changes_of_every_kind_are_found() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    let Some(watch) = watch(dir.path()) else { return };
    let changes: [(&str, Change); 8] = [
        ("write", |_, file| file.write_all_at(b"new", AT)),
        ("append", |_, file| file.write_all_at(b"new", SIZE)),
        ("truncate", |_, file| file.set_len(AT)),
        ("truncate and grow", |_, file| file.set_len(AT).and_then(|()| file.set_len(SIZE))),
        ("hole", |_, file| {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            Ok(fallocate(file, flags, AT as i64, PAGE as i64)?)
        }),
        ("zeroes", |_, file| Ok(fallocate(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, AT as i64, PAGE as i64)?)),
        ("collapse", |_, file| Ok(fallocate(file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, AT as i64, PAGE as i64)?)),
        ("direct", |path, _| {
            let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path)?;
            direct.write_all_at(&Page([9; PAGE]).0, AT)
        }),
    ];
    for (name, change) in changes {
        let mut pair = Pair::new(&dir.path().join(name), watch.clone());
        pair.pass(false);
        let file = OpenOptions::new().read(true).write(true).open(pair.path()).expect("opens");
        change(&pair.path(), &file).expect(name);
        pair.pass(true);
        pair.assert_equal(name);
    }
}

/// A writer at work during the passes, as a container is.
#[test]
fn what_is_written_during_passes_is_found() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    let Some(watch) = watch(dir.path()) else { return };
    let mut pair = Pair::new(dir.path(), watch);
    let path = pair.path();
    for turn in 0..30_u64 {
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let work = || write_at_random(&path, turn, &ended);
            let work = scope.spawn(work);
            (0..3).for_each(|_| pair.pass(false));
            ended.store(true, Ordering::Relaxed);
            work.join().expect("no panic");
        });
        pair.pass(true);
        pair.assert_equal(&format!("turn {turn}"));
    }
}

/// Changes a file in all the ways that a program has, until it is told to end.
fn write_at_random(path: &Path, seed: u64, ended: &AtomicBool) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("opens");
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a new mapping at a place of the kernel's choice.
    let mapping = unsafe { libc::mmap(std::ptr::null_mut(), SIZE as usize, prot, flags, file.as_raw_fd(), 0) };
    assert_ne!(mapping, libc::MAP_FAILED);
    let mut state = seed + 1;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    while !ended.load(Ordering::Relaxed) {
        let (at, value) = (random(SIZE - 8), random(1 << 32).to_le_bytes());
        match random(64) {
            0 => fallocate(&file, punch, at as i64, (random(1 << 20) + 1) as i64).expect("punches"),
            1 => file.sync_data().expect("syncs"),
            2..20 => file.write_all_at(&value, at).expect("writes"),
            // SAFETY: within the mapping, which is of the file's whole length.
            _ => unsafe { mapping.cast::<u8>().add(at as usize).write_volatile(value[0]) },
        }
    }
    // SAFETY: mapped above with this length.
    unsafe { libc::munmap(mapping, SIZE as usize) };
}
