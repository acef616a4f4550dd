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
