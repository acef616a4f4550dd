//! Large files that are written while they are copied, and watched by the kernel.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use longhaul_common::tree::{Scanner, TreeKind, Writer};
use longhaul_source::file_watch::FileWatch;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;

const SIZE: u64 = 16 << 20;

/// A writer at work during the passes, as a container is.
#[test]
fn what_is_written_during_passes_is_found() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    let Some(watch) = FileWatch::begin(dir.path()) else { return };
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    [&from, &to].into_iter().for_each(|path| std::fs::create_dir(path).expect("a directory"));
    let path = from.join("table");
    std::fs::write(&path, (0..SIZE / 8).flat_map(u64::to_le_bytes).collect::<Vec<_>>()).expect("writes");
    let mut scanner = Scanner::new(&from, TreeKind::Plain, Vec::new()).expect("opens");
    scanner.watched_by(Arc::new(watch));
    let mut writer = Writer::open(&to, TreeKind::Plain).expect("opens");
    for turn in 0..30_u64 {
        let ended = AtomicBool::new(false);
        let mut items = Vec::new();
        std::thread::scope(|scope| {
            let work = || write_at_random(&path, turn, &ended);
            let work = scope.spawn(work);
            for _ in 0..3 {
                let mut take = |item| {
                    items.push(item);
                    Ok(())
                };
                scanner.pass(&mut take).expect("passes");
            }
            ended.store(true, Ordering::Relaxed);
            work.join().expect("no panic");
            let mut take = |item| {
                items.push(item);
                Ok(())
            };
            scanner.last_pass(&mut take).expect("passes");
        });
        items.into_iter().for_each(|item| writer.apply(item).expect("applies"));
        writer.finish().expect("ends");
        let read = |dir: &Path| std::fs::read(dir.join("table")).expect("reads");
        assert!(read(&from) == read(&to), "the copies differ after turn {turn}");
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
