//! What keeps this host from taking a container in: everything is found before anything is touched.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use longhaul_common::config::DestConfig;
use longhaul_common::description::{Description, Network, Rootfs, VolumeMode};
use longhaul_common::layers::LayerDigests;
use longhaul_common::moved::Moved;
use longhaul_common::net::{Netns, addresses_in_use};
use longhaul_common::obstacle::Obstacle;
use longhaul_common::runtime::{Runtime, RuntimeError};
use nix::net::if_::if_nametoindex;
use nix::sys::statvfs::statvfs;

use crate::staging::layer_store;

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    /// What is in the way.
    pub obstacles: Vec<Obstacle>,
    /// Lower layers this host has, by digest.
    pub layers: BTreeMap<String, std::path::PathBuf>,
    /// Digests of those it lacks.
    pub missing_layers: Vec<String>,
    /// The most bytes of memory that may arrive.
    pub memory_limit: u64,
}

/// Looks at everything a container needs here. `promised` is memory that other arrivals will still take, in bytes.
pub async fn examine(config: &DestConfig, digests: &LayerDigests, container: &Description, promised: u64) -> Findings {
    let mut findings = Findings::default();
    let runtime = config.engine.runtime();
    identity(&runtime, container, &mut findings.obstacles).await;
    paths(container, &mut findings.obstacles);
    memory(config, container, promised, &mut findings);
    disk(config, container, &mut findings.obstacles);
    network(config, &runtime, container, &mut findings.obstacles).await;
    // It may have to read gigabytes: the connection's own task must go on.
    tokio::task::block_in_place(|| layers(config, digests, container, &mut findings));
    findings
}

async fn identity(runtime: &Runtime, container: &Description, obstacles: &mut Vec<Obstacle>) {
    match runtime.state(&container.id).await {
        Ok(state) => obstacles.push(Obstacle::new(
            format!("container {}", container.id),
            format!("a container of this name is {} on the destination", state.status),
            format!("remove it there (`runc delete {}`) or rename one of the two", container.id),
        )),
        Err(RuntimeError::Unknown { .. }) => {}
        Err(error) => obstacles.push(Obstacle::new(
            "runtime",
            format!("the destination can't ask its runtime: {}", longhaul_common::chain(&error)),
            "install runc there, or set engine.runc in its dest.toml",
        )),
    }
}

/// Paths that will be written must be free, or hold the stale copy of this same container.
fn paths(container: &Description, obstacles: &mut Vec<Obstacle>) {
    let moved = Moved::read(Path::new(&container.bundle));
    let stale = |path: &str| moved.as_ref().is_some_and(|moved| moved.covers(&container.id, Path::new(path)));
    for path in written_paths(container) {
        let path_ref = Path::new(&path);
        let empty_dir = path_ref.read_dir().is_ok_and(|mut entries| entries.next().is_none());
        if path_ref.symlink_metadata().is_ok() && !empty_dir && !stale(&path) {
            obstacles.push(Obstacle::new(
                format!("path {path}"),
                "it exists on the destination and would be overwritten",
                "move it away there; Longhaul replaces only what it marked as the stale copy of the same container",
            ));
        }
    }
    for volume in container.volumes.iter().filter(|volume| volume.mode == VolumeMode::Shared) {
        if !Path::new(&volume.source).exists() {
            obstacles.push(Obstacle::new(
                format!("mount {}", volume.destination),
                format!("its source {} was said to be shared, but is not there on the destination", volume.source),
                "mount the shared storage on the destination, or move with `--volumes copy`",
            ));
        }
    }
}

/// All paths an arrival writes.
pub fn written_paths(container: &Description) -> Vec<String> {
    let mut paths = vec![container.bundle.clone()];
    match &container.rootfs {
        Rootfs::Overlay { upper, work, merged, .. } => paths.extend([upper.clone(), work.clone(), merged.clone()]),
        Rootfs::Plain { path } => paths.push(path.clone()),
    }
    let copied = container.volumes.iter().filter(|volume| volume.mode == VolumeMode::Copy && !volume.file);
    paths.extend(copied.map(|volume| volume.source.clone()));
    paths.extend(container.copied_files());
    paths
}

/// Room for a container that grows while it is copied, or whose tasks have a child meanwhile, whose pages are owed one by one before it is known
/// which of them are its parent's: as much again as it has, and a little.
const GROWTH_BYTES: u64 = 64 << 20;

fn memory(config: &DestConfig, container: &Description, promised: u64, findings: &mut Findings) {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    let most = container.memory_bytes.saturating_mul(2).saturating_add(GROWTH_BYTES);
    let Some(available) = available.map(|kib| kib << 10) else {
        findings.memory_limit = most;
        return;
    };
    let kept = promised.saturating_add(config.reserve_memory_mib << 20);
    findings.memory_limit = most.min(available.saturating_sub(kept));
    // A page leaves the store as it comes into the container: it is here once. CRIU's own images are small beside it.
    let needed = container.memory_bytes.saturating_add(kept);
    if needed > available {
        findings.obstacles.push(Obstacle::new(
            "memory",
            format!(
                "the move needs {} MiB on the destination, {} MiB are available ({} MiB of them promised to other moves)",
                needed >> 20,
                available >> 20,
                promised >> 20
            ),
            "free memory there, choose another host, or lower reserve_memory_mib in its dest.toml",
        ));
    }
}

fn disk(config: &DestConfig, container: &Description, obstacles: &mut Vec<Obstacle>) {
    let root = match &container.rootfs {
        Rootfs::Overlay { upper, .. } => upper,
        Rootfs::Plain { path } => path,
    };
    let existing = |path: &Path| path.ancestors().find(|ancestor| ancestor.exists()).map(Path::to_owned);
    for (path, needed) in [(Path::new(root), container.disk_bytes), (config.paths.state.as_path(), 1 << 20)] {
        let Some(place) = existing(path) else { continue };
        let Ok(stat) = statvfs(&place) else { continue };
        let free = stat.blocks_available() * stat.fragment_size();
        if needed > free {
            obstacles.push(Obstacle::new(
                format!("disk at {}", place.display()),
                format!("the move writes {} MiB, {} MiB are free on the destination", needed >> 20, free >> 20),
                "free space there or choose another host",
            ));
        }
    }
}

async fn network(config: &DestConfig, runtime: &Runtime, container: &Description, obstacles: &mut Vec<Obstacle>) {
    let Network::Own { path, namespace } = &container.network else { return };
    if let Some(path) = path
        && Path::new(path).exists()
    {
        obstacles.push(Obstacle::new(
            format!("network namespace {path}"),
            "a namespace is pinned there on the destination already",
            "remove it there: `ip netns delete NAME`",
        ));
    }
    for link in &namespace.links {
        let bridge = config.bridges.get(&link.bridge).unwrap_or(&link.bridge);
        let exists = if_nametoindex(bridge.as_str()).is_ok();
        let is_bridge = Path::new("/sys/class/net").join(bridge).join("bridge").exists();
        if !exists || (Path::new("/sys/class/net").join(bridge).exists() && !is_bridge) {
            obstacles.push(Obstacle::new(
                format!("interface {}", link.name),
                format!("the destination has no bridge {bridge}"),
                format!("make the bridge there, or map it in its dest.toml: [bridges] {} = \"NAME\"", link.bridge),
            ));
        }
    }
    let wanted: Vec<IpAddr> = namespace.addresses.iter().map(|address| address.address.addr()).collect();
    let report = |owner: String, address: &IpAddr| {
        Obstacle::new(
            format!("address {address}"),
            format!("it is in use on the destination, by {owner}"),
            "stop what uses it there, or choose another host",
        )
    };
    if let Ok(used) = addresses_in_use(None) {
        obstacles.extend(wanted.iter().filter(|ip| used.contains(ip)).map(|ip| report("the host itself".into(), ip)));
    }
    for other in runtime.list().await.unwrap_or_default().iter().filter(|other| other.pid > 0) {
        let used = Netns::of_task(other.pid).and_then(|netns| addresses_in_use(Some(&netns))).unwrap_or_default();
        let owner = format!("container {}", other.id);
        obstacles.extend(wanted.iter().filter(|ip| used.contains(ip)).map(|ip| report(owner.clone(), ip)));
    }
}

/// A layer is taken from where the source has it, if the same is there, or from Longhaul's own store.
fn layers(config: &DestConfig, digests: &LayerDigests, container: &Description, findings: &mut Findings) {
    let Rootfs::Overlay { lowers, .. } = &container.rootfs else { return };
    for layer in lowers {
        let stored = layer_store(&config.paths).join(&layer.digest);
        let found = [Path::new(&layer.path), stored.as_path()]
            .into_iter()
            .find(|path| path.is_dir() && digests.digest(path).is_ok_and(|digest| digest == layer.digest));
        match found {
            Some(path) => {
                findings.layers.insert(layer.digest.clone(), path.to_owned());
            }
            None => findings.missing_layers.push(layer.digest.clone()),
        }
    }
}
