//! Pages that lie in CRIU's images although memory is filled in later.
//!
//! CRIU marks every page of an area that could be filled in lazily as lazy (`PE_LAZY`), and a lazy restore then leaves such
//! pages to the lazy server, images or not (criu/mem.c, criu/pagemap.c, 4.2). In our images lie just those pages that the
//! page store does not have, or that must be there before the container runs: they are restored from there.

use std::path::Path;

use prost::Message;

use crate::image_entries::{EntriesError, extend};

/// `PE_LAZY`, criu/include/pagemap.h.
const LAZY: u32 = 1 << 1;

/// The part of `pagemap_entry` (images/pagemap.proto) that matters here.
#[derive(Clone, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
}

/// Has every page in the images below `images` restored from there.
pub fn restore_from_images(images: &Path) -> Result<(), EntriesError> {
    let list = |source| EntriesError::File { path: images.to_owned(), source };
    for entry in std::fs::read_dir(images).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("pagemap-") && !name.starts_with("pagemap-shmem-") {
            extend(&path, without_lazy)?;
        }
    }
    Ok(())
}

fn without_lazy(number: usize, entry: &[u8]) -> Option<Option<Vec<u8>>> {
    // The first names the file of pages.
    if number == 0 {
        return Some(None);
    }
    let flags = PagemapEntry::decode(entry).ok()?.flags.unwrap_or(0);
    let is_lazy = flags & LAZY != 0;
    Some(is_lazy.then(|| PagemapEntry { flags: Some(flags & !LAZY) }.encode_to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_entries::extended;

    #[test]
    fn the_mark_is_taken_off_and_nothing_else() {
        let mut image = b"12345678".to_vec();
        // A head with pages_id 7, and an entry with vaddr 1, flags PE_LAZY | PE_PRESENT and 2 pages.
        for entry in [&[0x08, 7][..], &[0x08, 1, 0x20, 6, 0x28, 2]] {
            image.extend((entry.len() as u32).to_le_bytes());
            image.extend(entry);
        }
        let (changed, count) = extended(&image, without_lazy).expect("sound");
        assert_eq!(count, 1);
        let last = &changed[8 + 4 + 2 + 4..];
        assert_eq!(PagemapEntry::decode(last).expect("sound").flags, Some(4));
        assert!(last.starts_with(&[0x08, 1, 0x20, 6, 0x28, 2]));
        assert_eq!(extended(&changed, without_lazy).expect("sound").1, 0);
    }
}
