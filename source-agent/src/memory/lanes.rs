//! Several page connections side by side: one keeps at most a core of each host busy. A page belongs to one lane for good,
//! so that its contents arrive in the order they were sent.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::try_join_all;
use longhaul_common::pages::{Buffers, MAX_STREAMS, OBJECTS, Object};
use longhaul_common::sys::memory::PAGE;
use longhaul_common::tls::{Identity, PeerAddress};

use super::link::{Link, LinkError, Meter, Pacer};
use super::precopy::MemoryError;
use super::pump::{Pump, PumpError, Pumped, Stop, Tasks};
use super::tracker::{Content, SpacePages};

/// Bytes of neighbouring pages that stay together: a huge page.
const BLOCK: u64 = 2 << 20;
/// Lanes unless told otherwise (QEMU's `multifd-channels` is the same): even where two hosts share two cores, a second one is
/// faster by a fifth, because one works while the other waits.
const USUAL: usize = 2;

/// What memory may take of the link.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowed {
    /// The most bytes a second.
    pub bandwidth: Option<u64>,
    /// Connections.
    pub streams: Option<u32>,
}

impl Allowed {
    /// How many connections are made. A link that is to be spared needs one.
    fn lanes(self) -> u32 {
        let own = || std::thread::available_parallelism().map_or(1, |count| count.get().min(USUAL)) as u32;
        self.streams.unwrap_or_else(|| if self.bandwidth.is_some() { 1 } else { own() }).clamp(1, MAX_STREAMS)
    }
}

/// One connection and what feeds it.
struct Lane {
    pump: Arc<Mutex<Pump>>,
    link: Link,
}

/// See the module.
pub struct Lanes {
    all: Vec<Lane>,
    stop: Stop,
}

impl Lanes {
    /// Connects all of them.
    pub async fn connect(
        identity: &Identity,
        address: &PeerAddress,
        migration: &str,
        allowed: Allowed,
    ) -> Result<Self, LinkError> {
        let (count, stop) = (allowed.lanes(), Stop::default());
        let limit = allowed.bandwidth.map(|limit| limit / u64::from(count));
        let lanes = (0..count).map(async |stream| {
            let buffers = Buffers::default();
            let link = Link::connect(identity, address, (migration, stream), limit, buffers.clone()).await?;
            // Packing would spend a core of a host that is to be spared.
            let pump = Pump::new(buffers, link.link_pace(), allowed.bandwidth.is_none(), count, stop.clone());
            Ok::<_, LinkError>(Lane { pump: Arc::new(Mutex::new(pump)), link })
        });
        let all = try_join_all(lanes).await?;
        Ok(Self { all, stop })
    }

    /// The container is frozen: from now on as fast as they can, and without patience.
    pub fn hurry(&self) {
        self.all.iter().for_each(|lane| lane.link.hurry());
    }

    /// Changes how fast they may be together, until they have to hurry.
    pub fn pacers(&self) -> Pacers {
        Pacers(self.all.iter().map(|lane| lane.link.pacer()).collect())
    }

    /// Reads how much was sent.
    pub fn meter(&self) -> Meters {
        Meters(self.all.iter().map(|lane| lane.link.meter()).collect())
    }

    /// Ends a round that is under way early, once it is set.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Names pages that the destination has to fetch later. What was sent of them before does not count any more.
    pub async fn owe(&self, pages: &[SpacePages]) -> Result<(), MemoryError> {
        let count = self.all.len() as u64;
        let all = self.all.iter().enumerate().map(async |(number, lane)| {
            let share = share(pages, number as u64, count);
            lane.run(move |pump, link| pump.owe(&share, &link).map(|()| Pumped::default())).await
        });
        try_join_all(all).await.map(drop)
    }

    /// Sends pages, each over its lane, and waits until all are stored. On failure nothing says which of them are.
    pub async fn send(&self, pages: &[SpacePages], tasks: Tasks) -> Result<Pumped, MemoryError> {
        let count = self.all.len() as u64;
        let all = self.all.iter().enumerate().map(async |(number, lane)| {
            let share = share(pages, number as u64, count);
            lane.run(move |pump, link| pump.send(&share, tasks, &link)).await
        });
        Ok(try_join_all(all).await?.into_iter().fold(Pumped::default(), Pumped::and))
    }

    /// Address spaces have ended. Nothing may be under way: what comes next may be of others with the same numbers.
    pub async fn forget(&self, spaces: &[u32]) -> Result<(), MemoryError> {
        if spaces.is_empty() {
            return Ok(());
        }
        let all = self.all.iter().enumerate().map(async |(number, lane)| {
            let spaces = spaces.to_vec();
            let work = move |pump: &mut Pump, link| {
                pump.forget(&spaces);
                if number == 0 {
                    pump.tell_ended(&spaces, &link)?;
                }
                Ok(Pumped::default())
            };
            lane.run(work).await
        });
        try_join_all(all).await.map(drop)
    }

    /// Tells the destination of shared memory before any of it comes, over whichever lane.
    pub async fn declare(&self, objects: &[(u32, Object)]) -> Result<(), MemoryError> {
        if objects.is_empty() {
            return Ok(());
        }
        let all = self.all.iter().map(async |lane| {
            let objects = objects.to_vec();
            lane.run(move |pump, link| pump.declare(&objects, &link).map(|()| Pumped::default())).await
        });
        try_join_all(all).await.map(drop)
    }

    /// Tells which pages count in the end, and that this is the end.
    pub async fn finish(&self, mut content: Vec<Content>) -> Result<(), MemoryError> {
        let count = self.all.len() as u32;
        // The first lane's.
        let mut shares = self.all.iter().map(|_| std::mem::take(&mut content)).collect::<Vec<_>>().into_iter();
        let all = self.all.iter().map(|lane| (lane, shares.next().unwrap_or_default())).map(async |(lane, content)| {
            lane.run(move |pump, link| pump.finish(&content, count, &link).map(|()| Pumped::default())).await
        });
        try_join_all(all).await.map(drop)
    }
}

impl Lane {
    async fn run(
        &self,
        work: impl FnOnce(&mut Pump, tokio::sync::mpsc::Sender<super::pump::Frame>) -> Result<Pumped, PumpError>
        + Send
        + 'static,
    ) -> Result<Pumped, MemoryError> {
        let (pump, frames) = (self.pump.clone(), self.link.frames());
        let pumped =
            tokio::task::spawn_blocking(move || work(&mut pump.lock().unwrap_or_else(PoisonError::into_inner), frames));
        match pumped.await.map_err(|_| MemoryError::Panicked)? {
            Ok(pumped) => {
                self.link.settle().await?;
                Ok(pumped)
            }
            // The link knows better why nothing could be sent.
            Err(PumpError::Closed) => Err(self.link.failure().await.into()),
            Err(error) => Err(MemoryError::Pump(error)),
        }
    }
}

/// Changes how fast all lanes may be.
#[derive(Debug, Clone)]
pub struct Pacers(Vec<Pacer>);

impl Pacers {
    /// To so many bytes a second together; nothing for no limit.
    pub fn set_limit(&self, limit: Option<u64>) {
        let each = limit.map(|limit| (limit / self.0.len().max(1) as u64).max(1));
        self.0.iter().for_each(|pacer| pacer.set_limit(each));
    }
}

/// Reads how much all lanes have written.
#[derive(Debug, Clone)]
pub struct Meters(Vec<Meter>);

impl Meters {
    /// Bytes so far, headers included.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(Meter::bytes).sum()
    }

    /// Pages that were named so far and are stored.
    pub fn stored_pages(&self) -> u64 {
        self.0.iter().map(Meter::stored_pages).sum()
    }
}

/// The pages of one lane.
fn share(pages: &[SpacePages], lane: u64, lanes: u64) -> Vec<SpacePages> {
    if lanes == 1 {
        return pages.to_vec();
    }
    let of = |space: &SpacePages| {
        // The same addresses of all tasks over one lane, which alone knows what it has sent: a forked task's pages are often its parent's.
        let shift = if space.space < OBJECTS { 0 } else { u64::from(space.space) };
        let mine = |block: &Range<u64>| (block.start / BLOCK + shift) % lanes == lane;
        let ranges = space.ranges.iter().flat_map(|range| blocks(range.clone())).filter(mine).collect();
        SpacePages { origin: space.origin.clone(), space: space.space, ranges }
    };
    pages.iter().map(of).collect()
}

/// A range, cut at the borders of blocks.
fn blocks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    debug_assert!(range.start.is_multiple_of(PAGE), "ranges are of whole pages");
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min((start / BLOCK + 1) * BLOCK);
        let block = start..end;
        start = end;
        (!block.is_empty()).then_some(block)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tracker::Origin;
    use super::*;

    #[test]
    fn every_page_has_one_lane_and_keeps_it() {
        let first = SpacePages {
            origin: Origin::Task(1),
            space: 7,
            ranges: vec![PAGE..5 * BLOCK, 9 * BLOCK + PAGE..9 * BLOCK + 3 * PAGE],
        };
        let later = SpacePages { ranges: vec![2 * BLOCK - PAGE..2 * BLOCK + PAGE], ..first.clone() };
        let lane_of = |pages: &SpacePages, address: u64| {
            let has = |lane: &u64| {
                share(std::slice::from_ref(pages), *lane, 3)[0].ranges.iter().any(|r| r.contains(&address))
            };
            let lanes: Vec<u64> = (0..3).filter(has).collect();
            assert_eq!(lanes.len(), 1, "{address:#x}");
            lanes[0]
        };
        let bytes: u64 = (0..3).map(|lane| share(std::slice::from_ref(&first), lane, 3)[0].bytes()).sum();
        assert_eq!(bytes, first.bytes());
        for address in [2 * BLOCK - PAGE, 2 * BLOCK] {
            assert_eq!(lane_of(&first, address), lane_of(&later, address));
        }
        assert_ne!(lane_of(&first, 2 * BLOCK - PAGE), lane_of(&first, 2 * BLOCK));
    }

    #[test]
    fn the_user_decides_how_many_there_are() {
        assert_eq!(Allowed { streams: Some(3), bandwidth: None }.lanes(), 3);
        assert_eq!(Allowed { streams: Some(100), bandwidth: None }.lanes(), MAX_STREAMS);
        assert_eq!(Allowed { streams: None, bandwidth: Some(5) }.lanes(), 1);
    }
}
