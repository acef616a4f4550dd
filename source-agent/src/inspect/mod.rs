//! Looks at a container before anything is touched: what it is, and what of it can't move.

mod mounts;
mod rootfs;
mod sockets;
mod stdio;
mod tasks;
mod tmpfs;

pub use self::tmpfs::path_on_host;

use std::path::{Path, PathBuf};

use longhaul_common::cgroup::{CgroupError, Freezer};
use longhaul_common::config::SourceConfig;
use longhaul_common::description::{Description, Network, Rootfs, Stdio, StdioTarget, VERSION, Volume, VolumeMode};
use longhaul_common::layers::LayerDigests;
use longhaul_common::net::{self, NetError, Netns, Port};
use longhaul_common::obstacle::Obstacle;
use longhaul_common::runtime::RuntimeError;
use longhaul_common::tree::TreeError;
use serde_json::Value;
use thiserror::Error;

use crate::options::Options;

/// A container that could not be looked at.
#[derive(Debug, Error)]
pub enum InspectError {
    /// The runtime.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// It has no tasks.
    #[error("container {id} is {status}: only a running container can be moved live; start it")]
    NotRunning {
        /// Its id.
        id: String,
        /// The runtime's word.
        status: String,
    },
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Its network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A layer.
    #[error("can't read a lower layer of the container")]
    Layer(#[from] TreeError),
    /// A file.
    #[error("can't read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its configuration is no OCI configuration.
    #[error("the bundle's configuration {path} can't be read")]
    Config {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Its root filesystem is not understood.
    #[error("can't tell what the container's root filesystem {path} is: {why}")]
    Rootfs {
        /// Its path.
        path: String,
        /// What is wrong.
        why: String,
    },
}

/// A container, looked at.
#[derive(Debug)]
pub struct Inspection {
    /// What the destination has to know.
    pub description: Description,
    /// What is in the way.
    pub obstacles: Vec<Obstacle>,
    /// Handles on the running container.
    pub live: Live,
}

/// Handles on a running container.
#[derive(Debug)]
pub struct Live {
    /// Its first task.
    pub init: i32,
    /// Its cgroup.
    pub freezer: Freezer,
    /// The host's ends of its interfaces.
    pub ports: Vec<Port>,
    /// CRIU's name of its network namespace, if that is its own.
    pub netns_key: Option<String>,
}

/// Looks at a container.
pub async fn inspect(
    config: &SourceConfig,
    digests: &LayerDigests,
    id: &str,
    options: &Options,
) -> Result<Inspection, InspectError> {
    let state = config.engine.runtime().state(id).await?;
    let mut obstacles = Vec::new();
    if state.pid == 0 {
        return Err(InspectError::NotRunning { id: id.to_owned(), status: state.status });
    }
    if state.status != "running" {
        let fix = match state.status.as_str() {
            "paused" => format!("`runc resume {id}`"),
            "created" => format!("`runc start {id}`"),
            _ => "only a running container can be moved live; start it".to_owned(),
        };
        obstacles.push(Obstacle::new(format!("container {id}"), format!("it is {}, not running", state.status), fix));
    }
    let bundle = PathBuf::from(&state.bundle);
    let config_path = bundle.join("config.json");
    let text = std::fs::read_to_string(&config_path)
        .map_err(|source| InspectError::File { path: config_path.clone(), source })?;
    let oci: Value =
        serde_json::from_str(&text).map_err(|source| InspectError::Config { path: config_path, source })?;
    // It may have to read gigabytes of layers: other migrations' heartbeats must go on. Even where the layers are known it takes as long as all
    // the rest, which is looked at meanwhile.
    let (rootfs, rest) = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let rootfs = scope.spawn(|| rootfs::find(&oci, &bundle, digests));
            let rest = inspect_rest(config, id, &oci, state.pid, options, &mut obstacles);
            (rootfs.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), rest)
        })
    });
    let (rootfs, Rest { volumes, stdio, tasks, tmpfs, network, ports, netns_key, freezer }) = (rootfs?, rest?);
    let mut description = Description {
        version: VERSION,
        id: id.to_owned(),
        engine: "runc".to_owned(),
        bundle: state.bundle,
        config: text,
        rootfs,
        volumes,
        network,
        stdio,
        memory_bytes: tasks::memory_of(&tasks) + tmpfs.iter().map(|found| found.bytes).sum::<u64>(),
        tmpfs: tmpfs.into_iter().map(|found| found.tmpfs).collect(),
        disk_bytes: 0,
        mapped_files: tasks::mapped_files(&tasks),
        single_cgroup: !freezer.is_nested()?,
        single_netns: netns_key.is_some() && tasks.iter().all(|pid| is_in_netns_of(*pid, state.pid)),
    };
    description.disk_bytes = disk_bytes(&description);
    Ok(Inspection { description, obstacles, live: Live { init: state.pid, freezer, ports, netns_key } })
}

/// What a container has beside its root filesystem.
struct Rest {
    volumes: Vec<Volume>,
    stdio: Vec<Stdio>,
    tasks: Vec<i32>,
    tmpfs: Vec<tmpfs::Found>,
    network: Network,
    ports: Vec<Port>,
    netns_key: Option<String>,
    freezer: Freezer,
}

fn inspect_rest(
    config: &SourceConfig,
    id: &str,
    oci: &Value,
    init: i32,
    options: &Options,
    obstacles: &mut Vec<Obstacle>,
) -> Result<Rest, InspectError> {
    let volumes = mounts::examine(oci, init, options, obstacles)?;
    let freezer = match config.engine.runtime().cgroup(id).and_then(Freezer::at) {
        Some(freezer) => freezer,
        None => Freezer::of(init)?,
    };
    let tasks = freezer.tasks()?;
    let stdio = stdio::examine(id, init, oci, options, obstacles)?;
    tasks::examine(init, &tasks, &stdio, obstacles)?;
    let tmpfs = if tasks.iter().all(|pid| is_in_mntns_of(*pid, init)) { tmpfs::find(init)? } else { Vec::new() };
    let (network, ports, netns_key) = network(oci, init, &freezer, obstacles)?;
    sockets::examine(init, &tasks, matches!(network, Network::Host), obstacles)?;
    Ok(Rest { volumes, stdio, tasks, tmpfs, network, ports, netns_key, freezer })
}

/// The network: a namespace of its own, or the host's.
fn network(
    oci: &Value,
    init: i32,
    freezer: &Freezer,
    obstacles: &mut Vec<Obstacle>,
) -> Result<(Network, Vec<Port>, Option<String>), InspectError> {
    let netns = Netns::of_task(init)?;
    let inode = netns.inode()?;
    if inode == Netns::open("/proc/self/ns/net")?.inode()? {
        return Ok((Network::Host, Vec::new(), None));
    }
    let path = oci["linux"]["namespaces"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|namespace| namespace["type"] == "network")
        .and_then(|namespace| namespace["path"].as_str())
        .map(str::to_owned);
    if let Some(other) = other_user(inode, freezer) {
        obstacles.push(Obstacle::new(
            "network namespace",
            format!("task {other}, which is not of this container, uses it too"),
            "containers that share a network can't be moved one by one: give each its own, or end the other",
        ));
    }
    for what in net::not_rebuilt(&netns) {
        obstacles.push(Obstacle::new(
            format!("network namespace: {what}"),
            "it is set up inside the container's own network and would be missing on the destination",
            "remove it, or set it up on the host's side of the container's interface",
        ));
    }
    match net::describe(&netns) {
        Ok(described) => {
            // A namespace pinned at a path is passed by the runtime itself.
            let key = path.is_none().then(|| format!("net[{inode}]:{}", longhaul_common::criu::rpc::EXTERNAL_NETNS));
            Ok((Network::Own { path, namespace: described.namespace }, described.ports, key))
        }
        Err(NetError::Link { name, why }) => {
            obstacles.push(Obstacle::new(name, why, "remove it from the container, or put the container on a bridge"));
            Ok((Network::Own { path, namespace: longhaul_common::description::Namespace::default() }, Vec::new(), None))
        }
        Err(error) => Err(error.into()),
    }
}

/// A task outside the container that is in its network namespace.
fn other_user(inode: u64, freezer: &Freezer) -> Option<i32> {
    let wanted = format!("net:[{inode}]");
    let is_inside = |pid: i32| {
        std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|link| link.as_os_str() == wanted.as_str())
    };
    // A task at its birth is in no cgroup of its own for a moment (`cgroup_post_fork` comes after it is visible), and one
    // at its end leaves its namespaces before its cgroup (do_exit): only who is still outside after a while is foreign.
    let is_foreign = |pid: i32| {
        (0..FOREIGN_LOOKS).all(|look| {
            if look > 0 {
                std::thread::sleep(FOREIGN_LOOK_AGAIN);
            }
            is_inside(pid) && !freezer.contains(pid)
        })
    };
    let entries = std::fs::read_dir("/proc").ok()?;
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).find(|pid| is_foreign(*pid))
}

fn is_in_netns_of(pid: i32, other: i32) -> bool {
    share_namespace("net", pid, other)
}

fn is_in_mntns_of(pid: i32, other: i32) -> bool {
    share_namespace("mnt", pid, other)
}

/// Whether two tasks are in one namespace. One that has ended since is in none that matters.
fn share_namespace(kind: &str, pid: i32, other: i32) -> bool {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    namespace(pid).map_or(true, |link| namespace(other).is_ok_and(|other| other == link))
}

/// Looks at a task that seems to be another user of the network, and the pause between them.
const FOREIGN_LOOKS: u32 = 10;
const FOREIGN_LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(5);

fn disk_bytes(description: &Description) -> u64 {
    let root = match &description.rootfs {
        Rootfs::Overlay { upper, .. } => upper,
        Rootfs::Plain { path } => path,
    };
    let volumes = description.volumes.iter().filter(|volume| volume.mode == VolumeMode::Copy);
    let logs = description.stdio.iter().filter_map(|stdio| match &stdio.target {
        StdioTarget::File { path, .. } => Some(path),
        StdioTarget::Pipe { log, .. } => log.as_ref(),
    });
    [root]
        .into_iter()
        .chain(volumes.map(|volume| &volume.source))
        .chain(logs)
        .map(|path| size_of(Path::new(path)))
        .sum()
}

/// Bytes in use below a path, on its filesystem alone.
fn size_of(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = path.symlink_metadata() else { return 0 };
    let own = metadata.blocks() * 512;
    if !metadata.is_dir() {
        return own;
    }
    let Ok(entries) = std::fs::read_dir(path) else { return own };
    let inside = entries.flatten().filter(|entry| entry.metadata().is_ok_and(|inner| inner.dev() == metadata.dev()));
    own + inside.map(|entry| size_of(&entry.path())).sum::<u64>()
}

/// Reads a file of `/proc`.
fn read_proc(path: &str) -> Result<String, InspectError> {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .map_err(|source| InspectError::File { path: path.into(), source })
}

/// `/proc/<pid>/comm`, for messages.
fn name_of(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("task {pid} ({})", name.trim())
}

/// One line of a mountinfo file.
struct MountLine<'a> {
    id: &'a str,
    /// Major and minor number of the filesystem's device.
    device: &'a str,
    /// What of the filesystem is mounted.
    root: String,
    mount_point: String,
    /// Those of this mount.
    options: &'a str,
    fstype: &'a str,
    source: &'a str,
    super_options: &'a str,
}

/// Parses mountinfo (proc_pid_mountinfo(5)).
fn mount_lines(text: &str) -> impl Iterator<Item = MountLine<'_>> {
    text.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let mut right = right.splitn(3, ' ');
        let fstype = right.next()?;
        let (source, super_options) = (right.next()?, right.next()?);
        Some(MountLine {
            id: left.first()?,
            device: left.get(2)?,
            root: unescape(left.get(3)?),
            mount_point: unescape(left.get(4)?),
            options: left.get(5)?,
            fstype,
            source,
            super_options,
        })
    })
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let text = "36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 - overlay overlay rw,lowerdir=/l,upperdir=/u";
        let lines: Vec<_> = mount_lines(text).collect();
        assert_eq!(lines[0].mount_point, "/mnt/a b");
        assert_eq!(lines[0].fstype, "overlay");
        assert_eq!(lines[0].super_options, "rw,lowerdir=/l,upperdir=/u");
        assert_eq!(unescape("a\\134b\\x"), "a\\b\\x");
    }
}
