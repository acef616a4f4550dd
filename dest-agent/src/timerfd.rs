//! Timers that expired while the container was being saved.
//!
//! CRIU 4.2 saves a timer's time to its next expiry (criu/timerfd.c). Of a periodic timerfd that has expired and was not
//! read yet the kernel reports zero, which armed again means "never": a loop that waits for such a timer would hang for
//! ever after a move. Its image is given the shortest time to the next expiry instead, which is what the timer was due
//! for; the interval is untouched.

use std::path::Path;

use prost::Message;

use crate::image_entries::{EntriesError, extend};

/// CRIU's image of open files.
const IMAGE: &str = "files.img";

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
pub fn rearm_expired(images: &Path) -> Result<usize, EntriesError> {
    extend(&images.join(IMAGE), rearmed)
}

fn rearmed(_: usize, entry: &[u8]) -> Option<Option<Vec<u8>>> {
    let timer = FileEntry::decode(entry).ok()?.timerfd.filter(is_expired_and_periodic);
    let armed = timer.map(|timer| TimerfdEntry { value_nanos: 1, ..timer });
    Some(armed.map(|timer| FileEntry { timerfd: Some(timer) }.encode_to_vec()))
}

fn is_expired_and_periodic(timer: &TimerfdEntry) -> bool {
    let periodic = timer.interval_secs > 0 || timer.interval_nanos > 0;
    periodic && timer.value_secs == 0 && timer.value_nanos == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_entries::extended;

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
        let (changed, count) = extended(&image(&[expired, running.clone(), disarmed.clone()]), rearmed).expect("sound");
        assert_eq!(count, 1);
        let (again, none) = extended(&changed, rearmed).expect("still sound");
        assert_eq!((none, again), (0, changed));
        assert_eq!(extended(&image(&[running, disarmed]), rearmed).expect("sound").1, 0);
    }

    #[test]
    fn an_entry_that_is_none_is_named_damaged() {
        assert_eq!(extended(b"12345678\x01\x00\x00\x00\xff", rearmed), None);
    }
}
