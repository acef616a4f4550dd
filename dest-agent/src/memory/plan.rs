//! What is still to be filled in, for every address space, and how the container's own doings change it.
//!
//! A plan is a pure value: it is told events and answers where a page's content lies. All events are kept in a
//! log, so that a filler that was killed can make the plan again.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::index::Index;

/// An address space: the container's own number of its first task, or beyond 2³² for one that was forked off later.
pub type SpaceId = u64;
/// Where the numbers of forked address spaces begin.
pub const FIRST_FORKED: SpaceId = 1 << 32;
/// Bytes of an event in the log.
pub const EVENT: usize = 40;

/// Something the container did to its memory. Pages by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A child has a copy of everything from now on.
    Fork {
        /// Its address space.
        child: SpaceId,
    },
    /// Content moved, and what was at its new place is gone.
    Move {
        /// From.
        from: u64,
        /// To.
        to: u64,
        /// How many pages.
        count: u64,
    },
    /// Content was given up or unmapped: whatever is there next is not ours to fill.
    Drop {
        /// First.
        start: u64,
        /// End.
        end: u64,
    },
}

/// An event as it stands in the log.
pub fn encode(space: SpaceId, event: Event) -> [u8; EVENT] {
    let (kind, a, b, c) = match event {
        Event::Fork { child } => (1u64, child, 0, 0),
        Event::Move { from, to, count } => (2, from, to, count),
        Event::Drop { start, end } => (3, start, end, 0),
    };
    let mut bytes = [0; EVENT];
    for (index, word) in [space, kind, a, b, c].into_iter().enumerate() {
        bytes[index * 8..index * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Reads one back.
pub fn decode(bytes: &[u8]) -> io::Result<(SpaceId, Event)> {
    let mut words = bytes.chunks_exact(8).map(|eight| u64::from_le_bytes(eight.try_into().unwrap_or_default()));
    let mut next = || words.next().unwrap_or_default();
    let (space, kind, a, b, c) = (next(), next(), next(), next(), next());
    let event = match kind {
        1 => Event::Fork { child: a },
        2 => Event::Move { from: a, to: b, count: c },
        3 => Event::Drop { start: a, end: b },
        _ => return Err(io::Error::other("the filler's log is damaged")),
    };
    Ok((space, event))
}

/// One address space.
#[derive(Debug, Clone)]
struct Space {
    index: Arc<Index>,
    /// By first page: end, and where its slots begin in the index.
    segments: BTreeMap<u64, (u64, usize)>,
    /// Everything before this page was looked at by the background; what moves to before it moves it back.
    cursor: u64,
}

/// A run of pages whose contents lie in consecutive slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub page: u64,
    /// The first entry of the index: a slot, with [`SHARED`](super::index::SHARED), or [`ZERO`](super::index::ZERO).
    pub entry: u32,
    /// How many.
    pub count: u64,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    spaces: BTreeMap<SpaceId, Space>,
}

impl Plan {
    /// Adds an address space that was restored.
    pub fn add(&mut self, space: SpaceId, index: Arc<Index>) {
        let segments = index.ranges.iter().map(|(range, at)| (range.start, (range.end, *at))).collect();
        self.spaces.insert(space, Space { index, segments, cursor: 0 });
    }

    /// Whether it knows an address space.
    pub fn knows(&self, space: SpaceId) -> bool {
        self.spaces.contains_key(&space)
    }

    /// Forgets one that has ended or is complete.
    pub fn remove(&mut self, space: SpaceId) {
        self.spaces.remove(&space);
    }

    /// Takes an event in.
    pub fn apply(&mut self, space: SpaceId, event: Event) {
        if let Event::Fork { child } = event {
            if let Some(parent) = self.spaces.get(&space) {
                // What the parent has, the child has; what the parent lacks, both lack.
                let copy = parent.clone();
                self.spaces.insert(child, copy);
            }
            return;
        }
        let Some(space) = self.spaces.get_mut(&space) else { return };
        match event {
            Event::Fork { .. } => {}
            Event::Drop { start, end } => space.cut(start..end),
            Event::Move { from, to, count } => {
                let moved: Vec<_> = space
                    .segments
                    .range(..from + count)
                    .filter(|(_, (end, _))| *end > from)
                    .map(|(start, (end, at))| {
                        let first = (*start).max(from);
                        (first - from + to, (*end).min(from + count) - from + to, at + (first - start) as usize)
                    })
                    .collect();
                space.cut(from..from + count);
                space.cut(to..to + count);
                for (start, end, at) in moved {
                    space.segments.insert(start, (end, at));
                    space.cursor = space.cursor.min(start);
                }
            }
        }
    }

    /// Where a page's content lies, with as many pages after it as follow in the store, up to `most`; nothing if it has none.
    pub fn find(&self, space: SpaceId, page: u64, most: u64) -> Option<Run> {
        let space = self.spaces.get(&space)?;
        let (start, (end, at)) = space.segments.range(..=page).next_back()?;
        if page >= *end {
            return None;
        }
        Some(space.run(page, *end, at + (page - start) as usize, most))
    }

    /// The next run the background should fill, which counts as done from now on; nothing when all are.
    pub fn next(&mut self, space: SpaceId, most: u64) -> Option<Run> {
        let space = self.spaces.get_mut(&space)?;
        let within = space.segments.range(..=space.cursor).next_back().filter(|(_, (end, _))| *end > space.cursor);
        let (start, (end, at)) = within.or_else(|| space.segments.range(space.cursor..).next())?;
        let page = space.cursor.max(*start);
        let run = space.run(page, *end, at + (page - start) as usize, most);
        space.cursor = page + run.count;
        Some(run)
    }

    /// Has the background come back to a page.
    pub fn come_back(&mut self, space: SpaceId, page: u64) {
        if let Some(space) = self.spaces.get_mut(&space) {
            space.cursor = space.cursor.min(page);
        }
    }
}

impl Space {
    /// The run that begins at `page`, entry `at` of the index, and ends at `end` at the latest.
    fn run(&self, page: u64, end: u64, at: usize, most: u64) -> Run {
        use super::index::ZERO;
        let entries = self.index.slots.get(at..).unwrap_or_default();
        let first = entries.first().copied().unwrap_or(ZERO);
        let most = usize::try_from(most.min(end - page)).unwrap_or(usize::MAX).max(1);
        let follows = |(offset, entry): (usize, &u32)| {
            if first == ZERO { *entry == ZERO } else { *entry == first.wrapping_add(offset as u32) && *entry != ZERO }
        };
        let count = entries.iter().take(most).enumerate().take_while(|pair| follows(*pair)).count();
        Run { page, entry: first, count: count.max(1) as u64 }
    }

    fn cut(&mut self, gone: Range<u64>) {
        let touched: Vec<_> = self
            .segments
            .range(..gone.end)
            .filter(|(_, (end, _))| *end > gone.start)
            .map(|(start, (end, at))| (*start, *end, *at))
            .collect();
        for (start, end, at) in touched {
            self.segments.remove(&start);
            if start < gone.start {
                self.segments.insert(start, (gone.start, at));
            }
            if end > gone.end {
                self.segments.insert(gone.end, (end, at + (gone.end - start) as usize));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::index::{SHARED, ZERO};
    use super::*;

    fn plan() -> Plan {
        let mut plan = Plan::default();
        let index = Index { ranges: vec![(10..14, 0), (20..22, 4)], slots: vec![100, 101, 5 | SHARED, ZERO, 7, 8] };
        plan.add(1, Arc::new(index));
        plan
    }

    fn all(plan: &mut Plan, space: SpaceId) -> Vec<Run> {
        std::iter::from_fn(|| plan.next(space, 64)).collect()
    }

    #[test]
    fn runs_follow_the_store() {
        let mut plan = plan();
        let run = |page, entry, count| Run { page, entry, count };
        assert_eq!(all(&mut plan, 1), [run(10, 100, 2), run(12, 5 | SHARED, 1), run(13, ZERO, 1), run(20, 7, 2)]);
        assert_eq!(plan.find(1, 11, 64), Some(run(11, 101, 1)));
        assert_eq!(plan.find(1, 15, 64), None);
        assert_eq!(plan.next(1, 64), None);
    }

    #[test]
    fn a_child_has_what_its_parent_had_at_the_fork() {
        let mut plan = plan();
        plan.apply(1, Event::Drop { start: 10, end: 12 });
        plan.apply(1, Event::Fork { child: FIRST_FORKED });
        plan.apply(1, Event::Drop { start: 20, end: 22 });
        assert_eq!(all(&mut plan, FIRST_FORKED).len(), 3);
        assert_eq!(all(&mut plan, 1).len(), 2);
    }

    #[test]
    fn the_log_keeps_events() {
        let events =
            [Event::Fork { child: 7 }, Event::Move { from: 1, to: 2, count: 3 }, Event::Drop { start: 4, end: 9 }];
        for event in events {
            assert_eq!(decode(&encode(5, event)).expect("reads"), (5, event));
        }
        decode(&[0xff; EVENT]).expect_err("no event");
    }

    proptest! {
        /// Against a plain map from page to slot.
        #[test]
        fn events_do_what_the_kernel_did(events in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..60, 1u64..20), 0..30)) {
            let slots: Vec<u32> = (0..40).map(|page| if page % 7 == 0 { ZERO } else { 500 + page / 3 * 2 + page }).collect();
            let mut plan = Plan::default();
            plan.add(1, Arc::new(Index { ranges: vec![(0..25, 0), (30..45, 25)], slots: slots.clone() }));
            let mut model: HashMap<u64, u32> = (0..25).chain(30..45).zip(slots).collect();
            for (is_move, a, b, count) in events {
                // mremap(2) refuses places that overlap.
                if is_move && a.abs_diff(b) >= count {
                    let taken: Vec<_> = (0..count).map(|offset| model.remove(&(a + offset))).collect();
                    for (offset, slot) in (0..count).zip(taken) {
                        model.remove(&(b + offset));
                        if let Some(slot) = slot { model.insert(b + offset, slot); }
                    }
                    plan.apply(1, Event::Move { from: a, to: b, count });
                } else {
                    (a..a + count).for_each(|page| { model.remove(&page); });
                    plan.apply(1, Event::Drop { start: a, end: a + count });
                }
            }
            let mut found = HashMap::new();
            while let Some(run) = plan.next(1, 8) {
                for offset in 0..run.count {
                    let entry = if run.entry == ZERO { ZERO } else { run.entry + offset as u32 };
                    prop_assert_eq!(found.insert(run.page + offset, entry), None);
                    prop_assert_eq!(plan.find(1, run.page + offset, 1).map(|run| run.entry), Some(entry));
                }
            }
            prop_assert_eq!(found, model);
        }
    }
}
