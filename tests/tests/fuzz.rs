//! The fuzz targets without a fuzzer: random bytes, and sound input with some bytes changed.

use longhaul_common::pages::{Header, Kind, Record, What, checksum, encode_records};
use longhaul_lab::fuzz::TARGETS;
use longhaul_proto::peer::{self, tree_message::Message as Part};
use proptest::prelude::*;
use prost::Message;

/// Sound input of each target.
fn sound() -> Vec<Vec<u8>> {
    let records = encode_records(&[
        Record { page: 1, count: 1, what: What::Data },
        Record { page: 2, count: 3, what: What::Zero },
        Record { page: 9, count: 1, what: What::Same { space: 1, page: 1 } },
    ]);
    let page = [7; 4096];
    let header = Header {
        kind: Kind::Batch,
        packed: false,
        records: 3,
        payload: 4096,
        raw: 4096,
        space: 1,
        sequence: 1,
        checksum: checksum(&records, &page),
    };
    let frames = [header.encode().as_slice(), &records, &page].concat();
    let entry = peer::TreeEntry { path: b"a/b".to_vec().into(), ..peer::TreeEntry::default() };
    let tree = piece(&peer::TreeMessage { message: Some(Part::Entry(entry)) });
    let trees = [vec![0], tree].concat();
    let mut image = b"12345678".to_vec();
    for entry in [&[0x08, 7][..], &[0x08, 1, 0x20, 6, 0x28, 2]] {
        image.extend((entry.len() as u32).to_le_bytes());
        image.extend(entry);
    }
    let maps = "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr lo \n".into();
    let chunk = peer::ImageChunk { name: "core-1.img".into(), offset: 0, bytes: b"abc".to_vec().into() };
    let images = piece(&peer::ImageMessage { message: Some(peer::image_message::Message::Chunk(chunk)) });
    vec![frames, trees, image, maps, images, br#"{"id": "web", "bundle": "/srv/web"}"#.to_vec()]
}

fn piece(message: &impl Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    [(bytes.len() as u16).to_le_bytes().as_slice(), &bytes].concat()
}

fn run_all(bytes: &[u8]) {
    TARGETS.iter().for_each(|(_, target)| target(bytes));
}

#[test]
fn sound_input_is_taken() {
    sound().iter().for_each(|bytes| run_all(bytes));
    assert!(Header::decode(sound()[0].first_chunk().expect("a header")).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_input_does_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        run_all(&bytes);
    }

    #[test]
    fn damaged_input_does_no_harm(
        number in 0usize..6,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = sound().swap_remove(number);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        run_all(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        run_all(&bytes);
    }
}
