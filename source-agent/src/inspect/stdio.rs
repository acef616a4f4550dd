//! Standard streams that lead outside the container.

use std::collections::HashSet;
use std::fs::{Metadata, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use longhaul_common::description::{Stdio, StdioTarget};
use longhaul_common::obstacle::Obstacle;
use serde_json::Value;

use super::{InspectError, mount_lines, read_proc};
use crate::options::Options;

/// Where the destination writes the output of a container whose output was a pipe here.
const PIPE_LOGS: &str = "/var/lib/longhaul/logs";

/// The streams of a container's first task.
pub(super) fn examine(
    id: &str,
    init: i32,
    oci: &Value,
    options: &Options,
    obstacles: &mut Vec<Obstacle>,
) -> Result<Vec<Stdio>, InspectError> {
    if oci["process"]["terminal"] == Value::Bool(true) {
        obstacles.push(Obstacle::new(
            "terminal",
            "the container was started with a terminal of this host, which can't move",
            "start it without one: \"terminal\": false in the bundle's config.json",
        ));
        return Ok(Vec::new());
    }
    let mounts = read_proc(&format!("/proc/{init}/mountinfo"))?;
    let inside: HashSet<&str> = mount_lines(&mounts).map(|mount| mount.id).collect();
    let is_inside = |open: &OpenFile| inside.contains(open.info.mount.as_str());
    let on_host = read_proc("/proc/self/mountinfo")?;
    let on_host: HashSet<&str> = mount_lines(&on_host).map(|mount| mount.id).collect();
    // Of this host's files alone it is certain that the container was given them: pipes, sockets and memory may be its own.
    let is_of_host = |open: &OpenFile| open.metadata.is_file() && on_host.contains(open.info.mount.as_str());
    let mut used = 0;
    let mut streams = Vec::new();
    for fd in 0..3 {
        let Some(mut open) = OpenFile::look(init, fd) else { continue };
        if fd > 0 && is_inside(&open) {
            // Looked for after that, and again if it has its own back by now.
            let aside = set_aside(init)?.into_iter().filter(is_of_host).nth(used);
            used += usize::from(aside.is_some());
            match aside.or_else(|| OpenFile::look(init, fd).filter(|open| !is_inside(open))) {
                Some(original) => open = original,
                None => continue,
            }
        }
        if open.link == "/dev/null" {
            continue;
        }
        let OpenFile { link, info, metadata } = open;
        if link.starts_with("pipe:[") {
            let log = (info.flags & nix::libc::O_ACCMODE != nix::libc::O_RDONLY)
                .then(|| options.log.clone().unwrap_or_else(|| format!("{PIPE_LOGS}/{id}.log")));
            streams.push(Stdio { fd, target: StdioTarget::Pipe { key: link, log } });
            continue;
        }
        if !metadata.is_file() || link.ends_with(" (deleted)") {
            obstacles.push(Obstacle::new(
                format!("standard stream {fd}"),
                format!("it leads outside the container to {link}, which can't move"),
                "start the container with its output going to a regular file, a pipe or /dev/null",
            ));
            continue;
        }
        let mount: u64 = info.mount.parse().unwrap_or(0);
        let key = format!("file[{mount:x}:{:x}]", metadata.ino());
        streams.push(Stdio { fd, target: StdioTarget::File { path: link, key, flags: info.flags } });
    }
    Ok(streams)
}

/// What a shell that has redirected its own streams, for a loop or a builtin, keeps of the ones it was given: above all descriptors
/// that a script can name with one digit, and closed in what it starts (dash `src/redir.c`, bash `redir.c`: from 10).
fn set_aside(init: i32) -> Result<Vec<OpenFile>, InspectError> {
    const FIRST: i32 = 10;
    let path = format!("/proc/{init}/fd");
    let entries = std::fs::read_dir(&path).map_err(|source| InspectError::File { path: path.into(), source })?;
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut above: Vec<i32> = numbers.filter(|fd| *fd >= FIRST).collect();
    above.sort_unstable();
    let opened = above.into_iter().filter_map(|fd| OpenFile::look(init, fd));
    Ok(opened.filter(|open| open.info.flags & nix::libc::O_CLOEXEC != 0).collect())
}

/// An open file of a task.
pub(super) struct OpenFile {
    /// Its path or kind, as its descriptor's link has it.
    pub(super) link: String,
    /// How it was opened.
    pub(super) info: FdInfo,
    /// What it is.
    pub(super) metadata: Metadata,
}

impl OpenFile {
    /// How often a descriptor is looked at again that is another file each time.
    const LOOKS: usize = 1000;

    /// All answers are about one file: a shell gives a descriptor another one, and its own back, between any two looks. Nothing if it is
    /// closed.
    pub(super) fn look(pid: i32, fd: i32) -> Option<Self> {
        (0..Self::LOOKS).find_map(|_| Self::try_look(pid, fd).transpose())?.ok()
    }

    /// `Ok(None)` if it changed meanwhile.
    fn try_look(pid: i32, fd: i32) -> Result<Option<Self>, std::io::Error> {
        let held =
            OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH).open(format!("/proc/{pid}/fd/{fd}"))?;
        let own = held.as_raw_fd();
        // Flags are the descriptor's own: a handle has others.
        let info = FdInfo::parse(&std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?);
        let handle = FdInfo::parse(&std::fs::read_to_string(format!("/proc/self/fdinfo/{own}"))?);
        if (&info.mount, &info.inode) != (&handle.mount, &handle.inode) {
            return Ok(None);
        }
        let link = std::fs::read_link(format!("/proc/self/fd/{own}"))?.to_string_lossy().into_owned();
        Ok(Some(Self { link, info, metadata: held.metadata()? }))
    }
}

/// What `/proc/<pid>/fdinfo` tells.
pub(super) struct FdInfo {
    /// open(2) flags.
    pub(super) flags: i32,
    /// The mount's id.
    pub(super) mount: String,
    /// The inode's number; empty before Linux 5.14.
    pub(super) inode: String,
}

impl FdInfo {
    pub(super) fn parse(text: &str) -> Self {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim).unwrap_or_default();
        let flags = i32::from_str_radix(value("flags:"), 8).unwrap_or(0);
        Self { flags, mount: value("mnt_id:").to_owned(), inode: value("ino:").to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn all_that_is_said_of_a_descriptor_is_of_one_file() {
        let (dir, changes) = (tempfile::tempdir().expect("a directory"), AtomicBool::new(true));
        let [one, other] = ["one", "other"].map(|name| std::fs::File::create(dir.path().join(name)).expect("created"));
        let mut shown = OwnedFd::from(one.try_clone().expect("a descriptor"));
        let fd = shown.as_raw_fd();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while changes.load(Ordering::Relaxed) {
                    for file in [&other, &one] {
                        nix::unistd::dup2(file, &mut shown).expect("another file");
                    }
                }
            });
            for _ in 0..2000 {
                let open = OpenFile::look(std::process::id() as i32, fd).expect("it is open at all times");
                let named = if open.link.ends_with("/one") { &one } else { &other };
                assert_eq!(open.metadata.ino(), named.metadata().expect("metadata").ino(), "{}", open.link);
                assert_eq!(open.info.inode, open.metadata.ino().to_string());
            }
            changes.store(false, Ordering::Relaxed);
        });
    }

    #[test]
    fn fdinfo_flags_are_octal() {
        let info = FdInfo::parse("pos:\t0\nflags:\t0102001\nmnt_id:\t29\n");
        assert_eq!(info.flags, 0o102001);
        assert_eq!(info.mount, "29");
    }
}
