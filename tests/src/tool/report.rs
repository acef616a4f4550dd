//! What a test reads: the final report, and a status file while the program runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::Value;

/// How often a status file is rewritten.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64)
}

/// Replaces `path` by `value` so that a reader sees the old or the new content, never half of it.
pub(crate) fn write(path: &Path, value: &Value) -> anyhow::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    fs::write(&temporary, format!("{value}\n"))
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("write {}", path.display()))
}

/// Prints the final report, and writes it to `path` too if one is given.
pub(crate) fn publish(value: &Value, path: Option<&Path>) -> anyhow::Result<()> {
    println!("{value}");
    path.map_or(Ok(()), |path| write(path, value))
}

/// A file that is rewritten every 100 ms until this is dropped; the last content is written on drop.
pub(crate) struct StatusFile {
    writer: Option<(Sender<()>, JoinHandle<()>)>,
}

impl StatusFile {
    /// Writes what `snapshot` returns; does nothing without a path.
    pub(crate) fn start(path: Option<&Path>, snapshot: impl Fn() -> Value + Send + 'static) -> anyhow::Result<Self> {
        let Some(path) = path.map(Path::to_path_buf) else { return Ok(Self { writer: None }) };
        write(&path, &snapshot())?;
        let (stop, stopped) = channel();
        let thread = thread::Builder::new().name("status".into()).spawn(move || rewrite(&path, &snapshot, &stopped))?;
        Ok(Self { writer: Some((stop, thread)) })
    }
}

impl Drop for StatusFile {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.writer.take() {
            drop(stop);
            // A panicked writer has already printed its message.
            let _ = thread.join();
        }
    }
}

fn rewrite(path: &Path, snapshot: &dyn Fn() -> Value, stopped: &Receiver<()>) {
    loop {
        let last = stopped.recv_timeout(STATUS_INTERVAL) != Err(RecvTimeoutError::Timeout);
        if let Err(error) = write(path, &snapshot()) {
            eprintln!("status file: {error:#}");
        }
        if last {
            return;
        }
    }
}
