//! The memory filesystem that images pass through: nothing of a container's memory touches a disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount as mount_fs, umount2};
use thiserror::Error;

/// It could not be mounted.
#[derive(Debug, Error)]
#[error("can't mount a memory filesystem on {path}: run the agent as root")]
pub struct MemoryDirError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A mounted memory filesystem. It goes with this value, and with what is in it.
#[derive(Debug)]
pub struct MemoryDir {
    path: PathBuf,
}

/// Mounts one at `path`. What an agent that was killed left there stays mounted and is used again: a hold may still be
/// waiting on a socket in it.
pub fn mount(path: &Path) -> Result<MemoryDir, MemoryDirError> {
    let wrap = |source| MemoryDirError { path: path.to_owned(), source };
    fs::create_dir_all(path).map_err(wrap)?;
    if !is_mount_point(path) {
        // Half of memory, the kernel's default, would stop a container that fills more than that.
        mount_fs(
            Some("longhaul"),
            path,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("mode=700,size=90%"),
        )
        .map_err(|errno| wrap(errno.into()))?;
    }
    Ok(MemoryDir { path: path.to_owned() })
}

fn is_mount_point(path: &Path) -> bool {
    fs::read_to_string("/proc/self/mountinfo")
        .is_ok_and(|text| text.lines().any(|line| line.split(' ').nth(4).is_some_and(|mount| Path::new(mount) == path)))
}

impl Drop for MemoryDir {
    fn drop(&mut self) {
        // A container's memory may still be filled in from here.
        if fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_some()) {
            tracing::info!(path = %self.path.display(), "left mounted: it is in use");
            return;
        }
        if let Err(errno) = umount2(&self.path, MntFlags::MNT_DETACH) {
            tracing::warn!(path = %self.path.display(), %errno, "can't unmount the memory filesystem");
        }
        let _ = fs::remove_dir(&self.path);
    }
}
