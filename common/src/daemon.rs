//! What every agent does with the system that runs it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};

/// The fewest threads that an agent runs on. A journal is synced, and a disk asked, on some of them: with one for each processor, on a host
/// with one or two, no heartbeat would be sent while the disk is busy, and the peer would take this host for dead.
const THREADS: usize = 4;

/// Runs an agent to its end.
///
/// # Errors
/// The agent's own; no threads can be had.
pub fn run<T, E: From<io::Error>>(agent: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let threads = std::thread::available_parallelism().map_or(THREADS, |count| count.get().max(THREADS));
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?.block_on(agent)
}

/// How long an agent that was killed may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// The right to be the one agent of a directory of state, while it is held.
#[derive(Debug)]
pub struct Alone {
    _lock: Flock<File>,
}

impl Alone {
    /// Waits a little for an agent that is about to be gone. A second one must not take the first one's migrations for those of an earlier
    /// life: it would let go what the first is about to give away.
    ///
    /// # Errors
    /// `EWOULDBLOCK`: there is another one.
    pub fn in_directory(state: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(state)?;
        let start = Instant::now();
        let mut directory = File::open(state)?;
        loop {
            match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { _lock: lock }),
                Err((_, errno)) if errno != nix::errno::Errno::EWOULDBLOCK || start.elapsed() > GONE_WITHIN => {
                    return Err(errno.into());
                }
                Err((file, _)) => directory = file,
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Tells the service manager that the agent answers. Without one it does nothing.
pub fn say_ready() {
    notify(sd_notify::NotifyState::Ready);
}

/// Waits until the agent is told to end (SIGTERM, SIGINT), and tells the service manager so.
pub async fn told_to_end() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify(sd_notify::NotifyState::Stopping);
}

fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "can't tell the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_waits_for_the_first() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = Alone::in_directory(dir.path()).expect("is alone");
        let path = dir.path().to_owned();
        let second = std::thread::spawn(move || Alone::in_directory(&path).map(drop));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!second.is_finished(), "two at once");
        drop(first);
        second.join().expect("ends").expect("is alone now");
    }
}
