//! Input that nobody sane would send, for everything that is parsed from the network, from CRIU's images and from `/proc`.
//!
//! Each function takes any bytes. It may not panic, may not hang, may not take more memory than the peer was allowed, and may write
//! nowhere but where it was told to. `tests/fuzz` has a target of cargo-fuzz for each; `tests/tests/fuzz.rs` runs them with random and with
//! slightly damaged input in every test run.

use std::path::Path;

use longhaul_common::description::Description;
use longhaul_common::host::CriuVersion;
use longhaul_common::pages::{HEADER, HELLO, Header, Hello, RECORD, REPLY, Reply};
use longhaul_common::sys::memory::PAGE;
use longhaul_common::tree::{TreeItem, TreeKind, Writer};
use longhaul_common::wire::{neighbour, tree_item};
use longhaul_dest::images::ImageWriter;
use longhaul_dest::memory::common::{self, NotCommon};
use longhaul_dest::memory::receive::{Memory, check};
use longhaul_dest::memory::store::PageStore;
use longhaul_dest::pagemap::restore_from_images;
use longhaul_dest::timerfd::rearm_expired;
use longhaul_proto::peer::{self, destination_message, image_message, source_message};
use longhaul_source::memory::flags::{marks_of, parse_smaps, summarize};
use longhaul_source::memory::maps::{Areas, Device, difference, intersection, union};
use prost::Message;

/// A target: its name, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 6] = [
    ("frames", frames),
    ("messages", messages),
    ("trees", trees),
    ("images", images),
    ("descriptions", descriptions),
    ("proc", proc),
];

/// Pages a store of a target may hold.
const MOST_PAGES: u64 = 64;

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Memory on its way: what a page connection brings.
pub fn frames(mut bytes: &[u8]) {
    if let Some(hello) = bytes.first_chunk::<HELLO>() {
        let _ = Hello::decode(hello);
    }
    if let Some(reply) = bytes.first_chunk::<REPLY>() {
        let _ = Reply::decode(*reply);
    }
    let dir = temporary();
    let store = PageStore::create(&dir.path().join("store"), MOST_PAGES * PAGE).expect("a store");
    let memory = Memory::new(store);
    let Ok((connection, _)) = memory.connect(0) else { return };
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() {
        let Ok(header) = Header::decode(header) else { return };
        let Some((records, rest)) = rest.split_at_checked(header.records as usize * RECORD) else { return };
        let Some((payload, rest)) = rest.split_at_checked(header.payload as usize) else { return };
        bytes = rest;
        let Ok(frame) = check(header, records, payload.to_vec()) else { return };
        if memory.apply(0, connection, &frame).is_err() {
            return;
        }
        assert!(memory.stored_bytes() <= MOST_PAGES * PAGE, "the store took more than it may");
    }
    let _ = memory.finish();
}

/// What agents say to each other, but for memory and trees.
pub fn messages(bytes: &[u8]) {
    if let Ok(message) = peer::SourceMessage::decode(bytes) {
        match message.message {
            Some(source_message::Message::Offer(offer)) => descriptions(&offer.description),
            Some(source_message::Message::Arm(arm)) => {
                drop(arm.neighbours.into_iter().filter_map(neighbour).collect::<Vec<_>>());
            }
            _ => {}
        }
    }
    if let Ok(message) = peer::DestinationMessage::decode(bytes)
        && let Some(destination_message::Message::Verdict(verdict)) = message.message
    {
        let obstacles: Vec<longhaul_common::obstacle::Obstacle> =
            verdict.obstacles.into_iter().map(Into::into).collect();
        drop(obstacles);
    }
    let dir = temporary();
    let mut writer = ImageWriter::new(dir.path());
    each(bytes, |bytes| {
        let Ok(message) = peer::ImageMessage::decode(bytes) else { return false };
        match message.message {
            Some(image_message::Message::Chunk(chunk)) => writer.chunk(&chunk).is_ok(),
            Some(image_message::Message::Close(close)) => writer.close(&close).is_ok(),
            _ => false,
        }
    });
}

/// Changes of a file tree, applied to one.
pub fn trees(bytes: &[u8]) {
    let outside = temporary();
    let root = outside.path().join("root");
    std::fs::create_dir(&root).expect("a directory");
    std::fs::write(outside.path().join("secret"), "untouched").expect("a file");
    let (kind, bytes) = match bytes.split_first() {
        Some((first, rest)) => (if first & 1 == 0 { TreeKind::Upper } else { TreeKind::Plain }, rest),
        None => return,
    };
    let mut writer = Writer::open(&root, kind).expect("opens");
    each(bytes, |bytes| {
        let Ok(peer::TreeMessage { message: Some(message) }) = peer::TreeMessage::decode(bytes) else { return false };
        let Ok(item) = tree_item(message) else { return false };
        // A device or a very large file is no business of a fuzzer's.
        !is_costly(&item) && writer.apply(item).is_ok()
    });
    let _ = writer.finish();
    let mut names: Vec<_> = std::fs::read_dir(outside.path())
        .expect("readable")
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap_or_default())
        .collect();
    names.sort();
    assert_eq!(names, ["root", "secret"], "something was written outside of the tree");
    assert_eq!(std::fs::read(outside.path().join("secret")).expect("readable"), b"untouched");
}

fn is_costly(item: &TreeItem) -> bool {
    matches!(item, TreeItem::Data { offset, .. } if *offset > 1 << 20)
}

/// CRIU's images, as a peer sends them and this side changes them.
pub fn images(bytes: &[u8]) {
    let dir = temporary();
    for name in ["pagemap-1.img", "timerfd.img", "files.img", "mm-1.img"] {
        write(dir.path(), name, bytes);
    }
    let _ = restore_from_images(dir.path());
    let _ = rearm_expired(dir.path());
    let _ = common::write_tasks(dir.path(), &NotCommon::default());
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(dir.join(name), bytes).expect("a file");
}

/// What a container is said to be.
pub fn descriptions(bytes: &[u8]) {
    if let Ok(description) = Description::from_json(bytes) {
        let _ = (description.trees(), description.copied_files(), description.addresses());
        assert!(
            Description::from_json(&description.to_json()).is_ok(),
            "what was read can't be written and read again"
        );
    }
}

/// Texts of the kernel and of programs.
pub fn proc(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let areas = Areas::parse(&text, &Device("00:01".into()));
    let areas: Vec<_> = areas.private.into_iter().map(|private| private.area).collect();
    let _ = (intersection(&areas, &areas), difference(&areas, &areas), union(areas));
    let flagged = parse_smaps(&text);
    let _ = (summarize(&text, &flagged), marks_of(&flagged));
    let _ = CriuVersion::parse(&text);
}

/// Pieces that each have their length, two bytes, in front; ends at the first that `take` refuses.
fn each(mut bytes: &[u8], mut take: impl FnMut(&[u8]) -> bool) {
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let Some((piece, rest)) = rest.split_at_checked(u16::from_le_bytes(*length).into()) else { return };
        bytes = rest;
        if !take(piece) {
            return;
        }
    }
}
