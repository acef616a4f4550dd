//! Standard streams that lead outside the container.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

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
    let mut streams = Vec::new();
    for fd in 0..3 {
        let path = format!("/proc/{init}/fd/{fd}");
        let Ok(link) = std::fs::read_link(&path) else { continue };
        let link = link.to_string_lossy().into_owned();
        let info = FdInfo::parse(&read_proc(&format!("/proc/{init}/fdinfo/{fd}"))?);
        if link.starts_with("pipe:[") {
            let log = (info.flags & nix::libc::O_ACCMODE != nix::libc::O_RDONLY)
                .then(|| options.log.clone().unwrap_or_else(|| format!("{PIPE_LOGS}/{id}.log")));
            streams.push(Stdio { fd, target: StdioTarget::Pipe { key: link, log } });
            continue;
        }
        if inside.contains(info.mount.as_str()) || link == "/dev/null" {
            continue;
        }
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
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

/// What `/proc/<pid>/fdinfo` tells.
pub(super) struct FdInfo {
    /// open(2) flags.
    pub(super) flags: i32,
    /// The mount's id.
    pub(super) mount: String,
}

impl FdInfo {
    pub(super) fn parse(text: &str) -> Self {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim).unwrap_or_default();
        Self { flags: i32::from_str_radix(value("flags:"), 8).unwrap_or(0), mount: value("mnt_id:").to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::FdInfo;

    #[test]
    fn fdinfo_flags_are_octal() {
        let info = FdInfo::parse("pos:\t0\nflags:\t0102001\nmnt_id:\t29\n");
        assert_eq!(info.flags, 0o102001);
        assert_eq!(info.mount, "29");
    }
}
