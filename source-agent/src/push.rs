//! Sends directory trees, pass by pass.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use longhaul_common::description::{Description, TreeRole};
use longhaul_common::tree::{PassStats, Scanner, SinkClosed, TreeError, TreeItem, TreeKind};
use longhaul_common::wire::tree_message;
use longhaul_proto::peer::tree_message::Message;
use longhaul_proto::peer::{TreeEnd, TreeMessage, TreeStart};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::file_watch::FileWatch;
use crate::inspect::path_on_host;
use crate::memory::maps::{Areas, Device};
use crate::peer::{Peer, PeerError};

/// Messages between the scanning thread and the network, each at most a data item of 256 KiB.
const QUEUE: usize = 32;

/// A pass that failed.
#[derive(Debug, Error)]
pub enum PushError {
    /// Reading.
    #[error("can't read the container's files")]
    Scan(#[from] TreeError),
    /// Sending.
    #[error("can't send the container's files")]
    Peer(#[from] PeerError),
    /// A thread panicked.
    #[error("the scanning thread ended unexpectedly")]
    Panicked,
}

/// Whether the container runs during a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// It does: what changes meanwhile is for the next.
    Live,
    /// It is frozen: this is the last.
    Last,
}

/// What one round over all trees did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Round {
    /// Items sent.
    pub items: u64,
    /// Bytes of content sent.
    pub bytes: u64,
    /// Bytes of files that are read again in the next round in any case: see [`PassStats::unsettled_bytes`].
    pub unsettled_bytes: u64,
}

/// The trees of one container, and what has been sent of them.
pub struct Trees {
    trees: Vec<PushedTree>,
    passes: u32,
}

struct PushedTree {
    number: u32,
    path: PathBuf,
    /// A layer is sent once; everything else in every round.
    once: bool,
    scanner: Arc<Mutex<Scanner>>,
    /// Nothing else below the root is looked at.
    only: Option<PathBuf>,
    /// It is a memory filesystem: a file's times do not tell when a task writes through a mapping.
    in_memory: bool,
}

impl Trees {
    /// The trees a destination needs: all but the layers it has. Those that change are watched.
    pub fn new(
        container: &Description,
        init: i32,
        missing_layers: &[String],
        watch: Option<&Arc<FileWatch>>,
    ) -> Result<Self, TreeError> {
        use longhaul_common::description::Rootfs;
        let mut trees = Vec::new();
        for (number, tree) in container.trees().into_iter().enumerate() {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let path = PathBuf::from(&tree.path);
            let (root, kind, once, only) = match tree.role {
                TreeRole::Upper => (path, TreeKind::Upper, false, None),
                TreeRole::Plain | TreeRole::Volume => (path, TreeKind::Plain, false, None),
                TreeRole::Layer(index) => {
                    let needed = matches!(&container.rootfs, Rootfs::Overlay { lowers, .. }
                        if lowers.get(index).is_some_and(|layer| missing_layers.contains(&layer.digest)));
                    if !needed {
                        continue;
                    }
                    (path, TreeKind::Upper, true, None)
                }
                TreeRole::Tmpfs(_) => (path_on_host(init, &tree.path), TreeKind::Plain, false, None),
                TreeRole::File => {
                    let root = path.parent().unwrap_or(Path::new("/")).to_owned();
                    let only = path.file_name().map(PathBuf::from);
                    (root, TreeKind::Plain, false, only)
                }
            };
            if only.is_some() && !root.join(only.as_deref().unwrap_or(Path::new(""))).exists() {
                continue;
            }
            let excludes = only.as_ref().map(|only| siblings(&root, only)).unwrap_or_default();
            let mut scanner = Scanner::new(&root, kind, excludes)?;
            if only.is_some() {
                scanner.ignores_renames();
            }
            if let Some(watch) = watch.filter(|_| !once) {
                scanner.watched_by(watch.clone());
            }
            let in_memory = matches!(tree.role, TreeRole::Tmpfs(_));
            trees.push(PushedTree {
                number,
                path: root,
                once,
                scanner: Arc::new(Mutex::new(scanner)),
                only,
                in_memory,
            });
        }
        Ok(Self { trees, passes: 0 })
    }

    /// How many passes were made.
    pub fn passes(&self) -> u32 {
        self.passes
    }

    /// Has the next pass look into files of memory filesystems that these tasks map shared.
    pub fn recheck_mapped(&self, tasks: &[i32]) -> std::io::Result<()> {
        for tree in self.trees.iter().filter(|tree| tree.in_memory) {
            let device = Device::of(&tree.path)?;
            let mut scanner = tree.scanner.lock().unwrap_or_else(PoisonError::into_inner);
            for pid in tasks {
                // One that has ended has nothing mapped.
                let areas = Areas::of(*pid, &device).unwrap_or_default();
                areas.shared.iter().for_each(|area| scanner.recheck_inode(area.inode));
            }
        }
        Ok(())
    }

    /// One pass over every tree.
    pub async fn push(&mut self, peer: &Peer, migration: &str, pass: Pass) -> Result<Round, PushError> {
        self.passes += 1;
        let mut round = Round::default();
        let first = self.passes == 1;
        for tree in self.trees.iter().filter(|tree| first || !tree.once) {
            let (items, stats) = push_one(tree, peer, migration, self.passes, pass).await?;
            round.items += items;
            round.bytes += stats.bytes_sent;
            round.unsettled_bytes += stats.unsettled_bytes;
        }
        Ok(round)
    }
}

/// Everything beside the one file of a directory.
fn siblings(root: &Path, only: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    entries.flatten().map(|entry| PathBuf::from(entry.file_name())).filter(|name| name != only).collect()
}

async fn push_one(
    tree: &PushedTree,
    peer: &Peer,
    migration: &str,
    number: u32,
    pass: Pass,
) -> Result<(u64, PassStats), PushError> {
    let (send, receive) = mpsc::channel(QUEUE);
    let start = TreeStart { migration_id: migration.to_owned(), tree: tree.number, pass: number };
    let scanner = tree.scanner.clone();
    let only = tree.only.clone();
    let scan = tokio::task::spawn_blocking(move || scan(&scanner, &send, start, only.as_deref(), pass));
    let pushed = peer.push_tree(receive).await;
    let scanned = scan.await.map_err(|_| PushError::Panicked)?;
    match (scanned, pushed) {
        // The destination's reason comes first: the scanner only saw its channel close.
        (_, Err(error)) => Err(error.into()),
        (Err(error), Ok(_)) => Err(error.into()),
        (Ok((items, stats)), Ok(_)) => {
            tracing::debug!(
                tree = %tree.path.display(),
                pass = number,
                scanned = stats.entries_scanned,
                sent = stats.entries_sent,
                bytes = stats.bytes_sent,
                micros = stats.duration.as_micros(),
                "pass over a tree"
            );
            Ok((items, stats))
        }
    }
}

fn scan(
    scanner: &Mutex<Scanner>,
    send: &mpsc::Sender<TreeMessage>,
    start: TreeStart,
    only: Option<&Path>,
    pass: Pass,
) -> Result<(u64, PassStats), TreeError> {
    use std::os::unix::ffi::OsStrExt;
    let say = |message| send.blocking_send(TreeMessage { message: Some(message) }).map_err(|_| SinkClosed);
    say(Message::Start(start))?;
    let mut items = 0;
    let only = only.map(|only| only.as_os_str().as_bytes().to_vec());
    // Of a directory with one file to send, the directory itself and files that appeared since are not sent.
    let mut skipping = false;
    let mut sink = |item: TreeItem| {
        if let Some(only) = &only {
            match &item {
                TreeItem::Entry(entry) => skipping = entry.path != *only,
                TreeItem::Removed { .. } => return Ok(()),
                TreeItem::Data { .. } | TreeItem::FileEnd { .. } => {}
            }
            if skipping {
                return Ok(());
            }
        }
        items += 1;
        send.blocking_send(tree_message(item)).map_err(|_| SinkClosed)
    };
    let mut scanner = scanner.lock().unwrap_or_else(PoisonError::into_inner);
    let stats = match pass {
        Pass::Live => scanner.pass(&mut sink)?,
        Pass::Last => scanner.last_pass(&mut sink)?,
    };
    say(Message::End(TreeEnd { items }))?;
    Ok((items, stats))
}
