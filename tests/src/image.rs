//! The Debian 13 root filesystem that every lab host runs on.
//!
//! Built once with mmdebstrap and cached outside the source tree, under a name that holds a digest of the
//! recipe: a changed recipe makes a new image. CRIU comes from sid, because 4.1.1 (Debian 13) can't dump
//! any INET socket on kernels from 6.16.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// Where images are kept between runs.
const CACHE: &str = "/var/cache/longhaul-lab";

/// Where images are kept between runs.
pub(crate) fn cache() -> &'static Path {
    Path::new(CACHE)
}

/// What hosts and workloads need, from Debian 13.
const PACKAGES: &[&str] = &[
    "ca-certificates",
    "iproute2",
    "nftables",
    "iptables",
    "kmod",
    "procps",
    "iputils-ping",
    "iputils-arping",
    "tcpdump",
    "conntrack",
    "strace",
    "acl",
    "attr",
    "libcap2-bin",
    "runc",
    "crun",
    "redis-server",
    "redis-tools",
    "nginx-light",
    "wrk",
    "memcached",
    "python3-minimal",
    "socat",
    "zstd",
    "criu",
    "libcriu2",
];

/// Further runtimes for containers of one's own (`cargo lab up`), on by default since they add little time.
const EXTRA_PACKAGES: &[&str] = &["nodejs", "openjdk-21-jre-headless", "postgresql"];

/// CRIU and what its build in sid links to come from sid; everything else stays Debian 13.
const PREFERENCES: &str = "Package: *\nPin: release n=sid\nPin-Priority: 100\n\n\
    Package: criu libcriu2 libcompel1 libnet9 libnl-*\nPin: release n=sid\nPin-Priority: 995\n";

/// Documentation and translations are left out: they are a third of the image.
const EXCLUDED: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

/// A root filesystem that is complete and must not be written to.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its directory on this machine.
    pub root: PathBuf,
}

impl Image {
    /// The cached image, built first if there is none.
    pub fn ensure() -> Result<Self> {
        let root = Path::new(CACHE).join(format!("rootfs-{:016x}", recipe_digest()));
        fs::create_dir_all(CACHE).with_context(|| format!("create {CACHE}"))?;
        let lock = fs::File::create(Path::new(CACHE).join("lock")).context("create the cache's lock")?;
        // Two labs started at once must not build the same image twice.
        let _lock =
            Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context("lock the image cache")?;
        if !complete_mark(&root).exists() {
            build(&root)?;
        }
        Ok(Self { root })
    }
}

fn complete_mark(root: &Path) -> PathBuf {
    root.with_extension("complete")
}

fn recipe_digest() -> u64 {
    use std::hash::{Hash, Hasher};
    // SipHash with fixed keys: the same on every run of the same build, which is all a cache name needs.
    #[allow(deprecated, reason = "the keyed default hasher is the random one")]
    let mut hasher = std::hash::SipHasher::new();
    (PACKAGES, EXTRA_PACKAGES, PREFERENCES, EXCLUDED).hash(&mut hasher);
    hasher.finish()
}

fn build(root: &Path) -> Result<()> {
    eprintln!("lab: building the Debian 13 root filesystem (once, one to two minutes)");
    let _ = fs::remove_dir_all(root);
    let scratch = root.with_extension("recipe");
    fs::create_dir_all(&scratch)?;
    let preferences = scratch.join("preferences");
    fs::write(&preferences, PREFERENCES)?;
    let sources = scratch.join("sources.list");
    let mirror = debian_mirror()?;
    fs::write(&sources, format!("deb {mirror} trixie main\ndeb {mirror} sid main\n"))?;

    let log_path = root.with_extension("log");
    let log = fs::File::create(&log_path)?;
    let install_preferences = format!(
        "mkdir -p \"$1/etc/apt/preferences.d\" && cp {} \"$1/etc/apt/preferences.d/longhaul-lab\"",
        preferences.display()
    );
    let packages: Vec<&str> = PACKAGES.iter().chain(EXTRA_PACKAGES).copied().collect();
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=root", "--variant=minbase"])
        .arg(format!("--include={}", packages.join(",")))
        // A mirror that is a snapshot serves sid's index past its date; its signature is still checked.
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .args(EXCLUDED.iter().map(|path| format!("--dpkgopt=path-exclude={path}")))
        .arg(format!("--setup-hook={install_preferences}"))
        // update-alternatives of the Java package fails where the directory of its man pages is missing.
        .args(["--essential-hook=mkdir -p \"$1/usr/share/man/man1\"", "trixie"])
        .arg(root)
        .arg(&sources)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let status = command.status().context("start mmdebstrap")?;
    if !status.success() {
        bail!("mmdebstrap failed ({status}): see {}", log_path.display());
    }
    fs::write(complete_mark(root), "")?;
    let _ = fs::remove_dir_all(&scratch);
    Ok(())
}

/// The Debian archive this machine itself uses, or `LONGHAUL_LAB_MIRROR`.
pub(crate) fn debian_mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("LONGHAUL_LAB_MIRROR") {
        return Ok(mirror);
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    files.iter().filter_map(|file| fs::read_to_string(file).ok()).find_map(|text| archive_in(&text)).context(
        "no Debian archive found in /etc/apt/sources.list or /etc/apt/sources.list.d: \
             set LONGHAUL_LAB_MIRROR to the URL of one",
    )
}

/// The first archive in an apt source file whose path ends in `/debian` (security archives hold no sid).
fn archive_in(text: &str) -> Option<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"))
        .flat_map(str::split_whitespace)
        .map(|word| word.trim_end_matches('/'))
        .find(|word| word.contains("://") && word.ends_with("/debian"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::archive_in;

    #[test]
    fn both_source_formats_are_read() {
        let deb822 = "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm\n";
        assert_eq!(archive_in(deb822).as_deref(), Some("http://mirror.test/debian"));
        let one_line = "# x\ndeb [arch=amd64] https://mirror.test/debian/ bookworm main\n";
        assert_eq!(archive_in(one_line).as_deref(), Some("https://mirror.test/debian"));
        assert_eq!(archive_in("URIs: http://mirror.test/debian-security\n"), None);
    }
}
