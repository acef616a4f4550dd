//! Small trees as tar archives, in place of the tar that CRIU starts.
//!
//! CRIU packs every tmpfs of a container with `tar --gzip` while the container is frozen, and unpacks it before it runs again
//! (`tmpfs_dump` and `tmpfs_restore` in criu/filesystems.c, 4.2). A container of runc has five or six of them, most of
//! them empty: at 3 to 5 ms each for starting tar and gzip that is a third of the downtime of a small container. CRIU forks, and calls
//! execvp(3) in the child (`cr_system_userns` in criu/util.c): the child does tar's work by itself. A tree with anything but plain
//! entries is left to the real tar, and so is an archive: the two understand each other.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, mknod};
use tar::{Archive, Builder, EntryType, Header};

/// In the environment of a CRIU that the hold has started.
const HOLD: &str = "LONGHAUL_HOLD";
/// The most bytes of files taken: more is tar's work, which knows holes and streams. Larger than what a memory filesystem may have before
/// it is copied in passes (`MUCH` in source-agent/src/inspect/tmpfs.rs): files have holes.
const MOST_BYTES: u64 = 4 << 20;
/// The most entries.
const MOST_ENTRIES: usize = 2000;

/// Does what a command line asks of tar, from or to the standard streams; the exit code. Nothing if it is for the real tar.
pub(crate) fn stand_in(words: &[OsString]) -> Option<i32> {
    // What is packed here no `tar --gzip` unpacks: only where both ends are ours.
    std::env::var_os(HOLD)?;
    let (dir, packs) = asked(words)?;
    let mut stream = stream(if packs { libc::STDOUT_FILENO } else { libc::STDIN_FILENO });
    let done = if packs {
        let mut output = io::BufWriter::new(&*stream);
        create(&dir, &mut output).and_then(|done| output.flush().map(|()| done))
    } else {
        extract(&mut stream, &dir)
    };
    match done {
        Ok(is_done) => is_done.then_some(0),
        Err(error) => {
            eprintln!("longhaul: can't pack or unpack a memory filesystem: {error}");
            Some(1)
        }
    }
}

fn stream(fd: RawFd) -> ManuallyDrop<File> {
    // SAFETY: a standard stream, which this process has for as long as it lives: it is not closed here.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

/// One entry, looked at before anything is written.
struct Found {
    path: PathBuf,
    metadata: fs::Metadata,
}

/// Writes the tree below `dir`, on its own filesystem alone; false, with nothing written, if it is one for the real tar.
fn create(dir: &Path, to: &mut impl Write) -> io::Result<bool> {
    let mut found = vec![Found { path: PathBuf::new(), metadata: fs::metadata(dir)? }];
    let device = found[0].metadata.dev();
    let mut bytes = 0;
    let mut next = 0;
    while let Some(directory) = found.get(next) {
        next += 1;
        if !directory.metadata.is_dir() || directory.metadata.dev() != device {
            continue;
        }
        let base = directory.path.clone();
        for entry in fs::read_dir(dir.join(&base))? {
            let path = base.join(entry?.file_name());
            let metadata = dir.join(&path).symlink_metadata()?;
            let kind = metadata.file_type();
            if kind.is_socket() {
                // Nobody can bring it back; tar leaves it out, too.
                continue;
            }
            bytes += if kind.is_file() { metadata.len() } else { 0 };
            let hard_link = !kind.is_dir() && metadata.nlink() > 1;
            let has_attributes = xattr::list(dir.join(&path)).is_ok_and(|mut names| names.next().is_some());
            if hard_link || has_attributes || bytes > MOST_BYTES || found.len() > MOST_ENTRIES {
                return Ok(false);
            }
            found.push(Found { path, metadata });
        }
    }
    let mut builder = Builder::new(to);
    for entry in &found {
        append(&mut builder, dir, entry)?;
    }
    builder.finish()?;
    Ok(true)
}

fn append(builder: &mut Builder<&mut impl Write>, dir: &Path, entry: &Found) -> io::Result<()> {
    let metadata = &entry.metadata;
    let kind = metadata.file_type();
    let mut header = Header::new_gnu();
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header.set_size(0);
    let path = Path::new(".").join(&entry.path);
    if kind.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        return builder.append_link(&mut header, path, fs::read_link(dir.join(&entry.path))?);
    }
    if kind.is_file() {
        let content = fs::read(dir.join(&entry.path))?;
        header.set_entry_type(EntryType::Regular);
        header.set_size(content.len() as u64);
        return builder.append_data(&mut header, path, content.as_slice());
    }
    if kind.is_char_device() || kind.is_block_device() {
        let number = |number: u64| u32::try_from(number).map_err(io::Error::other);
        header.set_device_major(number(nix::sys::stat::major(metadata.rdev()))?)?;
        header.set_device_minor(number(nix::sys::stat::minor(metadata.rdev()))?)?;
    }
    header.set_entry_type(if kind.is_char_device() {
        EntryType::Char
    } else if kind.is_block_device() {
        EntryType::Block
    } else if kind.is_fifo() {
        EntryType::Fifo
    } else {
        EntryType::Directory
    });
    builder.append_data(&mut header, path, io::empty())
}

/// Unpacks an archive below `dir`; false if it is one for the real tar, which then finds `from` at its beginning.
fn extract(from: &mut File, dir: &Path) -> io::Result<bool> {
    let mut magic = [0; 2];
    from.read_exact(&mut magic)?;
    from.rewind()?;
    if magic == [0x1f, 0x8b] {
        return Ok(false);
    }
    let mut directories = Vec::new();
    let mut archive = Archive::new(&mut *from);
    let mut plain = true;
    for entry in archive.entries()? {
        let mut entry = entry?;
        if !unpack(&mut entry, dir, &mut directories)? {
            plain = false;
            break;
        }
    }
    if !plain {
        from.rewind()?;
        return Ok(false);
    }
    // Last: entries that come into a directory change its time, and its mode may forbid them.
    for (path, header) in directories.iter().rev() {
        own(path, header)?;
        fs::set_permissions(path, fs::Permissions::from_mode(header.mode()? & 0o7777))?;
        set_time(path, header)?;
    }
    Ok(true)
}

/// Unpacks one entry; false if it is of a kind for the real tar.
fn unpack(
    entry: &mut tar::Entry<'_, impl Read>,
    dir: &Path,
    directories: &mut Vec<(PathBuf, Header)>,
) -> io::Result<bool> {
    let name = entry.path()?.into_owned();
    let inside = name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !inside {
        return Err(io::Error::other(format!("the archive leads out of its directory: {}", name.display())));
    }
    let path = dir.join(&name);
    // What was unpacked may be a link that leads elsewhere.
    let parent_is_real = name
        .parent()
        .into_iter()
        .flat_map(Path::ancestors)
        .all(|parent| dir.join(parent).symlink_metadata().is_ok_and(|metadata| metadata.is_dir()));
    if !parent_is_real {
        return Err(io::Error::other(format!("the archive has no directory for {}", name.display())));
    }
    let header = entry.header().clone();
    let mode = header.mode()? & 0o7777;
    let kind = header.entry_type();
    if kind.is_dir() {
        if !path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            fs::create_dir(&path)?;
        }
        directories.push((path, header));
        return Ok(true);
    }
    // As tar does: what is there gives way.
    let _ = fs::remove_file(&path);
    if kind.is_symlink() {
        let target = entry.link_name()?.ok_or_else(|| io::Error::other("a symbolic link without a target"))?;
        std::os::unix::fs::symlink(target, &path)?;
        own(&path, &header)?;
        return Ok(true);
    }
    let device = || -> io::Result<u64> {
        let (major, minor) = (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
        Ok(nix::sys::stat::makedev(major.into(), minor.into()))
    };
    let node = |kind: SFlag, device: u64| mknod(&path, kind, Mode::from_bits_truncate(mode), device);
    if kind.is_character_special() {
        node(SFlag::S_IFCHR, device()?)?;
    } else if kind.is_block_special() {
        node(SFlag::S_IFBLK, device()?)?;
    } else if kind.is_fifo() {
        node(SFlag::S_IFIFO, 0)?;
    } else if kind.is_file() {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        io::copy(entry, &mut file)?;
    } else {
        return Ok(false);
    }
    own(&path, &header)?;
    // Also of what mknod(2) made: the umask was taken off there.
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    set_time(&path, &header)?;
    Ok(true)
}

fn own(path: &Path, header: &Header) -> io::Result<()> {
    let id = |id: u64| u32::try_from(id).map_err(io::Error::other);
    lchown(path, Some(id(header.uid()?)?), Some(id(header.gid()?)?))
}

fn set_time(path: &Path, header: &Header) -> io::Result<()> {
    let seconds = i64::try_from(header.mtime()?).unwrap_or(0);
    let time = nix::sys::time::TimeSpec::new(seconds, 0);
    let flag = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    Ok(nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, flag)?)
}

/// What a command line of CRIU's asks of tar: the directory, and whether to pack it.
fn asked(words: &[OsString]) -> Option<(PathBuf, bool)> {
    let has = |option: &str| words.iter().any(|word| word.as_bytes() == option.as_bytes());
    let at = words.iter().position(|word| word.as_bytes() == b"--directory")?;
    let dir = PathBuf::from(words.get(at + 1)?);
    match (has("--create"), has("--extract")) {
        (true, false) => Some((dir, true)),
        (false, true) => Some((dir, false)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("sub")).expect("creates");
        fs::write(dir.path().join("sub/file"), "content").expect("writes");
        fs::set_permissions(dir.path().join("sub/file"), fs::Permissions::from_mode(0o4751)).expect("sets");
        fs::set_permissions(dir.path().join("sub"), fs::Permissions::from_mode(0o1755)).expect("sets");
        std::os::unix::fs::symlink("/somewhere", dir.path().join("link")).expect("links");
        nix::unistd::mkfifo(&dir.path().join("fifo"), Mode::from_bits_truncate(0o640)).expect("makes");
        dir
    }

    fn packed(dir: &Path) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        assert!(create(dir, &mut file).expect("packs"));
        file.rewind().expect("rewinds");
        file
    }

    #[test]
    fn a_small_tree_comes_back() {
        let from = tree();
        let to = tempfile::tempdir().expect("a directory");
        assert!(extract(&mut packed(from.path()), to.path()).expect("unpacks"));
        assert_eq!(fs::read(to.path().join("sub/file")).expect("there"), b"content");
        for name in ["", "sub", "sub/file", "link", "fifo"] {
            let (was, is) = (from.path().join(name), to.path().join(name));
            let (was, is) = (was.symlink_metadata().expect("there"), is.symlink_metadata().expect("there"));
            assert_eq!((was.mode(), was.uid(), was.gid()), (is.mode(), is.uid(), is.gid()), "{name}");
            if !was.is_symlink() {
                assert_eq!(was.mtime(), is.mtime(), "{name}");
            }
        }
        assert_eq!(fs::read_link(to.path().join("link")).expect("a link"), Path::new("/somewhere"));
    }

    #[test]
    fn the_real_tar_understands_it() {
        let from = tree();
        let to = tempfile::tempdir().expect("a directory");
        let status = std::process::Command::new("tar")
            .args(["--extract", "--directory"])
            .arg(to.path())
            .stdin(packed(from.path()))
            .status()
            .expect("runs");
        assert!(status.success());
        assert_eq!(fs::read(to.path().join("sub/file")).expect("there"), b"content");
    }

    #[test]
    fn hard_links_are_left_to_tar() {
        let from = tree();
        fs::hard_link(from.path().join("sub/file"), from.path().join("other")).expect("links");
        let mut written = Vec::new();
        assert!(!create(from.path(), &mut written).expect("looks"));
        assert!(written.is_empty());
    }

    #[test]
    fn an_archive_does_not_lead_out() {
        let outside = tempfile::tempdir().expect("a directory");
        let dir = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink(outside.path(), dir.path().join("way")).expect("links");
        for name in ["../evil", "way/evil"] {
            let mut file = tempfile::tempfile().expect("a file");
            let mut builder = Builder::new(&mut file);
            let mut header = Header::new_gnu();
            header.set_size(0);
            header.set_mode(0o644);
            header.as_gnu_mut().expect("gnu").name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            builder.append(&header, io::empty()).expect("packs");
            builder.finish().expect("packs");
            drop(builder);
            file.rewind().expect("rewinds");
            extract(&mut file, dir.path()).expect_err(name);
        }
        assert_eq!(fs::read_dir(outside.path()).expect("there").count(), 0);
    }
}
