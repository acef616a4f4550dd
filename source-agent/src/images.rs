//! Sends CRIU's images while CRIU writes them.
//!
//! CRIU writes into a directory of a memory filesystem, so no disk of the source is touched. Every file is written from its
//! beginning to its end; inotify tells of growth and of the end. A file of pages is sent as it grows, and what was
//! sent is given back to memory at once; the small files go whole when they are closed.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use longhaul_proto::peer::image_message::Message;
use longhaul_proto::peer::{ImageChunk, ImageClose, ImageEnd, ImageMessage, ImageStart};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use thiserror::Error;
use tokio::sync::mpsc;
use xxhash_rust::xxh3::Xxh3;

/// Bytes in one message.
const CHUNK: usize = 256 << 10;
/// How often the word to finish is looked for while nothing is written, in milliseconds.
const FINISH_POLL_MS: u16 = 1;

/// An image that can't be sent.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A file of the images' directory.
    #[error("can't read image {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory can't be watched.
    #[error("can't watch {path} for images")]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The destination stopped reading; its own answer says why.
    #[error("the destination stopped taking images")]
    Refused,
    /// CRIU changed a file that was sent as whole.
    #[error("image {name} was written again after it was closed: this CRIU writes images in an unknown way")]
    Rewritten {
        /// The file.
        name: String,
    },
}

/// Files and bytes sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Files.
    pub files: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Sends what appears in one directory.
pub struct ImageSender {
    dir: PathBuf,
    inotify: Inotify,
    messages: mpsc::Sender<ImageMessage>,
    finish: Arc<AtomicBool>,
    images: HashMap<String, Image>,
    sent: Sent,
}

#[derive(Default)]
struct Image {
    file: Option<File>,
    size: u64,
    sum: Box<Xxh3>,
    closed: bool,
}

impl ImageSender {
    /// Watches `dir`. The flag says that nothing more will be written.
    pub fn new(
        dir: &Path,
        migration: &str,
        messages: mpsc::Sender<ImageMessage>,
        finish: Arc<AtomicBool>,
    ) -> Result<Self, ImageError> {
        let watch = |errno: nix::errno::Errno| ImageError::Watch { path: dir.to_owned(), source: errno.into() };
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(watch)?;
        inotify.add_watch(dir, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE).map_err(watch)?;
        let sender =
            Self { dir: dir.to_owned(), inotify, messages, finish, images: HashMap::new(), sent: Sent::default() };
        sender.send(Message::Start(ImageStart { migration_id: migration.to_owned() }))?;
        Ok(sender)
    }

    /// Sends until told to finish, then what is left and the end. For a thread of its own.
    pub fn run(mut self) -> Result<Sent, ImageError> {
        loop {
            let finishing = self.finish.load(Ordering::Acquire);
            let changed = self.changes(finishing)?;
            if finishing && !changed {
                break;
            }
        }
        self.send_rest()?;
        self.send(Message::End(ImageEnd { files: self.sent.files }))?;
        let (sent, inotify) = (self.sent, self.inotify);
        // The kernel takes its marks away after a grace period (fsnotify_wait_marks_destroyed): 15 to 20 ms of downtime for nothing.
        // Where there is no thread to be had, it is dropped here.
        let _ = std::thread::Builder::new().spawn(move || drop(inotify));
        Ok(sent)
    }

    /// Handles what inotify has; whether it had anything.
    fn changes(&mut self, finishing: bool) -> Result<bool, ImageError> {
        let timeout = if finishing { PollTimeout::ZERO } else { PollTimeout::from(FINISH_POLL_MS) };
        let ready = {
            let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, timeout).unwrap_or(0)
        };
        if ready == 0 {
            return Ok(false);
        }
        let events = match self.inotify.read_events() {
            Ok(events) => events,
            Err(nix::errno::Errno::EAGAIN) => return Ok(false),
            Err(errno) => return Err(ImageError::Watch { path: self.dir.clone(), source: errno.into() }),
        };
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                self.send_rest()?;
                continue;
            }
            let Some(name) = event.name.and_then(|name| name.into_string().ok()) else { continue };
            if !is_image(&name) {
                continue;
            }
            if event.mask.contains(AddWatchFlags::IN_CLOSE_WRITE) {
                self.grow(&name)?;
                self.close(&name)?;
            } else if is_pages(&name) {
                self.grow(&name)?;
            }
        }
        Ok(true)
    }

    /// Sends every file that is not sent yet: whatever inotify did not tell.
    fn send_rest(&mut self) -> Result<(), ImageError> {
        let wrap = |source| ImageError::Read { path: self.dir.clone(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(wrap)? {
            let entry = entry.map_err(wrap)?;
            if entry.file_type().is_ok_and(|kind| kind.is_file())
                && let Ok(name) = entry.file_name().into_string()
                && is_image(&name)
            {
                names.push(name);
            }
        }
        for name in names {
            if !self.images.get(&name).is_some_and(|image| image.closed) {
                self.grow(&name)?;
                self.close(&name)?;
            }
        }
        Ok(())
    }

    /// Sends what a file has grown by.
    fn grow(&mut self, name: &str) -> Result<(), ImageError> {
        let path = self.dir.join(name);
        let wrap = |source| ImageError::Read { path: path.clone(), source };
        let image = self.images.entry(name.to_owned()).or_default();
        if image.file.is_none() {
            let opened = File::options().read(true).write(is_pages(name)).open(&path);
            image.file = match opened {
                Ok(file) => Some(file),
                // Named by inotify and gone again: CRIU makes and removes some.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(wrap(error)),
            };
        }
        let Some(file) = &image.file else { return Ok(()) };
        let end = file.metadata().map_err(wrap)?.len();
        if image.closed {
            return if end == image.size { Ok(()) } else { Err(ImageError::Rewritten { name: name.to_owned() }) };
        }
        let mut chunks = Vec::new();
        while image.size < end {
            let length = usize::try_from(end - image.size).unwrap_or(CHUNK).min(CHUNK);
            let mut buffer = vec![0; length];
            file.read_exact_at(&mut buffer, image.size).map_err(wrap)?;
            image.sum.update(&buffer);
            let chunk = ImageChunk { name: name.to_owned(), offset: image.size, bytes: Bytes::from(buffer) };
            chunks.push(chunk);
            image.size += length as u64;
            if chunks.len() == 16 || image.size == end {
                let start = image.size - chunks.iter().map(|chunk| chunk.bytes.len() as u64).sum::<u64>();
                for chunk in chunks.drain(..) {
                    self.sent.bytes += chunk.bytes.len() as u64;
                    send(&self.messages, Message::Chunk(chunk))?;
                }
                if is_pages(name) {
                    give_back(file, start, image.size);
                }
            }
        }
        Ok(())
    }

    fn close(&mut self, name: &str) -> Result<(), ImageError> {
        let Some(image) = self.images.get_mut(name) else { return Ok(()) };
        if image.closed || image.file.is_none() {
            return Ok(());
        }
        image.closed = true;
        self.sent.files += 1;
        let close = ImageClose { name: name.to_owned(), size: image.size, checksum: image.sum.digest() };
        self.send(Message::Close(close))
    }

    fn send(&self, message: Message) -> Result<(), ImageError> {
        send(&self.messages, message)
    }
}

fn send(messages: &mpsc::Sender<ImageMessage>, message: Message) -> Result<(), ImageError> {
    messages.blocking_send(ImageMessage { message: Some(message) }).map_err(|_| ImageError::Refused)
}

/// `descriptors.json` went ahead, when the destination was armed; `stats-dump` is written when all is over.
fn is_image(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "img")
}

fn is_pages(name: &str) -> bool {
    name.starts_with("pages-")
}

/// Frees the memory behind what was sent: a large container must not need its memory twice.
fn give_back(file: &File, start: u64, end: u64) {
    let (Ok(start), Ok(end)) = (i64::try_from(start), i64::try_from(end)) else { return };
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    if let Err(errno) = fallocate(file, flags, start, end - start) {
        tracing::debug!(%errno, fd = file.as_raw_fd(), "can't free the memory of an image that was sent");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_written_is_what_is_sent() {
        let dir = tempfile::tempdir().expect("a directory");
        let (send, mut receive) = mpsc::channel(1000);
        let finish = Arc::new(AtomicBool::new(false));
        let sender = ImageSender::new(dir.path(), "m", send, finish.clone()).expect("watches");
        let writer = dir.path().to_owned();
        let thread = std::thread::spawn(move || sender.run());
        let mut pages = File::create(writer.join("pages-1.img")).expect("creates");
        for _ in 0..10 {
            pages.write_all(&[7; 100_000]).expect("writes");
        }
        drop(pages);
        std::fs::write(writer.join("core-1.img"), "state").expect("writes");
        std::fs::write(writer.join("notes.txt"), "no image").expect("writes");
        finish.store(true, Ordering::Release);
        let sent = thread.join().expect("no panic").expect("sends");
        assert_eq!(sent, Sent { files: 2, bytes: 1_000_005 });
        let mut received: HashMap<String, u64> = HashMap::new();
        while let Ok(message) = receive.try_recv() {
            if let Some(Message::Chunk(chunk)) = message.message {
                let size = received.entry(chunk.name).or_default();
                assert_eq!(chunk.offset, *size);
                *size += chunk.bytes.len() as u64;
            }
        }
        assert_eq!(received["pages-1.img"], 1_000_000);
        assert_eq!(received["core-1.img"], 5);
    }
}
