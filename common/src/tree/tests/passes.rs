//! What a later pass sends, and what happens when the tree changes under a pass.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use super::super::sys::tests::SharedMapping;
use super::super::{Entry, EntryKind};
use super::*;

const MIB: usize = 1 << 20;

/// Bytes of which no two blocks are equal.
fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn an_unchanged_tree_sends_nothing() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::create_dir(pair.path("d")).unwrap();
    fs::write(pair.path("d/a"), "x").unwrap();
    fs::hard_link(pair.path("d/a"), pair.path("b")).unwrap();
    settle(pair.source.path());
    pair.pass();
    let stats = pair.pass();
    assert_eq!((stats.entries_sent, stats.bytes_sent, stats.removed), (0, 0, 0));
    assert_eq!(stats.entries_scanned, 4);
}

#[test]
fn a_change_within_the_clock_tick_of_its_stat_is_found() {
    let mut pair = Pair::new(TreeKind::Plain);
    for round in 0..200 {
        fs::write(pair.path("f"), format!("{round:04}")).unwrap();
        pair.pass();
        fs::write(pair.path("f"), format!("{:04}", round + 5000)).unwrap();
        pair.last_pass();
        pair.assert_equal();
    }
}

#[test]
fn a_change_that_restores_size_and_mtime_is_found() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::write(pair.path("f"), "one").unwrap();
    let mtime = fs::metadata(pair.path("f")).unwrap().modified().unwrap();
    settle(pair.source.path());
    pair.pass();
    fs::write(pair.path("f"), "two").unwrap();
    File::options().write(true).open(pair.path("f")).unwrap().set_modified(mtime).unwrap();
    pair.pass();
    pair.assert_equal();
}

#[test]
fn an_appended_log_sends_its_tail() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::write(pair.path("log"), noise(20 * MIB)).unwrap();
    fs::hard_link(pair.path("log"), pair.path("log.link")).unwrap();
    settle(pair.source.path());
    pair.pass();
    let inode = fs::metadata(pair.copied("log")).unwrap().ino();
    OpenOptions::new().append(true).open(pair.path("log")).and_then(|log| log.write_all_at(b"tail", 0)).unwrap();
    let stats = pair.last_pass();
    assert!(stats.bytes_sent <= 64 * 1024 + 4, "{stats:?}");
    assert_eq!(fs::metadata(pair.copied("log.link")).unwrap().ino(), inode, "patched in place");
    pair.assert_equal();
}

#[test]
fn a_large_file_under_another_name_is_not_sent_again() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::create_dir(pair.path("sub")).unwrap();
    for name in ["log.1", "log.2", "log.3", "left", "right", "sub/inner", "twice"] {
        fs::write(pair.path(name), noise(4 * MIB)).unwrap();
    }
    pair.pass();
    // As a database does with its log: the oldest gets the next name, and is written over from its beginning.
    let rename = |from: &str, to: &str| fs::rename(pair.path(from), pair.path(to)).unwrap();
    rename("log.1", "log.4");
    rename("log.2", "log.3");
    rename("left", "between");
    rename("right", "left");
    rename("between", "right");
    rename("sub/inner", "sub/other");
    rename("sub", "moved");
    fs::hard_link(pair.path("twice"), pair.path("again")).unwrap();
    fs::remove_file(pair.path("twice")).unwrap();
    let log = OpenOptions::new().write(true).open(pair.path("log.4")).unwrap();
    log.write_all_at(b"new", 0).unwrap();
    fs::write(pair.path("log.1"), noise(2 * MIB)).unwrap();
    let stats = pair.last_pass();
    pair.assert_equal();
    // What was renamed to where another was may be met after that has gone; so may what is in a directory of another name.
    assert!(stats.bytes_sent <= (2 + 3 * 4) * MIB as u64 + 64 * 1024, "{stats:?}");
    let stats = pair.last_pass();
    assert!(stats.bytes_sent <= 2 * MIB as u64, "{stats:?}");
    pair.assert_equal();
}

#[test]
fn a_large_file_that_had_two_names_goes_whole_when_one_is_gone() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::write(pair.path("a"), noise(2 * MIB)).unwrap();
    fs::hard_link(pair.path("a"), pair.path("b")).unwrap();
    pair.pass();
    let first = fs::read(pair.path("a")).unwrap();
    fs::remove_file(pair.path("b")).unwrap();
    fs::rename(pair.path("a"), pair.path("c")).unwrap();
    let file = OpenOptions::new().write(true).open(pair.path("c")).unwrap();
    file.write_all_at(b"other", 0).unwrap();
    pair.pass();
    pair.assert_equal();
    file.write_all_at(&first[..5], 0).unwrap();
    fs::rename(pair.path("c"), pair.path("b")).unwrap();
    pair.last_pass();
    pair.assert_equal();
}

#[test]
fn a_directory_that_became_a_hard_link_and_came_back_is_sent() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::create_dir(pair.path("p")).unwrap();
    fs::write(pair.path("p/file"), "content").unwrap();
    fs::write(pair.path("a"), "other").unwrap();
    // Its times alone would tell of no change below.
    settle_for(pair.source.path(), super::super::UNDER_WAY + Duration::from_millis(100));
    pair.pass();
    fs::rename(pair.path("p"), pair.path("q")).unwrap();
    fs::hard_link(pair.path("a"), pair.path("p")).unwrap();
    pair.pass();
    pair.assert_equal();
    fs::remove_file(pair.path("p")).unwrap();
    fs::rename(pair.path("q"), pair.path("p")).unwrap();
    pair.last_pass();
    pair.assert_equal();
}

#[test]
fn a_patched_file_takes_holes_and_a_new_size() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::write(pair.path("db"), noise(8 * MIB)).unwrap();
    pair.pass();
    let db = OpenOptions::new().write(true).open(pair.path("db")).unwrap();
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&db, punch, MIB as u64, 2 * MIB as u64 + 4096).unwrap();
    db.write_all_at(b"page", 5 * MIB as u64 + 17).unwrap();
    db.set_len(7 * MIB as u64 + 3).unwrap();
    let stats = pair.pass();
    assert!(stats.bytes_sent < 3 * MIB as u64, "{stats:?}");
    pair.assert_equal();
    let (source, copy) = (fs::metadata(pair.path("db")).unwrap(), fs::metadata(pair.copied("db")).unwrap());
    assert!(copy.blocks() <= source.blocks() + 256, "{} sectors, not {}", copy.blocks(), source.blocks());
    db.set_len(9 * MIB as u64).unwrap();
    db.set_len(6 * MIB as u64).unwrap();
    db.set_len(8 * MIB as u64).unwrap();
    pair.pass();
    pair.assert_equal();
    db.set_len(10).unwrap();
    pair.pass();
    pair.assert_equal();
}

#[test]
fn a_store_through_a_mapping_after_the_pass_is_found() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::write(pair.path("mapped"), vec![1; 8192]).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(pair.path("mapped")).unwrap();
    let mut mapping = SharedMapping::new(&file, 8192);
    mapping.store(100, 2);
    settle(pair.source.path());
    pair.pass();
    mapping.store(100, 3);
    let stats = pair.pass();
    assert_eq!(stats.entries_sent, 1, "{stats:?}");
    assert_eq!(fs::read(pair.copied("mapped")).unwrap()[100], 3);
}

#[test]
fn a_suspect_is_read_again_through_any_of_its_names() {
    let Ok(source) = tempfile::tempdir_in("/dev/shm") else { return };
    let mut pair = Pair::between(source, TreeKind::Plain);
    fs::write(pair.path("a"), "x").unwrap();
    fs::hard_link(pair.path("a"), pair.path("b")).unwrap();
    fs::write(pair.path("c"), "x").unwrap();
    let file = OpenOptions::new().read(true).write(true).open(pair.path("a")).unwrap();
    let mut mapping = SharedMapping::new(&file, 1);
    mapping.store(0, b'x');
    settle(pair.source.path());
    pair.pass();
    mapping.store(0, b'y');
    pair.scanner.recheck(Path::new("b"));
    pair.scanner.recheck(Path::new("absent/too"));
    let stats = pair.pass();
    assert_eq!((stats.entries_sent, stats.bytes_sent), (2, 1), "the inode, and its second name");
    assert_eq!(pair.pass().entries_sent, 0);
}

#[test]
fn links_made_changed_and_broken_between_passes_are_the_same_at_the_copy() {
    let mut pair = Pair::new(TreeKind::Plain);
    for dir in ["m", "a", "z"] {
        fs::create_dir(pair.path(dir)).unwrap();
    }
    fs::write(pair.path("m/x"), "one").unwrap();
    let steps: [&dyn Fn(&Pair); 7] = [
        &|pair| fs::hard_link(pair.path("m/x"), pair.path("a/x")).unwrap(),
        &|pair| fs::hard_link(pair.path("m/x"), pair.path("z/x")).unwrap(),
        &|pair| fs::write(pair.path("a/x"), "changed").unwrap(),
        &|pair| fs::rename(pair.path("m"), pair.path("n")).unwrap(),
        &|pair| {
            fs::remove_file(pair.path("a/x")).unwrap();
            fs::write(pair.path("a/x"), "its own").unwrap();
        },
        &|pair| fs::set_permissions(pair.path("z/x"), fs::Permissions::from_mode(0o600)).unwrap(),
        &|pair| {
            fs::remove_file(pair.path("n/x")).unwrap();
            fs::rename(pair.path("z/x"), pair.path("n/x")).unwrap();
        },
    ];
    for step in steps {
        step(&pair);
        pair.pass();
        pair.assert_equal();
        settle(pair.source.path());
    }
}

#[test]
fn a_directory_renamed_replaced_or_made_opaque_ends_the_same() {
    let mut pair = Pair::new(TreeKind::Upper);
    fs::create_dir_all(pair.path("a/b/c")).unwrap();
    fs::write(pair.path("a/b/c/f"), "f").unwrap();
    pair.pass();
    fs::rename(pair.path("a/b"), pair.path("moved")).unwrap();
    pair.pass();
    pair.assert_equal();
    fs::create_dir_all(pair.path("a/b/c")).unwrap();
    fs::write(pair.path("a/b/c/g"), "g").unwrap();
    xattr::set(pair.path("a/b"), "trusted.overlay.opaque", b"y").unwrap();
    pair.pass();
    pair.assert_equal();
    fs::remove_dir_all(pair.path("a/b/c")).unwrap();
    fs::write(pair.path("a/b/c"), "a file now").unwrap();
    xattr::remove(pair.path("a/b"), "trusted.overlay.opaque").unwrap();
    pair.last_pass();
    pair.assert_equal();
}

#[test]
fn a_file_that_shrinks_while_it_is_read_closes_and_comes_again() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::write(pair.path("f"), noise(3 * MIB)).unwrap();
    settle(pair.source.path());
    let mut cut = false;
    pair.pass_while(|root, item| {
        if matches!(item, TreeItem::Data { .. }) && !std::mem::replace(&mut cut, true) {
            File::options().write(true).open(root.join("f")).unwrap().set_len(300_000).unwrap();
        }
    });
    assert!(cut);
    assert_eq!(fs::metadata(pair.copied("f")).unwrap().len(), 3 * MIB as u64);
    pair.pass();
    pair.assert_equal();
}

#[test]
fn names_swapped_and_removed_under_the_pass_are_no_error() {
    let mut pair = Pair::new(TreeKind::Plain);
    for index in 0..50 {
        fs::create_dir(pair.path(format!("d{index}"))).unwrap();
        fs::write(pair.path(format!("d{index}/f")), "x").unwrap();
    }
    let mut count = 0;
    pair.pass_while(|root, item| {
        if let TreeItem::Entry(Entry { path, kind: EntryKind::Dir, .. }) = item
            && !path.is_empty()
        {
            let dir = root.join(OsStr::from_bytes(path));
            match count % 3 {
                0 => fs::remove_dir_all(&dir).unwrap(),
                1 => {
                    fs::remove_dir_all(&dir).unwrap();
                    std::os::unix::fs::symlink("/etc", &dir).unwrap();
                }
                _ => {}
            }
            count += 1;
        }
    });
    assert_eq!(count, 50);
    pair.last_pass();
    pair.assert_equal();
}

#[test]
fn a_closed_sink_ends_the_pass() {
    let mut pair = Pair::new(TreeKind::Plain);
    fs::write(pair.path("f"), "x").unwrap();
    let result = pair.scanner.pass(&mut |_| Err(super::super::SinkClosed));
    assert!(matches!(result, Err(super::super::TreeError::SinkClosed(_))));
}

#[test]
fn a_very_deep_tree_needs_few_descriptors_and_goes_away_again() {
    let mut pair = Pair::new(TreeKind::Plain);
    let mut deep = PathBuf::new();
    (0..1900).for_each(|_| deep.push("d"));
    let root = pair.source.path().to_owned();
    let mut dir = File::open(&root).unwrap();
    for _ in 0..1900 {
        rustix::fs::mkdirat(&dir, "d", rustix::fs::Mode::RWXU).unwrap();
        dir = rustix::fs::openat(&dir, "d", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap().into();
    }
    assert_eq!(pair.pass().entries_scanned, 1901);
    fs::rename(root.join("d"), root.join("e")).unwrap();
    let stats = pair.pass();
    assert_eq!((stats.entries_sent, stats.removed), (1901, 1));
    fs::remove_dir_all(root.join("e")).unwrap();
    pair.last_pass();
    pair.assert_equal();
}

/// For a person who wonders: `cargo test -p longhaul-common tree -- --nocapture an_unchanged_scan`.
#[test]
fn an_unchanged_scan_reports_its_speed() {
    let mut pair = Pair::new(TreeKind::Plain);
    for dir in 0..100 {
        fs::create_dir(pair.path(format!("dir{dir}"))).unwrap();
        for file in 0..200 {
            File::create(pair.path(format!("dir{dir}/some-file-{file}"))).unwrap();
        }
    }
    settle(pair.source.path());
    pair.pass();
    let stats = pair.pass();
    assert_eq!((stats.entries_scanned, stats.entries_sent), (20_101, 0));
    println!("{:?} for {} entries: {:?} each", stats.duration, stats.entries_scanned, stats.duration / 20_101);
}

/// write(2) moves the times before it writes. A store to a mapped page of a tmpfs does so only the first time: the rest of its stores are
/// like a write that is under way.
#[test]
fn a_write_that_is_under_way_during_a_pass_arrives() {
    let Ok(source) = tempfile::tempdir_in("/dev/shm") else { return };
    let mut pair = Pair::between(source, TreeKind::Plain);
    let sizes = [("small", 4096), ("large", 4 << 20)];
    let mapped = sizes.map(|(name, size)| {
        fs::write(pair.path(name), vec![1; size]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(pair.path(name)).unwrap();
        let mut mapping = SharedMapping::new(&file, size);
        mapping.store(0, 2);
        mapping
    });
    settle(pair.source.path());
    pair.pass();
    for mut mapping in mapped {
        mapping.store(0, 3);
    }
    // The same content is sent once.
    let stats = pair.pass();
    assert!((4097..=128 << 10).contains(&stats.bytes_sent), "{stats:?}");
    assert_eq!(pair.last_pass().bytes_sent, 0);
    pair.assert_equal();
}
