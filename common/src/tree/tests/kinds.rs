//! Every kind of inode and attribute, once.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;

type Make = fn(&Path);

/// An access ACL, version 2: owner rwx, user 1000 rw-, group r-x, mask rwx, others r--.
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 6, 0, 232, 3, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255, 16, 0, 7, 0,
    255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255,
];
/// File capabilities, version 2, effective: cap_net_bind_service.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn node(path: &Path, kind: FileType, major: u32, minor: u32) {
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), rustix::fs::makedev(major, minor)).unwrap();
}

const KINDS: &[(&str, Make)] = &[
    ("an empty file", |path| fs::write(path, "").unwrap()),
    ("a small file", |path| fs::write(path, "content").unwrap()),
    ("a file of several data items", |path| {
        fs::write(path, vec![7; 1_000_001]).unwrap();
    }),
    ("a file with set-ID bits and another owner", |path| {
        fs::write(path, "suid").unwrap();
        chown(path, Some(1234), Some(70_000)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o6755)).unwrap();
    }),
    ("file capabilities", |path| {
        fs::write(path, "ping").unwrap();
        chown(path, Some(5), Some(6)).unwrap();
        xattr::set(path, "security.capability", &CAPABILITY).unwrap();
    }),
    ("an access ACL", |path| {
        fs::write(path, "acl").unwrap();
        xattr::set(path, "system.posix_acl_access", &ACL).unwrap();
    }),
    ("user and trusted attributes, one empty, one binary", |path| {
        fs::write(path, "x").unwrap();
        xattr::set(path, "user.empty", b"").unwrap();
        xattr::set(path, "user.binary", &[0, 255, 1]).unwrap();
        xattr::set(path, "trusted.long", &[3; 2000]).unwrap();
    }),
    ("a sparse file", |path| {
        let file = File::create(path).unwrap();
        file.write_all_at(b"middle", 10 << 20).unwrap();
        file.set_len(64 << 20).unwrap();
    }),
    ("a file that is one hole", |path| {
        File::create(path).unwrap().set_len(3 << 30).unwrap();
    }),
    ("a whiteout, a null device", |path| {
        node(path, FileType::CharacterDevice, 0, 0);
    }),
    ("a character device", |path| {
        node(path, FileType::CharacterDevice, 4095, 1_048_575);
    }),
    ("a block device", |path| {
        node(path, FileType::BlockDevice, 7, 300);
    }),
    ("a pipe", |path| node(path, FileType::Fifo, 0, 0)),
    ("a socket", |path| node(path, FileType::Socket, 0, 0)),
    ("a pipe with a trusted attribute", |path| {
        node(path, FileType::Fifo, 0, 0);
        xattr::set(path, "trusted.pipe", b"1").unwrap();
    }),
    ("a dangling symlink with an owner and times", |path| {
        symlink("/nowhere/../at all", path).unwrap();
        lchown(path, Some(77), Some(78)).unwrap();
        xattr::set(path, "trusted.link", b"1").unwrap();
    }),
    ("a symlink that points out of the tree", |path| {
        symlink("../../../../etc/passwd", path).unwrap();
    }),
    ("an old file", |path| {
        let file = File::create(path).unwrap();
        file.set_modified(UNIX_EPOCH - Duration::new(1000, 5)).unwrap();
    }),
    ("a directory with a sticky bit, times and content", |path| {
        fs::create_dir(path).unwrap();
        fs::write(path.join("below"), "x").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o1777)).unwrap();
        File::open(path).unwrap().set_modified(UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789)).unwrap();
    }),
    ("a directory with a default ACL above a file without one", |path| {
        fs::create_dir(path).unwrap();
        fs::write(path.join("below"), "x").unwrap();
        fs::create_dir(path.join("dir")).unwrap();
        xattr::set(path, "system.posix_acl_default", &ACL).unwrap();
    }),
    ("hard links in two directories", |path| {
        fs::create_dir_all(path.join("a")).unwrap();
        fs::create_dir_all(path.join("b")).unwrap();
        fs::write(path.join("a/x"), "linked").unwrap();
        fs::hard_link(path.join("a/x"), path.join("b/y")).unwrap();
        fs::hard_link(path.join("a/x"), path.join("z")).unwrap();
    }),
    ("names that are not UTF-8", |path| {
        fs::create_dir(path).unwrap();
        fs::write(path.join(OsStr::from_bytes(b"\xff\xfe \n'")), "x").unwrap();
        fs::create_dir(path.join(OsStr::from_bytes(b"\x80"))).unwrap();
        fs::write(path.join(OsStr::from_bytes(&[b'n'; 255])), "long").unwrap();
    }),
];

#[test]
fn every_kind_arrives_in_both_kinds_of_tree() {
    for kind in [TreeKind::Plain, TreeKind::Upper] {
        for (what, make) in KINDS {
            println!("{kind:?}: {what}");
            let mut pair = Pair::new(kind);
            make(&pair.path("it"));
            pair.last_pass();
            pair.assert_equal();
        }
    }
}

#[test]
fn every_kind_replaces_every_other() {
    let mut pair = Pair::new(TreeKind::Upper);
    for (_, make) in KINDS {
        let it = pair.path("it");
        if fs::symlink_metadata(&it).is_ok_and(|status| status.is_dir()) {
            fs::remove_dir_all(&it).unwrap();
        } else if fs::symlink_metadata(&it).is_ok() {
            fs::remove_file(&it).unwrap();
        }
        make(&it);
        pair.last_pass();
        pair.assert_equal();
    }
}

#[test]
fn holes_stay_holes() {
    let mut pair = Pair::new(TreeKind::Plain);
    let file = File::create(pair.path("sparse")).unwrap();
    file.write_all_at(b"x", 100 << 20).unwrap();
    file.set_len(1 << 30).unwrap();
    let stats = pair.last_pass();
    assert!(stats.bytes_sent <= 4096, "{stats:?}");
    let blocks = fs::metadata(pair.copied("sparse")).unwrap().blocks();
    assert!(blocks <= 128, "{blocks} sectors");
}

#[test]
fn the_root_itself_is_carried() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::set_permissions(pair.path(""), fs::Permissions::from_mode(0o2710)).unwrap();
    chown(pair.path(""), Some(9), Some(10)).unwrap();
    pair.last_pass();
    pair.assert_equal();
    assert_eq!(fs::metadata(pair.copied("")).unwrap().mode() & 0o7777, 0o2710);
}

#[test]
fn what_overlayfs_notes_of_its_host_stays_behind() {
    let mut pair = Pair::new(TreeKind::Upper);
    let dir = pair.path("dir");
    fs::create_dir(&dir).unwrap();
    for name in ["origin", "impure", "nlink", "upper", "uuid", "opaque", "redirect", "metacopy", "whiteout", "protattr"]
    {
        xattr::set(&dir, format!("trusted.overlay.{name}"), b"y").unwrap();
    }
    let stats = pair.last_pass();
    assert_eq!(stats.xattrs_left_out, 0, "nothing is lost");
    let names: Vec<_> = xattr::list(pair.copied("dir")).unwrap().map(|name| name.into_string().unwrap()).collect();
    for name in ["opaque", "redirect", "metacopy", "whiteout", "protattr"] {
        assert!(names.contains(&format!("trusted.overlay.{name}")), "{names:?}");
    }
    assert_eq!(names.len(), 5, "{names:?}");
}

#[test]
fn overlay_attributes_in_a_plain_tree_are_counted_as_left_out() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::create_dir(pair.path("nested")).unwrap();
    xattr::set(pair.path("nested"), "trusted.overlay.opaque", b"y").unwrap();
    assert_eq!(pair.last_pass().xattrs_left_out, 1);
}

#[test]
fn excluded_paths_are_neither_sent_nor_removed() {
    let mut pair = Pair::new(TreeKind::Plain);
    pair.scanner = Scanner::new(pair.source.path(), TreeKind::Plain, vec!["a/skip".into()]).unwrap();
    fs::create_dir_all(pair.path("a/skip/deep")).unwrap();
    fs::write(pair.path("a/keep"), "x").unwrap();
    pair.pass();
    assert!(pair.copied("a/keep").exists());
    assert!(!pair.copied("a/skip").exists());
    fs::create_dir(pair.copied("a/skip")).unwrap();
    fs::remove_file(pair.path("a/keep")).unwrap();
    pair.pass();
    assert!(pair.copied("a/skip").exists());
    assert!(!pair.copied("a/keep").exists());
}
