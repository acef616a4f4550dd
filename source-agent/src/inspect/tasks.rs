//! A container's tasks: what they hold that CRIU can't save.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use longhaul_common::description::{MOST_MAPPED, Stdio, StdioTarget};
use longhaul_common::obstacle::Obstacle;
use longhaul_common::warm::mapped_privately;

use super::stdio::OpenFile;
use super::{InspectError, mount_lines, name_of, read_proc};
use crate::memory::maps::{Areas, Device};

/// Kinds of anonymous files CRIU 4.2 can't save, and what to do about each.
const UNSUPPORTED: [(&str, &str, &str); 7] = [
    (
        "anon_inode:[io_uring]",
        "io_uring",
        "deny io_uring_setup in the container's seccomp profile (node and others then do without), or turn it off in the program (PostgreSQL 18: io_method=worker)",
    ),
    ("anon_inode:[userfaultfd]", "a userfaultfd", "only garbage collectors and hypervisors use it: turn that mode off"),
    ("anon_inode:[perf_event]", "a performance counter", "end the profiler"),
    ("anon_inode:bpf-", "a BPF object", "end the program that loaded it"),
    ("anon_inode:kvm", "a virtual machine", "virtual machines are moved by their own manager"),
    ("anon_inode:[landlock", "a Landlock rule set", "run the program without Landlock"),
    ("anon_inode:[fscontext]", "a mount in the making", "wait until the mount is made"),
];

/// Looks at every task's descriptors, mappings and parents.
pub(super) fn examine(
    init: i32,
    tasks: &[i32],
    stdio: &[Stdio],
    obstacles: &mut Vec<Obstacle>,
) -> Result<(), InspectError> {
    let mounts = read_proc(&format!("/proc/{init}/mountinfo"))?;
    let inside: HashSet<String> = mount_lines(&mounts).map(|mount| mount.id.to_owned()).collect();
    let known: HashSet<&str> = stdio
        .iter()
        .filter_map(|stdio| match &stdio.target {
            StdioTarget::File { path, .. } => Some(path.as_str()),
            StdioTarget::Pipe { .. } => None,
        })
        .collect();
    strangers(init, tasks, obstacles);
    for &pid in tasks {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in entries.flatten() {
            let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let Ok(link) = std::fs::read_link(entry.path()) else { continue };
            // Nothing more has to be asked of a socket or a pipe; there may be many.
            let obstacle = if link.is_absolute() {
                OpenFile::look(pid, fd).and_then(|open| descriptor(pid, fd, &open, &inside, &known))
            } else {
                unsupported(pid, &link.to_string_lossy())
            };
            if let Some(obstacle) = obstacle {
                push_once(obstacles, obstacle);
            }
        }
        mapped_devices(pid, obstacles);
    }
    Ok(())
}

/// Tasks in the container's cgroup that are not descendants of its first: CRIU saves one tree.
fn strangers(init: i32, tasks: &[i32], obstacles: &mut Vec<Obstacle>) {
    for &pid in tasks {
        let mut ancestor = Some(pid);
        // Asked now and not of a list: tasks come and go while we look. One that is gone is nobody's stranger.
        while let Some(task) = ancestor.filter(|task| *task != init && *task > 1) {
            ancestor = parent_of(task);
        }
        if ancestor.is_some_and(|ancestor| ancestor != init) {
            obstacles.push(Obstacle::new(
                name_of(pid),
                "it was started in the container from outside (`runc exec`) and is no child of its first task",
                "end that session, then move",
            ));
        }
    }
}

fn parent_of(pid: i32) -> Option<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn unsupported(pid: i32, link: &str) -> Option<Obstacle> {
    let (_, what, fix) = UNSUPPORTED.iter().find(|(prefix, _, _)| link.starts_with(prefix))?;
    Some(Obstacle::new(name_of(pid), format!("it uses {what}, which CRIU can't save"), *fix))
}

fn descriptor(
    pid: i32,
    fd: i32,
    OpenFile { link, info, metadata }: &OpenFile,
    inside: &HashSet<String>,
    known: &HashSet<&str>,
) -> Option<Obstacle> {
    // Memory with a file's name: CRIU saves it as memory.
    const MEMORY: [&str; 4] = ["/memfd:", "/SYSV", "/dev/zero", "/[aio]"];
    if !link.starts_with('/') || MEMORY.iter().any(|prefix| link.starts_with(prefix)) {
        return None;
    }
    let kind = metadata.file_type();
    if (kind.is_char_device() || kind.is_block_device()) && !is_plain_device(metadata.rdev(), kind.is_char_device()) {
        return Some(Obstacle::new(
            name_of(pid),
            format!("it has the device {link} open, whose state only this host's hardware or kernel has"),
            "close it or run the container without the device",
        ));
    }
    let outside = !inside.contains(&info.mount) && !known.contains(link.as_str()) && link != "/dev/null";
    if outside && kind.is_char_device() {
        return Some(Obstacle::new(
            name_of(pid),
            format!("its descriptor {fd} is {link}, a terminal or device of this host"),
            "start the container without a terminal",
        ));
    }
    if outside && (kind.is_file() || kind.is_dir()) {
        return Some(Obstacle::new(
            name_of(pid),
            format!("its descriptor {fd} is {link}, a file outside the container"),
            "give the file to the container as a bind mount; only standard streams may lead outside",
        ));
    }
    None
}

/// Devices without state, terminals of the container's own devpts, and tun, which CRIU saves.
fn is_plain_device(device: u64, character: bool) -> bool {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    character && matches!((major, minor), (1, 3 | 5 | 7 | 8 | 9) | (5, 0 | 2) | (136..=143, _) | (10, 200))
}

fn mapped_devices(pid: i32, obstacles: &mut Vec<Obstacle>) {
    let Ok(maps) = std::fs::read_to_string(format!("/proc/{pid}/maps")) else { return };
    for line in maps.lines() {
        let Some(path) = line.splitn(6, ' ').nth(5).map(str::trim_start) else { continue };
        let device = path.starts_with("/dev/") && !path.starts_with("/dev/shm/") && !path.starts_with("/dev/zero");
        if device {
            push_once(
                obstacles,
                Obstacle::new(
                    name_of(pid),
                    format!("it has mapped the device {path}"),
                    "run the container without the device",
                ),
            );
        }
    }
}

fn push_once(obstacles: &mut Vec<Obstacle>, obstacle: Obstacle) {
    if !obstacles.contains(&obstacle) {
        obstacles.push(obstacle);
    }
}

/// Files that tasks have mapped as programs and libraries are.
pub(super) fn mapped_files(tasks: &[i32]) -> Vec<String> {
    let mut found = BTreeSet::new();
    for pid in tasks {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        for path in maps.lines().filter_map(mapped_privately) {
            if !found.contains(path) {
                found.insert(path.to_owned());
            }
        }
    }
    found.into_iter().take(MOST_MAPPED).collect()
}

/// The memory that tasks have in use, in bytes: of each what it has alone and its part of what it has in common with others, and
/// whole what they share, which may have more pages than any of them has in its page tables.
pub(super) fn memory_of(tasks: &[i32]) -> u64 {
    let own = tasks.iter().map(|pid| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let kib = |name: &str| {
            let figure =
                text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok());
            figure.unwrap_or(0u64)
        };
        kib("Pss:").saturating_sub(kib("Pss_Shmem:")) << 10
    });
    let mut shared = BTreeMap::new();
    let device = Device::of_this_host().ok();
    for (pid, device) in tasks.iter().zip(device.iter().cycle()) {
        for area in Areas::of(*pid, device).unwrap_or_default().shared {
            let path = format!("/proc/{pid}/map_files/{:x}-{:x}", area.start, area.end);
            let bytes = || std::fs::metadata(path).map_or(0, |about| about.blocks() * 512);
            shared.entry(area.inode).or_insert_with(bytes);
        }
    }
    own.chain(shared.into_values()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_uring_is_named_with_its_way_out() {
        let obstacle = unsupported(1, "anon_inode:[io_uring]").expect("found");
        assert!(obstacle.why.contains("io_uring") && obstacle.fix.contains("seccomp"));
    }

    #[test]
    fn null_is_plain_and_a_disk_is_not() {
        assert!(is_plain_device(nix::sys::stat::makedev(1, 3), true));
        assert!(!is_plain_device(nix::sys::stat::makedev(8, 0), false));
        assert!(!is_plain_device(nix::sys::stat::makedev(195, 0), true));
    }
}
