//! Debian's kernels, unpacked and not installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::quiet;
use crate::image;

/// One kernel.
pub(super) struct Kernel {
    pub(super) series: &'static str,
    root: PathBuf,
}

impl Kernel {
    /// The newest cloud kernel of a series, from Debian's archive if it is not in the cache yet.
    pub(super) fn ensure(series: &'static str) -> Result<Self> {
        let root = image::cache().join(format!("kernel-{series}"));
        let kernel = Self { series, root };
        if kernel.image().is_ok() {
            return Ok(kernel);
        }
        eprintln!("lab: getting Debian's kernel {series}");
        let partial = kernel.root.with_extension("partial");
        let _ = std::fs::remove_dir_all(&partial);
        std::fs::create_dir_all(partial.join("lists/partial"))?;
        // Debian 12 has 6.1, Debian 13 has 6.12: lists of their own, whatever this machine's are.
        let release = if series == "6.1" { "bookworm" } else { "trixie" };
        let sources = partial.join("sources.list");
        std::fs::write(&sources, format!("deb [trusted=yes] {} {release} main\n", image::debian_mirror()?))?;
        let apt = |words: &[&str]| {
            let mut command = Command::new(words[0]);
            let option = |name: &str, value: &Path| format!("{name}={}", value.display());
            command.arg("-o").arg(option("Dir::Etc::sourcelist", &sources)).args(["-o", "Dir::Etc::sourceparts=-"]);
            command
                .arg("-o")
                .arg(option("Dir::State::Lists", &partial.join("lists")))
                .args(["-o", "APT::Sandbox::User=root"]);
            command.args(&words[1..]).current_dir(&partial);
            command
        };
        quiet(&mut apt(&["apt-get", "update"])).context("read Debian's list of packages")?;
        let depends = apt(&["apt-cache", "depends", "linux-image-cloud-amd64"]).output()?;
        let text = String::from_utf8_lossy(&depends.stdout).into_owned();
        let package = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: ").filter(|name| name.starts_with("linux-image-")))
            .with_context(|| format!("Debian's {release} names no cloud kernel: {text}"))?;
        quiet(&mut apt(&["apt-get", "download", package])).context("get the kernel")?;
        quiet(Command::new("sh").args(["-euc", "dpkg -x *.deb root && rm -f *.deb"]).current_dir(&partial))?;
        std::fs::rename(partial.join("root"), &kernel.root)?;
        let _ = std::fs::remove_dir_all(&partial);
        kernel.image()?;
        Ok(kernel)
    }

    /// What is booted.
    pub(super) fn image(&self) -> Result<PathBuf> {
        let found = std::fs::read_dir(self.root.join("boot")).context("no kernel")?.flatten();
        let mut names = found
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
        names.next().with_context(|| format!("{} has no kernel", self.root.display()))
    }

    /// Its modules, in a directory of the kernel's version.
    pub(super) fn modules(&self) -> PathBuf {
        let usr = self.root.join("usr/lib/modules");
        if usr.is_dir() { usr } else { self.root.join("lib/modules") }
    }
}
