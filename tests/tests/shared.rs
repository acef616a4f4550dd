//! Tracker, pump and page store against processes that share memory and write to it in every way there is: what has arrived
//! in the end must be what they have, byte for byte.

mod family;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use longhaul_common::sys::memory::PAGE;
use longhaul_source::memory::pump::Tasks;
use longhaul_source::memory::tracker::{Origin, SpacePages, Taken, Tracker, WriteProtect};
use nix::sys::signal::Signal;
use proptest::prelude::*;

use self::family::{Arriving, Family, Subject};

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
    /// A command for a page, and whether only a memfd can do it.
    Page {
        command: &'static str,
        only_memfd: bool,
        slot: usize,
        page: usize,
        value: u32,
    },
    Fork,
    End,
    /// A round. Times of files have to settle before it, so that nothing is read again for their sake.
    Round {
        settled: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let command = prop_oneof![
        10 => Just(("write", false)),
        3 => Just(("child", false)),
        2 => Just(("slip", false)),
        1 => Just(("remove", false)),
        1 => Just(("put", true)),
        2 => Just(("flash", true)),
    ];
    let slot = 0usize..3;
    // Few values, so that pages are often equal, and often zero.
    let value = prop_oneof![1 => Just(0u32), 4 => 1u32..5, 4 => any::<u32>()];
    prop_oneof![
        2 => (slot.clone(), 1usize..24, prop_oneof![Just("shared"), Just("memfd")])
            .prop_map(|(slot, pages, kind)| Step::Map { slot, pages, kind }),
        1 => slot.clone().prop_map(|slot| Step::Unmap { slot }),
        16 => (command, slot, 0usize..24, value)
            .prop_map(|((command, only_memfd), slot, page, value)| Step::Page { command, only_memfd, slot, page, value }),
        1 => Just(Step::Fork),
        1 => Just(Step::End),
        5 => any::<bool>().prop_map(|settled| Step::Round { settled }),
    ]
}

/// A mapping, as the test knows it.
#[derive(Debug, Clone)]
struct Mapped {
    address: u64,
    pages: usize,
    is_memfd: bool,
    /// A round has seen it.
    seen: bool,
}

impl Subject<Mapped> {
    fn obey(&mut self, step: &Step) {
        match step {
            Step::Map { slot, pages, kind } if !self.slots.contains_key(slot) => {
                let address = self.tell(&format!("map {slot} {pages} {kind}")).parse().expect("an address");
                let mapped = Mapped { address, pages: *pages, is_memfd: *kind == "memfd", seen: false };
                self.slots.insert(*slot, mapped);
            }
            Step::Unmap { slot } if self.slots.remove(slot).is_some() => drop(self.tell(&format!("unmap {slot}"))),
            Step::Page { command, only_memfd, slot, page, value }
                if self
                    .slots
                    .get(slot)
                    .is_some_and(|mapped| page < &mapped.pages && (mapped.is_memfd || !only_memfd)) =>
            {
                self.tell(&format!("{command} {slot} {page} {value}"));
            }
            _ => {}
        }
    }

    /// Its last moment.
    fn end(&self) {
        self.signal(Signal::SIGKILL, |stat| stat.is_empty() || stat.contains(") Z "));
    }

    fn inode_of(&self, mapped: &Mapped) -> u64 {
        let end = mapped.address + mapped.pages as u64 * PAGE;
        let path = format!("/proc/{}/map_files/{:x}-{end:x}", self.pid, mapped.address);
        std::fs::metadata(path).expect("is mapped").ino()
    }
}

/// A round's work.
fn take(arriving: &mut Arriving, taken: &Taken, tasks: Tasks) -> Vec<SpacePages> {
    arriving.pump.forget(&taken.ended);
    taken.ended.iter().for_each(|space| arriving.store.forget(*space));
    for (space, about) in &taken.objects {
        arriving.store.objects().declare(*space, about.clone()).expect("is made");
    }
    arriving.take(&taken.pages, tasks)
}

fn content(file: &File) -> Vec<u8> {
    let length = file.metadata().expect("is there").len();
    let mut bytes = vec![0; usize::try_from(length).expect("fits")];
    file.read_exact_at(&mut bytes, 0).expect("is readable");
    bytes
}

fn play(steps: &[(prop::sample::Index, Step)]) {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).expect("listens");
    let mut family: Family<Mapped> = Family::start(&listener, &socket, &socket);
    let mut tracker = WriteProtect::new(family.members[0].pid).expect("looks at the kernel");
    let mut arriving = Arriving::new(&dir.path().join("pages"));
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
            Step::End if who > 0 => family.members.remove(who).end(),
            Step::Round { settled } => {
                if *settled {
                    std::thread::sleep(Duration::from_millis(60));
                }
                let tasks = family.tasks();
                let taken = tracker.take(&tasks).expect("is tracked");
                let skipped = take(&mut arriving, &taken, Tasks::Running);
                tracker.put_back(skipped);
                let mapped = family.members.iter_mut().flat_map(|member| member.slots.values_mut());
                mapped.for_each(|mapped| mapped.seen = true);
            }
            step => family.members[who].obey(step),
        }
    }
    let tasks = family.tasks();
    family.members.iter().for_each(Subject::stop);
    let looked = tracker.look_frozen(&tasks).expect("is tracked");
    let pages = looked.objects.iter().map(|object| object.written.clone()).collect();
    take(&mut arriving, &Taken { pages, ..Taken::default() }, Tasks::Frozen);
    let mut followed = BTreeSet::new();
    for object in &looked.objects {
        followed.insert(object.inode);
        let Origin::Object(here) = &object.written.origin else { panic!("an object is no task") };
        let there = arriving.store.objects().file(object.written.space).expect("was declared");
        assert!(content(here) == content(there), "object {} has arrived as another", object.inode);
    }
    for member in &family.members {
        for mapped in member.slots.values().filter(|mapped| mapped.seen) {
            assert!(followed.contains(&member.inode_of(mapped)), "a round saw {mapped:?}, and it is not followed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_arrives_is_what_they_share(steps in prop::collection::vec((any::<prop::sample::Index>(), step()), 1..80)) {
        play(&steps);
    }
}
