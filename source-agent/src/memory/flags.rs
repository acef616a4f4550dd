//! What is special about each area of an address space: the `VmFlags` of `/proc/<pid>/smaps` (proc_pid_smaps(5)), without
//! reading smaps.
//!
//! For smaps the kernel walks over all page tables of a task, which takes some 15 ms for each GiB, and holds its lock on
//! the address space meanwhile. CRIU reads it for the flags alone, and only while the container is frozen. Each area has them in one
//! word, `vm_flags`. An iterator in the kernel reads those words, 0.1 ms for a thousand areas. What the bits mean
//! differs between kernels; but equal words have equal texts (`show_smap_vma_flags` in fs/proc/task_mmu.c looks at nothing else), so
//! the texts of smaps are learnt by their words while the container runs.
//!
//! Where the kernel allows no iterator (before Linux 6.1, without `CAP_BPF` and `CAP_PERFMON`, or locked down), or a word was never
//! seen, smaps is read as ever.

use std::collections::HashMap;
use std::fmt::Write;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use longhaul_common::sys::bpf::{Instruction, iterate_task, load_iterator};

use super::kernel_types::Types;
use super::maps::{Area, range_of};

/// What is special about an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// CRIU does not restore it lazily: locked, or of huge pages (`vma_entry_can_be_lazy` in criu/include/vma.h, 4.2). Its
    /// pages must be in place before the task runs.
    AtOnce,
    /// CRIU saves it itself: droppable memory, a shadow stack, a device's memory. And what a fork wipes: a child must not
    /// be given what its parent had there.
    Criu,
}

impl Mark {
    fn of(flags: &str) -> Option<Self> {
        const CRIU: [&str; 6] = ["dp", "ss", "wf", "io", "pf", "mm"];
        const AT_ONCE: [&str; 2] = ["lo", "ht"];
        let has = |wanted: &[&str]| flags.split_ascii_whitespace().any(|flag| wanted.contains(&flag));
        if has(&CRIU) { Some(Self::Criu) } else { has(&AT_ONCE).then_some(Self::AtOnce) }
    }
}

/// An area and its flags, as smaps writes them.
pub type Flagged = (Area, Arc<str>);

/// Whether flags can be had without smaps on this host.
pub fn are_cheap() -> bool {
    Words::of_this_host().is_some()
}

/// The areas of a task that have a mark, in order.
pub fn marks(pid: i32) -> io::Result<Vec<(Area, Mark)>> {
    let flagged = match Words::of_this_host() {
        Some(words) => words.flags(pid)?,
        None => read_smaps(pid)?,
    };
    Ok(marks_of(&flagged))
}

/// The areas of a list that have a mark.
pub fn marks_of(flagged: &[Flagged]) -> Vec<(Area, Mark)> {
    flagged.iter().filter_map(|(area, flags)| Some((area.clone(), Mark::of(flags)?))).collect()
}

/// Learns what there is to learn about a running task, so that [`summary`] knows it when the task is frozen.
pub fn learn(pid: i32) -> io::Result<()> {
    Words::of_this_host().map_or(Ok(()), |words| words.flags(pid).map(drop))
}

/// What CRIU wants to know from a frozen task's smaps: each area's first line and its flags (`parse_smaps` in criu/proc_parse.c,
/// 4.2). Nothing, if that can't be told without reading smaps.
pub fn summary(pid: i32) -> Option<String> {
    let words = Words::of_this_host()?;
    let flagged = words.known(&words.read(pid).ok()?)?;
    summarize(&std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?, &flagged)
}

/// Joins the text of maps with flags; nothing unless they are of the same areas.
pub fn summarize(maps: &str, flagged: &[Flagged]) -> Option<String> {
    let mut text = String::with_capacity(maps.len() * 2);
    let mut flagged = flagged.iter();
    for line in maps.lines() {
        // No area of the task: the kernel shows it to all (`get_gate_vma`), and CRIU passes over it.
        if line.ends_with("[vsyscall]") {
            continue;
        }
        let (area, flags) = flagged.next()?;
        if line.split(' ').next().and_then(range_of)? != *area {
            return None;
        }
        // Writing to a string can't fail.
        let _ = writeln!(text, "{line}\nVmFlags:{flags}");
    }
    flagged.next().is_none().then_some(text)
}

/// From smaps itself.
fn read_smaps(pid: i32) -> io::Result<Vec<Flagged>> {
    Ok(parse_smaps(&std::fs::read_to_string(format!("/proc/{pid}/smaps"))?))
}

/// From the text of smaps.
pub fn parse_smaps(text: &str) -> Vec<Flagged> {
    let mut current = None;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            found.extend(current.take().map(|area| (area, Arc::from(flags))));
        } else if let Some(area) = line.split(' ').next().and_then(range_of) {
            current = Some(area);
        }
    }
    found
}

/// Reads the words, and knows the texts of those it has met.
struct Words {
    iterator: OwnedFd,
    texts: Mutex<HashMap<u64, Arc<str>>>,
}

impl Words {
    /// Nothing, if this host allows no iterator.
    fn of_this_host() -> Option<&'static Self> {
        static WORDS: OnceLock<Option<Words>> = OnceLock::new();
        let load = || match load() {
            Ok(iterator) => Some(Words { iterator, texts: Mutex::default() }),
            Err(error) => {
                tracing::info!(%error, "flags of areas are read from smaps: no iterator over areas on this host");
                None
            }
        };
        WORDS.get_or_init(load).as_ref()
    }

    fn read(&self, pid: i32) -> io::Result<Vec<(Area, u64)>> {
        let mut iterator = iterate_task(&self.iterator, pid)?;
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        let mut words: Vec<(Area, u64)> = Vec::new();
        // The kernel's own buffer has this size: a read ends where it is full, or where the areas do.
        let mut records = vec![0; 32 << 10];
        loop {
            let length = iterator.read(&mut records)?;
            let reached = words.last().map_or(0, |(area, _)| area.end);
            for record in records[..length].chunks_exact(RECORD) {
                let area = number(&record[..8])..number(&record[8..16]);
                if area.start < words.last().map_or(0, |(last, _)| last.end) {
                    // From the beginning again: that was all.
                    return Ok(words);
                }
                words.push((area, number(&record[16..])));
            }
            if words.last().map_or(0, |(area, _)| area.end) == reached {
                return Ok(words);
            }
        }
    }

    /// The flags of areas, if all of their words have been met.
    fn known(&self, words: &[(Area, u64)]) -> Option<Vec<Flagged>> {
        let texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        words.iter().map(|(area, word)| Some((area.clone(), texts.get(word)?.clone()))).collect()
    }

    /// The flags of a running task's areas.
    fn flags(&self, pid: i32) -> io::Result<Vec<Flagged>> {
        let before = self.read(pid)?;
        if let Some(flagged) = self.known(&before) {
            return Ok(flagged);
        }
        let flagged = read_smaps(pid)?;
        // What is the same before and after was so in between.
        let after = self.read(pid)?;
        let find = |words: &[(Area, u64)], area: &Area| {
            let index = words.binary_search_by_key(&area.start, |(area, _)| area.start).ok()?;
            words.get(index).filter(|(found, _)| found == area).map(|(_, word)| *word)
        };
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        for (area, flags) in &flagged {
            if let (Some(one), Some(other)) = (find(&before, area), find(&after, area))
                && one == other
            {
                texts.entry(one).or_insert_with(|| flags.clone());
            }
        }
        Ok(flagged)
    }
}

/// Bytes the program writes for each area: its start, its end, its word.
const RECORD: usize = 24;

/// Loads the program that writes a record for each area.
fn load() -> io::Result<OwnedFd> {
    let found = Types::of_this_host().and_then(|types| {
        let member = |name| types.member("vm_area_struct", name);
        Some((
            program([member("vm_start")?, member("vm_end")?, member("vm_flags")?]),
            types.function("bpf_iter_task_vma")?,
        ))
    });
    let (program, iterator) = found.ok_or_else(|| io::Error::other("the kernel's types are not as expected"))?;
    // The kernel lends the helper that writes the records to programs under the GPL only. These sixteen instructions may be had under
    // it as well as under this project's licences.
    let iterator = load_iterator(&program, iterator, c"Dual MIT/GPL")?;
    // Before Linux 6.1 no task can be chosen: found out now, and not when it is needed.
    iterate_task(&iterator, std::process::id().cast_signed())?;
    Ok(iterator)
}

/// The program, for these places of `vm_start`, `vm_end` and `vm_flags` in a `struct vm_area_struct`. Called with a `struct
/// bpf_iter__task_vma`: three pointers, to the iterator's `meta` (whose first member is the file that is written), the task and the area; the
/// last is null at the end.
fn program(members: [i16; 3]) -> Vec<Instruction> {
    // BPF_LDX | BPF_MEM | BPF_DW, and so on: class, mode and width, linux/bpf_common.h.
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    const JUMP_IF: u8 = 0x15;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const SET: u8 = 0xb7;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    // Registers: a function's result, its first three arguments, one that calls keep, the end of the stack.
    let (result, first, second, third, area, stack) = (0, 1, 2, 3, 6, 10);
    /// `bpf_seq_write(file, data, length)`.
    const SEQ_WRITE: i32 = 127;
    let instruction =
        |code, to: u8, from: u8, offset, immediate| Instruction { code, registers: from << 4 | to, offset, immediate };
    let record = -(RECORD as i16);
    let mut program = vec![
        instruction(LOAD, area, first, 16, 0),
        // To the end.
        instruction(JUMP_IF, area, 0, 12, 0),
        instruction(LOAD, first, first, 0, 0),
        instruction(LOAD, first, first, 0, 0),
    ];
    for (place, member) in members.into_iter().enumerate() {
        program.push(instruction(LOAD, second, area, member, 0));
        program.push(instruction(STORE, stack, second, record + 8 * place as i16, 0));
    }
    program.extend([
        instruction(MOVE, second, stack, 0, 0),
        instruction(ADD, second, 0, 0, i32::from(record)),
        instruction(SET, third, 0, 0, RECORD as i32),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(SET, result, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_marked_by_their_flags() {
        let text = "1000-2000 rw-p 00000000 00:00 0 \nRss: 4 kB\nVmFlags: rd wr mr mw me ac sd \n\
                    2000-3000 rw-p 00000000 00:00 0 \nVmFlags: rd wr lo ac \n\
                    3000-4000 rw-p 00000000 00:00 0 \nVmFlags: rd wr lo wf \n";
        let expected = [(0x2000..0x3000, Mark::AtOnce), (0x3000..0x4000, Mark::Criu)];
        assert_eq!(marks_of(&parse_smaps(text)), expected);
    }

    #[test]
    fn a_summary_is_of_all_areas_or_none() {
        let maps =
            "1000-2000 rw-p 00000000 00:00 0 \n2000-3000 r-xp 00000000 00:00 0  [vdso]\nff-fff --xp 0 0 0 [vsyscall]\n";
        let flagged: [Flagged; 2] = [(0x1000..0x2000, " rd wr ".into()), (0x2000..0x3000, " rd ex ".into())];
        let text = summarize(maps, &flagged).expect("all known");
        assert_eq!(
            text,
            "1000-2000 rw-p 00000000 00:00 0 \nVmFlags: rd wr \n2000-3000 r-xp 00000000 00:00 0  [vdso]\nVmFlags: rd ex \n"
        );
        assert_eq!(summarize(maps, &flagged[..1]), None);
        assert_eq!(summarize("1000-2000 rw-p 00000000 00:00 0 \n", &flagged), None);
        assert_eq!(summarize(maps, &[flagged[0].clone(), (0x2000..0x4000, " ".into())]), None);
    }

    /// With the kernel's own words, where this host allows it: `cargo lab test` has root.
    #[test]
    fn words_say_what_smaps_says() {
        if !are_cheap() {
            assert!(!nix::unistd::geteuid().is_root(), "root can load an iterator on the hosts this is tested on");
            return;
        }
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("starts");
        let pid = child.id().cast_signed();
        // Until it has executed its program and waits.
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        while !(read("stat").contains("(sleep) S") && read("maps").contains("[vdso]")) {
            std::thread::yield_now();
        }
        learn(pid).expect("readable");
        let summary = summary(pid).expect("all is known");
        let mut smaps = parse_smaps(&std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("readable"));
        smaps.retain(|(area, _)| area.start < 1 << 63);
        child.kill().and_then(|()| child.wait()).expect("ends");
        assert!(smaps.len() > 5);
        assert_eq!(parse_smaps(&summary), smaps);
    }
}
