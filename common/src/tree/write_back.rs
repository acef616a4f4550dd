//! Brings what has arrived to the disk while nobody waits for it.
//!
//! Otherwise the first fsync(2) of the container, once it runs here, waits for all of it: a filesystem that keeps its data in order
//! (`data=ordered` of ext4) writes it first. A gigabyte at once would keep the disk busy for seconds, and whoever else syncs there: other
//! containers, the agent's own journal in the middle of a hand-over. So one thread writes a little at a time, and waits for it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};

use super::sys::{self, AT_A_TIME};

/// Files that wait: each is open.
const WAITING: usize = 256;

/// Has a file written back some time soon. It is not held open for writing: the container may want to execute it.
pub(super) fn soon(file: &File) {
    static QUEUE: OnceLock<Option<SyncSender<File>>> = OnceLock::new();
    let begin = || {
        let (queue, files) = sync_channel(WAITING);
        let work = move || {
            sys::be_last_at_the_disk();
            files.into_iter().for_each(|file| drop(write_back(&file)));
        };
        std::thread::Builder::new().name("write-back".to_owned()).spawn(work).ok().map(|_| queue)
    };
    let Ok(again) = sys::open_to_read(file.as_fd()) else { return };
    let queue = QUEUE.get_or_init(begin).as_ref();
    if queue.is_none_or(|queue| queue.try_send(again).is_err()) {
        sys::begin_write_back(file, 0, 0);
    }
}

/// Nothing of it if the file is gone meanwhile.
fn write_back(file: &File) -> io::Result<()> {
    let mut at = 0;
    loop {
        let about = file.metadata()?;
        if at >= about.size() || about.nlink() == 0 {
            return Ok(());
        }
        sys::begin_write_back(file, at, AT_A_TIME);
        sys::end_write_back(file, at, AT_A_TIME)?;
        at += AT_A_TIME;
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_file_comes_to_the_disk() {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).expect("a file");
        io::Write::write_all(&mut file, &vec![1; 3 * AT_A_TIME as usize + 1]).expect("writes");
        let Some(before) = sys::unwritten_pages(file.as_file()) else { return };
        assert!(before > 0);
        soon(file.as_file());
        // Sooner than the kernel would by itself (`dirty_expire_centisecs`).
        let deadline = Instant::now() + Duration::from_secs(25);
        while sys::unwritten_pages(file.as_file()) != Some(0) {
            assert!(Instant::now() < deadline, "{:?} pages are dirty still", sys::unwritten_pages(file.as_file()));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
