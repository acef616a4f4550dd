//! The keeper: holds every userfaultfd of one restored container, so that its filler may die.
//!
//! It is the process the agent starts, once for each migration. CRIU hands it the descriptors (criu/uffd.c, 4.2: a task's number
//! as the container counts, then the descriptor; a negative number for a zombie; `0x52535446` when all is restored), it
//! passes them to a [worker](super::filler) and starts another one if that ends early. It does nothing that can fail for
//! want of memory, and outlives its agent.
//!
//! With the agent it speaks in lines: it says `ready` and `filled`; it is told `go`, or `stop`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::channel::{Channel, Message, receive_with_fd};
use super::plan::SpaceId;

/// CRIU's word that all is restored (`LAZY_PAGES_RESTORE_FINISHED`).
const RESTORE_FINISHED: i32 = 0x5253_5446;
/// The pause after a worker's early end: tasks wait for it.
const EARLY_END: Duration = Duration::from_millis(5);
/// The pause after a failure. The keeper tries for as long as it takes: its end would be the end of the memory that is
/// not in place yet.
const AFTER_FAILURE: Duration = Duration::from_millis(200);

/// The socket, in the store's directory, where the agent passes on a connection of the source's.
pub const FETCH_SOCKET: &str = "fetch.sock";

/// See the module.
pub struct Keeper {
    dir: PathBuf,
    listener: Option<UnixListener>,
    fetches: UnixListener,
    /// A connection that came before there was a worker.
    fetch: Option<OwnedFd>,
    criu: Option<UnixStream>,
    agent: Option<io::Stdin>,
    worker: Option<(Child, Channel)>,
    /// Since then a worker is wanted.
    criu_came: bool,
    spaces: BTreeMap<SpaceId, OwnedFd>,
    go: bool,
    restored: bool,
}

enum Ready {
    Agent,
    Fetch,
    Criu,
    Worker,
}

impl Keeper {
    /// Listens at `socket` for CRIU. The store is in `dir`.
    pub fn bind(dir: &Path, socket: &Path) -> io::Result<Self> {
        let fetch = dir.join(FETCH_SOCKET);
        for socket in [socket, &fetch] {
            let _ = std::fs::remove_file(socket);
        }
        Ok(Self {
            dir: dir.to_owned(),
            listener: Some(UnixListener::bind(socket)?),
            fetches: UnixListener::bind(&fetch)?,
            fetch: None,
            criu: None,
            agent: Some(io::stdin()),
            worker: None,
            criu_came: false,
            spaces: BTreeMap::new(),
            go: false,
            restored: false,
        })
    }

    /// Keeps until all is filled, or it is told to stop.
    pub fn run(mut self) -> io::Result<()> {
        say("ready");
        loop {
            match self.step() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // Nothing is in its hands yet: the restore fails, and the container stays where it is.
                Err(error) if self.spaces.is_empty() => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "the keeper of a container's memory goes on after a failure");
                    std::thread::sleep(AFTER_FAILURE);
                }
            }
        }
    }

    /// Does what is due; false when it is all done.
    fn step(&mut self) -> io::Result<bool> {
        if self.worker.is_none() && self.criu_came {
            self.start_worker()?;
        }
        for ready in self.wait()? {
            let go_on = match ready {
                Ready::Agent => self.agent()?,
                Ready::Criu => self.criu()?,
                Ready::Worker => self.worker()?,
                Ready::Fetch => self.fetch()?,
            };
            if !go_on {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn wait(&self) -> io::Result<Vec<Ready>> {
        let mut polled = Vec::new();
        let mut kinds = Vec::new();
        if let Some(agent) = &self.agent {
            polled.push(PollFd::new(agent.as_fd(), PollFlags::POLLIN));
            kinds.push(Ready::Agent);
        }
        let criu = self.criu.as_ref().map(AsFd::as_fd).or(self.listener.as_ref().map(AsFd::as_fd));
        if let Some(criu) = criu {
            polled.push(PollFd::new(criu, PollFlags::POLLIN));
            kinds.push(Ready::Criu);
        }
        if let Some((_, channel)) = &self.worker {
            polled.push(PollFd::new(channel.as_fd(), PollFlags::POLLIN));
            kinds.push(Ready::Worker);
        }
        polled.push(PollFd::new(self.fetches.as_fd(), PollFlags::POLLIN));
        kinds.push(Ready::Fetch);
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        Ok(kinds.into_iter().zip(polled).filter(|(_, fd)| ready(fd)).map(|(kind, _)| kind).collect())
    }

    /// A word from the agent. One that is gone may have been restarted: what it has restored is to be filled.
    fn agent(&mut self) -> io::Result<bool> {
        let mut byte = [0; 1];
        let Some(agent) = &self.agent else { return Ok(true) };
        match nix::unistd::read(agent.as_fd(), &mut byte) {
            Ok(1) => {}
            _ => {
                self.agent = None;
                return self.start_filling();
            }
        }
        match byte[0] {
            b'g' => self.start_filling(),
            b's' => {
                if let Some((mut child, _)) = self.worker.take() {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                Ok(false)
            }
            // The rest of a line.
            _ => Ok(true),
        }
    }

    fn start_filling(&mut self) -> io::Result<bool> {
        if self.criu.is_none() && self.listener.is_some() {
            // Nothing was restored, and nobody is there to restore it.
            return Ok(self.agent.is_some());
        }
        self.go = true;
        if let Some((_, channel)) = &self.worker {
            let _ = channel.send(&Message::Go);
        }
        Ok(true)
    }

    fn criu(&mut self) -> io::Result<bool> {
        if let Some(listener) = &self.listener
            && self.criu.is_none()
        {
            let (criu, _) = listener.accept()?;
            self.criu = Some(criu);
            self.criu_came = true;
            self.listener = None;
            return Ok(true);
        }
        let Some(criu) = &self.criu else { return Ok(true) };
        let mut number = [0; 4];
        let (length, _) = receive_with_fd(criu.as_fd(), &mut number)?;
        let number = i32::from_ne_bytes(number);
        if length == 4 && number > 0 && number != RESTORE_FINISHED {
            let mut byte = [0; 1];
            let (_, fd) = receive_with_fd(criu.as_fd(), &mut byte)?;
            let Some(fd) = fd else { return Err(io::Error::other("CRIU sent a task without its userfaultfd")) };
            let space = SpaceId::from(number.unsigned_abs());
            if let Some((_, channel)) = &self.worker {
                let _ = channel.send_add(space, fd.as_fd());
            }
            self.spaces.insert(space, fd);
        } else if length != 4 || number == RESTORE_FINISHED {
            // Finished, or CRIU has ended early: no more will come.
            self.criu = None;
            self.restored = true;
            if let Some((_, channel)) = &self.worker {
                let _ = channel.send(&Message::Restored);
            }
        }
        Ok(true)
    }

    /// A connection to fetch pages over. It is the worker's alone: with the worker it ends.
    fn fetch(&mut self) -> io::Result<bool> {
        let (connection, _) = self.fetches.accept()?;
        match &self.worker {
            Some((_, channel)) => {
                let _ = channel.send(&Message::Fetch(connection.into()));
            }
            None => self.fetch = Some(connection.into()),
        }
        Ok(true)
    }

    fn worker(&mut self) -> io::Result<bool> {
        let Some((child, channel)) = &mut self.worker else { return Ok(true) };
        match channel.receive() {
            Ok(Some(Message::Add(space, fd))) => {
                self.spaces.insert(space, fd);
            }
            Ok(Some(Message::Done(space))) => {
                self.spaces.remove(&space);
            }
            Ok(Some(_)) => {}
            Err(error) => {
                tracing::error!(%error, "the filler can't be understood and is started again");
                let _ = child.kill();
                let _ = child.wait();
                self.worker = None;
            }
            Ok(None) => {
                let status = child.wait()?;
                if status.success() {
                    say("filled");
                    return Ok(false);
                }
                tracing::error!(%status, "the filler ended early and is started again");
                self.worker = None;
                std::thread::sleep(EARLY_END);
            }
        }
        Ok(true)
    }

    fn start_worker(&mut self) -> io::Result<()> {
        let (ours, theirs) = Channel::pair()?;
        // Standard input is the one descriptor that needs no number on the command line.
        let input = Stdio::from(theirs.as_fd().try_clone_to_owned()?);
        let child =
            Command::new("/proc/self/exe").arg("work").arg(&self.dir).stdin(input).stdout(Stdio::null()).spawn()?;
        for (space, fd) in &self.spaces {
            ours.send_add(*space, fd.as_fd())?;
        }
        if self.go {
            ours.send(&Message::Go)?;
        }
        if self.restored {
            ours.send(&Message::Restored)?;
        }
        if let Some(fetch) = self.fetch.take() {
            ours.send(&Message::Fetch(fetch))?;
        }
        tracing::debug!(pid = child.id(), channel = ours.as_fd().as_raw_fd(), "a filler was started");
        self.worker = Some((child, ours));
        Ok(())
    }
}

/// The agent may be gone.
fn say(word: &str) {
    let _ = writeln!(io::stdout(), "{word}");
}
