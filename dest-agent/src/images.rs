//! CRIU's images as they arrive: into a directory of a memory filesystem, checked file by file.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use longhaul_proto::peer::{ImageChunk, ImageClose};
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

/// The most files of one checkpoint: CRIU writes about 12, and 6 more a task.
const MAX_FILES: usize = 100_000;
/// The most bytes in one chunk.
const MAX_CHUNK: usize = 4 << 20;

/// An image that can't be taken.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A name that is no plain file name.
    #[error("the peer sent an image named {0:?}; a plain file name is wanted")]
    Name(String),
    /// Too many.
    #[error("the peer sent more than {MAX_FILES} image files")]
    TooMany,
    /// Too large a piece.
    #[error("the peer sent {0} bytes of an image at once; {MAX_CHUNK} are taken")]
    Chunk(usize),
    /// Out of order.
    #[error("the peer sent image {name} at offset {got}, where {expected} was expected")]
    Offset {
        /// The file.
        name: String,
        /// What it sent.
        got: u64,
        /// What was due.
        expected: u64,
    },
    /// Damaged or cut short.
    #[error("image {name} arrived damaged: its size or checksum differs from what the peer says")]
    Damaged {
        /// The file.
        name: String,
    },
    /// Files left open, or another count than announced.
    #[error("the peer's images are incomplete: {got} of {announced} files arrived whole")]
    Incomplete {
        /// Whole files.
        got: u64,
        /// Announced.
        announced: u64,
    },
    /// It can't be stored.
    #[error("can't store image {path}")]
    Store {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes images beneath one directory.
pub struct ImageWriter {
    dir: PathBuf,
    open: HashMap<String, OpenImage>,
    closed: u64,
    bytes: u64,
}

struct OpenImage {
    file: File,
    size: u64,
    sum: Box<Xxh3>,
}

impl ImageWriter {
    /// Into `dir`, which must exist.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), open: HashMap::new(), closed: 0, bytes: 0 }
    }

    /// Appends to an image.
    pub fn chunk(&mut self, chunk: &ImageChunk) -> Result<(), ImageError> {
        if chunk.bytes.len() > MAX_CHUNK {
            return Err(ImageError::Chunk(chunk.bytes.len()));
        }
        let image = self.image(&chunk.name)?;
        if chunk.offset != image.size {
            return Err(ImageError::Offset { name: chunk.name.clone(), got: chunk.offset, expected: image.size });
        }
        image.sum.update(&chunk.bytes);
        image
            .file
            .write_all_at(&chunk.bytes, chunk.offset)
            .map_err(|source| ImageError::Store { path: PathBuf::from(&chunk.name), source })?;
        image.size += chunk.bytes.len() as u64;
        self.bytes += chunk.bytes.len() as u64;
        Ok(())
    }

    /// Ends an image and checks it.
    pub fn close(&mut self, close: &ImageClose) -> Result<(), ImageError> {
        self.image(&close.name)?;
        let damaged = || ImageError::Damaged { name: close.name.clone() };
        let image = self.open.remove(&close.name).ok_or_else(damaged)?;
        if image.size != close.size || image.sum.digest() != close.checksum {
            return Err(damaged());
        }
        self.closed += 1;
        Ok(())
    }

    /// Ends them all; the files and bytes that arrived.
    pub fn finish(self, announced: u64) -> Result<(u64, u64), ImageError> {
        if !self.open.is_empty() || self.closed != announced {
            return Err(ImageError::Incomplete { got: self.closed, announced });
        }
        Ok((self.closed, self.bytes))
    }

    fn image(&mut self, name: &str) -> Result<&mut OpenImage, ImageError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.chars().all(plain) {
            return Err(ImageError::Name(name.chars().take(100).collect()));
        }
        if self.open.len() + self.closed as usize > MAX_FILES {
            return Err(ImageError::TooMany);
        }
        if !self.open.contains_key(name) {
            let path = self.dir.join(name);
            // create_new: an image that was closed can't be opened again.
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(|source| ImageError::Store { path, source })?;
            self.open.insert(name.to_owned(), OpenImage { file, size: 0, sum: Box::new(Xxh3::new()) });
        }
        self.open.get_mut(name).ok_or_else(|| ImageError::Name(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(name: &str, offset: u64, bytes: &'static [u8]) -> ImageChunk {
        ImageChunk { name: name.into(), offset, bytes: bytes.into() }
    }

    #[test]
    fn a_whole_image_is_taken_and_a_damaged_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut writer = ImageWriter::new(dir.path());
        writer.chunk(&chunk("core-1.img", 0, b"abc")).expect("takes");
        writer.chunk(&chunk("core-1.img", 3, b"def")).expect("takes");
        let checksum = xxhash_rust::xxh3::xxh3_64(b"abcdef");
        writer.close(&ImageClose { name: "core-1.img".into(), size: 6, checksum }).expect("closes");
        writer.chunk(&chunk("mm-1.img", 0, b"abc")).expect("takes");
        let error = writer.close(&ImageClose { name: "mm-1.img".into(), size: 3, checksum }).expect_err("differs");
        assert!(error.to_string().contains("mm-1.img"));
    }

    #[test]
    fn names_and_offsets_are_checked() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut writer = ImageWriter::new(dir.path());
        for bad in ["../x", "a/b", "", ".hidden", "/etc/passwd"] {
            writer.chunk(&chunk(bad, 0, b"x")).expect_err(bad);
        }
        writer.chunk(&chunk("a.img", 1 << 40, b"x")).expect_err("a gap");
        assert!(matches!(writer.finish(0), Err(ImageError::Incomplete { .. })));
    }
}
