//! Removes a subtree with one descriptor open at a time, however deep a hostile peer has made it.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, RawDir};
use rustix::io::Errno;

use super::names::{join, split};
use super::{TreeError, sys};

/// Room for one read of a directory.
const LIST_BUFFER: usize = 32 * 1024;

/// Removes the directory `path` beneath `root` with all that is in it. Mounts stop it.
pub(super) fn remove_tree(root: BorrowedFd<'_>, path: &[u8]) -> Result<(), TreeError> {
    let mut pending = vec![path.to_vec()];
    while let Some(dir) = pending.last() {
        match remove_empty(root, dir) {
            Ok(()) => {
                pending.pop();
            }
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                let dir = dir.clone();
                let below = empty_of_files(root, &dir)?;
                if below.is_empty() {
                    remove_empty(root, &dir).map_err(TreeError::io("remove the directory", &dir))?;
                    pending.pop();
                }
                pending.extend(below.iter().map(|name| join(&dir, name)));
            }
            Err(error) => return Err(TreeError::io("remove the directory", dir)(error)),
        }
    }
    Ok(())
}

fn remove_empty(root: BorrowedFd<'_>, path: &[u8]) -> Result<(), Errno> {
    let (parent, name) = split(path);
    rustix::fs::unlinkat(sys::hold_dir(root, parent)?, name, AtFlags::REMOVEDIR)
}

/// Unlinks all but the directories of a directory, and names those.
fn empty_of_files(root: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<Vec<u8>>, TreeError> {
    let dir = sys::open_dir(root, path).map_err(TreeError::io("open the directory", path))?;
    let mut buffer = vec![MaybeUninit::uninit(); LIST_BUFFER];
    let mut listing = RawDir::new(dir.as_fd(), &mut buffer);
    let mut below = Vec::new();
    while let Some(found) = listing.next() {
        let found = found.map_err(TreeError::io("list the directory", path))?;
        let name = found.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        match rustix::fs::unlinkat(dir.as_fd(), name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => below.push(name.to_bytes().to_vec()),
            removed => removed.map_err(TreeError::io("remove", &join(path, name.to_bytes())))?,
        }
    }
    Ok(below)
}
