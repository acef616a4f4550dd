//! Memory that the container's tasks share, in place: each [`object`](longhaul_common::pages::Object) is made on this host when the first word of it
//! comes, is written as its pages arrive, and is handed to CRIU as it is when the container is restored. Nothing of it
//! has to be copied while the container stands still, nor to be filled in later.
//!
//! CRIU asks for it through the library in its process (`common/filter`): a number on a socket among the images, and a
//! descriptor back.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use longhaul_common::pages::{MemoryFile, Object, ObjectKind, Segment};
use longhaul_common::sys::ipc::create_segment;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, Shutdown, sendmsg, shutdown};
use thiserror::Error;

/// The socket's name among the images. The library knows it.
pub const SOCKET: &str = "longhaul.sock";
/// What the library asks for in place of a number: the IPC namespace.
const NAMESPACE: &str = "ipc";
/// Objects of one container. Each takes a descriptor of this agent.
const MAX_OBJECTS: usize = 4096;

/// Shared memory that can't be made.
#[derive(Debug, Error)]
pub enum ObjectError {
    /// The system.
    #[error("can't make the shared memory {0} of the container here")]
    Make(String, #[source] io::Error),
    /// The description.
    #[error("the peer's description of shared memory is not valid: {0}")]
    Invalid(&'static str),
    /// More than is taken.
    #[error("the container shares more than {MAX_OBJECTS} pieces of memory")]
    TooMany,
    /// CRIU made its own.
    #[error("CRIU did not ask for the shared memory {0:?} that is not in its images")]
    NotAsked(Vec<u64>),
    /// The socket.
    #[error("can't listen on {path} for CRIU")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One of them.
#[derive(Debug, Clone)]
struct Made {
    about: Object,
    file: Arc<File>,
}

impl Made {
    fn is_segment(&self) -> bool {
        matches!(self.about.kind, Some(ObjectKind::Segment(_)))
    }
}

/// Those of one container.
#[derive(Debug, Default)]
pub struct Objects {
    made: HashMap<u32, Made>,
    /// Where its segments are.
    namespace: Option<Arc<OwnedFd>>,
}

impl Objects {
    /// Makes an object, or cuts it to the size it has now.
    pub fn declare(&mut self, space: u32, about: Object) -> Result<(), ObjectError> {
        let failed = |source| ObjectError::Make(name_of(&about), source);
        if i64::try_from(about.size).is_err() {
            return Err(ObjectError::Invalid("its size"));
        }
        if let Some(made) = self.made.get_mut(&space) {
            if made.about.kind != about.kind || made.about.inode != about.inode {
                return Err(ObjectError::Invalid("it has become another"));
            }
            // Said over every stream. A segment never changes its size.
            if made.about.size != about.size {
                made.file.set_len(about.size).map_err(failed)?;
                made.about = about;
            }
            return Ok(());
        }
        if self.made.len() >= MAX_OBJECTS {
            return Err(ObjectError::TooMany);
        }
        if self.made.values().any(|made| made.about.inode == about.inode) {
            return Err(ObjectError::Invalid("its inode is another's"));
        }
        let file = match about.kind.as_ref().ok_or(ObjectError::Invalid("its kind"))? {
            ObjectKind::File(file) => make_file(file, about.size).map_err(failed)?,
            ObjectKind::Segment(segment) => self.make_segment(segment, about.size).map_err(failed)?,
        };
        self.made.insert(space, Made { about, file: Arc::new(file) });
        Ok(())
    }

    fn make_segment(&mut self, segment: &Segment, size: u64) -> io::Result<File> {
        let namespace = self.namespace.clone();
        let segment = segment.clone();
        // A namespace is a thread's: one that ends with this.
        let made = std::thread::spawn(move || {
            let namespace = match namespace {
                Some(namespace) => {
                    setns(namespace.as_fd(), CloneFlags::CLONE_NEWIPC)?;
                    namespace
                }
                None => {
                    unshare(CloneFlags::CLONE_NEWIPC)?;
                    Arc::new(File::open("/proc/thread-self/ns/ipc")?.into())
                }
            };
            let file = create_segment(segment.id, segment.key, size, segment.mode & 0o777)?;
            Ok::<_, io::Error>((namespace, file))
        });
        let (namespace, file) = made.join().map_err(|_| io::Error::other("a thread ended unexpectedly"))??;
        self.namespace = Some(namespace);
        Ok(file)
    }

    /// Its memory.
    pub fn file(&self, space: u32) -> Option<&Arc<File>> {
        self.made.get(&space).map(|made| &made.file)
    }

    /// It is in nobody's use any more. A segment stays in its namespace, where its number may be another's later.
    pub fn forget(&mut self, space: u32) {
        if let Some(Made { about: Object { kind: Some(ObjectKind::Segment(segment)), .. }, .. }) =
            self.made.remove(&space)
            && let Some(namespace) = self.namespace.clone()
        {
            let removed = std::thread::spawn(move || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWIPC)?;
                longhaul_common::sys::ipc::remove_segment(segment.id)
            });
            if !matches!(removed.join(), Ok(Ok(()))) {
                tracing::warn!(
                    id = segment.id,
                    "can't remove a segment of shared memory that the container has given up"
                );
            }
        }
    }

    /// Everything, for CRIU.
    pub fn hand_out(&self, images: &Path) -> Result<HandOut, ObjectError> {
        for made in self.made.values() {
            // Pages are written whole, also the last one.
            made.file.set_len(made.about.size).map_err(|source| ObjectError::Make(name_of(&made.about), source))?;
        }
        let (segments, files): (Vec<&Made>, Vec<&Made>) = self.made.values().partition(|made| made.is_segment());
        let segments = segments.iter().map(|made| made.about.inode).collect();
        let files = files.iter().map(|made| (made.about.inode, made.file.clone())).collect();
        let path = images.join(SOCKET);
        let stock = Stock { files, segments, namespace: self.namespace.clone() };
        HandOut::begin(&path, stock).map_err(|source| ObjectError::Listen { path, source })
    }
}

fn name_of(about: &Object) -> String {
    match &about.kind {
        Some(ObjectKind::Segment(segment)) => format!("segment {}", segment.id),
        Some(ObjectKind::File(file)) => format!("file {}", String::from_utf8_lossy(&file.name).escape_default()),
        None => format!("object {}", about.inode),
    }
}

fn make_file(about: &MemoryFile, size: u64) -> io::Result<File> {
    let sealing = if about.may_be_sealed { MFdFlags::MFD_ALLOW_SEALING } else { MFdFlags::empty() };
    // Not for the programs that this agent starts meanwhile: they would keep the memory.
    let flags = sealing | MFdFlags::MFD_CLOEXEC;
    let name = std::ffi::CString::new(about.name.clone()).map_err(io::Error::other)?;
    let file = File::from(memfd_create(name.as_c_str(), flags)?);
    file.set_len(size)?;
    Ok(file)
}

/// What there is to hand out. Segments are where they are to be, in their namespace.
struct Stock {
    files: HashMap<u64, Arc<File>>,
    segments: BTreeSet<u64>,
    namespace: Option<Arc<OwnedFd>>,
}

/// Gives CRIU what it asks for, until it is dropped.
#[derive(Debug)]
pub struct HandOut {
    listener: Arc<UnixListener>,
    given: Arc<Mutex<BTreeSet<u64>>>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl HandOut {
    fn begin(path: &Path, stock: Stock) -> io::Result<Self> {
        let listener = Arc::new(UnixListener::bind(path)?);
        let given = Arc::new(Mutex::new(BTreeSet::new()));
        let (questions, noted) = (listener.clone(), given.clone());
        let thread = std::thread::spawn(move || {
            while let Ok((connection, _)) = questions.accept() {
                if let Err(error) = answer(connection, &stock, &noted) {
                    tracing::warn!(%error, "CRIU's question for shared memory went wrong");
                }
            }
        });
        Ok(Self { listener, given, thread: Some(thread), path: path.to_owned() })
    }

    /// All of these must have been asked for: they are nowhere else.
    pub fn must_have_given(&self, wanted: &[u64]) -> Result<(), ObjectError> {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<u64> = wanted.iter().filter(|inode| !given.contains(inode)).copied().collect();
        if missing.is_empty() { Ok(()) } else { Err(ObjectError::NotAsked(missing)) }
    }
}

impl Drop for HandOut {
    fn drop(&mut self) {
        // Ends the wait for the next one.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Answers one question, 32 bytes: with a descriptor, if there is what it asks for.
fn answer(mut connection: UnixStream, stock: &Stock, given: &Mutex<BTreeSet<u64>>) -> io::Result<()> {
    let mut question = [0; QUESTION];
    connection.set_read_timeout(Some(QUESTION_DEADLINE))?;
    connection.read_exact(&mut question)?;
    let question = String::from_utf8_lossy(&question).trim_end_matches('\0').to_owned();
    let (fd, noted): (Option<RawFd>, Vec<u64>) = if question == NAMESPACE {
        (stock.namespace.as_ref().map(|namespace| namespace.as_raw_fd()), stock.segments.iter().copied().collect())
    } else {
        let file = question.parse().ok().and_then(|inode: u64| Some((stock.files.get(&inode)?, inode)));
        file.map_or((None, Vec::new()), |(file, inode)| (Some(file.as_raw_fd()), vec![inode]))
    };
    let fds: Vec<RawFd> = fd.into_iter().collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[] } else { &rights[..] };
    sendmsg::<()>(connection.as_raw_fd(), &[IoSlice::new(b"ok")], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    given.lock().unwrap_or_else(PoisonError::into_inner).extend(noted.into_iter().filter(|_| !fds.is_empty()));
    Ok(())
}

/// Bytes of a question.
const QUESTION: usize = 32;
/// How long one may take to come: who asks has it ready.
const QUESTION_DEADLINE: Duration = Duration::from_secs(5);
