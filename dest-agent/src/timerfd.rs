//! Timers that expired while the container was being saved.
//!
//! CRIU 4.2 saves a timer's time to its next expiry (criu/timerfd.c). Of a periodic timerfd that has expired and was not
//! read yet the kernel reports zero, which armed again means "never": a loop that waits for such a timer would hang for
//! ever after a move. Its image is given the shortest time to the next expiry instead, which is what the timer was due
//! for; the interval is untouched.

use std::io;
use std::path::{Path, PathBuf};

use prost::Message;
use thiserror::Error;

/// CRIU's image of open files.
const IMAGE: &str = "files.img";
/// Magic numbers in front of the entries, in bytes (criu/include/magic.h: IMG_COMMON_MAGIC and the image's own).
const HEADER: usize = 8;
/// The largest image looked at, in bytes: a million open files have about 100 MiB.
const MAX_BYTES: u64 = 1 << 30;

/// The image can't be read.
#[derive(Debug, Error)]
pub enum TimerfdError {
    /// The file.
    #[error("can't read or write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its entries.
    #[error("the image {0} is damaged")]
    Damaged(PathBuf),
}

/// The parts of `file_entry` (images/fdinfo.proto) that matter here.
#[derive(Clone, PartialEq, Message)]
struct FileEntry {
    #[prost(message, optional, tag = "12")]
    timerfd: Option<TimerfdEntry>,
}

/// `timerfd_entry` (images/timerfd.proto).
#[derive(Clone, PartialEq, Message)]
struct TimerfdEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    /// `fown_entry`, passed on as it is.
    #[prost(bytes = "vec", required, tag = "3")]
    owner: Vec<u8>,
    #[prost(uint32, required, tag = "4")]
    clock: u32,
    #[prost(uint64, required, tag = "5")]
    ticks: u64,
    #[prost(uint32, required, tag = "6")]
    settime_flags: u32,
    #[prost(uint64, required, tag = "7")]
    value_secs: u64,
    #[prost(uint64, required, tag = "8")]
    value_nanos: u64,
    #[prost(uint64, required, tag = "9")]
    interval_secs: u64,
    #[prost(uint64, required, tag = "10")]
    interval_nanos: u64,
}

/// Arms expired periodic timers in the images below `images` again; how many there were.
pub fn rearm_expired(images: &Path) -> Result<usize, TimerfdError> {
    let path = images.join(IMAGE);
    let wrap = |source| TimerfdError::File { path: path.clone(), source };
    let bytes = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() <= MAX_BYTES => std::fs::read(&path).map_err(wrap)?,
        Ok(_) => return Ok(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(wrap(error)),
    };
    let (changed, count) = rearm(&bytes).ok_or_else(|| TimerfdError::Damaged(path.clone()))?;
    if count > 0 {
        std::fs::write(&path, changed).map_err(wrap)?;
    }
    Ok(count)
}

/// The image with expired periodic timers armed, and their number; nothing if it is damaged.
fn rearm(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (header, mut rest) = bytes.split_at_checked(HEADER)?;
    let mut changed = header.to_vec();
    let mut count = 0;
    while !rest.is_empty() {
        let (length, after) = rest.split_at_checked(4)?;
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let (entry, after) = after.split_at_checked(length)?;
        rest = after;
        let mut entry = entry.to_vec();
        let timer = FileEntry::decode(entry.as_slice()).ok()?.timerfd;
        if let Some(mut timer) = timer.filter(is_expired_and_periodic) {
            timer.value_nanos = 1;
            // Appended: protobuf merges the two, and the last value holds.
            entry.extend(FileEntry { timerfd: Some(timer) }.encode_to_vec());
            count += 1;
        }
        changed.extend(u32::try_from(entry.len()).ok()?.to_le_bytes());
        changed.extend(entry);
    }
    Some((changed, count))
}

fn is_expired_and_periodic(timer: &TimerfdEntry) -> bool {
    let periodic = timer.interval_secs > 0 || timer.interval_nanos > 0;
    periodic && timer.value_secs == 0 && timer.value_nanos == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(timers: &[TimerfdEntry]) -> Vec<u8> {
        let mut bytes = vec![0x19, 0x43, 0x56, 0x54, 1, 2, 3, 4];
        for timer in timers {
            let entry = FileEntry { timerfd: Some(timer.clone()) }.encode_to_vec();
            bytes.extend(u32::try_from(entry.len()).expect("small").to_le_bytes());
            bytes.extend(entry);
        }
        bytes
    }

    #[test]
    fn only_expired_periodic_timers_are_armed() {
        let expired = TimerfdEntry { id: 1, interval_nanos: 50_000_000, ticks: 1, ..TimerfdEntry::default() };
        let running = TimerfdEntry { value_nanos: 7, ..expired.clone() };
        let disarmed = TimerfdEntry { interval_nanos: 0, ..expired.clone() };
        let (changed, count) = rearm(&image(&[expired, running.clone(), disarmed.clone()])).expect("sound");
        assert_eq!(count, 1);
        let (again, none) = rearm(&changed).expect("still sound");
        assert_eq!((none, again), (0, changed));
        assert_eq!(rearm(&image(&[running, disarmed])).expect("sound").1, 0);
    }

    #[test]
    fn a_damaged_image_is_no_panic() {
        for bad in [&b""[..], b"short", b"12345678\xff\xff\xff\xff", b"12345678\x01\x00\x00\x00\xff"] {
            assert_eq!(rearm(bad), None, "{bad:?}");
        }
        assert_eq!(rearm(b"12345678").map(|(_, count)| count), Some(0));
    }
}
