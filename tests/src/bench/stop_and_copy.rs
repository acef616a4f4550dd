//! What a careful person does by hand: `runc checkpoint` to memory, `tar | zstd -1` over TCP, `runc restore`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::container::{ContainerSpec, Rootfs};
use crate::lab::Host;

/// Where CRIU has no `CAP_SYS_RESOURCE`, as in these hosts, it can't read the limits of tasks of other users than root. The library reads
/// them for it, and does nothing else unless it is told to.
const RLIMITS: &str = "LD_PRELOAD=/usr/local/libexec/longhaul/liblonghaul_criu_filter.so";

/// The network namespace, pinned so that CRIU leaves it alone on both hosts.
const NETNS: &str = "/run/netns/byhand";

/// See [`NETNS`].
pub(super) fn pin_network(config: &mut Value) {
    if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
        for namespace in namespaces.iter_mut().filter(|namespace| namespace["type"] == "network") {
            namespace["path"] = json!(NETNS);
        }
    }
}

/// A container that can be moved by hand.
pub(super) fn spec(name: &str, last: u8, command: &[&str]) -> ContainerSpec {
    let address = std::net::Ipv4Addr::new(10, 77, 0, last);
    // CRIU alone can't save standard streams that lead out of the container.
    let inside = ["sh", "-c", "exec \"$@\" >/run/out 2>&1 </dev/null", "sh"];
    let command: Vec<&str> = inside.iter().chain(command).copied().collect();
    ContainerSpec { edit: Some(pin_network), rootfs: Rootfs::Overlay, ..ContainerSpec::new(name, address, &command) }
}

/// Waits until its program has said that it is ready.
pub(super) fn wait_ready(spec: &ContainerSpec, host: &Host) -> Result<()> {
    let script = "for i in $(seq 600); do runc exec $0 grep -q ready /run/out && exit 0; sleep 0.1; done; exit 1";
    let output = host.output(["sh", "-ec", script, &spec.name])?;
    anyhow::ensure!(output.status.success(), "{} does not get ready", spec.name);
    Ok(())
}

/// Starts it on a host.
pub(super) fn start(spec: &ContainerSpec, host: &Host) -> Result<()> {
    host.sh("ip netns add byhand")?;
    spec.start(host)
}

/// Moves it; how long it did not run.
pub(super) fn move_by_hand(spec: &ContainerSpec, from: &Host, to: &Host) -> Result<Duration> {
    let (name, bundle) = (&spec.name, spec.bundle());
    let address = spec.address.context("it has an address")?;
    let last = address.octets()[3];
    // Everything that can be done beforehand is.
    to.sh(&format!(
        "ip netns add byhand; \
         ip link add v{last} address fe:77:00:00:00:{last:02x} type veth peer name eth0 address 02:77:00:00:00:{last:02x} netns byhand; \
         ip netns exec byhand sh -ec 'ip link set lo up; ip link set eth0 up; ip address add {address}/24 dev eth0; ip route add default via 10.77.0.1'; \
         ip link set v{last} up; \
         mkdir -p {bundle}/rootfs {bundle}/upper {bundle}/work /run/byhand; mount -t tmpfs -o size=90% tmpfs /run/byhand"
    ))?;
    let config = std::fs::read(from.path(&format!("{bundle}/config.json"))).context("read config.json")?;
    std::fs::write(to.path(&format!("{bundle}/config.json")), config)?;
    from.sh("mkdir -p /run/byhand; mount -t tmpfs -o size=90% tmpfs /run/byhand")?;
    let mut receiver = to
        .command(["sh", "-ec", "socat -u -b1048576 TCP-LISTEN:9100,reuseaddr - | zstd -q -dc | tar -x -C /run/byhand"])
        .spawn()?;
    let port = format!("{}:9100", to.address);
    from.sh(&format!("for i in $(seq 200); do ss -ltn | grep -q . ; break; done; sleep 0.3; : {port}"))?;

    let start = Instant::now();
    from.sh(&format!(
        "{RLIMITS} runc checkpoint --tcp-established --file-locks --image-path /run/byhand/images --work-path /run/byhand/work {name}; \
         ip link set v{last} down; cp -a {bundle}/upper /run/byhand/upper; \
         tar -c -C /run/byhand . | zstd -q -1 | socat -u -b1048576 - TCP:{port}"
    ))
    .context("checkpoint and send")?;
    anyhow::ensure!(receiver.wait()?.success(), "the receiving end failed");
    to.sh(&format!(
        "cp -a /run/byhand/upper {bundle}/; \
         mount -t overlay overlay -o lowerdir=/srv/image,upperdir={bundle}/upper,workdir={bundle}/work {bundle}/rootfs; \
         ip link set v{last} master br0; \
         runc restore --detach --tcp-established --file-locks --bundle {bundle} --image-path /run/byhand/images --work-path /run/byhand/work {name} </dev/null >/dev/null 2>&1; \
         ip netns exec byhand arping -q -c 1 -U -I eth0 {address} || true"
    ))
    .context("restore")?;
    Ok(start.elapsed())
}

/// Takes everything of it away.
pub(super) fn clean(spec: &ContainerSpec, hosts: [&Host; 2]) -> Result<()> {
    let bundle = spec.bundle();
    for host in hosts {
        host.sh(&format!(
            "runc delete --force {} 2>/dev/null || true; ip netns delete byhand 2>/dev/null || true; \
             umount -l {bundle}/rootfs 2>/dev/null || true; umount -l /run/byhand 2>/dev/null || true; rm -rf {bundle} /run/byhand",
            spec.name
        ))?;
    }
    Ok(())
}
