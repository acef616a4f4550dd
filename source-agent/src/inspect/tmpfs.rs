//! Memory filesystems with much in them.
//!
//! CRIU packs each into an archive while the container is frozen (`tmpfs_dump` in criu/filesystems.c, 4.2), at some hundred MiB/s. One
//! that has more than a little is copied in passes instead, like the root filesystem, into one that is made at the
//! destination, and CRIU is told that it comes from outside.

use std::path::{Path, PathBuf};

use longhaul_common::description::{TMPFS_FLAGS, Tmpfs, is_tmpfs_option};
use nix::sys::statvfs::statvfs;

use super::{InspectError, MountLine, mount_lines, read_proc};

/// From so many bytes on it is copied: below, the archive takes a few milliseconds.
const MUCH: u64 = 1 << 20;

/// One of them.
pub(super) struct Found {
    pub(super) tmpfs: Tmpfs,
    /// What it has.
    pub(super) bytes: u64,
}

/// Where this host sees what a container has at a path.
pub fn path_on_host(init: i32, destination: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{init}/root{destination}"))
}

/// Those of a container, all of whose tasks see the mounts that its first task sees.
pub(super) fn find(init: i32) -> Result<Vec<Found>, InspectError> {
    let text = read_proc(&format!("/proc/{init}/mountinfo"))?;
    let lines: Vec<MountLine<'_>> = mount_lines(&text).collect();
    let candidates = lines.iter().filter(|line| is_own(line, &lines));
    let found = candidates.filter_map(|line| {
        let about = statvfs(&path_on_host(init, &line.mount_point)).ok()?;
        let bytes = (about.blocks() - about.blocks_free()) * about.fragment_size();
        let flags = line.options.split(',').map(str::to_owned).collect();
        let options = line.super_options.split(',').filter(|option| !matches!(*option, "rw" | "ro"));
        let options = options.map(str::to_owned).collect();
        let (destination, source) = (line.mount_point.clone(), line.source.to_owned());
        let tmpfs = Tmpfs { destination, source, options, flags };
        (bytes >= MUCH).then_some(Found { tmpfs, bytes })
    });
    Ok(found.collect())
}

/// Whether it can be made elsewhere from this line alone: all of one, seen at this place only, with nothing on it, and with options that
/// are known.
fn is_own(line: &MountLine<'_>, all: &[MountLine<'_>]) -> bool {
    let covers = |other: &&MountLine<'_>| {
        other.id != line.id
            && (other.device == line.device || Path::new(&other.mount_point).starts_with(&line.mount_point))
    };
    line.fstype == "tmpfs"
        && line.root == "/"
        && line.mount_point != "/dev"
        && !["/proc", "/sys"].iter().any(|kernel| Path::new(&line.mount_point).starts_with(kernel))
        && !all.iter().any(|other| covers(&other))
        && line.options.split(',').all(|flag| TMPFS_FLAGS.iter().any(|(known, _)| *known == flag))
        && line.options.split(',').any(|flag| flag == "rw")
        && line.source.bytes().all(|byte| byte.is_ascii_graphic())
        && line.super_options.split(',').all(|option| option == "rw" || is_tmpfs_option(option))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_made_again_is_taken() {
        let text = "1 0 0:20 / / rw - overlay overlay rw\n\
                    2 1 0:21 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755\n\
                    3 2 0:22 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=65536k,inode64\n\
                    4 1 0:23 / /run rw - tmpfs tmpfs rw\n\
                    5 4 0:24 / /run/lock rw - tmpfs tmpfs rw\n\
                    6 1 0:25 /part /a rw - tmpfs tmpfs rw\n\
                    7 1 0:26 / /b ro - tmpfs tmpfs rw\n\
                    8 1 0:27 / /c rw - tmpfs tmpfs rw,context=x\n\
                    9 1 0:28 / /d rw - tmpfs tmpfs rw\n\
                    10 1 0:28 / /e rw - tmpfs tmpfs rw\n\
                    11 1 0:29 / /proc/acpi rw - tmpfs tmpfs rw\n";
        let lines: Vec<_> = mount_lines(text).collect();
        let own = lines.iter().filter(|line| is_own(line, &lines)).map(|line| line.mount_point.as_str());
        assert_eq!(own.collect::<Vec<_>>(), ["/dev/shm", "/run/lock"]);
    }
}
