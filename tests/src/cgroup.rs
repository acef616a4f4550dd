//! A sub-tree of every cgroup hierarchy for each lab host.
//!
//! Works on the three layouts in the field: v2 alone (systemd's default), v1 alone, and the hybrid with
//! v1 controllers and an empty v2 tree.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One mounted hierarchy of the outer machine.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted, e.g. `/sys/fs/cgroup/memory`.
    pub mount: PathBuf,
    /// Version 2.
    pub unified: bool,
    /// The v1 mount options that name it (`memory`, `cpu,cpuacct`, `none,name=systemd`).
    pub options: String,
}

/// All hierarchies, from the text of `/proc/self/mountinfo`.
pub fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(mount), [fstype, _, options, ..]) = (left.split(' ').nth(4), right.as_slice()) else { continue };
        let hierarchy = match *fstype {
            "cgroup2" => Hierarchy { mount: mount.into(), unified: true, options: String::new() },
            "cgroup" => {
                let names: Vec<&str> = options
                    .split(',')
                    .filter(|option| !matches!(*option, "rw" | "ro" | "xattr" | "clone_children"))
                    .collect();
                let options = names.join(",");
                let options = if options.starts_with("name=") { format!("none,{options}") } else { options };
                Hierarchy { mount: mount.into(), unified: false, options }
            }
            _ => continue,
        };
        if !found.iter().any(|other| other.unified == hierarchy.unified && other.options == hierarchy.options) {
            found.push(hierarchy);
        }
    }
    found
}

/// The cgroups of one host: `<hierarchy>/longhaul-lab/<lab>/<host>`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostCgroups {
    /// The hierarchies they lie in.
    pub hierarchies: Vec<Hierarchy>,
    relative: PathBuf,
}

impl HostCgroups {
    /// Makes them, usable: a v1 cpuset takes no task before its CPUs and memory nodes are filled in.
    pub fn create(lab: &str, host: &str) -> Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
        let relative = Path::new("longhaul-lab").join(lab).join(host);
        let cgroups = Self { hierarchies: hierarchies(&mountinfo), relative };
        for hierarchy in &cgroups.hierarchies {
            let mut dir = hierarchy.mount.clone();
            for part in &cgroups.relative {
                let parent = dir.clone();
                dir.push(part);
                match fs::create_dir(&dir) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error).with_context(|| format!("create cgroup {}", dir.display())),
                }
                if hierarchy.unified {
                    enable_controllers(&parent);
                }
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if !hierarchy.unified && dir.join(file).exists() {
                        let value = fs::read_to_string(parent.join(file))?;
                        fs::write(dir.join(file), value.trim())
                            .with_context(|| format!("fill {}", dir.join(file).display()))?;
                    }
                }
            }
            if hierarchy.unified {
                // On v2 a cgroup with controllers for its children may hold no task itself.
                fs::create_dir_all(dir.join("init"))?;
                enable_controllers(&dir);
            }
        }
        Ok(cgroups)
    }

    /// The `cgroup.procs` files a process writes itself into to belong to the host.
    pub fn procs_files(&self) -> Vec<PathBuf> {
        self.hierarchies
            .iter()
            .map(|hierarchy| {
                let dir = hierarchy.mount.join(&self.relative);
                if hierarchy.unified { dir.join("init/cgroup.procs") } else { dir.join("cgroup.procs") }
            })
            .collect()
    }

    /// Thaws every cgroup of the host: a frozen task that was killed leaves only then.
    pub fn thaw(&self) {
        for hierarchy in &self.hierarchies {
            thaw_tree(&hierarchy.mount.join(&self.relative));
        }
    }

    /// Removes them with everything below; the host's processes must have ended.
    pub fn remove(&self) {
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.mount.join(&self.relative);
            remove_tree(&dir);
            // The lab's own level and the common one go when the last host goes.
            for parent in dir.ancestors().skip(1).take(2) {
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// Passes every controller of a v2 cgroup on to its children, one at a time: one that can't be must not stop the others.
fn enable_controllers(dir: &Path) {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn thaw_tree(dir: &Path) {
    for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        if dir.join(file).exists() {
            let _ = fs::write(dir.join(file), thawed);
        }
    }
    if let Ok(entries) = fs::read_dir(dir) {
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            thaw_tree(&entry.path());
        }
    }
}

/// Removes a cgroup directory tree, deepest first (files in it are the kernel's and go by themselves).
fn remove_tree(dir: &Path) {
    if let Ok(entries) = fs::read_dir(dir) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_tree(&entry.path());
            }
        }
    }
    for _ in 0..100 {
        match fs::remove_dir(dir) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                // The kernel is still reaping the last task: it tells nobody when it is done.
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_layout_is_understood() {
        let text = "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                    2 0 0:2 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                    3 0 0:3 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                    4 0 0:4 / /proc rw - proc proc rw\n";
        let found = hierarchies(text);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].options, "memory");
        assert_eq!(found[1].options, "none,name=systemd");
        assert!(found[2].unified);
    }
}
