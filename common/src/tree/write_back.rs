//! Brings what has arrived to the disk while nobody waits for it.
//!
//! Otherwise the first fsync(2) of the container, once it runs here, waits for all of it: a filesystem that keeps its data in order
//! (`data=ordered` of ext4) writes it first. A gigabyte at once would keep the disk busy for seconds, and whoever else syncs there: other
//! containers, the agent's own journal in the middle of a hand-over. So one thread writes a little at a time, and waits for it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::libc;

use super::TreeError;
use super::error::printable;
use super::sys::{self, AT_A_TIME};

/// Files that wait: each is open.
const WAITING: usize = 256;

/// Of one tree. What the disk refused the container would not be told any more, when it syncs a file that it opened later (errseq_t in
/// the kernel's core-api/errseq.rst): the tree is of no use then.
#[derive(Debug, Clone, Default)]
pub(super) struct WriteBack(Arc<Mutex<Option<TreeError>>>);

struct Job {
    file: File,
    path: Vec<u8>,
    of: WriteBack,
}

impl WriteBack {
    /// Has a file written back some time soon. It is not held open for writing: the container may want to execute it.
    pub(super) fn soon(&self, file: &File, path: &[u8]) {
        static QUEUE: OnceLock<Option<SyncSender<Job>>> = OnceLock::new();
        let begin = || {
            let (queue, jobs) = sync_channel::<Job>(WAITING);
            let work = move || {
                sys::be_last_at_the_disk();
                jobs.into_iter().for_each(|job| job.of.note(write_back(&job.file), &job.path));
            };
            std::thread::Builder::new().name("write-back".to_owned()).spawn(work).ok().map(|_| queue)
        };
        if sys::is_in_memory(file) {
            return;
        }
        let Ok(again) = sys::open_to_read(file.as_fd()) else { return };
        let queue = QUEUE.get_or_init(begin).as_ref();
        let job = Job { file: again, path: path.to_owned(), of: self.clone() };
        if queue.is_none_or(|queue| queue.try_send(job).is_err()) {
            sys::begin_write_back(file, 0, 0);
        }
    }

    fn note(&self, done: io::Result<()>, path: &[u8]) {
        // The call itself may be refused, by a filesystem or a sandbox: that says nothing about the disk.
        const CANNOT: [Option<i32>; 4] =
            [Some(libc::EINVAL), Some(libc::ENOSYS), Some(libc::EPERM), Some(libc::ESPIPE)];
        let Some(error) = done.err().filter(|error| !CANNOT.contains(&error.raw_os_error())) else { return };
        tracing::error!(path = printable(path), %error, "what arrived can't be written to the disk");
        let failed = TreeError::io("write back", path)(error);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failed);
    }

    /// What the disk has refused by now, once.
    pub(super) fn check(&self) -> Result<(), TreeError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

/// Nothing of it if the file is gone meanwhile.
fn write_back(file: &File) -> io::Result<()> {
    let end = file.metadata()?.len();
    let mut at = 0;
    while at < end && file.metadata()?.nlink() > 0 {
        sys::begin_write_back(file, at, AT_A_TIME);
        sys::end_write_back(file, at, AT_A_TIME)?;
        at += AT_A_TIME;
    }
    Ok(())
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
        let of = WriteBack::default();
        of.soon(file.as_file(), b"file");
        // Sooner than the kernel would by itself (`dirty_expire_centisecs`).
        let deadline = Instant::now() + Duration::from_secs(25);
        while sys::unwritten_pages(file.as_file()) != Some(0) {
            assert!(Instant::now() < deadline, "{:?} pages are dirty still", sys::unwritten_pages(file.as_file()));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    #[test]
    fn what_the_disk_refuses_is_told() {
        let of = WriteBack::default();
        of.note(Err(io::Error::from_raw_os_error(libc::ENOSYS)), b"a/b");
        assert!(of.check().is_ok());
        of.note(Err(io::Error::other("the disk is broken")), b"a/b");
        assert!(of.check().is_err_and(|error| error.to_string() == "cannot write back a/b"));
    }
}
