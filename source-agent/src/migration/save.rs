//! While the container is frozen: everything of it is saved, sent, and restored on the destination, stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::CgroupError;
use tokio::sync::{mpsc, oneshot};

use super::commit::{Restored, note_timings};
use super::prepare::Prepared;
use super::quiesce::quiesce;
use super::{IMAGE_QUEUE, MigrationError, Trip};
use crate::checkpoint::{CheckpointError, images_dir};
use crate::images::{ImageSender, Sent};
use crate::memory::filter;
use crate::memory::serve::Serving;
use crate::peer::{Pages, Session};
use crate::push::{Pass, Round};
use crate::report::PostCopyReport;

/// Both runtimes wait for their word.
pub(super) struct Ready {
    pub(super) prepared: Prepared,
    pub(super) pages: Pages,
    /// CRIU waits for what it has to leave out of memory.
    pub(super) awaited: Option<filter::Awaited>,
}

/// Freezes that are tried while a task can't be stopped: a disk that is busy for longer than these is in trouble.
const FREEZES: u32 = 8;
/// How long the container goes on between two of them: it can do some of what it was kept from.
const BETWEEN_FREEZES: Duration = Duration::from_millis(300);

impl Ready {
    pub(super) async fn freeze(mut self, trip: &Trip) -> Result<Frozen, MigrationError> {
        let mut rollback = trip.rollback.lock().await;
        let live = &self.prepared.inspection.live;
        let (freezer, ports, init) = (live.freezer.clone(), live.ports.clone(), live.init);
        rollback.freezer = Some(freezer.clone());
        rollback.ports.clone_from(&ports);
        drop(rollback);
        if let Some(memory) = &self.prepared.memory {
            // A task that waits for processor time can't be frozen, and CRIU would save the quota.
            memory.give_back();
        }
        let mut attempt = 0;
        loop {
            attempt += 1;
            trip.job.note(|report| report.freezes = attempt);
            let at = Instant::now();
            let (freezer, ports) = (freezer.clone(), ports.clone());
            let frozen = tokio::task::spawn_blocking(move || quiesce(&freezer, &ports, init)).await;
            match frozen.map_err(|_| MigrationError::Panicked)? {
                Err(MigrationError::Cgroup(error @ CgroupError::Stuck { .. })) if attempt < FREEZES => {
                    tracing::warn!(attempt, %error, "the container goes on for a moment");
                }
                done => {
                    done?;
                    trip.step("freeze", at.elapsed());
                    let Self { prepared, pages, awaited } = self;
                    return Ok(Frozen { prepared, pages, awaited, at, serving: None });
                }
            }
            // What it does until the next attempt must not fall into the downtime.
            trip.still_wanted()?;
            tokio::time::sleep(BETWEEN_FREEZES).await;
            self.prepared.catch_up(trip).await?;
            trip.still_wanted()?;
        }
    }
}

/// Nothing in the container runs.
pub(super) struct Frozen {
    pub(super) prepared: Prepared,
    pages: Pages,
    awaited: Option<filter::Awaited>,
    /// Since when.
    pub(super) at: Instant,
    /// Sends what is owed of its memory.
    pub(super) serving: Option<Serving>,
}

impl Frozen {
    /// The destination's half.
    pub(super) fn session(&self) -> Arc<Session> {
        self.prepared.session.clone()
    }

    /// CRIU's dump, its images, the last pages, and the last change of the files: all at once.
    pub(super) async fn save(mut self, trip: &Trip) -> Result<Saved, MigrationError> {
        self.prepared.recheck_mapped()?;
        let Prepared { peer, inspection, trees, memory, .. } = &mut self.prepared;
        // CRIU begins at once, and waits for what is found out about the memory where it wants it; no longer than this lasts.
        let awaited = self.awaited.take();
        let finish = Arc::new(AtomicBool::new(false));
        let (messages, receiver) = mpsc::channel(IMAGE_QUEUE);
        let (dir, migration, flag) = (images_dir(&trip.dir), trip.migration.clone(), finish.clone());
        // Also when this is cut short: the sending thread must not wait for images for ever.
        let _finish_at_the_end = FinishOnDrop(finish.clone());
        let sender = tokio::task::spawn_blocking(move || ImageSender::new(&dir, &migration, messages, flag)?.run());
        let start = Instant::now();
        let dump = async {
            let dumped = dump(trip, &inspection.live.ports).await;
            trip.step("criu-dump", start.elapsed());
            finish.store(true, Ordering::Release);
            dumped
        };
        let images = async {
            let pushed = peer.push_images(receiver).await;
            let sent = sender.await.map_err(|_| MigrationError::Panicked)?;
            // The destination's reason comes first: the sender only saw its channel close.
            pushed?;
            trip.step("images", start.elapsed());
            Ok::<Sent, MigrationError>(sent?)
        };
        // CRIU waits for the look at the memory, and not for the files.
        let (looked, has_looked) = oneshot::channel::<()>();
        let files = async {
            // Either way: it fails where there is nothing to wait for.
            let _ = has_looked.await;
            let round = trees.push(peer, &trip.migration, Pass::Last).await;
            trip.step("rootfs-delta", start.elapsed());
            Ok::<Round, MigrationError>(round?)
        };
        let pages = async {
            let looked = looked;
            let Some((memory, awaited)) = memory.as_mut().zip(awaited.as_ref()) else { return Ok((None, None)) };
            let last = memory.look_frozen(&trip.dir, awaited.answer()).await?;
            drop(looked);
            trip.step("memory-scan", start.elapsed());
            let round = memory.send_last(&last).await?;
            trip.step("memory-pages", start.elapsed());
            Ok::<_, MigrationError>((Some(last), Some(round)))
        };
        // The first failure ends them all: with a destination that is gone, the container must not stay frozen for the rest.
        let ((), sent, mut round, (last, last_round)) = tokio::try_join!(dump, images, files, pages)?;
        drop(awaited);
        if let (Some(memory), Some(last)) = (memory.as_ref().filter(|memory| memory.owed_pages > 0), last.as_ref()) {
            // From now on: tasks may want a page while CRIU puts them together.
            let may_pack = trip.options.bandwidth.is_none();
            let (identity, address) = (&trip.env.identity, &trip.address);
            self.serving = Some(Serving::start(identity, address, &trip.migration, last.sources(), may_pack));
            let owed_pages = memory.owed_pages;
            trip.job.note(|report| {
                report.memory.postcopy = Some(PostCopyReport { owed_pages, ..PostCopyReport::default() });
            });
        }
        let left_out = last.as_ref().map(|last| last.check(&trip.dir)).transpose()?;
        if let Some(left_out) = &left_out {
            let flags_from = if left_out.smaps { "iterator" } else { "smaps" };
            trip.job.note(|report| report.memory.flags_from = Some(flags_from.to_owned()));
        }
        if made_links(&trip.dir) {
            // CRIU linked unlinked files back into the tree for the restore: they have to be there, too.
            let links = trees.push(peer, &trip.migration, Pass::Last).await?;
            round.bytes += links.bytes;
        }
        trip.job.note(|report| {
            let pages = last_round.as_ref().map_or(0, |round| round.wire_bytes);
            report.bytes_on_wire += sent.bytes + round.bytes + pages;
            report.rootfs_passes = trees.passes();
            report.memory.last_round = last_round;
        });
        let shared = left_out.map(|left_out| left_out.objects).unwrap_or_default();
        Ok(Saved { frozen: self, sent, shared })
    }
}

/// Tells the thread that sends images that no more will come.
pub(super) struct FinishOnDrop(Arc<AtomicBool>);

impl Drop for FinishOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// CRIU's dump; at its word the container is cut off the network.
async fn dump(trip: &Trip, ports: &[longhaul_common::net::Port]) -> Result<(), MigrationError> {
    let mut rollback = trip.rollback.lock().await;
    rollback.ports = ports.to_vec();
    let Some(checkpoint) = rollback.checkpoint.as_mut() else {
        return Err(CheckpointError::Runtime("its process is gone".to_owned()).into());
    };
    let cut_off = || {
        ports
            .iter()
            .try_for_each(longhaul_common::net::Port::part)
            .map_err(|error| CheckpointError::Criu(longhaul_common::chain(&error)))
    };
    Ok(checkpoint.save(cut_off).await?)
}

/// Whether CRIU made `link_remap.*` files: it then says so in an image that is more than its 8 bytes of magic numbers.
fn made_links(dir: &std::path::Path) -> bool {
    let image = images_dir(dir).join("remap-fpath.img");
    image.metadata().is_ok_and(|metadata| metadata.len() > 8)
}

/// Everything of the container is at the destination.
pub(super) struct Saved {
    frozen: Frozen,
    sent: Sent,
    /// Shared memory that CRIU left out of its images, by its inodes.
    shared: Vec<u64>,
}

impl Saved {
    pub(super) async fn restore(self, trip: &Trip) -> Result<Restored, MigrationError> {
        let start = Instant::now();
        let (timings, stored_pages) =
            self.frozen.prepared.session.restore(self.sent, self.frozen.pages, self.shared).await?;
        trip.step("restore", start.elapsed());
        trip.job.note(|report| report.memory.stored_pages = stored_pages);
        note_timings(trip, timings);
        Ok(Restored { frozen: self.frozen })
    }
}
