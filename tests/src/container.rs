//! Containers for the lab: an OCI bundle on an overlay of the image, started with runc.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::Host;

/// A redis that can be filled (DEBUG POPULATE) and asked what it holds (DEBUG DIGEST).
pub const REDIS: [&str; 9] =
    ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--enable-debug-command", "yes"];

/// Where the output of containers goes.
pub const CONTAINER_LOGS: &str = "/var/log/containers";
/// Where bundles lie in a host.
pub const BUNDLES: &str = "/srv/containers";

/// How a container's root filesystem is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rootfs {
    /// An overlay whose lower layer is the lab's image.
    Overlay,
    /// A directory of its own.
    Plain,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Its id.
    pub name: String,
    /// Its command line.
    pub command: Vec<String>,
    /// Its address on the lab's network, if it has an interface.
    pub address: Option<Ipv4Addr>,
    /// Overlay or plain.
    pub rootfs: Rootfs,
    /// Further mounts, as in an OCI config.
    pub mounts: Vec<Value>,
    /// Changes the generated OCI config before it is written.
    pub edit: Option<fn(&mut Value)>,
}

/// The sum of PSS of a container's tasks, in KiB.
pub fn pss(host: &Host, name: &str) -> Result<f64> {
    let text = host.sh(&format!(
        "for pid in $(runc ps --format json {name} | tr -d '[]' | tr ',' ' '); do cat /proc/$pid/smaps_rollup; done | awk '/^Pss:/ {{sum += $2}} END {{print sum}}'"
    ))?;
    text.trim().parse().context("read PSS")
}

impl ContainerSpec {
    /// A container on an overlay with an address of its own.
    pub fn new(name: &str, address: Ipv4Addr, command: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            address: Some(address),
            rootfs: Rootfs::Overlay,
            mounts: Vec::new(),
            edit: None,
        }
    }

    /// Its bundle's directory in the host.
    pub fn bundle(&self) -> String {
        format!("{BUNDLES}/{}", self.name)
    }

    /// The file its output goes to.
    pub fn log(&self) -> String {
        format!("{CONTAINER_LOGS}/{}.log", self.name)
    }

    /// Starts it on a host.
    pub fn start(&self, host: &Host) -> Result<()> {
        let bundle = self.bundle();
        let name = &self.name;
        host.sh(&format!("mkdir -p {bundle}/rootfs {bundle}/upper {bundle}/work {CONTAINER_LOGS}"))?;
        match self.rootfs {
            Rootfs::Overlay => host.sh(&format!(
                "mount -t overlay overlay -o lowerdir=/srv/image,upperdir={bundle}/upper,workdir={bundle}/work {bundle}/rootfs"
            ))?,
            Rootfs::Plain => host.sh(&format!(
                "cd /srv/image && cp -a --parents bin sbin lib lib64 usr/bin usr/sbin usr/lib usr/lib64 etc {bundle}/rootfs/ && \
                 mkdir -p {bundle}/rootfs/proc {bundle}/rootfs/sys {bundle}/rootfs/dev {bundle}/rootfs/tmp {bundle}/rootfs/root \
                 {bundle}/rootfs/var/lib {bundle}/rootfs/var/log {bundle}/rootfs/run"
            ))?,
        };
        if self.command.iter().any(|word| word == "lab-tool") {
            let root = if self.rootfs == Rootfs::Overlay { "upper" } else { "rootfs" };
            host.sh(&format!("install -D /usr/local/bin/lab-tool {bundle}/{root}/usr/local/bin/lab-tool"))?;
        }
        let config = self.config(host)?;
        std::fs::write(host.path(&format!("{bundle}/config.json")), serde_json::to_vec_pretty(&config)?)
            .context("write config.json")?;
        host.sh(&format!("runc create --bundle {bundle} {name} </dev/null >>{} 2>&1", self.log()))
            .with_context(|| std::fs::read_to_string(host.path(&self.log())).unwrap_or_default())?;
        if let Some(address) = self.address {
            host.sh(&self.network_script(address))?;
        }
        host.sh(&format!("runc start {name}"))?;
        Ok(())
    }

    fn network_script(&self, address: Ipv4Addr) -> String {
        let last = address.octets()[3];
        let v6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 1, u16::from(last));
        format!(
            "pid=$(runc state {name} | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p'); \
             ip link add v{last} address fe:77:00:00:00:{last:02x} type veth peer name eth0 address 02:77:00:00:00:{last:02x} netns $pid; \
             ip link set v{last} master br0 up; \
             nsenter -t $pid -n sh -ec 'ip link set lo up; ip link set eth0 up; ip address add {address}/24 dev eth0; \
             ip -6 address add {v6}/64 dev eth0 nodad; ip route add default via 10.77.0.1'",
            name = self.name
        )
    }

    fn config(&self, host: &Host) -> Result<Value> {
        let text = host.sh("cd /tmp && rm -f config.json && runc spec && cat config.json && rm config.json")?;
        let mut config: Value = serde_json::from_str(&text).context("read runc's spec")?;
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_KILL",
            "CAP_MKNOD",
            "CAP_NET_BIND_SERVICE",
            "CAP_NET_RAW",
            "CAP_SETFCAP",
            "CAP_SETGID",
            "CAP_SETPCAP",
            "CAP_SETUID",
            "CAP_SYS_CHROOT",
            "CAP_AUDIT_WRITE"
        ]);
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = capabilities.clone();
        }
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(self.command);
        config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "hard": 4096, "soft": 4096 }]);
        config["root"] = json!({ "path": "rootfs", "readonly": false });
        config["hostname"] = json!(self.name);
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.extend(self.mounts.iter().cloned());
        }
        if let Some(edit) = self.edit {
            edit(&mut config);
        }
        Ok(config)
    }
}

/// Shell text that deletes a container. runc waits 150 ms for its last thread to be gone, and then leaves its cgroups (runc 1.1,
/// `RemovePaths`).
pub(crate) fn delete(id: &str) -> String {
    format!(
        "runc delete --force {id}; \
         for try in $(seq 100); do \
             left=$(find /sys/fs/cgroup -mindepth 2 -maxdepth 2 -type d -name {id}); \
             [ -z \"$left\" ] && break; \
             rmdir $left 2>/dev/null || sleep 0.05; \
         done"
    )
}
