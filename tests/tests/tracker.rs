//! Tracker, pump and page store against a process that changes its memory at random: what has arrived in the end must be
//! what the process has.

mod family;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use longhaul_common::sys::memory::PAGE;
use longhaul_dest::memory::index::{Due, Index, SHARED, ZERO};
use longhaul_dest::memory::store::{PageStore, SLOTS};
use longhaul_source::memory::flags::marks;
use longhaul_source::memory::maps::Area;
use longhaul_source::memory::pump::Tasks;
use longhaul_source::memory::tracker::{Frozen, Origin, SpacePages, Tracker, WriteProtect};
use proptest::prelude::*;

use self::family::{Arriving, Family, Subject};

const PAGE_BYTES: usize = PAGE as usize;

/// What a process is told to do.
#[derive(Debug, Clone)]
enum Step {
    Map {
        slot: usize,
        pages: usize,
        kind: &'static str,
    },
    Unmap {
        slot: usize,
    },
    Resize {
        slot: usize,
        pages: usize,
    },
    Write {
        slot: usize,
        page: usize,
        value: u64,
    },
    Drop {
        slot: usize,
        page: usize,
    },
    Lock {
        slot: usize,
    },
    Fork,
    /// A round.
    Round,
}

fn step() -> impl Strategy<Value = Step> {
    let slot = 0usize..4;
    let page = 0usize..24;
    // Few values, so that pages are often equal, and often zero.
    let value = prop_oneof![1 => Just(0u64), 4 => 1u64..5, 4 => any::<u32>().prop_map(u64::from)];
    prop_oneof![
        2 => (slot.clone(), 1usize..24, prop_oneof![Just("anonymous"), Just("file")])
            .prop_map(|(slot, pages, kind)| Step::Map { slot, pages, kind }),
        1 => slot.clone().prop_map(|slot| Step::Unmap { slot }),
        2 => (slot.clone(), 1usize..24).prop_map(|(slot, pages)| Step::Resize { slot, pages }),
        12 => (slot.clone(), page.clone(), value).prop_map(|(slot, page, value)| Step::Write { slot, page, value }),
        3 => (slot.clone(), page).prop_map(|(slot, page)| Step::Drop { slot, page }),
        4 => slot.prop_map(|slot| Step::Lock { slot }),
        1 => Just(Step::Fork),
        4 => Just(Step::Round),
    ]
}

/// A mapping, as the test knows it.
#[derive(Debug, Clone)]
struct Mapped {
    address: u64,
    pages: usize,
    is_file: bool,
    /// A round has seen it.
    seen: bool,
    /// What was written and not dropped.
    written: BTreeMap<usize, u64>,
}

impl Subject<Mapped> {
    fn obey(&mut self, step: &Step) {
        match step {
            Step::Map { slot, pages, kind } => {
                if !self.slots.contains_key(slot) {
                    let address = self.tell(&format!("map {slot} {pages} {kind}")).parse().expect("an address");
                    let is_file = *kind == "file";
                    let mapped = Mapped { address, pages: *pages, is_file, seen: false, written: BTreeMap::new() };
                    self.slots.insert(*slot, mapped);
                }
            }
            Step::Unmap { slot } => {
                if self.slots.remove(slot).is_some() {
                    self.tell(&format!("unmap {slot}"));
                }
            }
            Step::Resize { slot, pages } => {
                if self.slots.contains_key(slot) {
                    let address = self.tell(&format!("resize {slot} {pages}")).parse().expect("an address");
                    // Neighbours are one area to the kernel, and one of which a part moves is followed no more
                    // (`userfaultfd_reset_ctx` in mm/userfaultfd.c): until the next round it is CRIU's.
                    self.slots.values_mut().for_each(|mapped| mapped.seen = false);
                    let mapped = self.slots.get_mut(slot).expect("is mapped");
                    (mapped.address, mapped.pages) = (address, *pages);
                    mapped.written.retain(|page, _| page < pages);
                }
            }
            Step::Write { slot, page, value } => {
                if self.has(*slot, *page) {
                    self.tell(&format!("write {slot} {page} {value}"));
                    self.slots.get_mut(slot).expect("is mapped").written.insert(*page, *value);
                }
            }
            Step::Drop { slot, page } => {
                // What is locked can't be dropped (madvise(2)).
                if self.has(*slot, *page) && !self.is_locked() {
                    self.tell(&format!("drop {slot} {page}"));
                    self.slots.get_mut(slot).expect("is mapped").written.remove(page);
                }
            }
            Step::Lock { slot } => {
                if self.slots.contains_key(slot) {
                    self.tell(&format!("lock {slot}"));
                }
            }
            Step::Fork | Step::Round => {}
        }
    }

    fn has(&self, slot: usize, page: usize) -> bool {
        self.slots.get(&slot).is_some_and(|mapped| page < mapped.pages)
    }

    fn is_locked(&self) -> bool {
        longhaul_source::memory::maps::status_bytes(self.pid, "VmLck") > 0
    }

    fn page(&self, address: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_BYTES];
        let mem = std::fs::File::open(format!("/proc/{}/mem", self.pid)).expect("opens");
        mem.read_exact_at(&mut bytes, address).expect("is readable");
        bytes
    }
}

/// Pages by address, as the index of the store has them.
fn arrived(dir: &Path, due: Due, space: u32, ranges: &[Area], store: &PageStore) -> BTreeMap<u64, Vec<u8>> {
    let pages: Vec<_> = ranges.iter().map(|range| range.start / PAGE..range.end / PAGE).collect();
    store.write_index(due, space, &pages).expect("nothing is missing");
    let index = Index::read(&Index::path(dir, due, space)).expect("reads");
    let slots = std::fs::File::open(dir.join(SLOTS)).expect("opens");
    let mut found = BTreeMap::new();
    for (range, first) in &index.ranges {
        for (page, entry) in range.clone().zip(&index.slots[*first..]) {
            let mut bytes = vec![0; PAGE_BYTES];
            if *entry != ZERO {
                slots.read_exact_at(&mut bytes, u64::from(entry & !SHARED) * PAGE).expect("is there");
            }
            found.insert(page * PAGE, bytes);
        }
    }
    found
}

fn check(subject: &Subject<Mapped>, frozen: &Frozen, arrived: &BTreeMap<u64, Vec<u8>>) {
    for (address, bytes) in arrived {
        assert!(*bytes == subject.page(*address), "page {address:#x} of {} is another", subject.pid);
    }
    // CRIU fills locked areas before anything could come later.
    for (area, mark) in marks(subject.pid).expect("readable") {
        let late = frozen.later.iter().any(|later| later.start < area.end && area.start < later.end);
        assert!(!late, "{area:x?} is {mark:?}, and pages of it would come later: {:x?}", frozen.later);
    }
    for mapped in subject.slots.values() {
        let end = mapped.address + mapped.pages as u64 * PAGE;
        let is_followed = frozen.followed.iter().any(|area| area.start <= mapped.address && end <= area.end);
        assert!(is_followed || !mapped.seen, "a round saw {mapped:?}, and it is not followed: {:?}", frozen.followed);
        for (page, value) in mapped.written.iter().filter(|_| is_followed) {
            let address = mapped.address + *page as u64 * PAGE;
            let bytes = arrived.get(&address);
            assert!(bytes.is_some(), "page {page} of {mapped:?} was written and does not count");
            let is_right = bytes.is_some_and(|bytes| bytes[..8] == value.to_ne_bytes());
            assert!(is_right, "page {page} of {mapped:?} arrived with something else");
        }
        let at_once = frozen.at_once.iter().any(|area| area.start < end && mapped.address < area.end);
        assert!(
            !is_followed || !mapped.is_file || mapped.written.is_empty() || at_once,
            "a file's page could come late"
        );
    }
}

fn play(steps: &[(prop::sample::Index, Step)]) {
    let dir = tempfile::tempdir().expect("a directory");
    let (socket, file) = (dir.path().join("socket"), dir.path().join("file"));
    std::fs::write(&file, vec![0xab; 32 * PAGE_BYTES]).expect("writes");
    let listener = UnixListener::bind(&socket).expect("listens");
    let mut family: Family<Mapped> = Family::start(&listener, &socket, &file);
    let init = family.members[0].pid;
    let mut tracker = WriteProtect::new(init).expect("looks at the kernel");
    let pages = dir.path().join("pages");
    let mut arriving = Arriving::new(&pages);
    for (who, step) in steps {
        let members = family.members.len();
        let who = who.index(members);
        match step {
            Step::Fork if members < 4 => {
                family.members[who].tell("fork");
                let mut slots = family.members[who].slots.clone();
                slots.values_mut().for_each(|mapped| mapped.seen = false);
                family.members.push(Subject::accept(&listener, slots));
            }
            Step::Round => {
                let tasks = family.tasks();
                let taken = tracker.take(&tasks).expect("is tracked").pages;
                let skipped = arriving.take(&taken, Tasks::Running);
                tracker.put_back(skipped);
                family
                    .members
                    .iter_mut()
                    .flat_map(|member| member.slots.values_mut())
                    .for_each(|mapped| mapped.seen = true);
            }
            step => family.members[who].obey(step),
        }
    }
    let tasks = family.tasks();
    family.members.iter().for_each(Subject::stop);
    let frozen = tracker.look_frozen(&tasks).expect("is tracked").tasks;
    let written = |frozen: &Frozen| SpacePages {
        origin: Origin::Task(frozen.pid),
        space: frozen.space,
        ranges: frozen.written.clone(),
    };
    arriving.take(&frozen.iter().map(written).collect::<Vec<_>>(), Tasks::Frozen);
    for frozen in &frozen {
        let subject = family.members.iter().find(|member| member.pid == frozen.pid).expect("is one of them");
        let mut all = arrived(&pages, Due::Later, frozen.space, &frozen.later, &arriving.store);
        all.extend(arrived(&pages, Due::AtOnce, frozen.space, &frozen.at_once, &arriving.store));
        check(subject, frozen, &all);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_arrives_is_what_the_process_has(steps in prop::collection::vec((any::<prop::sample::Index>(), step()), 1..80)) {
        play(&steps);
    }
}
