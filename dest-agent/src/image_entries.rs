//! CRIU's image files, entry by entry: two magic numbers, then each entry behind its length (criu/protobuf.c, 4.2).

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Magic numbers in front of the entries, in bytes (criu/include/magic.h: IMG_COMMON_MAGIC and the image's own).
const HEADER: usize = 8;
/// The largest image looked at, in bytes: a million open files have about 100 MiB.
const MAX_BYTES: u64 = 1 << 30;

/// An image that can't be changed.
#[derive(Debug, Error)]
pub enum EntriesError {
    /// The file.
    #[error("can't read or write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is larger than any CRIU writes.
    #[error("the image {0} has more than 1 GiB")]
    TooLarge(PathBuf),
    /// Its entries.
    #[error("the image {0} is damaged")]
    Damaged(PathBuf),
}

/// Lets `change` extend each entry, which comes with its number; how many it did. An image that is not there has none.
///
/// To extend is enough: protobuf merges what is appended, and the last value of a field holds.
pub fn extend(path: &Path, change: impl FnMut(usize, &[u8]) -> Option<Option<Vec<u8>>>) -> Result<usize, EntriesError> {
    let wrap = |source| EntriesError::File { path: path.to_owned(), source };
    let bytes = match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() <= MAX_BYTES => std::fs::read(path).map_err(wrap)?,
        Ok(_) => return Err(EntriesError::TooLarge(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(wrap(error)),
    };
    let (changed, count) = extended(&bytes, change).ok_or_else(|| EntriesError::Damaged(path.to_owned()))?;
    if count > 0 {
        std::fs::write(path, changed).map_err(wrap)?;
    }
    Ok(count)
}

/// All entries of an image.
pub fn entries(path: &Path) -> Result<Vec<Vec<u8>>, EntriesError> {
    let mut found = Vec::new();
    extend(path, |_, entry| {
        found.push(entry.to_owned());
        Some(None)
    })?;
    Ok(found)
}

/// The image with its entries extended, and how many were; nothing if it is damaged. `change` gives nothing for an entry that
/// can't be read, and `Some(None)` for one that stays as it is.
pub(crate) fn extended(
    bytes: &[u8],
    mut change: impl FnMut(usize, &[u8]) -> Option<Option<Vec<u8>>>,
) -> Option<(Vec<u8>, usize)> {
    let (header, mut rest) = bytes.split_at_checked(HEADER)?;
    let mut changed = header.to_vec();
    let mut count = 0;
    for number in 0.. {
        if rest.is_empty() {
            break;
        }
        let (length, after) = rest.split_at_checked(4)?;
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let (entry, after) = after.split_at_checked(length)?;
        rest = after;
        let extension = change(number, entry)?;
        count += usize::from(extension.is_some());
        let extension = extension.unwrap_or_default();
        changed.extend(u32::try_from(entry.len() + extension.len()).ok()?.to_le_bytes());
        changed.extend(entry);
        changed.extend(extension);
    }
    Some((changed, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_image_is_no_panic() {
        for bad in [&b""[..], b"short", b"12345678\xff\xff\xff\xff", b"12345678\x01\x00\x00\x00"] {
            assert_eq!(extended(bad, |_, _| Some(None)), None, "{bad:?}");
        }
        assert_eq!(extended(b"12345678", |_, _| Some(None)).map(|(_, count)| count), Some(0));
    }
}
