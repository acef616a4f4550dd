//! The container description: everything but its memory, its kernel objects and its files.
//!
//! One JSON document, made by whoever has the container (a source agent, later a checkpoint store) and read by
//! whoever will restore it. It names the container as its engine does, so nothing of it depends on a peer.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::mount::MsFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The version written; a reader takes this one alone, since a field it does not know may be one it must not ignore.
pub const VERSION: u32 = 3;
/// The largest document taken, in bytes.
pub const MAX_BYTES: usize = 4 << 20;

/// The most files named as mapped.
pub const MOST_MAPPED: usize = 4096;

/// A container, described.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// [`VERSION`].
    pub version: u32,
    /// The container's id in its runtime.
    pub id: String,
    /// The OCI runtime: `runc`.
    pub engine: String,
    /// The bundle's directory.
    pub bundle: String,
    /// The bundle's `config.json`, as text.
    pub config: String,
    /// Where its root filesystem is.
    pub rootfs: Rootfs,
    /// Bind mounts of the host that are data.
    pub volumes: Vec<Volume>,
    /// Memory filesystems whose files are copied like the root filesystem's. The others CRIU packs while the container is frozen.
    pub tmpfs: Vec<Tmpfs>,
    /// How it is connected.
    pub network: Network,
    /// Standard input, output and error, where they lead outside the container.
    pub stdio: Vec<Stdio>,
    /// Memory in use, in bytes: what the destination has to have free.
    pub memory_bytes: u64,
    /// Bytes in the trees that will be copied.
    pub disk_bytes: u64,
    /// Files of its root filesystem that its tasks have mapped as programs and libraries are, as it names them: no more than [`MOST_MAPPED`]. Where it
    /// arrives they are read before it stands still.
    pub mapped_files: Vec<String>,
    /// All its tasks are in one cgroup of each hierarchy, so CRIU need not rebuild a tree of them.
    pub single_cgroup: bool,
    /// All its tasks are in one network namespace, which the runtime made: CRIU works inside of it, and need not save it. To do
    /// so it would walk the kernel's table of tracked connections, 20 ms on a large host.
    pub single_netns: bool,
}

/// Where a root filesystem is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Rootfs {
    /// An overlay mount.
    Overlay {
        /// Where it is mounted.
        merged: String,
        /// Its lower layers, topmost first, as overlayfs takes them.
        lowers: Vec<Layer>,
        /// Its upper layer.
        upper: String,
        /// Its work directory.
        work: String,
        /// Mount options that change what the layers mean (`redirect_dir=on`, `metacopy=on`, `volatile`, …).
        options: Vec<String>,
    },
    /// A plain directory.
    Plain {
        /// The directory.
        path: String,
    },
}

/// A read-only lower layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Its directory on the source.
    pub path: String,
    /// BLAKE3 of its content, hexadecimal.
    pub digest: String,
}

/// A bind mount that is data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Where the container sees it.
    pub destination: String,
    /// The host's directory or file.
    pub source: String,
    /// Whether it is copied, or there already on both hosts.
    pub mode: VolumeMode,
    /// It is a single file.
    pub file: bool,
}

/// A memory filesystem of the container's own (tmpfs(5)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tmpfs {
    /// Where the container sees it.
    pub destination: String,
    /// What it was called when it was mounted.
    pub source: String,
    /// Its options, as they are mounted with: `size=65536k`, ….
    pub options: Vec<String>,
    /// Those of the mount: `nosuid`, ….
    pub flags: Vec<String>,
}

/// What a mount of a memory filesystem may have, and the kernel's flag for it (mount(2)).
pub const TMPFS_FLAGS: [(&str, MsFlags); 8] = [
    ("rw", MsFlags::empty()),
    ("nosuid", MsFlags::MS_NOSUID),
    ("nodev", MsFlags::MS_NODEV),
    ("noexec", MsFlags::MS_NOEXEC),
    ("noatime", MsFlags::MS_NOATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME),
    ("relatime", MsFlags::MS_RELATIME),
    ("nosymfollow", MsFlags::from_bits_retain(256)),
];

/// Options of a memory filesystem that are passed on; those with a value end in `=`.
pub const TMPFS_OPTIONS: [&str; 9] =
    ["size=", "nr_blocks=", "nr_inodes=", "mode=", "uid=", "gid=", "huge=", "inode32", "inode64"];

/// Whether an option is one of those.
pub fn is_tmpfs_option(option: &str) -> bool {
    TMPFS_OPTIONS.iter().any(|known| match option.strip_prefix(known) {
        Some(value) if known.ends_with('=') => value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'),
        rest => rest == Some(""),
    })
}

/// How a volume is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeMode {
    /// Its files are copied like the root filesystem's.
    Copy,
    /// Both hosts see the same storage.
    Shared,
}

/// How a container is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Network {
    /// A namespace of its own, rebuilt on the destination.
    Own {
        /// Where the runtime's configuration says the namespace is pinned; nothing if the runtime made it.
        path: Option<String>,
        /// What is in it.
        namespace: Namespace,
    },
    /// The host's own network.
    Host,
}

/// The content of a network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    /// Interfaces other than `lo`.
    pub links: Vec<Link>,
    /// Whether `lo` is up.
    pub loopback_up: bool,
    /// Addresses of all interfaces but those the kernel gives itself.
    pub addresses: Vec<Address>,
    /// Routes but those that come with addresses.
    pub routes: Vec<Route>,
    /// `net.*` sysctls that differ from a new namespace's.
    pub sysctls: BTreeMap<String, String>,
}

/// An interface: one end of a veth pair whose other end is a port of a host's bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Its name in the container.
    pub name: String,
    /// Its MAC address.
    pub mac: Mac,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// The other end's name on the source.
    pub host_name: String,
    /// The bridge the other end is a port of.
    pub bridge: String,
}

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Not six hexadecimal bytes with colons.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no MAC address")]
pub struct NoMac(String);

impl std::str::FromStr for Mac {
    type Err = NoMac;

    fn from_str(text: &str) -> Result<Self, NoMac> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| if part.len() == 2 { u8::from_str_radix(part, 16).ok() } else { None })
            .collect();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| NoMac(text.to_owned()))
    }
}

impl TryFrom<String> for Mac {
    type Error = NoMac;

    fn try_from(text: String) -> Result<Self, NoMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// The interface.
    pub link: String,
    /// The address with its prefix.
    pub address: IpNet,
    /// `global`, `link` or `host`.
    pub scope: Scope,
}

/// How far an address or a route reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "named as iproute2 names them")]
pub enum Scope {
    Global,
    Site,
    Link,
    Host,
}

impl Scope {
    /// iproute2's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Site => "site",
            Self::Link => "link",
            Self::Host => "host",
        }
    }
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Where it leads; the default route is `0.0.0.0/0` or `::/0`.
    pub destination: IpNet,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The interface.
    pub link: Option<String>,
    /// The source address it prefers.
    pub source: Option<IpAddr>,
    /// Its metric.
    pub metric: Option<u32>,
    /// Its scope, where iproute2 shows one.
    pub scope: Option<Scope>,
    /// Its table (254 is `main`).
    pub table: u32,
    /// The gateway need not be on a connected network.
    pub onlink: bool,
}

/// A standard stream that leads outside the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stdio {
    /// 0, 1 or 2.
    pub fd: i32,
    /// Where it leads.
    pub target: StdioTarget,
}

/// Where a standard stream leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum StdioTarget {
    /// A regular file of the host.
    File {
        /// Its path on the host.
        path: String,
        /// CRIU's name of it: `file[<mount id>:<inode>]`, hexadecimal.
        key: String,
        /// open(2) flags.
        flags: i32,
    },
    /// A pipe whose other end is outside: on the destination it becomes a file.
    Pipe {
        /// CRIU's name of it: `pipe:[<inode>]`.
        key: String,
        /// The log it is written to on the destination; nothing for an input, which reads as empty.
        log: Option<String>,
    },
}

/// A description that must not be used.
#[derive(Debug, Error)]
pub enum DescriptionError {
    /// Too large.
    #[error("the container description has {0} bytes; {MAX_BYTES} are taken")]
    TooLarge(usize),
    /// Not JSON of the right form.
    #[error("the container description can't be read")]
    Json(#[from] serde_json::Error),
    /// Another version.
    #[error(
        "the container description has version {0}; this agent knows {VERSION}: upgrade the older of the two agents"
    )]
    Version(u32),
    /// A field that could lead outside what it names.
    #[error("the container description's {field} {value:?} is not acceptable: {why}")]
    Field {
        /// Which.
        field: &'static str,
        /// What it says.
        value: String,
        /// What is wrong.
        why: &'static str,
    },
}

impl Description {
    /// Reads and checks a document from a peer.
    pub fn from_json(bytes: &[u8]) -> Result<Self, DescriptionError> {
        if bytes.len() > MAX_BYTES {
            return Err(DescriptionError::TooLarge(bytes.len()));
        }
        let description: Self = serde_json::from_slice(bytes)?;
        if description.version != VERSION {
            return Err(DescriptionError::Version(description.version));
        }
        description.check()?;
        Ok(description)
    }

    /// The document.
    pub fn to_json(&self) -> Vec<u8> {
        // A description holds only strings, numbers and lists, which always encode.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The trees that are copied, in the order their numbers on the wire give.
    pub fn trees(&self) -> Vec<Tree> {
        let mut trees = Vec::new();
        match &self.rootfs {
            Rootfs::Overlay { lowers, upper, .. } => {
                trees.push(Tree { role: TreeRole::Upper, path: upper.clone() });
                for (index, layer) in lowers.iter().enumerate() {
                    trees.push(Tree { role: TreeRole::Layer(index), path: layer.path.clone() });
                }
            }
            Rootfs::Plain { path } => trees.push(Tree { role: TreeRole::Plain, path: path.clone() }),
        }
        for volume in self.volumes.iter().filter(|volume| volume.mode == VolumeMode::Copy && !volume.file) {
            trees.push(Tree { role: TreeRole::Volume, path: volume.source.clone() });
        }
        for file in self.copied_files() {
            trees.push(Tree { role: TreeRole::File, path: file });
        }
        for (index, tmpfs) in self.tmpfs.iter().enumerate() {
            trees.push(Tree { role: TreeRole::Tmpfs(index), path: tmpfs.destination.clone() });
        }
        trees
    }

    /// Single files of the host that are copied: logs, and volumes that are files.
    pub fn copied_files(&self) -> Vec<String> {
        let mut files: Vec<String> = Vec::new();
        let logs = self.stdio.iter().filter_map(|stdio| match &stdio.target {
            StdioTarget::File { path, .. } => Some(path.clone()),
            StdioTarget::Pipe { log, .. } => log.clone(),
        });
        let volumes = self
            .volumes
            .iter()
            .filter(|volume| volume.file && volume.mode == VolumeMode::Copy)
            .map(|volume| volume.source.clone());
        for file in logs.chain(volumes) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
        files
    }

    /// The container's addresses.
    pub fn addresses(&self) -> Vec<IpAddr> {
        match &self.network {
            Network::Own { namespace, .. } => {
                namespace.addresses.iter().map(|address| address.address.addr()).collect()
            }
            Network::Host => Vec::new(),
        }
    }

    fn check(&self) -> Result<(), DescriptionError> {
        check_id(&self.id)?;
        check_path("bundle", &self.bundle)?;
        match &self.rootfs {
            Rootfs::Overlay { merged, lowers, upper, work, options } => {
                for path in [merged, upper, work] {
                    check_overlay_path("overlay directory", path)?;
                }
                for layer in lowers {
                    check_overlay_path("lower layer", &layer.path)?;
                    let hex = layer.digest.bytes().all(|byte| byte.is_ascii_hexdigit());
                    if layer.digest.len() != 64 || !hex {
                        return Err(field("layer digest", &layer.digest, "64 hexadecimal digits are wanted"));
                    }
                }
                for option in options {
                    if !OVERLAY_OPTIONS.contains(&option.as_str()) {
                        return Err(field("overlay option", option, "it is not one that Longhaul passes on"));
                    }
                }
            }
            Rootfs::Plain { path } => check_path("root filesystem", path)?,
        }
        for volume in &self.volumes {
            check_path("volume", &volume.source)?;
            check_path("volume destination", &volume.destination)?;
        }
        if self.mapped_files.len() > MOST_MAPPED {
            return Err(field("mapped files", &self.mapped_files.len().to_string(), "so many can't be read in time"));
        }
        for file in &self.mapped_files {
            check_path("mapped file", file)?;
        }
        for tmpfs in &self.tmpfs {
            check_path("tmpfs", &tmpfs.destination)?;
            if tmpfs.source.len() > 255 || !tmpfs.source.chars().all(|c| c.is_ascii_graphic()) {
                return Err(field("tmpfs source", &tmpfs.source, "a short name is wanted"));
            }
            for option in &tmpfs.options {
                if !is_tmpfs_option(option) {
                    return Err(field("tmpfs option", option, "it is not one that Longhaul passes on"));
                }
            }
            for flag in &tmpfs.flags {
                if !TMPFS_FLAGS.iter().any(|(known, _)| known == flag) {
                    return Err(field("tmpfs flag", flag, "it is not one that Longhaul passes on"));
                }
            }
        }
        for stdio in &self.stdio {
            let path = match &stdio.target {
                StdioTarget::File { path, .. } => Some(path),
                StdioTarget::Pipe { log, .. } => log.as_ref(),
            };
            if let Some(path) = path {
                check_path("log", path)?;
            }
        }
        if let Network::Own { path, namespace } = &self.network {
            if let Some(path) = path {
                check_path("network namespace", path)?;
            }
            for link in &namespace.links {
                check_link_name(&link.name)?;
                check_link_name(&link.host_name)?;
                check_link_name(&link.bridge)?;
            }
            for name in namespace.addresses.iter().map(|address| &address.link) {
                check_link_name(name)?;
            }
            for name in namespace.routes.iter().filter_map(|route| route.link.as_ref()) {
                check_link_name(name)?;
            }
            for (name, value) in &namespace.sysctls {
                let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
                if !name.starts_with("net.") || !name.chars().all(plain) || name.contains("..") {
                    return Err(field("sysctl", name, "only net.* can be set"));
                }
                if value.len() > 4096 || value.contains('\n') {
                    return Err(field("sysctl", name, "its value is no single line"));
                }
            }
        }
        Ok(())
    }
}

/// Overlay options that change what the layers mean and are passed on.
pub const OVERLAY_OPTIONS: [&str; 6] =
    ["redirect_dir=on", "redirect_dir=follow", "redirect_dir=nofollow", "metacopy=on", "userxattr", "volatile"];

/// A tree that is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// What it is.
    pub role: TreeRole,
    /// Where it is on the source.
    pub path: String,
}

/// What a copied tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeRole {
    /// The overlay's upper layer.
    Upper,
    /// A lower layer, by its index.
    Layer(usize),
    /// A root filesystem that is a directory.
    Plain,
    /// A volume.
    Volume,
    /// One file.
    File,
    /// A memory filesystem, by its index: its path is where the container sees it.
    Tmpfs(usize),
}

fn field(field: &'static str, value: &str, why: &'static str) -> DescriptionError {
    DescriptionError::Field { field, value: value.chars().take(200).collect(), why }
}

/// Container ids as runc takes them: nothing that could be a path.
fn check_id(id: &str) -> Result<(), DescriptionError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if id.is_empty() || id.len() > 255 || !id.chars().all(plain) || id == "." || id == ".." {
        return Err(field("id", id, "letters, digits and _+-. are allowed"));
    }
    Ok(())
}

fn check_path(what: &'static str, path: &str) -> Result<(), DescriptionError> {
    if !path.starts_with('/') || path.len() > 4000 || path.contains('\0') {
        return Err(field(what, path, "an absolute path is wanted"));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(field(what, path, "it must not contain `..`"));
    }
    if path.trim_end_matches('/').is_empty() {
        return Err(field(what, path, "the root directory can't be replaced"));
    }
    Ok(())
}

/// Overlay mount options are separated by commas, and lower layers by colons.
fn check_overlay_path(what: &'static str, path: &str) -> Result<(), DescriptionError> {
    check_path(what, path)?;
    if path.contains([',', ':', '\\', '"']) {
        return Err(field(what, path, "overlayfs can't take a path with a comma, colon, quote or backslash"));
    }
    Ok(())
}

/// Interface names as the kernel takes them (15 bytes, no slash or space).
fn check_link_name(name: &str) -> Result<(), DescriptionError> {
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '"' | '\'' | '\\' | '@');
    if name.is_empty() || name.len() > 15 || !name.chars().all(plain) || name.starts_with('-') || name == ".." {
        return Err(field("interface name", name, "1 to 15 plain characters are wanted"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Description {
        Description {
            version: VERSION,
            id: "web".into(),
            engine: "runc".into(),
            bundle: "/srv/web".into(),
            config: "{}".into(),
            rootfs: Rootfs::Plain { path: "/srv/web/rootfs".into() },
            volumes: Vec::new(),
            tmpfs: Vec::new(),
            network: Network::Host,
            stdio: Vec::new(),
            memory_bytes: 0,
            disk_bytes: 0,
            mapped_files: Vec::new(),
            single_cgroup: true,
            single_netns: true,
        }
    }

    #[test]
    fn a_description_survives_the_wire() {
        let sample = sample();
        assert_eq!(Description::from_json(&sample.to_json()).expect("reads back"), sample);
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for bad in ["relative", "/a/../b", "/", "/a\0b"] {
            let mut description = sample();
            description.bundle = bad.into();
            let error = Description::from_json(&description.to_json()).expect_err(bad);
            assert!(error.to_string().contains("bundle"), "{error}");
        }
        for bad in ["", "..", "a/b", "a b"] {
            let mut description = sample();
            description.id = bad.into();
            Description::from_json(&description.to_json()).expect_err(bad);
        }
    }

    #[test]
    fn unknown_fields_and_versions_are_refused() {
        let mut value = serde_json::to_value(sample()).expect("encodes");
        value["surprise"] = 1.into();
        Description::from_json(value.to_string().as_bytes()).expect_err("unknown field");
        let mut newer = sample();
        newer.version = VERSION + 1;
        assert!(
            matches!(Description::from_json(&newer.to_json()), Err(DescriptionError::Version(found)) if found == newer.version)
        );
    }

    #[test]
    fn tmpfs_options_are_known_ones() {
        for good in ["size=65536k", "mode=1777", "inode64", "huge=within_size"] {
            assert!(is_tmpfs_option(good), "{good}");
        }
        for bad in ["size", "inode64x", "context=x", "size=1,uid=0", ""] {
            assert!(!is_tmpfs_option(bad), "{bad}");
        }
    }

    #[test]
    fn mac_addresses_are_exact() {
        assert_eq!("02:77:00:00:00:14".parse::<Mac>().expect("a MAC").to_string(), "02:77:00:00:00:14");
        for bad in ["02:77:00:00:00", "02:77:00:00:00:1", "02:77:00:00:00:zz", "02:77:00:00:00:14:15"] {
            bad.parse::<Mac>().expect_err(bad);
        }
    }
}
