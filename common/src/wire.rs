//! The one place where wire types become domain types and back.

use bytes::Bytes;
use longhaul_proto::peer;
use thiserror::Error;

use crate::host::{Capabilities, CriuVersion};
use crate::net::Neighbour;
use crate::obstacle::Obstacle;
use crate::tree::{Content, Entry, EntryKind, Timestamp, TreeItem};

/// A message that means nothing.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// A message without its content.
    #[error("the peer sent an empty {0} message")]
    Empty(&'static str),
    /// An entry of no kind.
    #[error("the peer sent a file entry of unknown kind {0}")]
    Kind(i32),
    /// A message that does not belong in its stream.
    #[error("the peer sent {got}, where {expected} was expected")]
    OutOfTurn {
        /// What came.
        got: &'static str,
        /// What may come.
        expected: &'static str,
    },
    /// The stream ended before its end marker.
    #[error("the peer's {0} stream was cut off")]
    Truncated(&'static str),
}

impl From<Capabilities> for peer::Capabilities {
    fn from(ours: Capabilities) -> Self {
        Self {
            protocol_min: ours.protocol.0,
            protocol_max: ours.protocol.1,
            agent_version: ours.agent,
            host: ours.host,
            kernel: ours.kernel,
            criu_version: ours.criu.map_or(0, |version| version.0),
            architecture: ours.architecture,
            cpu_features: ours.cpu_features,
            engines: Vec::new(),
        }
    }
}

impl From<peer::Capabilities> for Capabilities {
    fn from(theirs: peer::Capabilities) -> Self {
        Self {
            protocol: (theirs.protocol_min, theirs.protocol_max),
            agent: theirs.agent_version,
            host: theirs.host,
            kernel: theirs.kernel,
            criu: (theirs.criu_version != 0).then_some(CriuVersion(theirs.criu_version)),
            architecture: theirs.architecture,
            cpu_features: theirs.cpu_features,
        }
    }
}

impl From<Obstacle> for peer::Obstacle {
    fn from(obstacle: Obstacle) -> Self {
        Self { subject: obstacle.subject, why: obstacle.why, fix: obstacle.fix }
    }
}

impl From<peer::Obstacle> for Obstacle {
    fn from(obstacle: peer::Obstacle) -> Self {
        Self { subject: obstacle.subject, why: obstacle.why, fix: obstacle.fix }
    }
}

impl From<Neighbour> for peer::Neighbour {
    fn from(neighbour: Neighbour) -> Self {
        Self { link: neighbour.link, address: neighbour.address.to_string(), mac: neighbour.mac.to_string() }
    }
}

/// A neighbour out of what travelled; nothing if it makes no sense, since it only saves a question.
pub fn neighbour(message: peer::Neighbour) -> Option<Neighbour> {
    Some(Neighbour { address: message.address.parse().ok()?, mac: message.mac.parse().ok()?, link: message.link })
}

/// An item of a tree as it travels.
pub fn tree_message(item: TreeItem) -> peer::TreeMessage {
    use peer::tree_message::Message;
    let message = match item {
        TreeItem::Entry(entry) => Message::Entry(entry_message(entry)),
        TreeItem::Data { offset, bytes } => Message::Data(peer::TreeData { offset, bytes }),
        TreeItem::FileEnd { checksum } => Message::FileEnd(peer::TreeFileEnd { checksum }),
        TreeItem::Removed { path } => Message::Removed(peer::TreeRemoved { path: path.into() }),
    };
    peer::TreeMessage { message: Some(message) }
}

fn entry_message(entry: Entry) -> peer::TreeEntry {
    let mut message = peer::TreeEntry {
        path: entry.path.into(),
        uid: entry.uid,
        gid: entry.gid,
        mode: entry.mode,
        mtime_secs: entry.mtime.secs,
        mtime_nanos: entry.mtime.nanos,
        atime_secs: entry.atime.secs,
        atime_nanos: entry.atime.nanos,
        xattrs: entry
            .xattrs
            .into_iter()
            .map(|(name, value)| peer::Xattr { name: name.into(), value: value.into() })
            .collect(),
        ..peer::TreeEntry::default()
    };
    let kind = match entry.kind {
        EntryKind::File { size, content } => {
            message.size = size;
            message.patch = content == Content::Patch;
            peer::EntryKind::File
        }
        EntryKind::Dir => peer::EntryKind::Directory,
        EntryKind::Symlink { target } => {
            message.target = target.into();
            peer::EntryKind::Symlink
        }
        EntryKind::CharDevice { major, minor } => {
            (message.major, message.minor) = (major, minor);
            peer::EntryKind::CharDevice
        }
        EntryKind::BlockDevice { major, minor } => {
            (message.major, message.minor) = (major, minor);
            peer::EntryKind::BlockDevice
        }
        EntryKind::Fifo => peer::EntryKind::Fifo,
        EntryKind::Socket => peer::EntryKind::Socket,
        EntryKind::Hardlink { target } => {
            message.target = target.into();
            peer::EntryKind::HardLink
        }
    };
    message.set_kind(kind);
    message
}

/// An item of a tree out of what travelled. Its paths, sizes and names are checked where it is applied.
pub fn tree_item(message: peer::tree_message::Message) -> Result<TreeItem, WireError> {
    use peer::tree_message::Message;
    Ok(match message {
        Message::Entry(entry) => TreeItem::Entry(entry_of(entry)?),
        Message::Data(peer::TreeData { offset, bytes }) => TreeItem::Data { offset, bytes },
        Message::FileEnd(peer::TreeFileEnd { checksum }) => TreeItem::FileEnd { checksum },
        Message::Removed(peer::TreeRemoved { path }) => TreeItem::Removed { path: path.into() },
        Message::Start(_) => return Err(WireError::OutOfTurn { got: "a start", expected: "an item of the tree" }),
        Message::End(_) => return Err(WireError::OutOfTurn { got: "an end", expected: "an item of the tree" }),
    })
}

fn entry_of(message: peer::TreeEntry) -> Result<Entry, WireError> {
    let target = |bytes: Bytes| Vec::from(bytes);
    let (major, minor) = (message.major, message.minor);
    let kind = match message.kind() {
        peer::EntryKind::Unspecified => return Err(WireError::Kind(message.kind)),
        peer::EntryKind::File => {
            EntryKind::File { size: message.size, content: if message.patch { Content::Patch } else { Content::Whole } }
        }
        peer::EntryKind::Directory => EntryKind::Dir,
        peer::EntryKind::Symlink => EntryKind::Symlink { target: target(message.target) },
        peer::EntryKind::CharDevice => EntryKind::CharDevice { major, minor },
        peer::EntryKind::BlockDevice => EntryKind::BlockDevice { major, minor },
        peer::EntryKind::Fifo => EntryKind::Fifo,
        peer::EntryKind::Socket => EntryKind::Socket,
        peer::EntryKind::HardLink => EntryKind::Hardlink { target: target(message.target) },
    };
    Ok(Entry {
        path: message.path.into(),
        kind,
        uid: message.uid,
        gid: message.gid,
        mode: message.mode,
        mtime: Timestamp { secs: message.mtime_secs, nanos: message.mtime_nanos },
        atime: Timestamp { secs: message.atime_secs, nanos: message.atime_nanos },
        xattrs: message.xattrs.into_iter().map(|xattr| (xattr.name.into(), xattr.value.into())).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_wire() {
        let kinds = [
            EntryKind::File { size: 7, content: Content::Patch },
            EntryKind::Dir,
            EntryKind::Symlink { target: b"/x\xff".to_vec() },
            EntryKind::CharDevice { major: 0, minor: 0 },
            EntryKind::BlockDevice { major: 8, minor: 1 },
            EntryKind::Fifo,
            EntryKind::Socket,
            EntryKind::Hardlink { target: b"a".to_vec() },
        ];
        for kind in kinds {
            let item = TreeItem::Entry(Entry {
                path: b"d/\xfe".to_vec(),
                kind,
                uid: 1,
                gid: 2,
                mode: 0o4755,
                mtime: Timestamp { secs: -1, nanos: 999_999_999 },
                atime: Timestamp { secs: 5, nanos: 6 },
                xattrs: vec![(b"user.a".to_vec(), vec![0, 255])],
            });
            let message = tree_message(item.clone()).message.expect("has content");
            assert_eq!(tree_item(message), Ok(item));
        }
    }

    #[test]
    fn an_entry_of_no_kind_is_refused() {
        let message = peer::tree_message::Message::Entry(peer::TreeEntry::default());
        assert_eq!(tree_item(message), Err(WireError::Kind(0)));
    }
}
