//! A container's network namespace: read on the source, rebuilt on the destination, and the two ends of its veth pairs.
//!
//! Reading and building go through `ip` (iproute2), which knows every attribute and is on every host that runs
//! containers; both happen while the container runs. What falls into the downtime (taking a port off the bridge, putting
//! one on, announcing) is done by system call.

mod announce;
mod backlog;
mod build;
mod describe;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use announce::Announcer;
pub use backlog::ListenQueues;
pub use build::{BuiltNamespace, addresses_in_use, build};
pub use describe::{Described, describe, neighbours, not_rebuilt};

use crate::sys::{BridgePort, InNetns, PortState, bridge_port, set_port_state};

/// A failed network operation.
#[derive(Debug, Error)]
pub enum NetError {
    /// A namespace could not be entered or made.
    #[error("can't {operation} network namespace {namespace}")]
    Namespace {
        /// `open`, `enter`, `make`.
        operation: &'static str,
        /// Which.
        namespace: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `ip` could not be started.
    #[error("can't run `ip`: install iproute2")]
    Start(#[source] io::Error),
    /// `ip` failed.
    #[error("`ip {command}` failed: {message}")]
    Ip {
        /// Its words.
        command: String,
        /// What it said.
        message: String,
    },
    /// Its answer is not understood.
    #[error("can't read the answer of `ip {command}`")]
    Answer {
        /// Its words.
        command: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// An interface that can't be rebuilt.
    #[error("interface {name}: {why}")]
    Link {
        /// Its name.
        name: String,
        /// Why not.
        why: String,
    },
    /// A port could not be put on or taken off a bridge.
    #[error("can't {operation} {port} and bridge {bridge}")]
    Port {
        /// `join` or `part`.
        operation: &'static str,
        /// The host's end of the veth pair.
        port: String,
        /// The bridge.
        bridge: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the namespace could not be read or written.
    #[error("can't access {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A network namespace held open.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// The namespace a task is in.
    pub fn of_task(pid: i32) -> Result<Self, NetError> {
        Self::open(&format!("/proc/{pid}/ns/net"))
    }

    /// The namespace pinned at a path.
    pub fn open(path: &str) -> Result<Self, NetError> {
        let file = File::open(path).map_err(|source| NetError::Namespace {
            operation: "open",
            namespace: path.to_owned(),
            source,
        })?;
        Ok(Self { fd: file.into() })
    }

    /// A new, empty one. It lives as long as this value, or a task in it.
    pub fn create() -> Result<Self, NetError> {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
            File::open("/proc/thread-self/ns/net")
        })
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that makes it panicked")));
        let file = made.map_err(|source| NetError::Namespace {
            operation: "make",
            namespace: "for the container".to_owned(),
            source,
        })?;
        Ok(Self { fd: file.into() })
    }

    /// Its inode number, as CRIU and `lsns` name it.
    pub fn inode(&self) -> Result<u64, NetError> {
        let stat = nix::sys::stat::fstat(&self.fd).map_err(|errno| NetError::Namespace {
            operation: "stat",
            namespace: "of the container".to_owned(),
            source: errno.into(),
        })?;
        Ok(stat.st_ino)
    }

    /// Runs a function on a thread inside it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let entered = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                    Ok(work())
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread inside panicked")))
        });
        entered.map_err(|source| NetError::Namespace {
            operation: "enter",
            namespace: "of the container".to_owned(),
            source,
        })
    }

    /// `ip` inside it, with JSON output if `json`.
    fn ip(&self, words: &[&str]) -> Result<String, NetError> {
        run_ip(Some(self.fd.as_fd()), words, None)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A link-layer address that a namespace knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface it was learnt on.
    pub link: String,
    /// Whose.
    pub address: std::net::IpAddr,
    /// What.
    pub mac: crate::description::Mac,
}

/// Runs `ip`, in a namespace or the agent's own, with `input` on its standard input.
fn run_ip(netns: Option<BorrowedFd<'_>>, words: &[&str], input: Option<&str>) -> Result<String, NetError> {
    use std::io::Write;
    let mut command = Command::new("ip");
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(netns) = netns {
        command.in_netns(netns);
    }
    let mut child = command.spawn().map_err(NetError::Start)?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // A program that stopped reading says why on its standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(NetError::Start)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        return Err(NetError::Ip { command: words.join(" "), message });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes this host forget the connections it tracks of these addresses. Kept, they would be taken for invalid when the
/// container comes back, and dropped (engines that filter `ct state invalid` do so).
///
/// Best effort: a host that tracks nothing has nothing to forget, and one without `conntrack` is told once.
pub fn forget_connections(addresses: impl IntoIterator<Item = std::net::IpAddr>) {
    let tracked = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap_or_default();
    if matches!(tracked.trim(), "" | "0") {
        return;
    }
    for address in addresses {
        let family = if address.is_ipv6() { "ipv6" } else { "ipv4" };
        for direction in ["--src", "--dst"] {
            let address = address.to_string();
            let mut command = Command::new("conntrack");
            command.args(["--delete", "--family", family, direction, &address]);
            if let Err(error) = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status() {
                tracing::warn!(%error, "can't run conntrack: connections of the container stay tracked here");
                return;
            }
        }
    }
}

/// The host's end of a veth pair, and the bridge it belongs on. Written down as name, index, bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(String, u32, String)", into = "(String, u32, String)")]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its index in the host's namespace.
    pub index: u32,
    /// The bridge.
    pub bridge: String,
}

impl From<(String, u32, String)> for Port {
    fn from((name, index, bridge): (String, u32, String)) -> Self {
        Self { name, index, bridge }
    }
}

impl From<Port> for (String, u32, String) {
    fn from(Port { name, index, bridge }: Port) -> Self {
        (name, index, bridge)
    }
}

impl Port {
    /// Puts it on its bridge, forwarding; being there already is success.
    pub fn join(&self) -> Result<(), NetError> {
        self.change(BridgePort::Attach, "join", libc::EBUSY)?;
        if let Err(error) = set_port_state(self.index, PortState::Forwarding) {
            // Under the spanning tree protocol the bridge comes to it by itself.
            tracing::debug!(%error, port = self.name, "can't set the port forwarding");
        }
        Ok(())
    }

    /// Cuts it off: packets to the container end on the bridge, and none of its own get out. Its carrier stays up, so that
    /// the container sees no change.
    pub fn part(&self) -> Result<(), NetError> {
        match set_port_state(self.index, PortState::Disabled) {
            Ok(()) => Ok(()),
            // Under the spanning tree protocol the state is not ours to set; off the bridge it is cut off as well.
            Err(_) => self.change(BridgePort::Detach, "part", libc::EINVAL),
        }
    }

    fn change(&self, action: BridgePort, operation: &'static str, done_already: i32) -> Result<(), NetError> {
        match bridge_port(&self.bridge, self.index, action) {
            Err(error) if error.raw_os_error() == Some(done_already) => Ok(()),
            other => other.map_err(|source| NetError::Port {
                operation,
                port: self.name.clone(),
                bridge: self.bridge.clone(),
                source,
            }),
        }
    }

    /// Removes the veth pair, unless it is gone or another has its name.
    pub fn remove_if_there(&self) {
        if if_nametoindex(self.name.as_str()) != Ok(self.index) {
            return;
        }
        if let Err(error) = run_ip(None, &["link", "delete", "dev", &self.name], None) {
            tracing::debug!(port = self.name, %error, "an interface was gone already");
        }
    }
}
