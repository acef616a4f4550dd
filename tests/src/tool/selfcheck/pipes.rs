//! Pipes and FIFOs with unread data.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::pattern;
use super::suite::{same, same_content};
use crate::tool::sys::event;

/// Less than a page, so that it does not fill its buffer.
const LITTLE: usize = 3000;
/// Much more than the default capacity of 64 KiB.
const MUCH: usize = 300 << 10;
/// The capacity for `MUCH`, which an unprivileged process may set.
const LARGE_CAPACITY: i32 = 1 << 20;

/// A pipe with a little unread data.
pub(super) fn unread() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    keeps_data(reader, writer, 1, LITTLE)
}

/// A non-blocking pipe with a raised capacity and much unread data.
pub(super) fn large() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let capacity = event::fcntl(writer.as_fd(), libc::F_SETPIPE_SZ, LARGE_CAPACITY)?;
    let copy = writer.try_clone()?;
    let mut content = keeps_data(reader, writer, 2, MUCH)?;
    Ok(move || {
        same("the capacity", &event::fcntl(copy.as_fd(), libc::F_GETPIPE_SZ, 0)?, &capacity)?;
        content()
    })
}

/// A FIFO in the file system with unread data.
pub(super) fn fifo(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join("fifo");
    nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).context("make the FIFO")?;
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
    let writer = OpenOptions::new().write(true).open(&path)?;
    keeps_data(reader.into(), writer.into(), 3, LITTLE)
}

fn keeps_data(
    reader: OwnedFd,
    writer: OwnedFd,
    seed: u64,
    length: usize,
) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let flags = [event::fcntl(reader.as_fd(), libc::F_GETFL, 0)?, event::fcntl(writer.as_fd(), libc::F_GETFL, 0)?];
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    let mut generation = 0;
    writer.write_all(&pattern::bytes(seed, generation, length))?;
    Ok(move || {
        same("the length of the unread data", &event::unread(reader.as_fd())?, &length)?;
        let now = [event::fcntl(reader.as_fd(), libc::F_GETFL, 0)?, event::fcntl(writer.as_fd(), libc::F_GETFL, 0)?];
        same("the status flags of both ends", &now, &flags)?;
        let mut content = vec![0; length];
        reader.read_exact(&mut content).context("read the pipe")?;
        same_content("the unread data", &content, &pattern::bytes(seed, generation, length))?;
        generation += 1;
        writer.write_all(&pattern::bytes(seed, generation, length)).context("write to the pipe")
    })
}
