//! Random changes between the passes and during them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;

/// One change to a tree; what cannot be done to what is there does nothing.
#[derive(Debug, Clone)]
enum Change {
    Write(PathBuf, u8, usize),
    WriteAt(PathBuf, u8, u64),
    Append(PathBuf, u8),
    Resize(PathBuf, u64),
    Punch(PathBuf, u64, u64),
    MakeDir(PathBuf),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, u8),
    Node(PathBuf, FileType, u32),
    Mode(PathBuf, u32),
    Owner(PathBuf, u32),
    SetXattr(PathBuf, &'static str, u8),
    RemoveXattr(PathBuf, &'static str),
    Times(PathBuf, u64),
}

impl Change {
    fn make(&self, root: &Path) {
        let at = |path: &Path| root.join(path);
        let open = |path: &Path| {
            let is_file = fs::symlink_metadata(at(path)).is_ok_and(|status| status.is_file());
            is_file.then(|| OpenOptions::new().write(true).open(at(path)).unwrap())
        };
        let _does_not_apply = match self {
            Self::Write(path, byte, len) => match fs::symlink_metadata(at(path)) {
                Ok(status) if !status.is_file() => Ok(()),
                _ => fs::write(at(path), vec![*byte; *len]),
            },
            Self::WriteAt(path, byte, offset) => {
                open(path).map_or(Ok(()), |file| file.write_all_at(&[*byte; 5000], *offset))
            }
            Self::Append(path, byte) => open(path).map_or(Ok(()), |file| {
                let end = file.metadata()?.len();
                file.write_all_at(&[*byte; 100], end)
            }),
            Self::Resize(path, size) => open(path).map_or(Ok(()), |file| file.set_len(*size)),
            Self::Punch(path, offset, len) => open(path).map_or(Ok(()), |file| {
                let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                Ok(rustix::fs::fallocate(file, flags, *offset, *len)?)
            }),
            Self::MakeDir(path) => fs::create_dir(at(path)),
            Self::Remove(path) => fs::remove_file(at(path)).or_else(|_| fs::remove_dir_all(at(path))),
            Self::Rename(from, to) => fs::rename(at(from), at(to)),
            Self::Link(from, to) => fs::hard_link(at(from), at(to)),
            Self::Symlink(path, byte) => symlink(format!("target{byte}"), at(path)),
            Self::Node(path, kind, minor) => {
                let made = mknodat(CWD, at(path), *kind, Mode::RUSR, rustix::fs::makedev(0, *minor));
                made.map_err(Into::into)
            }
            Self::Mode(path, mode) => match fs::symlink_metadata(at(path)) {
                Ok(status) if !status.is_symlink() => fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)),
                _ => Ok(()),
            },
            Self::Owner(path, id) if id % 2 == 0 => lchown(at(path), Some(*id), None),
            Self::Owner(path, id) => match fs::symlink_metadata(at(path)) {
                Ok(status) if status.is_file() => chown(at(path), None, Some(*id)),
                _ => Ok(()),
            },
            Self::SetXattr(path, name, byte) => xattr::set(at(path), name, &[*byte; 3]),
            Self::RemoveXattr(path, name) => xattr::remove(at(path), name),
            Self::Times(path, secs) => {
                open(path).map_or(Ok(()), |file: File| file.set_modified(UNIX_EPOCH + Duration::new(*secs, 7)))
            }
        };
    }
}

/// Few names, so that changes meet; three levels.
fn path() -> impl Strategy<Value = PathBuf> {
    let name = prop_oneof![Just(&b"a"[..]), Just(&b"b"[..]), Just(&b"c"[..]), Just(&b"\xfe"[..])];
    prop::collection::vec(name, 1..=3).prop_map(|names| names.into_iter().map(OsStr::from_bytes).collect())
}

fn xattr_name() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("trusted.one"), Just("user.two"), Just("trusted.overlay.opaque"), Just("trusted.overlay.origin")]
}

fn change() -> impl Strategy<Value = Change> {
    let size = prop_oneof![Just(0), Just(10), 1..200_000_usize, 1_048_570..1_500_000_usize];
    let offset = prop_oneof![0..3000_u64, 0..1_600_000_u64];
    let node = prop_oneof![Just(FileType::CharacterDevice), Just(FileType::Fifo), Just(FileType::Socket)];
    prop_oneof![
        4 => (path(), any::<u8>(), size).prop_map(|(path, byte, size)| Change::Write(path, byte, size)),
        4 => (path(), any::<u8>(), offset.clone()).prop_map(|(path, byte, at)| Change::WriteAt(path, byte, at)),
        2 => (path(), any::<u8>()).prop_map(|(path, byte)| Change::Append(path, byte)),
        2 => (path(), 0..2_000_000_u64).prop_map(|(path, size)| Change::Resize(path, size)),
        2 => (path(), offset, 1..400_000_u64).prop_map(|(path, at, len)| Change::Punch(path, at, len)),
        5 => path().prop_map(Change::MakeDir),
        2 => path().prop_map(Change::Remove),
        4 => (path(), path()).prop_map(|(from, to)| Change::Rename(from, to)),
        5 => (path(), path()).prop_map(|(from, to)| Change::Link(from, to)),
        1 => (path(), any::<u8>()).prop_map(|(path, byte)| Change::Symlink(path, byte)),
        2 => (path(), node, 0..2_u32).prop_map(|(path, kind, minor)| Change::Node(path, kind, minor)),
        1 => (path(), 0..0o10000_u32).prop_map(|(path, mode)| Change::Mode(path, mode)),
        1 => (path(), 0..5000_u32).prop_map(|(path, id)| Change::Owner(path, id)),
        2 => (path(), xattr_name(), any::<u8>()).prop_map(|(path, name, byte)| Change::SetXattr(path, name, byte)),
        1 => (path(), xattr_name()).prop_map(|(path, name)| Change::RemoveXattr(path, name)),
        1 => (path(), 0..4_000_000_000_u64).prop_map(|(path, secs)| Change::Times(path, secs)),
    ]
}

/// What happens around one live pass: changes before it, and one change after each item that it sends.
fn round() -> impl Strategy<Value = (Vec<Change>, Vec<Change>)> {
    (prop::collection::vec(change(), 0..25), prop::collection::vec(change(), 0..12))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_changes_between_and_during_live_passes_end_in_equal_trees(
        is_upper in any::<bool>(),
        rounds in prop::collection::vec(round(), 1..5),
        after in prop::collection::vec(change(), 0..25),
    ) {
        let mut pair = Pair::new(if is_upper { TreeKind::Upper } else { TreeKind::Plain });
        for (before, during) in rounds {
            before.iter().for_each(|change| change.make(pair.source.path()));
            let mut during = during.iter();
            pair.pass_while(|root, _| during.by_ref().take(1).for_each(|change| change.make(root)));
        }
        after.iter().for_each(|change| change.make(pair.source.path()));
        pair.last_pass();
        pair.assert_equal();
    }
}
