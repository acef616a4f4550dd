//! What this host is: asked once, compared in every negotiation.

use std::path::Path;
use std::process::Command;

use crate::config::EngineConfig;
use crate::obstacle::Obstacle;

/// The protocol versions this agent speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// The newest of them.
pub const PROTOCOL_MAX: u32 = 1;
/// The oldest CRIU that can be used: 4.1.1 can't dump INET sockets on kernels from 6.16, and page formats changed in 4.2.
pub const CRIU_MIN: CriuVersion = CriuVersion(40200);

/// CRIU's version as its VERSION request encodes it: major * 10000 + minor * 100 + sub-level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CriuVersion(pub u32);

impl CriuVersion {
    /// Reads `4.2.1`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| part.parse::<u32>().ok());
        let (major, minor) = (parts.next()??, parts.next()??);
        let sublevel = parts.next().flatten().unwrap_or(0);
        major.checked_mul(10_000)?.checked_add(minor.checked_mul(100)?)?.checked_add(sublevel).map(Self)
    }

    /// Images of one can be restored by the other: they differ by a bug-fix release at most.
    pub fn same_format(self, other: Self) -> bool {
        self.0 / 100 == other.0 / 100
    }
}

impl std::fmt::Display for CriuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 10_000, self.0 / 100 % 100)?;
        if !self.0.is_multiple_of(100) {
            write!(f, ".{}", self.0 % 100)?;
        }
        Ok(())
    }
}

/// What a host is able to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Lowest and highest protocol version.
    pub protocol: (u32, u32),
    /// The agent's version.
    pub agent: String,
    /// The host's name.
    pub host: String,
    /// Its kernel's release.
    pub kernel: String,
    /// Its CRIU, if it has one.
    pub criu: Option<CriuVersion>,
    /// Its processor architecture.
    pub architecture: String,
    /// Its processor's features, as `/proc/cpuinfo` names them.
    pub cpu_features: Vec<String>,
}

impl Capabilities {
    /// Those of this host.
    pub fn of_this_host(engine: &EngineConfig) -> Self {
        let name = nix::sys::utsname::uname().ok();
        let text = |pick: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
            name.as_ref().map(|name| pick(name).to_string_lossy().into_owned()).unwrap_or_default()
        };
        warm_up(&engine.criu);
        Self {
            protocol: (PROTOCOL_MIN, PROTOCOL_MAX),
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            host: text(nix::sys::utsname::UtsName::nodename),
            kernel: text(nix::sys::utsname::UtsName::release),
            criu: criu_version(&engine.criu),
            architecture: std::env::consts::ARCH.to_owned(),
            cpu_features: cpu_features(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        }
    }
}

/// Has CRIU find out what this kernel can do, which it keeps in `/run/criu.kdat` (criu/kerndat.c, 4.2). Left to the first
/// move, that would cost some 40 ms while the container is frozen. What it says does not matter here.
fn warm_up(criu: &Path) {
    if let Err(error) = Command::new(criu).args(["check", "--feature", "uffd"]).output() {
        tracing::debug!(%error, "CRIU can't be started");
    }
}

/// The version `criu --version` prints.
fn criu_version(criu: &Path) -> Option<CriuVersion> {
    let output = Command::new(criu).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().find_map(|line| CriuVersion::parse(line.strip_prefix("Version: ")?.trim()))
}

/// The flags of the first processor (x86) or its Features (arm64).
fn cpu_features(cpuinfo: &str) -> Vec<String> {
    cpuinfo
        .lines()
        .find_map(|line| {
            let (key, value) = line.split_once(':')?;
            matches!(key.trim(), "flags" | "Features").then_some(value)
        })
        .map(|flags| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

/// What keeps containers of `source` from running on `destination`, whichever container it is.
pub fn compare(source: &Capabilities, destination: &Capabilities) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    let place = format!("host {}", destination.host);
    let (low, high) = (source.protocol.0.max(destination.protocol.0), source.protocol.1.min(destination.protocol.1));
    if low > high {
        obstacles.push(Obstacle::new(
            &place,
            format!("its agent {} and this one ({}) share no protocol version", destination.agent, source.agent),
            "upgrade the older of the two agents",
        ));
    }
    for side in [source, destination] {
        let place = format!("host {}", side.host);
        match side.criu {
            None => obstacles.push(Obstacle::new(
                place,
                "CRIU was not found, or does not start",
                format!("install CRIU {CRIU_MIN} or newer, or set engine.criu in the agent's configuration"),
            )),
            Some(version) if version < CRIU_MIN => obstacles.push(Obstacle::new(
                place,
                format!("CRIU {version} is too old"),
                format!("install CRIU {CRIU_MIN} or newer"),
            )),
            Some(_) => {}
        }
    }
    if let (Some(ours), Some(theirs)) = (source.criu, destination.criu)
        && !ours.same_format(theirs)
    {
        obstacles.push(Obstacle::new(
            &place,
            format!("its CRIU is {theirs}, this host's {ours}: images of one may not be read by the other"),
            "install the same CRIU version on both hosts",
        ));
    }
    if source.architecture != destination.architecture {
        obstacles.push(Obstacle::new(
            &place,
            format!("its processor is {}, this host's {}", destination.architecture, source.architecture),
            "choose a destination with the same architecture",
        ));
    }
    let missing: Vec<&str> = source
        .cpu_features
        .iter()
        .filter(|feature| !destination.cpu_features.contains(feature))
        .filter(|feature| is_visible_to_programs(feature))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        obstacles.push(Obstacle::new(
            place,
            format!(
                "its processor lacks {}: a program that found them here may stop with SIGILL there",
                missing.join(", ")
            ),
            "choose a destination whose processor has them",
        ));
    }
    obstacles
}

/// Whether a program can have chosen its code by this flag. The others describe the kernel, the hypervisor or errata.
fn is_visible_to_programs(feature: &str) -> bool {
    const PREFIXES: [&str; 32] = [
        "sse", "ssse", "avx", "fma", "bmi", "aes", "vaes", "pclmul", "vpclmul", "popcnt", "abm", "adx", "sha", "movbe",
        "f16c", "rdrand", "rdseed", "rdpid", "rdtscp", "xsave", "fsgsbase", "gfni", "amx", "clflush", "clwb", "mmx",
        "fxsr", "cx16", "lahf", "erms", "fsrm", "pku",
    ];
    // arm64 names are all instruction sets.
    cfg!(target_arch = "aarch64") || PREFIXES.iter().any(|prefix| feature.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(criu: &str, features: &[&str]) -> Capabilities {
        Capabilities {
            protocol: (1, 1),
            agent: "0".into(),
            host: "h".into(),
            kernel: "6".into(),
            criu: CriuVersion::parse(criu),
            architecture: "x86_64".into(),
            cpu_features: features.iter().map(|&feature| feature.to_owned()).collect(),
        }
    }

    #[test]
    fn equal_hosts_get_along() {
        assert_eq!(compare(&host("4.2.1", &["avx2"]), &host("4.2", &["avx2", "sse2"])), []);
    }

    #[test]
    fn each_difference_is_named() {
        let cases = [
            (host("4.2", &["avx512f"]), host("4.2", &[]), "avx512f"),
            (host("4.2", &[]), host("", &[]), "CRIU was not found"),
            (host("4.2", &[]), host("4.1.1", &[]), "too old"),
            (host("4.2", &[]), host("4.3", &[]), "may not be read"),
        ];
        for (source, destination, expected) in cases {
            let text: String = compare(&source, &destination).iter().map(ToString::to_string).collect();
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn flags_of_the_hypervisor_do_not_matter() {
        assert_eq!(compare(&host("4.2", &["hypervisor", "tsc_adjust"]), &host("4.2", &[])), []);
    }
}
