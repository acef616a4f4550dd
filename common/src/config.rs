//! The agents' configuration files.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

/// Where a source agent's configuration is looked for.
pub const SOURCE_FILE: &str = "/etc/longhaul/source.toml";
/// Where a destination agent's configuration is looked for.
pub const DEST_FILE: &str = "/etc/longhaul/dest.toml";
/// The port a destination agent listens at, unless told otherwise.
pub const DEFAULT_PORT: u16 = 7474;
/// The source agent's socket for `migrate`.
pub const AGENT_SOCKET: &str = "/run/longhaul/source.sock";

/// A configuration that can't be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It can't be read.
    #[error("can't read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not what is expected.
    #[error("the configuration {path} is wrong")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// `source.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceConfig {
    /// This host's identity.
    pub tls: TlsFiles,
    /// Hosts by the name that `--to` takes.
    pub hosts: BTreeMap<String, HostEntry>,
    /// Runtimes and CRIU.
    pub engine: EngineConfig,
    /// Where state is kept.
    pub paths: Paths,
    /// `migrate`'s socket.
    pub socket: Option<PathBuf>,
    /// What tells which pages were written.
    pub tracker: TrackerChoice,
    /// How long a destination may be silent while the container is frozen for it, in milliseconds. It speaks every 50 ms; then
    /// the container goes on here.
    pub frozen_silence_ms: u64,
    /// Whether the kernel counts, during a move, where large files change: what has to be read while a database is frozen is little then.
    /// Everything on the host that makes pages of files dirty, or gives them back, takes a little longer meanwhile: too little to be measured.
    pub count_file_changes: bool,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            tls: TlsFiles::default(),
            hosts: BTreeMap::new(),
            engine: EngineConfig::default(),
            paths: Paths::default(),
            socket: None,
            tracker: TrackerChoice::Auto,
            frozen_silence_ms: 200,
            count_file_changes: true,
        }
    }
}

/// What tells which pages a running container has written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum TrackerChoice {
    /// The best that the kernel has.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// Asynchronous write protection: Linux 6.7 and newer.
    #[serde(rename = "userfaultfd-wp")]
    WriteProtect,
    /// Soft-dirty bits, for which the container is stopped in each round.
    #[serde(rename = "soft-dirty")]
    SoftDirty,
    /// No memory travels before the freeze.
    #[serde(rename = "none")]
    None,
}

/// `dest.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DestConfig {
    /// This host's identity.
    pub tls: TlsFiles,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Names, as in their certificates, of the hosts that may move containers here.
    pub allow: Vec<String>,
    /// Bridges of other hosts and what they are called here.
    pub bridges: BTreeMap<String, String>,
    /// Memory that a migration must leave free here, in MiB.
    pub reserve_memory_mib: u64,
    /// Runtimes and CRIU.
    pub engine: EngineConfig,
    /// Where state is kept.
    pub paths: Paths,
}

impl Default for DestConfig {
    fn default() -> Self {
        Self {
            tls: TlsFiles::default(),
            listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
            allow: Vec::new(),
            bridges: BTreeMap::new(),
            reserve_memory_mib: 128,
            engine: EngineConfig::default(),
            paths: Paths::default(),
        }
    }
}

/// One host that containers can be moved to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostEntry {
    /// `name:port` or `address:port`; the port may be left out.
    pub address: String,
    /// The name in its certificate, if it is not the entry's own.
    pub name: Option<String>,
}

/// The PEM files of a host's identity.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsFiles {
    /// The private authority both hosts trust.
    pub ca: PathBuf,
    /// This host's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Default for TlsFiles {
    fn default() -> Self {
        let dir = Path::new("/etc/longhaul/tls");
        Self { ca: dir.join("ca.pem"), cert: dir.join("cert.pem"), key: dir.join("key.pem") }
    }
}

/// Programs.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// The OCI runtime.
    pub runc: PathBuf,
    /// Its state directory, if it is not the default.
    pub runc_root: Option<PathBuf>,
    /// CRIU.
    pub criu: PathBuf,
    /// Longhaul's stand-in for CRIU.
    pub hold: PathBuf,
    /// The library preloaded into CRIU: it leaves out pages that are sent beside it.
    pub filter: PathBuf,
    /// The program that fills in a restored container's memory.
    pub fill: PathBuf,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            runc: "runc".into(),
            runc_root: None,
            criu: "/usr/sbin/criu".into(),
            hold: "/usr/local/libexec/longhaul/longhaul-criu".into(),
            filter: "/usr/local/libexec/longhaul/liblonghaul_criu_filter.so".into(),
            fill: "/usr/local/libexec/longhaul/longhaul-fill".into(),
        }
    }
}

/// Directories.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paths {
    /// Sockets and images in flight; a memory filesystem is mounted below it.
    pub run: PathBuf,
    /// Journals, reports and layers.
    pub state: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self { run: "/run/longhaul".into(), state: "/var/lib/longhaul".into() }
    }
}

/// An entry of the environment of a CRIU that restores (`common/filter`).
pub const CRIU_RESTORES: &str = "LONGHAUL_RESTORE=1";
/// A variable of that environment: the page store, if tasks have pages in common.
pub const CRIU_READS_COMMON: &str = "LONGHAUL_COMMON";
/// The same where memory is filled in later.
pub const CRIU_LEAVES_LATER: &str = "LONGHAUL_RESTORE=later";

impl EngineConfig {
    /// The environment CRIU is started with for a checkpoint: the library, which leaves out pages and reads the limits of
    /// other users' tasks where this agent has no `CAP_SYS_RESOURCE`. With [`CRIU_RESTORES`] for a restore: what CRIU holds ends with it.
    pub fn criu_environment(&self) -> Vec<String> {
        if !self.filter.is_file() {
            return Vec::new();
        }
        vec![format!("LD_PRELOAD={}", self.filter.display())]
    }

    /// The runtime as configured.
    pub fn runtime(&self) -> crate::runtime::Runtime {
        crate::runtime::Runtime::new(self.runc.clone(), self.runc_root.clone())
    }
}

/// Reads a configuration; a file that isn't there means the defaults, unless it was named by the user.
pub fn load<T: for<'de> Deserialize<'de> + Default>(path: &Path, named: bool) -> Result<T, ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => return Ok(T::default()),
        Err(source) => return Err(ConfigError::Read { path: path.to_owned(), source }),
    };
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_destination_configuration_is_read() {
        let text = r#"
            listen = "10.0.0.2:7000"
            allow = ["host1"]
            [bridges]
            br0 = "lan0"
            [tls]
            ca = "/x/ca.pem"
        "#;
        let config: DestConfig = toml::from_str(text).expect("reads");
        assert_eq!(config.listen.port(), 7000);
        assert_eq!(config.bridges["br0"], "lan0");
        assert_eq!(config.tls.key, Path::new("/etc/longhaul/tls/key.pem"));
    }

    #[test]
    fn a_misspelt_key_is_an_error() {
        let error = toml::from_str::<SourceConfig>("sockets = 1").expect_err("unknown key");
        assert!(error.to_string().contains("sockets"));
    }
}
