//! What is pushed for one arrival: trees, images and memory, while they may be pushed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use longhaul_common::config::Paths;
use longhaul_common::layers::LayerDigests;
use longhaul_common::tree::{TreeError, TreeItem, Writer};

use crate::arrival::ArrivalError;
use crate::images::ImageWriter;
use crate::memory::receive::{Memory, ReceiveError};
use crate::one_file::OneFile;
use crate::staging::{Target, layer_store};

/// See the module.
pub struct Intake {
    paths: Paths,
    writers: Mutex<Writers>,
}

#[derive(Default)]
struct Writers {
    open: bool,
    trees: HashMap<u32, TreeWriter>,
    targets: Vec<Option<Target>>,
    images_dir: PathBuf,
    images_arrived: Option<u64>,
    memory: Option<Arc<Memory>>,
}

/// Writes what is pushed: a tree, or a file in place.
enum TreeWriter {
    Tree(Box<Writer>),
    File(OneFile),
}

impl TreeWriter {
    fn open(target: &Target) -> Result<Self, TreeError> {
        Ok(match &target.only {
            Some(name) => Self::File(OneFile::new(&target.root, name)),
            None => Self::Tree(Box::new(Writer::open(&target.root, target.kind)?)),
        })
    }

    fn apply(&mut self, item: TreeItem) -> Result<(), ArrivalError> {
        match self {
            Self::Tree(writer) => Ok(writer.apply(item)?),
            Self::File(file) => Ok(file.apply(item)?),
        }
    }

    fn finish(&mut self) -> Result<(), ArrivalError> {
        match self {
            Self::Tree(writer) => Ok(writer.finish()?),
            Self::File(file) => Ok(file.finish()?),
        }
    }
}

impl Intake {
    /// Closed until there is a place for what is pushed.
    pub(crate) fn new(paths: &Paths) -> Self {
        Self { paths: paths.clone(), writers: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Writers> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on everything may be pushed.
    pub(crate) fn open(&self, memory: Arc<Memory>, targets: Vec<Option<Target>>, images_dir: PathBuf) {
        let mut writers = self.lock();
        writers.open = true;
        writers.memory = Some(memory);
        writers.targets = targets;
        writers.images_dir = images_dir;
    }

    /// Where a tree goes; an error if it is not to be pushed now.
    fn writer(&self, tree: u32) -> Result<(TreeWriter, Target), ArrivalError> {
        let mut writers = self.lock();
        if !writers.open {
            return Err(ArrivalError::OutOfTurn { got: "a tree", state: "not taking files", expected: "Prepare" });
        }
        let target = writers.targets.get(tree as usize).cloned().flatten().ok_or(ArrivalError::Tree(tree))?;
        let writer = match writers.trees.remove(&tree) {
            Some(writer) => writer,
            None => TreeWriter::open(&target)?,
        };
        Ok((writer, target))
    }

    /// One pass over one tree, for a blocking thread. The items and bytes that were applied.
    pub fn apply_pass(
        &self,
        tree: u32,
        items: impl Iterator<Item = Result<TreeItem, ArrivalError>>,
    ) -> Result<(u64, u64), ArrivalError> {
        let (mut writer, target) = self.writer(tree)?;
        let (mut count, mut bytes) = (0, 0);
        for item in items {
            let item = item?;
            if let TreeItem::Data { bytes: data, .. } = &item {
                bytes += data.len() as u64;
            }
            count += 1;
            writer.apply(item)?;
        }
        writer.finish()?;
        if let Some(expected) = &target.digest {
            self.store_layer(&target, expected)?;
            return Ok((count, bytes));
        }
        let mut writers = self.lock();
        writers.trees.insert(tree, writer);
        Ok((count, bytes))
    }

    fn store_layer(&self, target: &Target, expected: &str) -> Result<(), ArrivalError> {
        let got = LayerDigests::open(&self.paths.state).digest(&target.root)?;
        if got != expected {
            return Err(ArrivalError::Layer { got, expected: expected.to_owned() });
        }
        let place = layer_store(&self.paths).join(expected);
        match std::fs::rename(&target.root, &place) {
            Ok(()) => Ok(()),
            // Another arrival brought the same layer meanwhile.
            Err(_) if place.is_dir() => Ok(()),
            Err(source) => Err(ArrivalError::File { path: place, source }),
        }
    }

    /// The writer of CRIU's images.
    pub fn image_writer(&self) -> Result<ImageWriter, ArrivalError> {
        let writers = self.lock();
        if !writers.open || writers.images_arrived.is_some() {
            return Err(ArrivalError::OutOfTurn { got: "images", state: "not taking them", expected: "Prepare" });
        }
        Ok(ImageWriter::new(&writers.images_dir))
    }

    /// All images are here.
    pub fn images_arrived(&self, count: u64) {
        let mut writers = self.lock();
        writers.images_arrived = Some(count);
    }

    /// Where pages go.
    pub fn memory(&self) -> Result<Arc<Memory>, ArrivalError> {
        let writers = self.lock();
        writers.memory.clone().filter(|_| writers.open).ok_or(ReceiveError::NotDue.into())
    }

    /// Bytes of memory that lie in the store.
    pub fn stored_bytes(&self) -> u64 {
        self.lock().memory.as_ref().map_or(0, |memory| memory.stored_bytes())
    }

    /// Nothing more may be pushed; how many images have arrived, and the memory.
    pub(crate) fn close(&self) -> (Option<u64>, Option<Arc<Memory>>) {
        let mut writers = self.lock();
        writers.open = false;
        writers.trees.clear();
        if let Some(memory) = &writers.memory {
            memory.close();
        }
        (writers.images_arrived, writers.memory.take())
    }
}
