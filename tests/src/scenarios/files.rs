//! A container's files come along: every kind, from every kind of root filesystem.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::clients::WITHOUT;
use super::{Stage, migrate, move_to};
use crate::container::{ContainerSpec, Rootfs, delete};
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "an overlay arrives with every kind of file", run: overlay },
        Scenario { name: "a plain directory arrives with every kind of file", run: plain },
        Scenario { name: "a layer the destination lacks is sent and kept", run: missing_layer },
        Scenario { name: "a log in a file goes on and the old one comes along", run: log_file },
        Scenario { name: "a log behind a pipe goes on in a file", run: log_pipe },
        Scenario { name: "volumes are copied or shared as they are told", run: volumes },
        Scenario { name: "memory filesystems come along with what is in them", run: memory_filesystems },
        Scenario { name: "files that change during the move arrive as they were at the freeze", run: changing },
        Scenario { name: "a task that can't be stopped for a while holds nothing up", run: unstoppable },
    ]
}

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 30);

/// Makes one of everything below `/stuff`, and changes what the image has.
const MAKE: &str = r#"
    mkdir -p /stuff && cd /stuff
    echo plain > file; chmod 4711 file; chown 7:8 file
    ln file hard; ln -s /nowhere/at/all link; mkfifo fifo; mknod dev c 1 3
    python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/stuff/sock")'
    truncate -s 100M sparse; printf x | dd of=sparse bs=1 seek=50M conv=notrunc 2>/dev/null
    setfattr -n user.colour -v blue file
    setfacl -m u:1234:rw file
    cp /bin/true captrue; setcap cap_net_raw+ep captrue
    printf name > "$(printf 'bad\377name')"
    touch -d '2001-02-03 04:05:06.123456789' old
    mkdir -p deep/er/still; echo x > deep/er/still/file; chmod 1777 deep
    rm -rf /usr/share/zoneinfo; rm /etc/services; rm -rf /etc/alternatives; mkdir /etc/alternatives; echo new > /etc/alternatives/one
    mv /etc/profile.d /etc/profile.moved 2>/dev/null || true
"#;

/// Prints everything a move must keep, the same before and after.
const LIST: &str = r#"
    cd /stuff && find . ! -name . -printf '%P %y %m %U %G %s %n %l %T@\n' | sort
    find . -type f | sort | while read -r f; do sha256sum "$f"; done
    du -k sparse | cut -f1 | awk '{print ($1 < 1000) ? "sparse" : "full"}'
    getfattr -d -m - file captrue 2>/dev/null; getfacl -n file; getcap captrue
    test file -ef hard && echo linked
    stat -c '%t:%T' dev
    ls /etc/alternatives /usr/share/zoneinfo /etc/services /etc/profile.d /etc/profile.moved 2>&1 | grep -v total
"#;

/// A container that does as it is told by `runc exec`.
fn sleeper(name: &str, rootfs: Rootfs) -> ContainerSpec {
    let mut spec = ContainerSpec::new(name, ADDRESS, &["sleep", "1000000"]);
    spec.rootfs = rootfs;
    spec
}

fn exec(host: &Host, name: &str, script: &str) -> Result<String> {
    let output = host.output(["runc", "exec", name, "sh", "-c", script])?;
    ensure!(output.status.success(), "in {name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn everything_arrives(lab: &Lab, rootfs: Rootfs) -> Result<()> {
    let stage = Stage::of(lab)?;
    let spec = sleeper("files", rootfs);
    spec.start(stage.a)?;
    exec(stage.a, "files", MAKE)?;
    let before = exec(stage.a, "files", LIST)?;
    ensure!(
        before.contains("linked") && before.contains("sparse\n") && before.contains("cap_net_raw"),
        "not made: {before}"
    );
    move_to("files", stage.a, stage.b)?;
    let after = exec(stage.b, "files", LIST)?;
    ensure!(before == after, "files differ.\nbefore:\n{before}\nafter:\n{after}");
    // Changed there, they come back changed.
    exec(stage.b, "files", "cd /stuff && echo more >> file && rm old && rm -r deep && echo d > deep && mkdir dir2")?;
    let before = exec(stage.b, "files", LIST)?;
    move_to("files", stage.b, stage.a)?;
    let after = exec(stage.a, "files", LIST)?;
    ensure!(before == after, "files differ after the way back.\nbefore:\n{before}\nafter:\n{after}");
    Ok(())
}

fn overlay(lab: &Lab) -> Result<()> {
    everything_arrives(lab, Rootfs::Overlay)
}

fn plain(lab: &Lab) -> Result<()> {
    everything_arrives(lab, Rootfs::Plain)
}

fn missing_layer(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let spec = sleeper("layered", Rootfs::Overlay);
    let bundle = spec.bundle();
    spec.start(stage.a)?;
    stage.a.sh(&delete("layered"))?;
    // The same container on a layer that only this host has, over the common one.
    stage.a.sh(&format!(
        "umount {bundle}/rootfs; mkdir -p /srv/disk/layer; echo only-here > /srv/disk/layer/marker; \
         mount -t overlay overlay -o lowerdir=/srv/disk/layer:/srv/image,upperdir={bundle}/upper,workdir={bundle}/work {bundle}/rootfs; \
         runc run --detach --bundle {bundle} layered </dev/null >/dev/null 2>&1"
    ))?;
    move_to("layered", stage.a, stage.b)?;
    ensure!(exec(stage.b, "layered", "cat /marker")?.trim() == "only-here", "the layer did not arrive");
    ensure!(!stage.b.sh("ls /var/lib/longhaul/layers")?.trim().is_empty(), "the layer was not kept");
    // Known now: the second time it is not sent again.
    move_to("layered", stage.b, stage.a)?;
    ensure!(exec(stage.a, "layered", "cat /marker")?.trim() == "only-here", "the layer did not come back");
    Ok(())
}

const TICKER: &str = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done";

/// The same; most of the time its output is another one, and its own is set aside.
const ASIDE: &str = "i=0; while :; do echo line $i; i=$((i+1)); { sleep 0.02; echo; } > /aside; done";

/// Every line once, in order: nothing lost between the two hosts.
fn must_be_whole(log: &str) -> Result<usize> {
    let numbers: Vec<usize> = log.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    let expected: Vec<usize> = (0..numbers.len()).collect();
    ensure!(numbers == expected, "the log is not whole: {log}");
    Ok(numbers.len())
}

fn wait_lines(host: &Host, log: &str, lines: usize) -> Result<()> {
    host.sh(&format!("for i in $(seq 500); do [ $(wc -l < {log}) -gt {lines} ] && exit 0; sleep 0.02; done; exit 1"))
        .map(drop)
}

fn log_file(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let spec = ContainerSpec::new("ticker", ADDRESS, &["sh", "-c", ASIDE]);
    spec.start(stage.a)?;
    wait_lines(stage.a, &spec.log(), 20)?;
    move_to("ticker", stage.a, stage.b)?;
    let moved = stage.b.sh(&format!("wc -l < {}", spec.log()))?.trim().parse::<usize>()?;
    wait_lines(stage.b, &spec.log(), moved + 20)?;
    must_be_whole(&stage.b.sh(&format!("cat {}", spec.log()))?)?;
    move_to("ticker", stage.b, stage.a)?;
    wait_lines(stage.a, &spec.log(), moved + 40)?;
    must_be_whole(&stage.a.sh(&format!("cat {}", spec.log()))?)?;
    Ok(())
}

fn log_pipe(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let spec = ContainerSpec::new("piped", ADDRESS, &["sh", "-c", TICKER]);
    let bundle = spec.bundle();
    spec.start(stage.a)?;
    stage.a.sh(&format!(
        "runc delete --force piped; \
         (runc run --detach --bundle {bundle} piped </dev/null 2>&1 | cat >/tmp/old.log) >/dev/null 2>&1 </dev/null &"
    ))?;
    stage.a.sh("for i in $(seq 500); do [ -s /tmp/old.log ] && exit 0; sleep 0.02; done; exit 1")?;
    wait_lines(stage.a, "/tmp/old.log", 10)?;
    let said =
        migrate(stage.a, &["piped", "--to", &stage.b.name, "--log", "/var/log/containers/piped-there.log", "-q"])?;
    ensure!(said.code == 0, "{}", said.text());
    wait_lines(stage.b, "/var/log/containers/piped-there.log", 20)?;
    Ok(())
}

fn volumes(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let mut spec = sleeper("volumes", Rootfs::Overlay);
    let bind = |destination: &str, source: &str| json!({ "destination": destination, "source": source, "type": "bind", "options": ["rbind", "rw"] });
    spec.mounts = vec![
        bind("/data", "/srv/volumes/data"),
        bind("/shared", "/srv/volumes/shared"),
        bind("/etc/conf", "/srv/volumes/conf"),
    ];
    stage.a.sh("mkdir -p /srv/volumes/data/sub /srv/volumes/shared; echo here > /srv/volumes/data/sub/file; echo conf > /srv/volumes/conf")?;
    stage.b.sh("mkdir -p /srv/volumes/shared; echo there > /srv/volumes/shared/file")?;
    spec.start(stage.a)?;
    let refused = migrate(stage.a, &["volumes", "--to", &stage.b.name, "-q"])?;
    ensure!(refused.code == 3 && refused.obstacles().contains("/data=copy"), "{}", refused.text());
    let moved = migrate(
        stage.a,
        &["volumes", "--to", &stage.b.name, "-q", "--volumes", "copy", "--volumes", "/shared=shared"],
    )?;
    ensure!(moved.code == 0, "{}", moved.text());
    let seen = exec(stage.b, "volumes", "cat /data/sub/file /shared/file /etc/conf")?;
    ensure!(seen == "here\nthere\nconf\n", "the volumes hold {seen:?}");
    Ok(())
}

fn changing(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let writer = "i=0; mkdir /out; while :; do i=$((i+1)); echo $i > /out/new; mv /out/new /out/$((i%50)); echo $i >> /out/log; done";
    let spec = ContainerSpec::new("writer", ADDRESS, &["sh", "-c", writer]);
    spec.start(stage.a)?;
    stage.a.sh(&format!(
        "for i in $(seq 500); do [ -s {0}/upper/out/log ] && exit 0; sleep 0.02; done; exit 1",
        spec.bundle()
    ))?;
    move_to("writer", stage.a, stage.b)?;
    // The writer goes on from where it was: a file that arrived late would break the sequence.
    exec(stage.b, "writer", "awk '{ if ($1 != NR) { print \"broken at \" NR; exit 1 } }' /out/log")?;
    Ok(())
}

fn unstoppable(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let mut spec = ContainerSpec::new(
        "waiter",
        ADDRESS,
        &["sh", "-c", "while :; do mkdir /busy/x; rmdir /busy/x; sleep 0.01; done"],
    );
    spec.mounts = vec![
        json!({ "destination": "/busy", "source": "/srv/volumes/busy", "type": "bind", "options": ["rbind", "rw"] }),
    ];
    for host in [stage.a, stage.b] {
        host.sh("mkdir -p /srv/volumes/busy")?;
    }
    spec.start(stage.a)?;
    stage.a.sh("lab-tool hold-directory /srv/volumes/busy --seconds 5 >/dev/null 2>&1 </dev/null & \
         for i in $(seq 400); do \
           for pid in $(runc ps --format json waiter | tr -d '[]' | tr ',' ' '); do \
             grep -q '^State:.D' /proc/$pid/status 2>/dev/null && exit 0; \
           done; sleep 0.005; \
         done; exit 1")?;
    let moved = migrate(stage.a, &["waiter", "--to", &stage.b.name, "-q", "--volumes", "shared"])?;
    ensure!(moved.code == 0, "{}", moved.text());
    let freezes = moved.report["freezes"].as_u64();
    ensure!(freezes.is_some_and(|freezes| freezes > 1), "it was stopped at once: {}", moved.report);
    exec(stage.b, "waiter", "for i in $(seq 500); do [ -d /busy/x ] && exit 0; sleep 0.005; done; exit 1")?;
    Ok(())
}

/// In passes, and not in CRIU's archive: also what a task writes through a mapping.
fn memory_filesystems(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let command = ["lab-tool", "selfcheck", "run", "--dir", "/work", "--listen", "0.0.0.0:7004", "--without", WITHOUT];
    let mut spec = ContainerSpec::new("memory-files", ADDRESS, &command);
    let tmpfs = |place: &str| json!({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=200m", "mode=1777"]});
    spec.mounts = vec![tmpfs("/tmp"), tmpfs("/stuff")];
    spec.start(stage.a)?;
    let check =
        format!("lab-tool wait-port {ADDRESS}:7004 --seconds 20 && lab-tool selfcheck query --addr {ADDRESS}:7004");
    stage.c.sh(&check)?;
    let fill = "head -c 40000000 /dev/urandom > /stuff/random; head -c 9000000 /dev/urandom > /dev/shm/random";
    exec(stage.a, "memory-files", &format!("{MAKE}\n{fill}"))?;
    let list = format!("{LIST}\nsha256sum /dev/shm/random; grep -E ' /(stuff|dev/shm) ' /proc/self/mounts");
    let list = |host: &Host| exec(host, "memory-files", &list);
    let before = list(stage.a)?;
    ensure!(before.contains("linked") && before.contains("random"), "not made: {before}");
    for (from, to) in [(stage.a, stage.b), (stage.b, stage.a)] {
        move_to("memory-files", from, to)?;
        let after = list(to)?;
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
        stage.c.sh(&check)?;
        to.sh("for i in $(seq 400); do grep 'longhaul.*tmpfs-' /proc/mounts || exit 0; sleep 0.05; done; exit 1")
            .context("still mounted for the way")?;
    }
    Ok(())
}
