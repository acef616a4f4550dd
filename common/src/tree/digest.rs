//! Names a directory tree by its content.

use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{FileType, RawDir};

use super::names::{join, split};
use super::{TreeError, TreeKind, metadata, sys};

/// The hash of a layer or image directory. Equal digests mean equal trees, even against a peer that lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerDigest([u8; 32]);

/// One thread for each core of the smallest host we know; hashing is bound by reading.
const THREADS: usize = 2;
/// Room for one read of a directory.
const LIST_BUFFER: usize = 64 * 1024;
/// How much of a file is read at once.
const READ_BUFFER: usize = 256 * 1024;
/// Marks this way of hashing: change one with the other.
const DOMAIN: &str = "longhaul 2026 layer digest 1";
/// Labels that the host's policy sets, not the image.
const HOST_LABEL: &[u8] = b"security.selinux";

impl LayerDigest {
    /// The 32 bytes of the digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for LayerDigest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for LayerDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for LayerDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "LayerDigest({self})")
    }
}

/// Hashes the tree beneath `root`: of each path, sorted by bytes, its type, mode, owner, group, size, link target,
/// device, extended attributes and content. Times, hard links and what names the host are left out. The tree must
/// not change meanwhile.
///
/// # Errors
/// [`TreeError::Io`] if anything in it cannot be read; a mount within the tree is such an error.
pub fn digest(root: &Path) -> Result<LayerDigest, TreeError> {
    let root_path = root.as_os_str().as_encoded_bytes();
    let root = sys::open_root(root).map_err(TreeError::io("open the root", root_path))?;
    let mut paths = all_paths(root.as_fd())?;
    paths.sort_unstable();
    let hashes = hash_entries(root.as_fd(), &paths)?;
    let mut whole = blake3::Hasher::new_derive_key(DOMAIN);
    hashes.iter().for_each(|hash| {
        whole.update(hash);
    });
    Ok(LayerDigest(*whole.finalize().as_bytes()))
}

/// Every path of the tree, the empty one for its root included.
fn all_paths(root: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, TreeError> {
    let mut buffer = vec![MaybeUninit::uninit(); LIST_BUFFER];
    let mut paths = vec![Vec::new()];
    let mut todo = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let dir = sys::open_dir(root, &path).map_err(TreeError::io("open the directory", &path))?;
        let mut listing = RawDir::new(dir.as_fd(), &mut buffer);
        while let Some(found) = listing.next() {
            let found = found.map_err(TreeError::io("list the directory", &path))?;
            let name = found.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let below = join(&path, name.to_bytes());
            // Some filesystems do not say the type here.
            let is_dir = match found.file_type() {
                FileType::Unknown => {
                    let status = sys::status_at(dir.as_fd(), name).map_err(TreeError::io("examine", &below))?;
                    metadata::file_type(&status) == FileType::Directory
                }
                kind => kind == FileType::Directory,
            };
            if is_dir {
                todo.push(below.clone());
            }
            paths.push(below);
        }
    }
    Ok(paths)
}

/// The hash of each path, in their order; threads take the next path as they come free.
fn hash_entries(root: BorrowedFd<'_>, paths: &[Vec<u8>]) -> Result<Vec<[u8; 32]>, TreeError> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, [u8; 32])>, TreeError> {
        let mut done = Vec::new();
        let mut buffer = vec![0; READ_BUFFER];
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(path) = paths.get(index) else {
                return Ok(done);
            };
            done.push((index, hash_entry(root, path, &mut buffer)?));
        }
    };
    let mut hashes = vec![[0; 32]; paths.len()];
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let done = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            done.into_iter().for_each(|(index, hash)| hashes[index] = hash);
        }
        Ok(hashes)
    })
}

fn hash_entry(root: BorrowedFd<'_>, path: &[u8], buffer: &mut [u8]) -> Result<[u8; 32], TreeError> {
    let (dir, name) = split(path);
    let node = if path.is_empty() {
        sys::hold_dir(root, path)
    } else {
        sys::hold_dir(root, dir).and_then(|dir| sys::hold(dir.as_fd(), name))
    };
    let node = node.map_err(TreeError::io("open", path))?;
    let status = sys::status(node.as_fd()).map_err(TreeError::io("examine", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(path);
    // Type and permissions.
    field(&status.stx_mode.to_le_bytes());
    field(&status.stx_uid.to_le_bytes());
    field(&status.stx_gid.to_le_bytes());
    let kind = metadata::file_type(&status);
    match kind {
        FileType::RegularFile => field(&status.stx_size.to_le_bytes()),
        FileType::Symlink => {
            field(&sys::link_target(node.as_fd()).map_err(TreeError::io("read the link", path))?);
        }
        FileType::CharacterDevice | FileType::BlockDevice => {
            field(&status.stx_rdev_major.to_le_bytes());
            field(&status.stx_rdev_minor.to_le_bytes());
        }
        _ => {}
    }
    let xattrs =
        metadata::read_xattrs(node.as_fd(), TreeKind::Upper).map_err(TreeError::io("read the attributes of", path))?;
    let xattrs: Vec<_> = xattrs.carried.iter().filter(|(name, _)| name != HOST_LABEL).collect();
    field(&(xattrs.len() as u64).to_le_bytes());
    for (name, value) in xattrs {
        field(name);
        field(value);
    }
    if kind == FileType::RegularFile {
        let mut file = sys::open_to_read(node.as_fd()).map_err(TreeError::io("open", path))?;
        loop {
            match std::io::Read::read(&mut file, buffer) {
                Ok(0) => break,
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(TreeError::io("read", path)(error)),
            };
        }
    }
    Ok(*hasher.finalize().as_bytes())
}
