//! Which names a tree may hold, and which extended attributes cross hosts.

use super::error::printable;
use super::{MAX_NAME, MAX_PATH, TreeError, TreeKind};

/// What overlayfs notes about *this* host's filesystems. `origin` and `upper` hold file handles, `uuid` and `impure`
/// and `nlink` go with them. A handle means nothing on another filesystem: "Sharing and copying layers" in the kernel's
/// `Documentation/filesystems/overlayfs.rst` allows layers to be copied to another machine, and says that
/// verifying the handles of a copied layer then fails the mount.
const HOST_BOUND: [&[u8]; 5] = [b"origin", b"impure", b"nlink", b"upper", b"uuid"];

/// What overlayfs notes about the layer's meaning: the same document, "whiteouts and opaque directories", "Renaming
/// directories", "Metadata only copy up"; `protattr` is from `fs/overlayfs/overlayfs.h` (immutable and append-only).
const LAYER_DATA: [&[u8]; 5] = [b"opaque", b"redirect", b"metacopy", b"whiteout", b"protattr"];

/// The HMAC of `security.evm` covers inode number and filesystem UUID (kernel `Documentation/ABI/testing/evm`).
const EVM: &[u8] = b"security.evm";

/// Says whether an extended attribute is part of a tree of this kind.
pub(super) fn is_carried(kind: TreeKind, name: &[u8]) -> bool {
    if let Some(overlay) = name.strip_prefix(b"trusted.overlay.") {
        return kind == TreeKind::Upper && LAYER_DATA.contains(&overlay);
    }
    // Mounted with `userxattr`, overlayfs keeps its notes here; otherwise they are the container's own.
    if let Some(overlay) = name.strip_prefix(b"user.overlay.") {
        return kind == TreeKind::Plain || !HOST_BOUND.contains(&overlay);
    }
    if name == EVM {
        return false;
    }
    let namespaces: [&[u8]; 4] = [b"user.", b"security.", b"system.posix_acl_", b"trusted."];
    namespaces.iter().any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
}

/// Says whether leaving out an attribute loses nothing: it describes the host, not the tree.
pub(super) fn is_host_bound(name: &[u8]) -> bool {
    name == EVM
        || [&b"trusted.overlay."[..], b"user.overlay."]
            .iter()
            .filter_map(|prefix| name.strip_prefix(*prefix))
            .any(|rest| HOST_BOUND.contains(&rest))
}

/// Says whether a filesystem or security module may decline an attribute without harm: labels of a module
/// that this host does not run. File capabilities are not among them.
pub(super) fn may_be_declined(name: &[u8]) -> bool {
    name.starts_with(b"security.") && name != b"security.capability"
}

/// Refuses what cannot be the path of something beneath a root.
pub(super) fn check_path(path: &[u8]) -> Result<(), TreeError> {
    let refuse = |reason| Err(TreeError::BadPath { path: printable(path), reason });
    if path.is_empty() {
        return refuse("it is empty");
    }
    if path.len() > MAX_PATH {
        return refuse("it is longer than 4096 bytes");
    }
    if path[0] == b'/' {
        return refuse("it is absolute");
    }
    if path.contains(&0) {
        return refuse("it holds a NUL byte");
    }
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" => return refuse("it has an empty component"),
            b"." | b".." => return refuse("it has a '.' or '..' component"),
            name if name.len() > MAX_NAME => return refuse("a component is longer than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

/// The path of `name` in the directory `dir`; the empty path is the root.
pub(super) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(dir.len() + 1 + name.len());
    if !dir.is_empty() {
        path.extend_from_slice(dir);
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// Splits a path into its directory and its last component.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}
