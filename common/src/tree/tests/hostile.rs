//! Items that no honest source sends: each is refused, and nothing outside the root is touched.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use bytes::Bytes;

use super::super::{
    Content, ContentSum, Entry, EntryKind, MAX_DATA, MAX_XATTR_VALUE, MAX_XATTRS, Timestamp, TreeError, TreeItem,
};
use super::*;

/// A root with a neighbour that must stay as it is.
struct Target {
    dir: TempDir,
    writer: Writer,
}

impl Target {
    fn new(kind: TreeKind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/file"), "untouched").unwrap();
        let writer = Writer::open(&dir.path().join("root"), kind).unwrap();
        Self { dir, writer }
    }

    fn apply(&mut self, item: TreeItem) -> Result<(), TreeError> {
        self.writer.apply(item)
    }

    #[track_caller]
    fn accept(&mut self, item: TreeItem) {
        self.apply(item).unwrap();
    }

    /// Applies what must be refused, and says how it was.
    #[track_caller]
    fn refused(&mut self, item: TreeItem) -> TreeError {
        let before = snapshot(&self.dir.path().join("outside"), TreeKind::Plain);
        let shown = format!("{item:?}");
        let error = self.apply(item).expect_err(&shown[..shown.len().min(200)]);
        assert_same(&before, &snapshot(&self.dir.path().join("outside"), TreeKind::Plain));
        error
    }
}

fn entry(path: impl AsRef<[u8]>, kind: EntryKind) -> Entry {
    Entry {
        path: path.as_ref().to_vec(),
        kind,
        uid: 0,
        gid: 0,
        mode: 0o644,
        mtime: Timestamp::default(),
        atime: Timestamp::default(),
        xattrs: Vec::new(),
    }
}

fn item(path: impl AsRef<[u8]>, kind: EntryKind) -> TreeItem {
    TreeItem::Entry(entry(path, kind))
}

fn file(size: u64) -> EntryKind {
    EntryKind::File { size, content: Content::Whole }
}

fn data(offset: u64, len: usize) -> TreeItem {
    TreeItem::Data { offset, bytes: Bytes::from(vec![1; len]) }
}

#[test]
fn paths_that_are_not_plain_and_relative_are_refused() {
    let long_name = [b'n'; 256];
    let long_path = b"d/".repeat(2049);
    let bad: [&[u8]; 15] = [
        b"",
        b"/",
        b"/etc",
        b".",
        b"..",
        b"./a",
        b"a/..",
        b"a/../b",
        b"../outside/file",
        b"a//b",
        b"a/",
        b"a\0b",
        b"a/.",
        &long_name,
        &long_path,
    ];
    for path in bad {
        let mut target = Target::new(TreeKind::Plain);
        for item in [
            item(path, file(0)),
            item(path, EntryKind::Symlink { target: b"x".to_vec() }),
            item("ok", EntryKind::Hardlink { target: path.to_vec() }),
            TreeItem::Removed { path: path.to_vec() },
        ] {
            let error = target.refused(item);
            assert!(matches!(error, TreeError::BadPath { .. }), "{error:?}");
        }
        if !path.is_empty() {
            assert!(matches!(target.refused(item(path, EntryKind::Dir)), TreeError::BadPath { .. }));
        }
    }
}

#[test]
fn metadata_that_no_inode_has_is_refused() {
    type Spoil = fn(&mut Entry);
    let spoils: [(&str, Spoil); 13] = [
        ("type bits in the mode", |entry| entry.mode = 0o104_755),
        ("the invalid user", |entry| entry.uid = u32::MAX),
        ("the invalid group", |entry| entry.gid = u32::MAX),
        ("a second of nanoseconds in mtime", |entry| {
            entry.mtime.nanos = 1_000_000_000;
        }),
        ("UTIME_OMIT in atime", |entry| {
            entry.atime.nanos = (1 << 30) - 2;
        }),
        ("a size beyond 8 EiB", |entry| entry.kind = file(1 << 63)),
        ("an empty symlink", |entry| entry.kind = EntryKind::Symlink { target: Vec::new() }),
        ("a symlink with a NUL", |entry| entry.kind = EntryKind::Symlink { target: b"a\0".to_vec() }),
        ("a long symlink", |entry| entry.kind = EntryKind::Symlink { target: vec![b'x'; 4096] }),
        ("a major number of 13 bits", |entry| entry.kind = EntryKind::CharDevice { major: 1 << 12, minor: 0 }),
        ("a minor number of 21 bits", |entry| entry.kind = EntryKind::BlockDevice { major: 0, minor: 1 << 20 }),
        ("too many attributes", |entry| {
            entry.xattrs = (0..=MAX_XATTRS).map(|index| (format!("user.{index}").into_bytes(), Vec::new())).collect();
        }),
        ("a file system's limit", |entry| {
            entry.kind = file(i64::MAX as u64);
        }),
    ];
    for (what, spoil) in spoils {
        let mut spoiled = entry("x", EntryKind::Dir);
        spoil(&mut spoiled);
        let error = Target::new(TreeKind::Plain).refused(TreeItem::Entry(spoiled));
        let by_system = what == "a file system's limit";
        assert_eq!(matches!(error, TreeError::Io { .. }), by_system, "{what}: {error:?}");
        assert!(by_system || matches!(error, TreeError::BadEntry { .. }), "{what}: {error:?}");
    }
}

#[test]
fn attributes_beyond_the_rules_are_refused() {
    let big = vec![0; MAX_XATTR_VALUE + 1];
    let long = format!("user.{}", "n".repeat(251));
    let bad: [(TreeKind, &str, &[u8]); 12] = [
        (TreeKind::Upper, "trusted.overlay.origin", b"handle"),
        (TreeKind::Upper, "trusted.overlay.upper", b"handle"),
        (TreeKind::Upper, "trusted.overlay.overlay.opaque", b"y"),
        (TreeKind::Upper, "user.overlay.origin", b"handle"),
        (TreeKind::Plain, "trusted.overlay.opaque", b"y"),
        (TreeKind::Plain, "system.nfs4_acl", b"x"),
        (TreeKind::Plain, "security.evm", b"x"),
        (TreeKind::Plain, "user.", b"x"),
        (TreeKind::Plain, "", b"x"),
        (TreeKind::Plain, "user.a\0b", b"x"),
        (TreeKind::Plain, "user.big", &big),
        (TreeKind::Plain, &long, b"x"),
    ];
    for (kind, name, value) in bad {
        let mut spoiled = entry("x", EntryKind::Dir);
        spoiled.xattrs.push((name.as_bytes().to_vec(), value.to_vec()));
        let error = Target::new(kind).refused(TreeItem::Entry(spoiled));
        assert!(matches!(error, TreeError::BadXattr { .. }), "{name}: {error:?}");
    }
}

#[test]
fn content_out_of_order_or_place_is_refused() {
    let mut target = Target::new(TreeKind::Plain);
    assert!(matches!(target.refused(data(0, 1)), TreeError::NoOpenFile { .. }));
    assert!(matches!(target.refused(TreeItem::FileEnd { checksum: 0 }), TreeError::NoOpenFile { .. }));
    let places = [(10, 1), (0, 11), (u64::MAX, 1), (0, 0), (9, 2)];
    for (offset, len) in places {
        target.accept(item("f", file(10)));
        assert!(matches!(target.refused(data(offset, len)), TreeError::BadData { .. }));
    }
    target.accept(item("f", file(1 << 30)));
    assert!(matches!(target.refused(data(0, MAX_DATA + 1)), TreeError::BadData { .. }));
    for interruption in [item("g", file(0)), item("g", EntryKind::Dir), TreeItem::Removed { path: b"f".to_vec() }] {
        target.accept(item("f", file(10)));
        assert!(matches!(target.refused(interruption), TreeError::FileStillOpen { .. }));
    }
    target.accept(item("f", file(10)));
    assert!(matches!(target.writer.finish(), Err(TreeError::FileStillOpen { .. })));
    target.accept(item("f", file(10)));
    target.accept(data(0, 10));
    let honest = ContentSum::new(10);
    assert!(matches!(target.refused(TreeItem::FileEnd { checksum: honest.finish() }), TreeError::Checksum { .. }));
}

#[test]
fn links_and_patches_need_what_was_sent() {
    let mut target = Target::new(TreeKind::Plain);
    target.accept(item("dir", EntryKind::Dir));
    target.accept(item("null", EntryKind::CharDevice { major: 1, minor: 3 }));
    target.accept(item("pipe", EntryKind::Fifo));
    target.accept(item("out", EntryKind::Symlink { target: b"../outside".to_vec() }));
    target.accept(item("out-file", EntryKind::Symlink { target: b"../outside/file".to_vec() }));
    for name in ["absent", "absent/deep", "dir", "out/file"] {
        let error = target.refused(item("link", EntryKind::Hardlink { target: name.into() }));
        assert!(matches!(error, TreeError::LinkTarget { .. }), "{name}: {error:?}");
    }
    for name in ["absent", "dir", "null", "pipe", "out-file"] {
        let error = target.refused(item(name, EntryKind::File { size: 0, content: Content::Patch }));
        assert!(matches!(error, TreeError::PatchTarget { .. }), "{name}: {error:?}");
    }
}

#[test]
fn symlinks_are_never_followed() {
    let mut target = Target::new(TreeKind::Plain);
    let outside = target.dir.path().join("outside");
    let out = EntryKind::Symlink { target: outside.as_os_str().as_bytes().to_vec() };
    target.accept(item("out", out));
    for bad in [
        item("out/file", file(0)),
        item("out/new", EntryKind::Dir),
        item("out/new", EntryKind::Symlink { target: b"x".to_vec() }),
        item("out/new", EntryKind::CharDevice { major: 0, minor: 0 }),
        TreeItem::Removed { path: b"out/file".to_vec() },
    ] {
        assert!(matches!(target.refused(bad), TreeError::Io { .. }));
    }
    // What lies at the last component is replaced, not followed, whoever put it there.
    symlink(outside.join("file"), target.dir.path().join("root/trap")).unwrap();
    target.accept(item("trap", file(0)));
    target.accept(TreeItem::FileEnd { checksum: ContentSum::new(0).finish() });
    symlink(&outside, target.dir.path().join("root/trap2")).unwrap();
    target.accept(item("trap2", EntryKind::Dir));
    target.accept(TreeItem::Removed { path: b"out".to_vec() });
    target.writer.finish().unwrap();
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "untouched");
    assert!(fs::symlink_metadata(target.dir.path().join("root/trap2")).unwrap().is_dir());
}

#[test]
fn a_directory_swapped_for_a_symlink_does_not_redirect_what_follows() {
    let mut target = Target::new(TreeKind::Plain);
    let outside = target.dir.path().join("outside");
    target.accept(item("d", EntryKind::Dir));
    target.accept(item("d/sub", EntryKind::Dir));
    target.accept(item("d/sub/x", EntryKind::Fifo));
    target.accept(item("d", EntryKind::Symlink { target: outside.as_os_str().as_bytes().to_vec() }));
    let times = fs::metadata(&outside).unwrap().mtime_nsec();
    assert!(matches!(target.refused(item("d/sub/x", EntryKind::Fifo)), TreeError::Io { .. }));
    assert!(matches!(target.refused(item("d/file", EntryKind::Fifo)), TreeError::Io { .. }));
    target.writer.finish().unwrap();
    assert_eq!(fs::metadata(&outside).unwrap().mtime_nsec(), times);
}

#[test]
fn errors_name_the_path_escaped() {
    let error = Target::new(TreeKind::Plain).refused(item(b"a\n\x1b[2J/../\xff", EntryKind::Fifo));
    assert_eq!(error.to_string(), "path a\\n\\x1b[2J/../\\xff is refused: it has a '.' or '..' component");
}
