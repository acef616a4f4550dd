//! Checks that this machine can run the lab, and installs what the lab itself needs.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Programs the lab runs outside its hosts, with the Debian package of each.
const TOOLS: [(&str, &str); 3] = [("mmdebstrap", "mmdebstrap"), ("ip", "iproute2"), ("tar", "tar")];

/// The namespaces a lab host is made of, as `/proc/self/ns` names them.
const NAMESPACES: [&str; 6] = ["mnt", "pid", "uts", "ipc", "net", "cgroup"];

/// Refuses, naming everything that is missing, where the lab can't run.
pub fn check() -> Result<()> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root: run the lab as root (it makes namespaces, mounts and cgroups)".to_owned());
    }
    for ns in NAMESPACES {
        if !Path::new("/proc/self/ns").join(ns).exists() {
            missing.push(format!("the {ns} namespace: this kernel was built without it"));
        }
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.trim_end().ends_with("overlay")) {
        // Built as a module, it appears only once loaded.
        let _ = Command::new("modprobe").arg("overlay").stderr(Stdio::null()).status();
        let now = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        if !now.contains("overlay") {
            missing.push("overlayfs: CONFIG_OVERLAY_FS is off and no module was found".to_owned());
        }
    }
    if !Path::new("/sys/fs/cgroup").is_dir() {
        missing.push("cgroups: nothing is mounted at /sys/fs/cgroup".to_owned());
    }
    let release = nix::sys::utsname::uname().context("uname")?;
    let release = release.release().to_string_lossy().into_owned();
    if kernel_version(&release).is_some_and(|version| version < (5, 10)) {
        missing.push(format!("kernel 5.10 or newer: this is {release}"));
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!("this machine can't run the lab. Missing:\n  - {}", missing.join("\n  - "));
}

/// Major and minor version out of a kernel release such as `6.12.9-amd64`.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Installs the outer tools with apt, if any is missing.
pub fn install_tools() -> Result<()> {
    let packages: Vec<&str> =
        TOOLS.iter().filter(|(program, _)| find_program(program).is_none()).map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("lab: installing {}", packages.join(", "));
    run_quiet(Command::new("apt-get").args(["update", "-qq"]))?;
    run_quiet(
        Command::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(&packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Runs a command to its end; its output is shown only if it fails.
pub fn run_quiet(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{:?} failed ({}):\n{}{}",
            command,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::kernel_version;

    #[test]
    fn kernel_releases_are_read() {
        assert_eq!(kernel_version("6.12.9-amd64"), Some((6, 12)));
        assert_eq!(kernel_version("5.10.0"), Some((5, 10)));
        assert_eq!(kernel_version("odd"), None);
    }
}
