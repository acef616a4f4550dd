//! Notices what leaves no trace in the page tables of tasks that share memory.
//!
//! What a task wrote stands in its own page tables. When it unmaps shared memory, executes another program or ends, they go,
//! and the memory stays. A mapping that was there in the last round is missed in the next one; but one may come and go between
//! two of them. The kernel keeps the areas of each address space in a maple tree, and has a tracepoint where it stores one
//! (`ma_write`, Linux 6.1): for mmap(2), shmat(2), mremap(2) and fork(2) alike. A small program there counts, by the
//! file's inode, the shared areas that are stored. Areas that are cut or joined are stored anew, and counted too, which does no harm.
//!
//! And a page that is made a hole (`MADV_REMOVE`) reads as zeroes from then on. The times of a file do not tell: a store through a
//! mapping changes them, too, whenever it faults (`fault_dirty_shared_page` in mm/memory.c). A second program counts the pages that leave a
//! file (`mm_filemap_delete_from_page_cache`).
//!
//! On a kernel that can't be watched so there is one thing to do: look at all of the shared memory while the container is frozen.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use longhaul_common::sys::bpf::{Counters, Instruction, trace};
use longhaul_common::sys::memory::{Mapping, PAGE};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::kernel_types::Types;
use crate::programs::{
    ADD_NUMBER, AND, FIRST, JUMP_IF, JUMP_UNLESS_EQUAL, LICENSE, LOAD, MOVE, STATE, SUBJECT, TREE, VALUE, count,
    end_if, instruction, read,
};

/// Counters: inodes share them by the lower bits of their numbers. A count that another inode caused costs a comparison of contents.
const COUNTERS: u32 = 4096;
/// `VM_SHARED` (linux/mm.h).
const VM_SHARED: i32 = 1 << 3;

/// See the module.
pub struct Watch {
    counters: Counters,
    _links: [OwnedFd; 2],
}

impl Watch {
    /// Counts from now on; nothing, where the kernel does not allow that.
    pub fn begin() -> Option<Self> {
        let begin = || {
            let counters = Counters::new(COUNTERS)?;
            let programs = Types::of_this_host().and_then(|types| {
                Some((stored_areas(&Places::of(&types)?, &counters), left_pages(&types, &counters)?))
            });
            let (areas, pages) = programs.ok_or_else(|| io::Error::other("the kernel's types are not as expected"))?;
            let links =
                [trace(c"ma_write", &areas, LICENSE)?, trace(c"mm_filemap_delete_from_page_cache", &pages, LICENSE)?];
            let watch = Self { counters, _links: links };
            watch.must_see()?;
            Ok::<_, io::Error>(watch)
        };
        let told = |error: &io::Error| {
            tracing::info!(%error, "this host can't watch shared memory: all of it is compared while the container is frozen");
        };
        begin().inspect_err(told).ok()
    }

    /// A number that changes when this inode is mapped shared, or loses a page.
    pub fn count(&self, inode: u64) -> u64 {
        self.counters.get((inode % u64::from(COUNTERS)) as usize)
    }

    /// A kernel that differs from what is known must not go unnoticed.
    fn must_see(&self) -> io::Result<()> {
        let file = File::from(memfd_create(c"longhaul", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(PAGE)?;
        file.write_all_at(b"x", 0)?;
        let inode = file.metadata()?.ino();
        let before = self.count(inode);
        drop(Mapping::of(&file, PAGE)?);
        let mapped = self.count(inode);
        file.set_len(0)?;
        if mapped == before || self.count(inode) == mapped {
            return Err(io::Error::other("a mapping went unseen"));
        }
        Ok(())
    }
}

/// Where members are in the kernel's structures, in bytes.
struct Places {
    tree: i16,
    address_space: i16,
    own_tree: i16,
    flags: i16,
    file: i16,
    inode: i16,
    number: i16,
}

impl Places {
    fn of(types: &Types) -> Option<Self> {
        let area = |name| types.member("vm_area_struct", name);
        Some(Self {
            tree: types.member("ma_state", "tree")?,
            address_space: area("vm_mm")?,
            own_tree: types.member("mm_struct", "mm_mt")?,
            flags: area("vm_flags")?,
            file: area("vm_file")?,
            inode: types.member("file", "f_inode")?,
            number: types.member("inode", "i_ino")?,
        })
    }
}

/// Called with `const char *function, struct ma_state *state, unsigned long pivot, void *entry`.
fn stored_areas(places: &Places, counters: &Counters) -> Vec<Instruction> {
    let mut program = vec![instruction(LOAD, SUBJECT, FIRST, 24, 0), instruction(LOAD, STATE, FIRST, 8, 0)];
    // An area, and not what other trees hold: its address space's tree is this one.
    program.extend(read(STATE, places.tree));
    program.push(instruction(MOVE, TREE, VALUE, 0, 0));
    program.extend(read(SUBJECT, places.address_space));
    program.push(instruction(ADD_NUMBER, VALUE, 0, 0, i32::from(places.own_tree)));
    program.push(end_if(JUMP_UNLESS_EQUAL, VALUE, TREE));
    program.extend(read(SUBJECT, places.flags));
    program.push(instruction(AND, VALUE, 0, 0, VM_SHARED));
    program.push(end_if(JUMP_IF, VALUE, 0));
    for (pointer, place) in [(SUBJECT, places.file), (VALUE, places.inode), (VALUE, places.number)] {
        program.extend(read(pointer, place));
    }
    count(program, counters, COUNTERS)
}

/// Called with `struct folio *folio`.
fn left_pages(types: &Types, counters: &Counters) -> Option<Vec<Instruction>> {
    let mut program = vec![instruction(LOAD, VALUE, FIRST, 0, 0)];
    for (structure, member) in [("folio", "mapping"), ("address_space", "host"), ("inode", "i_ino")] {
        program.extend(read(VALUE, types.member(structure, member)?));
    }
    Some(count(program, counters, COUNTERS))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where this host allows it: `cargo lab test` has root. It looks for itself whether it sees what it has to; that forks are seen,
    /// the test of the tracker finds out.
    #[test]
    fn the_kernel_can_be_watched() {
        assert!(Watch::begin().is_some() || !nix::unistd::geteuid().is_root());
    }
}
