//! What can't move is refused before anything is touched, by name and with the way out.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Said, Stage, migrate, redis, runs};
use crate::agents::{self, Agent};
use crate::container::{ContainerSpec, Rootfs, delete};
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "mistakes on the command line are named", run: mistakes },
        Scenario { name: "a destination that is occupied refuses", run: occupied },
        Scenario { name: "a destination that is too small refuses", run: too_small },
        Scenario { name: "a container with what CRIU can't save is refused", run: unsaveable },
        Scenario { name: "completions and man pages are there", run: documents },
    ]
}

fn refused(said: &Said, words: &[&str]) -> Result<()> {
    let text = said.text();
    ensure!(said.code == 3, "not refused: {text}");
    for word in words {
        ensure!(text.contains(word), "{word:?} is not named: {text}");
    }
    Ok(())
}

fn mistakes(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let unknown = migrate(stage.a, &["nosuch", "--to", "host2", "-q"])?;
    ensure!(unknown.code == 1 && unknown.text().contains("nosuch"), "{}", unknown.text());
    let nowhere = migrate(stage.a, &["web", "--to", "host99", "-q"])?;
    ensure!(nowhere.code == 1 && nowhere.text().contains("host99"), "{}", nowhere.text());
    agents::stop(stage.b, Agent::Dest)?;
    let down = migrate(stage.a, &["web", "--to", "host2", "-q"])?;
    agents::start(stage.b, Agent::Dest)?;
    agents::wait_ready(stage.b)?;
    ensure!(down.code == 1 && down.text().contains("longhaul-dest running there"), "{}", down.text());
    ensure!(migrate(stage.a, &["web"])?.code == 2, "a missing --to is a usage error");
    ensure!(
        migrate(stage.a, &["web", "--to", "host2", "--volumes", "maybe"])?.code == 2,
        "a bad rule is a usage error"
    );
    let no_agent = stage.a.output(["migrate", "status", "--socket", "/nowhere"])?;
    ensure!(no_agent.status.code() == Some(125), "no agent is exit code 125");
    ensure!(migrate(stage.a, &["cancel"])?.code == 1, "nothing to cancel");
    ensure!(runs(stage.a, "web")?, "it runs on");
    Ok(())
}

fn occupied(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let web = redis(stage.a, stage.c)?;
    let to = ["web", "--to", "host2", "-q"];
    // The same id, path and address, all at once: each is named.
    web.start(stage.b)?;
    refused(&migrate(stage.a, &to)?, &["container web", "/srv/containers/web", "10.77.0.20", "in use"])?;
    stage.b.sh(&format!(
        "{}; umount /srv/containers/web/rootfs; rm -rf /srv/containers/web /var/log/containers",
        delete("web")
    ))?;
    stage.b.sh("ip link set br0 down; ip link set br0 name other")?;
    let bridge = stage.b.sh("ip link set other up; ip route show");
    let said = migrate(stage.a, &to);
    stage.b.sh("ip link set other down; ip link set other name br0; ip link set br0 up")?;
    bridge?;
    refused(&said?, &["br0", "[bridges]"])
}

fn with_dest_config(host: &Host, line: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    host.sh(&format!("cp /etc/longhaul/dest.toml /tmp/dest.toml; sed -i '1i {line}' /etc/longhaul/dest.toml"))?;
    agents::stop(host, Agent::Dest)?;
    agents::start(host, Agent::Dest)?;
    agents::wait_ready(host)?;
    let checked = check();
    host.sh("cp /tmp/dest.toml /etc/longhaul/dest.toml")?;
    agents::stop(host, Agent::Dest)?;
    agents::start(host, Agent::Dest)?;
    agents::wait_ready(host)?;
    checked
}

fn too_small(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let to = ["web", "--to", "host2", "-q"];
    with_dest_config(stage.b, "reserve_memory_mib = 10000000", || {
        refused(&migrate(stage.a, &to)?, &["memory", "MiB", "reserve_memory_mib"])
    })?;
    with_dest_config(stage.b, "engine.criu = \\\"/nowhere/criu\\\"", || {
        refused(&migrate(stage.a, &to)?, &["CRIU was not found", "install CRIU"])
    })?;
    stage.a.sh("runc exec web sh -c 'head -c 20000000 /dev/urandom > /big'")?;
    stage.b.sh("mkdir -p /srv/containers; mount -t tmpfs -o size=4m tmpfs /srv/containers")?;
    let said = migrate(stage.a, &to);
    stage.b.sh("umount /srv/containers")?;
    refused(&said?, &["disk at", "MiB are free"])
}

fn unsaveable(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let to = ["odd", "--to", "host2", "-q"];
    let address = Ipv4Addr::new(10, 77, 0, 40);

    // A unix socket whose other end is a process of the host.
    stage.a.sh("mkdir -p /srv/volumes/run; (socat UNIX-LISTEN:/srv/volumes/run/s,fork EXEC:cat >/dev/null 2>&1 &)")?;
    let mut spec = ContainerSpec::new("odd", address, &["sh", "-c", "sleep 1000000 | socat - UNIX-CONNECT:/host/s"]);
    spec.mounts =
        vec![json!({ "destination": "/host", "source": "/srv/volumes/run", "type": "bind", "options": ["rbind"] })];
    stage.a.sh("for i in $(seq 100); do [ -S /srv/volumes/run/s ] && exit 0; sleep 0.02; done; exit 1")?;
    spec.start(stage.a)?;
    stage.a.sh("for i in $(seq 200); do nsenter -t $(pgrep -x -n socat) -n ss -x -H | grep -q ESTAB && exit 0; sleep 0.02; done; exit 1")?;
    refused(
        &migrate(stage.a, &["odd", "--to", "host2", "-q", "--volumes", "shared"])?,
        &["unix socket", "outside the container"],
    )?;
    stage.a.sh(&format!(
        "pkill socat; {}; umount /srv/containers/odd/rootfs; rm -rf /srv/containers/odd",
        delete("odd")
    ))?;

    // A device.
    let mut spec = ContainerSpec::new("odd", address, &["sh", "-c", "mknod /tun c 10 229; exec sleep 1000000 < /tun"]);
    spec.edit = Some(|config| {
        config["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    });
    spec.start(stage.a)?;
    stage.a.sh("for i in $(seq 500); do for pid in $(runc ps --format json odd | tr -d '[]' | tr ',' ' '); do [ \"$(readlink /proc/$pid/fd/0)\" = /tun ] && exit 0; done; sleep 0.02; done; exit 1")?;
    refused(&migrate(stage.a, &to)?, &["device"])?;
    stage.a.sh(&format!("{}; umount /srv/containers/odd/rootfs; rm -rf /srv/containers/odd", delete("odd")))?;

    // A session from outside, and a paused container.
    let mut spec = ContainerSpec::new("odd", address, &["sleep", "1000000"]);
    spec.rootfs = Rootfs::Overlay;
    spec.start(stage.a)?;
    stage.a.sh("runc exec --detach odd sleep 999 </dev/null >/dev/null 2>&1")?;
    refused(&migrate(stage.a, &to)?, &["runc exec", "end that session"])?;
    stage.a.sh("pkill -f '[s]leep 999'; runc pause odd")?;
    refused(&migrate(stage.a, &to)?, &["paused", "runc resume odd"])?;
    stage.a.sh("runc resume odd")?;
    // A second interface of a kind that can't be rebuilt.
    stage.a.sh(
        "nsenter -t $(runc state odd | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p') -n ip link add br9 type bridge",
    )?;
    refused(&migrate(stage.a, &to)?, &["br9", "veth"])
}

fn documents(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    stage.a.sh("migrate completions bash | grep -q volumes && migrate man /tmp/man && test -s /tmp/man/migrate.1 && test -s /tmp/man/migrate-check.1")?;
    Ok(())
}
