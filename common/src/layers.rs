//! Digests of lower layers, remembered.
//!
//! A digest reads every byte of a layer; a fingerprint of its files' inodes and change times costs one `stat`
//! each. A layer whose fingerprint is known is not read again. Change times can't be set, so a changed file
//! changes the fingerprint.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::tree::{TreeError, digest};

/// Remembered digests, in one file.
#[derive(Debug)]
pub struct LayerDigests {
    file: PathBuf,
    known: std::sync::Mutex<BTreeMap<String, Known>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Known {
    fingerprint: String,
    digest: String,
}

impl LayerDigests {
    /// The digests remembered in `state`. A file that can't be read is begun anew: it is a cache.
    pub fn open(state: &Path) -> Self {
        let file = state.join("layer-digests.json");
        let known = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { file, known: std::sync::Mutex::new(known) }
    }

    /// The digest of the layer at `path`, hexadecimal.
    pub fn digest(&self, path: &Path) -> Result<String, TreeError> {
        let key = path.to_string_lossy().into_owned();
        let fingerprint = fingerprint(path).ok();
        if let Ok(known) = self.known.lock()
            && let Some(entry) = known.get(&key)
            && Some(&entry.fingerprint) == fingerprint.as_ref()
        {
            return Ok(entry.digest.clone());
        }
        let digest = digest(path)?.to_string();
        if let (Ok(mut known), Some(fingerprint)) = (self.known.lock(), fingerprint) {
            known.insert(key, Known { fingerprint, digest: digest.clone() });
            if let Err(error) = save(&self.file, &known) {
                tracing::warn!(file = %self.file.display(), %error, "can't remember a layer's digest");
            }
        }
        Ok(digest)
    }
}

fn save(file: &Path, known: &BTreeMap<String, Known>) -> io::Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    let partial = file.with_extension("partial");
    fs::File::create(&partial)?.write_all(&serde_json::to_vec(known)?)?;
    fs::rename(partial, file)
}

fn fingerprint(root: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    add(root, &mut hasher)?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn add(dir: &Path, hasher: &mut blake3::Hasher) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let metadata = entry.metadata()?;
        hasher.update(entry.file_name().as_bytes());
        for number in [metadata.ino(), metadata.size(), metadata.ctime() as u64, metadata.ctime_nsec() as u64] {
            hasher.update(&number.to_le_bytes());
        }
        if metadata.is_dir() {
            add(&entry.path(), hasher)?;
        }
        hasher.update(b"/");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_layer_gets_another_digest() {
        let state = tempfile::tempdir().expect("a directory");
        let layer = tempfile::tempdir().expect("a directory");
        fs::write(layer.path().join("a"), "1").expect("writes");
        let digests = LayerDigests::open(state.path());
        let first = digests.digest(layer.path()).expect("a digest");
        assert_eq!(LayerDigests::open(state.path()).digest(layer.path()).expect("remembered"), first);
        fs::write(layer.path().join("b"), "2").expect("writes");
        assert_ne!(digests.digest(layer.path()).expect("a digest"), first);
    }
}
