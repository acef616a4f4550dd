//! A container's mounts: those that CRIU makes again, those that are data, and those that can't come.

use std::path::Path;

use longhaul_common::description::{Volume, VolumeMode};
use longhaul_common::obstacle::Obstacle;
use serde_json::Value;

use super::{InspectError, mount_lines, read_proc};
use crate::options::{Options, VolumeChoice};

/// Filesystems that hold only what the kernel or the container's memory holds: CRIU makes them again.
const REBUILT: [&str; 8] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs"];
/// Sources of bind mounts that are the same on every host.
const OF_EVERY_HOST: [&str; 3] = ["/proc", "/sys", "/dev"];

/// The volumes that come along; mounts that can't go to `obstacles`.
pub(super) fn examine(
    oci: &Value,
    init: i32,
    options: &Options,
    obstacles: &mut Vec<Obstacle>,
) -> Result<Vec<Volume>, InspectError> {
    let mut volumes = Vec::new();
    let mut configured = Vec::new();
    for mount in oci["mounts"].as_array().into_iter().flatten() {
        let destination = mount["destination"].as_str().unwrap_or_default();
        configured.push(destination.trim_end_matches('/').to_owned());
        if !is_bind(mount) {
            continue;
        }
        let source = mount["source"].as_str().unwrap_or_default();
        if OF_EVERY_HOST.iter().any(|prefix| Path::new(source).starts_with(prefix)) {
            continue;
        }
        if let Some(volume) = volume(destination, source, options, obstacles) {
            volumes.push(volume);
        }
    }
    unknown_mounts(&read_proc(&format!("/proc/{init}/mountinfo"))?, &configured, obstacles);
    Ok(volumes)
}

fn is_bind(mount: &Value) -> bool {
    let option = |option: &Value| matches!(option.as_str(), Some("bind" | "rbind"));
    mount["type"] == "bind" || mount["options"].as_array().is_some_and(|options| options.iter().any(option))
}

fn volume(destination: &str, source: &str, options: &Options, obstacles: &mut Vec<Obstacle>) -> Option<Volume> {
    let mode = match options.volume(destination) {
        VolumeChoice::Copy => VolumeMode::Copy,
        VolumeChoice::Shared => VolumeMode::Shared,
        VolumeChoice::Refuse => {
            obstacles.push(Obstacle::new(
                format!("mount {destination}"),
                format!("it is {source} of this host, and nobody said what is to become of it"),
                format!("`--volumes {destination}=copy` copies it; `--volumes {destination}=shared` if the destination sees the same storage"),
            ));
            return None;
        }
    };
    // The destination resolves no symlinks of ours: it gets the real path.
    let real = match Path::new(source).canonicalize() {
        Ok(real) if real == Path::new(source) => real,
        Ok(real) => {
            obstacles.push(Obstacle::new(
                format!("mount {destination}"),
                format!("its source {source} is a symbolic link to {}", real.display()),
                "name the real directory in the bundle's config.json",
            ));
            return None;
        }
        Err(error) => {
            obstacles.push(Obstacle::new(
                format!("mount {destination}"),
                format!("its source {source} can't be opened: {error}"),
                "put it back, or take the mount out of the bundle's config.json",
            ));
            return None;
        }
    };
    Some(Volume { destination: destination.to_owned(), source: source.to_owned(), mode, file: !real.is_dir() })
}

/// Mounts that were made in the container after its start, of a kind CRIU does not make again.
fn unknown_mounts(mountinfo: &str, configured: &[String], obstacles: &mut Vec<Obstacle>) {
    for mount in mount_lines(mountinfo) {
        let place = mount.mount_point.trim_end_matches('/');
        let known = place.is_empty()
            || REBUILT.contains(&mount.fstype)
            || configured.iter().any(|configured| configured == place)
            // Submounts of a recursive bind mount come with it.
            || configured.iter().any(|configured| !configured.is_empty() && Path::new(place).starts_with(configured));
        if !known {
            obstacles.push(Obstacle::new(
                format!("mount {place}"),
                format!(
                    "it is a {} filesystem mounted inside the container, which can't be made again elsewhere",
                    mount.fstype
                ),
                "unmount it in the container, or give it to the container as a bind mount",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_mounted_inside_is_named() {
        let text = "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:2 / /proc rw - proc proc rw\n\
                    3 1 0:3 / /mnt/x rw - fuse.sshfs host:/ rw\n4 1 8:1 /d /data rw - ext4 /dev/a rw\n";
        let mut obstacles = Vec::new();
        unknown_mounts(text, &["/data".to_owned()], &mut obstacles);
        assert_eq!(obstacles.len(), 1);
        assert!(obstacles[0].why.contains("fuse.sshfs"));
    }

    #[test]
    fn a_volume_nobody_decided_on_is_an_obstacle_with_both_ways_out() {
        let mut obstacles = Vec::new();
        assert_eq!(volume("/data", "/srv/data", &Options::default(), &mut obstacles), None);
        assert!(obstacles[0].fix.contains("/data=copy") && obstacles[0].fix.contains("/data=shared"));
    }
}
