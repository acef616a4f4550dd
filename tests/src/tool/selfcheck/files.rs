//! Open files: unlinked, appended to, on tmpfs; directories and the working directory.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::Context;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::pattern;
use super::suite::{same, same_content};

/// The directory that the process works in.
const WORKING: &str = "working";
/// Bytes one verification appends.
const RECORD: usize = 64;
/// The log is cut at this many records, so that a long run does not fill the disk.
const MAX_RECORDS: u64 = 1000;

/// A file that is open but has no name, with an offset in the middle; one block of it changes each time.
pub(super) fn unlinked(
    dir: &Path,
    seed: u64,
    length: usize,
) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join(format!("unlinked-{length}"));
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    let mut content = pattern::bytes(seed, 0, length);
    file.write_all(&content)?;
    fs::remove_file(&path)?;
    let offset = length as u64 / 2 + 1;
    file.seek(SeekFrom::Start(offset))?;
    let mut generation = 0;
    Ok(move || {
        same("the offset", &file.stream_position()?, &offset)?;
        same("is there a name, which", &path.exists(), &false)?;
        same("the number of links", &file.metadata()?.nlink(), &0)?;
        let mut now = vec![0; length];
        file.read_exact_at(&mut now, 0).context("read")?;
        same_content("the content", &now, &content)?;
        same("the length", &file.metadata()?.len(), &(length as u64))?;
        generation += 1;
        let start = (generation as usize * 4096) % length;
        content[start..start + 4096].copy_from_slice(&pattern::bytes(seed, generation, 4096));
        file.write_all_at(&content[start..start + 4096], start as u64).context("write")
    })
}

/// A file that is open under a name that was removed, while another name of it is left. CRIU needs `--link-remap`.
pub(super) fn unlinked_name(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let (removed, left) = (dir.join("removed-name"), dir.join("left-name"));
    let mut file = File::options().read(true).write(true).create_new(true).open(&removed)?;
    fs::hard_link(&removed, &left)?;
    fs::remove_file(&removed)?;
    let mut generation = 0;
    file.write_all(&pattern::bytes(81, generation, 4096))?;
    Ok(move || {
        same_content("the content", &fs::read(&left)?, &pattern::bytes(81, generation, 4096))?;
        same("is the removed name back, which", &removed.exists(), &false)?;
        let inodes = (file.metadata()?.ino(), fs::metadata(&left)?.ino());
        same("the inode", &inodes.0, &inodes.1)?;
        generation += 1;
        file.write_all_at(&pattern::bytes(81, generation, 4096), 0).context("write")
    })
}

/// A log: opened for appending, with a reader whose offset follows.
pub(super) fn append(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join("log");
    let mut log = File::options().append(true).create(true).open(&path)?;
    log.set_len(0)?;
    let mut reader = File::open(&path)?;
    let mut records = 0;
    log.write_all(&pattern::bytes(82, records, RECORD))?;
    Ok(move || {
        same("the reader's offset", &reader.stream_position()?, &(records * RECORD as u64))?;
        let mut record = Vec::new();
        reader.read_to_end(&mut record)?;
        same_content("the last record", &record, &pattern::bytes(82, records, RECORD))?;
        records += 1;
        if records == MAX_RECORDS {
            records = 0;
            log.set_len(0)?;
            reader.seek(SeekFrom::Start(0))?;
        }
        // The offset is moved away: only O_APPEND brings the record to the end.
        log.seek(SeekFrom::Start(0))?;
        log.write_all(&pattern::bytes(82, records, RECORD)).context("append")
    })
}

/// Files on a tmpfs, one of them open.
pub(super) fn tmpfs(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let dir = dir.join(format!("selfcheck-{}", std::process::id()));
    fs::create_dir_all(dir.join("sub"))?;
    let (still, open) = (dir.join("sub/still"), dir.join("open"));
    fs::write(&still, pattern::bytes(83, 0, 40_000))?;
    std::os::unix::fs::symlink("sub/still", dir.join("link"))?;
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&open)?;
    let mut generation = 0;
    file.write_all(&pattern::bytes(84, generation, 8192))?;
    Ok(move || {
        let wanted = pattern::bytes(83, 0, 40_000);
        same_content("the file that nobody has open", &fs::read(dir.join("link"))?, &wanted)?;
        same("the offset", &file.stream_position()?, &8192)?;
        same_content("the open file", &fs::read(&open)?, &pattern::bytes(84, generation, 8192))?;
        same("its inode", &file.metadata()?.ino(), &fs::metadata(&open)?.ino())?;
        generation += 1;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&pattern::bytes(84, generation, 8192)).context("write the open file")
    })
}

/// The working directory, the mask of new files, and a directory that is open.
pub(super) fn directories(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let working = dir.join(WORKING);
    fs::create_dir_all(&working)?;
    let working = fs::canonicalize(working)?;
    std::env::set_current_dir(&working)?;
    nix::sys::stat::umask(Mode::from_bits_truncate(0o137));
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let open = nix::fcntl::open(&working, flags, Mode::empty())?;
    let mut round = 0_u64;
    Ok(move || {
        same("the working directory", &std::env::current_dir()?, &working)?;
        round += 1;
        let create = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let made = nix::fcntl::openat(open.as_fd(), "made", create, Mode::from_bits_truncate(0o777))?;
        File::from(made).write_all(&round.to_le_bytes())?;
        same("a file made there", &fs::read("made")?, &round.to_le_bytes().to_vec())?;
        let mode = fs::metadata(working.join("made"))?.mode() & 0o777;
        fs::remove_file("made")?;
        same("the mode of a new file", &mode, &0o640)
    })
}
