//! Tells which parts of large files may have changed, by what the kernel does with the page cache.
//!
//! A database writes a few pages of a file of a gigabyte: its times say that it has changed, not where, and while the container is frozen
//! there is no time to read all of it. Two tracepoints tell what [`Watch`] wants to know: `writeback_dirty_folio` (`folio_account_dirtied`
//! in mm/page-writeback.c: each time a clean folio becomes dirty) and `mm_filemap_delete_from_page_cache`. Small programs there count, by the
//! file's inode and the place in it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use longhaul_common::sys::bpf::{Counters, Instruction, trace};
use longhaul_common::sys::memory::PAGE;
use longhaul_common::tree::{UNIT, Watch, can_be_watched, write_back};
use nix::libc;

use crate::memory::kernel_types::Types;
use crate::programs::{
    ADD, FIRST, LICENSE, LOAD, MOVE, MULTIPLY, SHIFT_RIGHT, STATE, SUBJECT, TREE, VALUE, count, instruction, read,
};

/// Counters, 64 bits each: parts of files share them by a hash. A count that another caused costs reading two megabytes.
const COUNTERS: u32 = 1 << 16;
/// Spreads inodes over them: odd, so that no two of the lower bits' inodes meet.
const SPREAD: i32 = 40_503;
const UNIT_PAGES: u64 = UNIT / PAGE;

/// See the module.
#[derive(Debug)]
pub struct FileWatch {
    counters: Counters,
    _links: [OwnedFd; 2],
}

impl FileWatch {
    /// Counts from now on; nothing where the kernel does not allow that or does otherwise than is known. That is found out with a file in
    /// `dir`, which must be on a filesystem that can be watched; it is written to the disk, which takes as long as that is busy.
    pub fn begin(dir: &Path) -> Option<Self> {
        let begin = || {
            let counters = Counters::new(COUNTERS)?;
            let programs =
                Types::of_this_host().and_then(|types| Some((dirtied(&types, &counters)?, left(&types, &counters)?)));
            let (dirtied, left) = programs.ok_or_else(|| io::Error::other("the kernel's types are not as expected"))?;
            let links = [
                trace(c"writeback_dirty_folio", &dirtied, LICENSE)?,
                trace(c"mm_filemap_delete_from_page_cache", &left, LICENSE)?,
            ];
            let watch = Self { counters, _links: links };
            watch.must_see(dir)?;
            Ok::<_, io::Error>(watch)
        };
        let told = |error: &io::Error| tracing::info!(%error, "large files that change are read whole on this host");
        begin().inspect_err(told).ok()
    }

    /// A kernel that differs from what is known must not go unnoticed.
    fn must_see(&self, dir: &Path) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir)?;
        if !can_be_watched(&file) {
            return Err(io::Error::other(format!("{} is on a filesystem of another kind", dir.display())));
        }
        let inode = file.metadata()?.ino();
        let mut last = self.count(inode, 1);
        let mut must_count = |what: &str, done: io::Result<()>| {
            done?;
            let now = self.count(inode, 1);
            let seen = now != std::mem::replace(&mut last, now);
            seen.then_some(()).ok_or_else(|| io::Error::other(format!("a page that {what} went unseen")))
        };
        must_count("became dirty", file.write_all_at(b"x", UNIT))?;
        write_back(&file)?;
        must_count("became dirty again", file.write_all_at(b"y", UNIT))?;
        must_count("left the page cache", file.set_len(0))
    }
}

impl Watch for FileWatch {
    fn count(&self, inode: u64, unit: u64) -> u64 {
        let hash = inode.wrapping_mul(SPREAD as u64).wrapping_add(unit);
        self.counters.get((hash % u64::from(COUNTERS)) as usize)
    }
}

/// Called with `struct folio *folio, struct address_space *mapping`.
fn dirtied(types: &Types, counters: &Counters) -> Option<Vec<Instruction>> {
    let program = vec![instruction(LOAD, SUBJECT, FIRST, 0, 0), instruction(LOAD, STATE, FIRST, 8, 0)];
    count_unit(program, types, counters)
}

/// Called with `struct folio *folio`.
fn left(types: &Types, counters: &Counters) -> Option<Vec<Instruction>> {
    let mut program = vec![instruction(LOAD, SUBJECT, FIRST, 0, 0)];
    program.extend(read(SUBJECT, types.member("folio", "mapping")?));
    program.push(instruction(MOVE, STATE, VALUE, 0, 0));
    count_unit(program, types, counters)
}

/// With the folio in `SUBJECT` and its file's `struct address_space` in `STATE`.
fn count_unit(mut program: Vec<Instruction>, types: &Types, counters: &Counters) -> Option<Vec<Instruction>> {
    program.extend(read(STATE, types.member("address_space", "host")?));
    program.extend(read(VALUE, types.member("inode", "i_ino")?));
    program.push(instruction(MOVE, TREE, VALUE, 0, 0));
    program.push(instruction(MULTIPLY, TREE, 0, 0, SPREAD));
    program.extend(read(SUBJECT, types.member("folio", "index")?));
    program.push(instruction(SHIFT_RIGHT, VALUE, 0, 0, UNIT_PAGES.trailing_zeros() as i32));
    program.push(instruction(ADD, VALUE, TREE, 0, 0));
    Some(count(program, counters, COUNTERS))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use longhaul_common::tree::{Scanner, TreeKind, Writer};
    use nix::fcntl::{FallocateFlags, fallocate};

    use super::*;

    const SIZE: u64 = 16 << 20;
    /// Of what is changed: in the middle of a unit.
    const AT: u64 = 5 << 20;

    /// Page-aligned memory.
    #[repr(align(4096))]
    struct Page([u8; PAGE as usize]);

    type Change = fn(&Path, &File) -> io::Result<()>;

    /// Whatever changes a file's content is seen, where this host allows it: `cargo lab test` has root.
    #[test]
    fn changes_of_every_kind_are_found() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
        let Some(watch) = FileWatch::begin(dir.path()) else {
            let is_watchable = File::open(dir.path()).is_ok_and(can_be_watched);
            return assert!(!is_watchable || !nix::unistd::geteuid().is_root());
        };
        let watch = Arc::new(watch);
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
            ("collapse", |_, file| {
                Ok(fallocate(file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, AT as i64, PAGE as i64)?)
            }),
            ("direct", |path, _| {
                let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path)?;
                direct.write_all_at(&Page([9; PAGE as usize]).0, AT)
            }),
        ];
        for (name, change) in changes {
            let (from, to) = (dir.path().join(name), dir.path().join(format!("{name} there")));
            [&from, &to].into_iter().for_each(|path| std::fs::create_dir(path).expect("a directory"));
            let path = from.join("table");
            std::fs::write(&path, (0..SIZE / 8).flat_map(u64::to_le_bytes).collect::<Vec<_>>()).expect("writes");
            let mut scanner = Scanner::new(&from, TreeKind::Plain, Vec::new()).expect("opens");
            scanner.watched_by(watch.clone());
            let mut writer = Writer::open(&to, TreeKind::Plain).expect("opens");
            let mut items = Vec::new();
            let mut take = |item| {
                items.push(item);
                Ok(())
            };
            scanner.pass(&mut take).expect("passes");
            change(&path, &OpenOptions::new().read(true).write(true).open(&path).expect("opens")).expect(name);
            scanner.last_pass(&mut take).expect("passes");
            items.into_iter().for_each(|item| writer.apply(item).expect("applies"));
            writer.finish().expect("ends");
            let read = |dir: &Path| std::fs::read(dir.join("table")).expect("reads");
            assert!(read(&from) == read(&to), "{name}: the copy differs");
        }
    }
}
