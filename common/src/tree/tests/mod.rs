//! A source and a copy side by side, and what makes two trees equal.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod digests;
mod hostile;
mod kinds;
mod overlay;
mod passes;
mod random;
mod watched;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::names::is_carried;
use super::{PassStats, Scanner, TreeItem, TreeKind, Writer};

/// Two directories, and the scanner and writer between them.
struct Pair {
    source: TempDir,
    copy: TempDir,
    kind: TreeKind,
    scanner: Scanner,
    writer: Writer,
}

impl Pair {
    fn new(kind: TreeKind) -> Self {
        Self::between(tempfile::tempdir().unwrap(), kind)
    }

    fn between(source: TempDir, kind: TreeKind) -> Self {
        let copy = tempfile::tempdir().unwrap();
        let scanner = Scanner::new(source.path(), kind, Vec::new()).unwrap();
        let writer = Writer::open(copy.path(), kind).unwrap();
        Self { source, copy, kind, scanner, writer }
    }

    fn path(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.source.path().join(name.as_ref())
    }

    fn copied(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.copy.path().join(name.as_ref())
    }

    fn pass(&mut self) -> PassStats {
        self.pass_while(|_, _| {})
    }

    /// A live pass, during which `meanwhile` is called after each item with the source's root.
    fn pass_while(&mut self, mut meanwhile: impl FnMut(&Path, &TreeItem)) -> PassStats {
        let (root, writer) = (self.source.path(), &mut self.writer);
        let stats = self.scanner.pass(&mut |item| {
            writer.apply(item.clone()).unwrap();
            meanwhile(root, &item);
            Ok(())
        });
        self.writer.finish().unwrap();
        stats.unwrap()
    }

    fn last_pass(&mut self) -> PassStats {
        let writer = &mut self.writer;
        let stats = self.scanner.last_pass(&mut |item| {
            writer.apply(item).unwrap();
            Ok(())
        });
        self.writer.finish().unwrap();
        stats.unwrap()
    }

    #[track_caller]
    fn assert_equal(&self) {
        assert_same(&snapshot(self.source.path(), self.kind), &snapshot(self.copy.path(), self.kind));
    }
}

/// What one name shows to those who look.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    device: u64,
    mtime: (i64, i64),
    target: Option<PathBuf>,
    content: Option<blake3::Hash>,
    size: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name of the same inode.
    same_as: PathBuf,
}

/// All names of a tree, by an independent way of reading it.
fn snapshot(root: &Path, kind: TreeKind) -> BTreeMap<PathBuf, Seen> {
    let mut names = vec![PathBuf::new()];
    let mut found = BTreeMap::new();
    let mut first_names = HashMap::new();
    while let Some(name) = names.pop() {
        let path = root.join(&name);
        let status = fs::symlink_metadata(&path).unwrap();
        let is_whiteout =
            kind == TreeKind::Upper && status.mode() & libc::S_IFMT == libc::S_IFCHR && status.rdev() == 0;
        if status.is_dir() {
            names.extend(fs::read_dir(&path).unwrap().map(|below| name.join(below.unwrap().file_name())));
        }
        let same_as = first_names.entry(status.ino()).or_insert_with(Vec::new);
        same_as.push(name.clone());
        let xattrs = xattr::list(&path).unwrap().filter(|attribute| is_carried(kind, attribute.as_bytes()));
        let xattrs = xattrs.map(|attribute| {
            let value = xattr::get(&path, &attribute).unwrap().unwrap();
            (attribute.into_encoded_bytes(), value)
        });
        let seen = Seen {
            mode: if is_whiteout { libc::S_IFCHR } else { status.mode() },
            owner: if is_whiteout { (0, 0) } else { (status.uid(), status.gid()) },
            device: status.rdev(),
            // Whiteouts share an inode, or do not: through the overlay nobody sees more than that they are there.
            mtime: if is_whiteout { (0, 0) } else { (status.mtime(), status.mtime_nsec()) },
            target: status.is_symlink().then(|| fs::read_link(&path).unwrap()),
            content: status.is_file().then(|| blake3::hash(&fs::read(&path).unwrap())),
            size: if status.is_dir() { 0 } else { status.len() },
            xattrs: if is_whiteout { BTreeMap::new() } else { xattrs.collect() },
            same_as: if is_whiteout { name.clone() } else { PathBuf::new() },
        };
        found.insert(name, seen);
    }
    for group in first_names.values() {
        let first = group.iter().min().unwrap();
        for name in group {
            let seen = found.get_mut(name).unwrap();
            if seen.same_as.as_os_str().is_empty() {
                seen.same_as.clone_from(first);
            }
        }
    }
    found
}

#[track_caller]
fn assert_same(source: &BTreeMap<PathBuf, Seen>, copy: &BTreeMap<PathBuf, Seen>) {
    for (name, seen) in source {
        assert_eq!(copy.get(name), Some(seen), "{name:?}: copy (left) and source (right) differ");
    }
    for name in copy.keys() {
        assert!(source.contains_key(name), "{name:?} is in the copy only");
    }
}

/// Waits until the kernel's coarse clock, and the scanner's trust in it, have passed what was done so far.
fn settle(dir: &Path) {
    settle_for(dir, Duration::from_millis(40));
}

/// Waits until the clock of a directory's filesystem is this much later.
fn settle_for(dir: &Path, time: Duration) {
    let probe = tempfile::NamedTempFile::new_in(dir.parent().unwrap()).unwrap();
    let since = probe.as_file().metadata().unwrap();
    let deadline = Instant::now() + time + Duration::from_secs(5);
    loop {
        probe.as_file().set_modified(std::time::SystemTime::now()).unwrap();
        let now = probe.as_file().metadata().unwrap();
        let passed = (now.ctime() - since.ctime()) * 1_000_000_000 + now.ctime_nsec() - since.ctime_nsec();
        if i128::from(passed) > time.as_nanos() as i128 {
            return;
        }
        assert!(Instant::now() < deadline, "the filesystem's clock stands still");
        std::thread::yield_now();
    }
}
