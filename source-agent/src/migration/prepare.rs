//! From the first word to the destination until both runtimes wait: the container runs all the time.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use longhaul_common::cgroup::Freezer;
use longhaul_common::config::{SourceConfig, TrackerChoice};
use longhaul_common::criu::rpc;
use longhaul_common::description::Network;
use longhaul_common::net::{Netns, neighbours};
use longhaul_common::obstacle::Obstacle;
use longhaul_common::sys::memory::{PAGE, tracks_writes};
use longhaul_common::tree::UNDER_WAY;
use longhaul_proto::peer::Offer;

use super::save::Ready;
use super::{MAX_LIVE_PASSES, MOST_UNSETTLED, MigrationError, SETTLED_BYTES, Trip};
use crate::checkpoint::{Armed, Externals, images_dir};
use crate::file_watch::FileWatch;
use crate::inspect::{InspectError, Inspection, inspect};
use crate::memory::lanes::{Allowed, Lanes, Pacers};
use crate::memory::precopy::{MemoryError, Precopy, Step, mib};
use crate::memory::predict::{Limits, Outlook};
use crate::memory::soft_dirty::{self, SoftDirty};
use crate::memory::throttle::Throttling;
use crate::memory::tracker::{TrackError, Tracker, WriteProtect};
use crate::memory::{filter, flags};
use crate::options::{DEFAULT_MAX_DOWNTIME, DEFAULT_MAX_ROUNDS, PostCopy, TimeoutAction, Tuning};
use crate::peer::{Pages, Peer, Session};
use crate::push::{Pass, PushError, Round, Trees};
use crate::report::{MemoryReport, millis};

/// Both sides fit together.
pub(super) struct Negotiated {
    pub(super) peer: Peer,
}

impl Negotiated {
    pub(super) async fn preflight(self, trip: &Trip) -> Result<Accepted, MigrationError> {
        let hint = "looking at the container; a layer that was never seen is read whole";
        trip.progress("preflight", hint.to_owned(), 0, 0);
        let inspection = inspect(&trip.env.config, &trip.env.digests, &trip.container, &trip.options).await?;
        trip.job.note(|report| report.memory_bytes = inspection.description.memory_bytes);
        let session = Arc::new(self.peer.session().await?);
        trip.rollback.lock().await.session = Some(session.clone());
        let own = !inspection.obstacles.is_empty();
        let offer = Offer {
            migration_id: trip.migration.clone(),
            epoch: trip.epoch,
            description: inspection.description.to_json().into(),
            // With obstacles of our own the answer is only for the list.
            dry_run: trip.options.dry_run || own,
        };
        let verdict = session.offer(offer).await?;
        let obstacles: Vec<Obstacle> = inspection.obstacles.iter().cloned().chain(verdict.obstacles).collect();
        if !obstacles.is_empty() {
            return Err(MigrationError::Refused(obstacles));
        }
        Ok(Accepted { peer: self.peer, session, inspection, missing_layers: verdict.missing_layers })
    }
}

/// How long it may take to find out whether files can be watched, on a disk that is busy.
const WATCH_WITHIN: Duration = Duration::from_secs(1);

/// Counts what changes in files from now on; nothing where that can't be done, or is not wanted.
async fn watch_files(config: &SourceConfig) -> Option<Arc<FileWatch>> {
    if !config.count_file_changes {
        return None;
    }
    let state = config.paths.state.clone();
    let begun = tokio::task::spawn_blocking(move || FileWatch::begin(&state));
    match tokio::time::timeout(WATCH_WITHIN, begun).await {
        Ok(begun) => begun.ok().flatten().map(Arc::new),
        Err(_) => {
            tracing::info!(
                "large files that change are read whole: the disk is too busy to try whether they can be watched"
            );
            None
        }
    }
}

/// Both sides have looked at the container, and nothing is in the way.
pub(super) struct Accepted {
    peer: Peer,
    session: Arc<Session>,
    inspection: Inspection,
    missing_layers: Vec<String>,
}

impl Accepted {
    pub(super) async fn prepare(self, trip: &Trip) -> Result<Prepared, MigrationError> {
        let (prepared, watch) = tokio::join!(self.session.prepare(), watch_files(&trip.env.config));
        prepared?;
        std::fs::create_dir_all(images_dir(&trip.dir))
            .map_err(|source| InspectError::File { path: trip.dir.clone(), source })?;
        let (description, init) = (&self.inspection.description, self.inspection.live.init);
        let trees = Trees::new(description, init, &self.missing_layers, watch.as_ref()).map_err(PushError::from)?;
        Ok(Prepared { peer: self.peer, session: self.session, inspection: self.inspection, trees, memory: None })
    }
}

/// The destination has made the container's place.
pub(super) struct Prepared {
    pub(super) peer: Peer,
    pub(super) session: Arc<Session>,
    pub(super) inspection: Inspection,
    pub(super) trees: Trees,
    /// Its memory on its way; nothing where all of it has to go while frozen.
    pub(super) memory: Option<Precopy>,
}

impl Prepared {
    pub(super) async fn presync(mut self, trip: &Trip) -> Result<Synced, MigrationError> {
        for _ in 0..MAX_LIVE_PASSES {
            let round = self.push_live(trip).await?;
            let what = format!("pass {}: {} items", self.trees.passes(), round.items);
            trip.progress("rootfs-presync", what, round.bytes, 0);
            if round.bytes <= SETTLED_BYTES {
                if round.unsettled_bytes > MOST_UNSETTLED {
                    tokio::time::sleep(UNDER_WAY).await;
                    self.push_live(trip).await?;
                }
                break;
            }
        }
        Ok(Synced(self))
    }
}

impl Prepared {
    /// Sends what was written since the last round, so that it does not fall into the downtime.
    pub(super) async fn catch_up(&mut self, trip: &Trip) -> Result<(), MigrationError> {
        if self.memory.is_some() {
            self.push_live(trip).await?;
        }
        if let Some(memory) = &mut self.memory {
            memory.last_live_round().await?;
        }
        Ok(())
    }

    /// One pass over all trees while the container runs.
    async fn push_live(&mut self, trip: &Trip) -> Result<Round, MigrationError> {
        let round = self.trees.push(&self.peer, &trip.migration, Pass::Live).await?;
        trip.job.note(|report| report.bytes_on_wire += round.bytes);
        Ok(round)
    }

    /// What tasks map of memory filesystems is looked at in the next pass.
    pub(super) fn recheck_mapped(&self) -> Result<(), MigrationError> {
        let tasks = self.inspection.live.freezer.tasks().map_err(MemoryError::from)?;
        let path = PathBuf::from("/proc");
        Ok(self.trees.recheck_mapped(&tasks).map_err(|source| InspectError::File { path, source })?)
    }
}

/// The destination has the files as they were a moment ago.
pub(super) struct Synced(Prepared);

impl Synced {
    /// Copies memory in rounds while the container runs, until the downtime would be as wanted.
    pub(super) async fn precopy(self, trip: &Trip) -> Result<Copied, MigrationError> {
        let Self(mut prepared) = self;
        let mut memory = match begin(trip, &prepared).await {
            Ok(memory) => memory,
            // What was asked for can't be kept.
            Err(Without(reason)) if trip.options.max_downtime.is_some() => {
                return Err(MigrationError::NoPrecopy(reason));
            }
            Err(Without(reason)) => {
                tracing::warn!(reason, "all memory goes while the container is frozen");
                trip.job.note(|report| report.memory = MemoryReport::images(reason));
                return Ok(Copied(prepared));
            }
        };
        let unsupported = copy_in_rounds(trip, &mut memory, &prepared.inspection).await?;
        if let Some(reason) = unsupported {
            trip.job.note(|report| report.memory = MemoryReport::images(reason));
            return Ok(Copied(prepared));
        }
        trip.job.note(|report| {
            report.memory = MemoryReport {
                tracker: Some(memory.tracker_name().to_owned()),
                path: match (trip.options.eager, memory.owes()) {
                    (true, _) => "eager",
                    (false, true) => "post-copy",
                    (false, false) => "lazy",
                }
                .to_owned(),
                longest_stop_ms: millis(memory.longest_stop()),
                predicted_downtime_ms: Some(memory.predicted_ms),
                throttled: memory.throttled(),
                ..std::mem::take(&mut report.memory)
            };
        });
        prepared.memory = Some(memory);
        prepared.recheck_mapped()?;
        // What the container wrote into its files meanwhile must not be left for the freeze.
        prepared.push_live(trip).await?;
        Ok(Copied(prepared))
    }
}

/// Why memory can't be copied beforehand.
struct Without(String);

/// The tracker that was asked for, or else the best that this kernel has.
fn choose(trip: &Trip, init: i32, freezer: &Freezer) -> Result<Box<dyn Tracker>, Without> {
    let failed = |error: std::io::Error| Without(error.to_string());
    let soft_dirty = || SoftDirty::new(init, freezer.clone(), trip.env.paused.clone(), &trip.migration).map_err(failed);
    match trip.env.config.tracker {
        TrackerChoice::None => Err(Without("source.toml has `tracker = \"none\"`".to_owned())),
        TrackerChoice::WriteProtect => Ok(Box::new(WriteProtect::new(init).map_err(failed)?)),
        TrackerChoice::SoftDirty if soft_dirty::works() => Ok(Box::new(soft_dirty()?)),
        TrackerChoice::SoftDirty => {
            Err(Without("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY): set `tracker = \"auto\"` in source.toml".to_owned()))
        }
        TrackerChoice::Auto if tracks_writes() => Ok(Box::new(WriteProtect::new(init).map_err(failed)?)),
        TrackerChoice::Auto if soft_dirty::works() => Ok(Box::new(soft_dirty()?)),
        TrackerChoice::Auto => Err(Without(
            "this kernel can't tell which pages were written: Linux 6.7 or newer can (PAGEMAP_SCAN, userfaultfd WP_ASYNC), \
             or one with soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)"
                .to_owned(),
        )),
    }
}

/// Opens the page connection.
async fn begin(trip: &Trip, prepared: &Prepared) -> Result<Precopy, Without> {
    let engine = &trip.env.config.engine;
    if !engine.filter.is_file() {
        return Err(Without(format!("{} is not installed", engine.filter.display())));
    }
    let tuning = *trip.job.tuning.borrow();
    let bandwidth = tuning.bandwidth.or(trip.options.bandwidth).filter(|limit| *limit != Tuning::NO_LIMIT);
    let allowed = Allowed { bandwidth, streams: trip.options.streams };
    let lanes = Lanes::connect(&trip.env.identity, &trip.address, &trip.migration, allowed)
        .await
        .map_err(|error| Without(error.to_string()))?;
    let live = &prepared.inspection.live;
    let outlook = Outlook {
        residual_bytes: 0,
        bytes_per_second: 0.0,
        memory_bytes: prepared.inspection.description.memory_bytes,
        reads_smaps: !flags::are_cheap() || !trip.env.capabilities.criu.is_some_and(filter::knows_smaps_of),
        round_trip: prepared.peer.round_trip(),
        fixed: trip.env.fixed_downtime.get(),
    };
    let limits = Limits {
        // What was not asked for must not be what fails on a slow machine.
        max_downtime: tuning
            .max_downtime
            .or(trip.options.max_downtime)
            .unwrap_or(DEFAULT_MAX_DOWNTIME.max(outlook.downtime() + MEMORY_SHARE)),
        max_rounds: trip.options.max_rounds.unwrap_or(DEFAULT_MAX_ROUNDS),
        postcopy: trip.options.postcopy != PostCopy::Never,
        auto_converge: tuning.auto_converge.unwrap_or(trip.options.auto_converge),
    };
    let tracker = choose(trip, live.init, &live.freezer)?;
    let throttling = Throttling::new(live.init, trip.env.throttled.clone(), &trip.migration);
    let postcopy = trip.options.postcopy;
    Ok(Precopy::new(tracker, lanes, live.freezer.clone(), limits, outlook, postcopy, throttling))
}

/// Rounds until it is time to freeze. A reason, where the kernel turns out to have no tracker.
async fn copy_in_rounds(
    trip: &Trip,
    memory: &mut Precopy,
    inspection: &Inspection,
) -> Result<Option<String>, MigrationError> {
    let freeze_at = trip.options.timeout.filter(|_| trip.options.timeout_action == TimeoutAction::Freeze);
    let (meter, limits, pacers) = (memory.meter(), memory.limits(), memory.pacers());
    let mut tuned = trip.job.tuning.subscribe();
    // Also what was changed since the limits were read.
    tuned.mark_changed();
    let mut told_to_wait = None;
    loop {
        let (before, total) = (meter.bytes(), inspection.description.memory_bytes);
        let round = memory.rounds.len() + 1;
        let ticking = async {
            loop {
                tokio::time::sleep(PROGRESS_EVERY).await;
                trip.progress(
                    "pre-copy",
                    format!("round {round}"),
                    meter.bytes() - before,
                    if round == 1 { total } else { 0 },
                );
            }
        };
        let tuning = async {
            while tuned.changed().await.is_ok() {
                let tuning = *tuned.borrow_and_update();
                tune(tuning, &mut limits.lock().unwrap_or_else(PoisonError::into_inner), &pacers);
                trip.progress("pre-copy", "tuned".to_owned(), 0, 0);
            }
            std::future::pending::<()>().await;
        };
        let step = tokio::select! {
            step = memory.step() => step,
            () = ticking => continue,
            () = tuning => continue,
        };
        match step {
            Ok(Step::Sent(round)) => {
                let what = format!(
                    "round {}: {:.1} MiB of {:.1} MiB written sent, {:.0} MiB/s, downtime would have been {:.0} ms",
                    round.round,
                    mib(round.wire_bytes),
                    mib(round.pages * PAGE),
                    round.mib_per_s,
                    round.predicted_downtime_ms
                );
                trip.progress("pre-copy", what, 0, 0);
                trip.job.note(|report| {
                    report.bytes_on_wire += round.wire_bytes;
                    report.memory.rounds.push(round);
                });
            }
            Ok(Step::Waiting(why)) => {
                if told_to_wait.replace(why) != Some(why) {
                    trip.progress("pre-copy", why.to_owned(), 0, 0);
                }
            }
            Ok(Step::Freeze | Step::PostCopy) => return Ok(None),
            Ok(Step::GiveUp { .. }) if trip.options.timeout_action == TimeoutAction::Freeze => return Ok(None),
            Ok(Step::GiveUp { rest_ms, .. }) if rest_ms > millis(memory.max_downtime()) => {
                return Err(MigrationError::TooLong { rest_ms });
            }
            Ok(Step::GiveUp { predicted_ms, dirty_mib_per_s, .. }) => {
                let rounds = memory.rounds.len();
                return Err(MigrationError::TooFast { dirty_mib_per_s, predicted_ms, rounds });
            }
            Err(MemoryError::Track(error @ TrackError::Unsupported)) => return Ok(Some(error.to_string())),
            Err(error) => return Err(error.into()),
        }
        if freeze_at.is_some_and(|limit| trip.job.elapsed() > limit) {
            memory.owe_if_long();
            return Ok(None);
        }
    }
}

/// Changes a migration whose memory is being copied.
fn tune(tuning: Tuning, limits: &mut Limits, pacers: &Pacers) {
    tracing::info!(?tuning, "changed");
    limits.max_downtime = tuning.max_downtime.unwrap_or(limits.max_downtime);
    limits.auto_converge = tuning.auto_converge.unwrap_or(limits.auto_converge);
    if let Some(bandwidth) = tuning.bandwidth {
        pacers.set_limit(Some(bandwidth).filter(|limit| *limit != Tuning::NO_LIMIT));
    }
}

/// What memory may add to a downtime that is long without it, where no limit was given.
const MEMORY_SHARE: Duration = Duration::from_millis(100);

/// How often progress within a round is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// The destination has memory as it was a moment ago.
pub(super) struct Copied(Prepared);

impl Copied {
    /// Starts both runtimes, which wait: their start-up costs no downtime.
    pub(super) async fn arm(self, trip: &Trip) -> Result<Ready, MigrationError> {
        let Self(mut prepared) = self;
        let live = &prepared.inspection.live;
        let pages = match (&prepared.memory, trip.options.eager) {
            (None, _) => Pages::None,
            (Some(_), true) => Pages::Eager,
            (Some(_), false) => Pages::Lazy,
        };
        let single_netns = prepared.inspection.description.single_netns;
        let mut keys: Vec<String> = live.netns_key.iter().filter(|_| !single_netns).cloned().collect();
        keys.extend(prepared.inspection.description.stdio.iter().filter_map(|stdio| match &stdio.target {
            longhaul_common::description::StdioTarget::File { key, .. } => Some(key.clone()),
            longhaul_common::description::StdioTarget::Pipe { .. } => None,
        }));
        let tmpfs = prepared.inspection.description.tmpfs.iter().enumerate();
        keys.extend(tmpfs.map(|(index, tmpfs)| format!("mnt[{}]:{}", tmpfs.destination, rpc::external_tmpfs(index))));
        let awaited = match pages {
            Pages::None => None,
            Pages::Eager | Pages::Lazy => Some(filter::Awaited::new(&trip.dir).map_err(MemoryError::Table)?),
        };
        let externals = Externals {
            keys,
            // With every interface's other end in our hands, or no interface at all.
            own_network_lock: matches!(prepared.inspection.description.network, Network::Own { .. }),
            single_cgroup: prepared.inspection.description.single_cgroup,
            netns: single_netns.then(|| format!("/proc/{}/ns/net", live.init)),
            environment: awaited.iter().map(|awaited| awaited.environment.clone()).collect(),
        };
        // First on record: what is started now outlives an agent that is killed.
        let owes = prepared.memory.as_ref().is_some_and(Precopy::owes);
        trip.hold(&prepared.inspection, owes).await?;
        let armed = Armed::start(&trip.env.config.engine, &trip.container, &trip.dir, &externals).await?;
        let descriptors = armed.descriptors();
        trip.rollback.lock().await.checkpoint = Some(armed);
        let neighbours = Netns::of_task(live.init).and_then(|netns| neighbours(&netns)).map_err(InspectError::from)?;
        prepared.session.arm(descriptors?, neighbours, pages).await?;
        // A database's log grows by megabytes while the runtimes are started.
        prepared.catch_up(trip).await?;
        Ok(Ready { prepared, pages, awaited })
    }
}
