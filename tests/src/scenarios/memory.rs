//! Memory that is copied while the container runs arrives as it was.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Stage, counter, migrate, must_have_counted_on, redis, runs, settle};
use crate::agents::{self, Agent};
use crate::client::Client;
use crate::container::{ContainerSpec, pss};
use crate::harness::{Scenario, tidy};
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "memory under heavy change checks itself after many moves", run: many_moves },
        Scenario { name: "memory checks itself where the move was given up", run: given_up },
        Scenario { name: "every byte of an address space is the same after a move", run: same_bytes },
        Scenario { name: "a filler that is killed is started again and nothing is lost", run: filler_killed },
        Scenario { name: "memory goes on being filled in without its agent", run: agent_killed },
        Scenario { name: "a page connection that breaks goes on where it stopped", run: connection_broken },
        Scenario { name: "an eager move has all memory in place before the container runs", run: eager },
        Scenario { name: "memory that was shared by fork stays shared", run: prefork },
        Scenario { name: "without its library all memory goes in the images and the report says so", run: no_library },
        Scenario { name: "an operator has all memory go while the container is stopped", run: no_tracker },
        Scenario { name: "a container that writes too fast stays untouched", run: too_fast },
    ]
}

const MEMCHECK: &str = "10.77.0.26:7003";

/// The self-checking workload: two processes of two threads that write, map, remap, give up, and fork.
pub(super) fn memcheck(host: &Host, client: &Host, mib: &str, rate: &str) -> Result<()> {
    let words = [
        "lab-tool",
        "memcheck",
        "run",
        "--mib",
        mib,
        "--rate",
        rate,
        "--procs",
        "2",
        "--threads",
        "2",
        "--listen",
        MEMCHECK,
    ];
    let words = words.map(|word| if word == MEMCHECK { "0.0.0.0:7003" } else { word });
    ContainerSpec::new("memory", Ipv4Addr::new(10, 77, 0, 26), &words).start(host)?;
    client.sh(&format!("lab-tool wait-port {MEMCHECK} --seconds 20")).map(drop)
}

pub(super) fn must_be_right(client: &Host) -> Result<()> {
    client.sh(&format!("lab-tool memcheck query --addr {MEMCHECK}")).map(drop)
}

pub(super) fn moved(name: &str, from: &Host, to: &Host, options: &[&str]) -> Result<Value> {
    let words = [&[name, "--to", &to.name, "-q"], options].concat();
    let said = migrate(from, &words)?;
    ensure!(said.code == 0, "the move failed: {}", said.text());
    Ok(said.report)
}

fn many_moves(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    memcheck(stage.a, stage.c, "64", "20000")?;
    let mut hosts = [stage.a, stage.b];
    for turn in 0..6 {
        // A loaded machine may never get as far as the downtime that is the default.
        let report = moved("memory", hosts[0], hosts[1], &["--timeout-action", "freeze"])?;
        ensure!(report["memory"]["flags_from"] == "iterator", "CRIU read smaps: {}", report["memory"]);
        ensure!(report["memory"]["tracker"] == "userfaultfd-wp", "memory was not tracked: {}", report["memory"]);
        // Also while it is still being filled in.
        if turn % 2 == 0 {
            must_be_right(stage.c)?;
        }
        hosts.swap(0, 1);
    }
    must_be_right(stage.c)
}

fn given_up(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    memcheck(stage.a, stage.c, "64", "20000")?;
    without_restore(stage.b, || {
        for _ in 0..3 {
            must_be_given_up("memory", stage.a, stage.b)?;
            must_be_right(stage.c)?;
        }
        Ok(())
    })?;
    moved("memory", stage.a, stage.b, &["--timeout-action", "freeze"])?;
    must_be_right(stage.c)
}

/// What workers have by fork(2) is there once, also where the server is no container's first task, and after several moves.
fn prefork(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let server = ["lab-tool", "prefork", "--mib", "64", "--workers", "4", "--listen", "0.0.0.0:7003"];
    let below = [&["sh", "-c", "\"$@\"; exit", "sh"], &server[..]].concat();
    for command in [&server[..], &below] {
        ContainerSpec::new("prefork", Ipv4Addr::new(10, 77, 0, 26), command).start(stage.a)?;
        stage.c.sh(&format!("lab-tool wait-port {MEMCHECK} --seconds 20"))?;
        must_be_right(stage.c)?;
        let before = pss(stage.a, "prefork")?;
        let mut hosts = [stage.a, stage.b];
        for options in [&[][..], &["--eager"], &["--postcopy", "now"]] {
            moved("prefork", hosts[0], hosts[1], options)?;
            hosts.swap(0, 1);
            settle(hosts[0])?;
            must_be_right(stage.c)?;
            let ratio = pss(hosts[0], "prefork")? / before;
            ensure!(ratio <= 1.15, "after a move with {options:?} it takes {ratio:.2} times the memory");
        }
        hosts.into_iter().try_for_each(tidy)?;
    }
    Ok(())
}

/// CRIU on a host can't restore meanwhile, for want of a capability: everything before it works, the freeze included.
fn without_restore(host: &Host, work: impl FnOnce() -> Result<()>) -> Result<()> {
    host.sh("mv /usr/sbin/criu /usr/sbin/criu.away; \
         printf '#!/bin/sh\\nexec setpriv --bounding-set -sys_admin --inh-caps -sys_admin %s \"$@\"\\n' \
           /usr/sbin/criu.away > /usr/sbin/criu; \
         chmod +x /usr/sbin/criu")?;
    let result = work();
    host.sh("mv /usr/sbin/criu.away /usr/sbin/criu")?;
    result
}

/// A move to a host where CRIU can't restore ends there, after the container was frozen.
fn must_be_given_up(name: &str, from: &Host, to: &Host) -> Result<()> {
    let said = migrate(from, &[name, "--to", &to.name, "-q", "--timeout-action", "freeze"])?;
    let frozen = ["final-state", "restore"].iter().any(|phase| said.report["phase"] == *phase);
    ensure!(said.code == 1 && frozen, "it was not given up while frozen: {}", said.text());
    Ok(())
}

fn same_bytes(lab: &Lab) -> Result<()> {
    const NAME: &str = "varied";
    let stage = Stage::of(lab)?;
    let mut spec = ContainerSpec::new(NAME, Ipv4Addr::new(10, 77, 0, 27), &["lab-tool", "varied-memory"]);
    spec.address = None;
    spec.start(stage.a)?;
    let log = spec.log();
    stage.a.sh(&format!("for i in $(seq 400); do grep -q ready {log} && exit 0; sleep 0.05; done; exit 1"))?;
    let before = AddressSpace::all_of(stage.a, NAME)?;
    ensure!(before.len() == 2, "{} processes, not the first and its child", before.len());

    without_restore(stage.b, || must_be_given_up(NAME, stage.a, stage.b))?;
    must_be_same(&before, stage.a, NAME).context("after a move that was given up")?;
    let report = moved(NAME, stage.a, stage.b, &[])?;
    ensure!(report["memory"]["path"] == "lazy", "{}", report["memory"]);
    must_be_same(&before, stage.b, NAME).context("after a move")?;
    moved(NAME, stage.b, stage.a, &["--eager"])?;
    must_be_same(&before, stage.a, NAME).context("after an eager move")
}

/// A process's memory: a hash for each area, under its addresses, permissions, flags and name.
struct AddressSpace {
    /// In the container's numbering, which a move keeps.
    pid: u64,
    areas: BTreeMap<String, String>,
}

impl AddressSpace {
    /// Those of all processes of a container, in the order of their numbers.
    fn all_of(host: &Host, container: &str) -> Result<Vec<Self>> {
        let list = host.sh(&format!("runc ps --format json {container}"))?;
        let pids: Vec<u64> = serde_json::from_str(list.trim()).context("read the container's processes")?;
        let mut all = pids.into_iter().map(|pid| Self::of(host, pid)).collect::<Result<Vec<Self>>>()?;
        all.sort_by_key(|space| space.pid);
        Ok(all)
    }

    fn of(host: &Host, pid: u64) -> Result<Self> {
        let said: Value = serde_json::from_str(&host.sh(&format!("lab-tool address-hash --pid {pid}"))?)?;
        let areas = said["areas"].as_array().context("no areas")?.iter().map(|area| {
            let text = |key: &str| area[key].as_str().unwrap_or_default().to_owned();
            let content = format!("{} ({} pages unreadable)", text("hash"), area["unreadable_pages"]);
            let area = [text("range"), text("perms"), text("flags"), text("name")].join(" ");
            (area, content)
        });
        Ok(Self { pid: said["pid"].as_u64().context("no pid")?, areas: areas.collect() })
    }

    /// What is not as it was, an area a line.
    fn differences(&self, now: &Self) -> Vec<String> {
        let gone = self.areas.iter().filter_map(|(area, before)| match now.areas.get(area) {
            Some(after) if after == before => None,
            Some(after) => Some(format!("{area}: {before} became {after}")),
            None => Some(format!("{area}: is gone")),
        });
        let new = now.areas.keys().filter(|area| !self.areas.contains_key(*area));
        gone.chain(new.map(|area| format!("{area}: is new")))
            .map(|what| format!("process {}: {what}", self.pid))
            .collect()
    }
}

/// Compares once all memory is in place.
fn must_be_same(before: &[AddressSpace], host: &Host, container: &str) -> Result<()> {
    settle(host)?;
    let after = AddressSpace::all_of(host, container)?;
    let pids = |spaces: &[AddressSpace]| spaces.iter().map(|space| space.pid).collect::<Vec<_>>();
    ensure!(pids(before) == pids(&after), "processes {:?} became {:?}", pids(before), pids(&after));
    let differences: Vec<String> = before.iter().zip(&after).flat_map(|(was, is)| was.differences(is)).collect();
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// A redis with so much content that filling it in takes a while, and what it says of all of it.
pub(super) fn filled_redis(stage: &Stage<'_>) -> Result<String> {
    redis(stage.a, stage.c)?;
    stage.c.sh("redis-cli -h 10.77.0.20 debug populate 200000 key 1000")?;
    // Nothing packs this: at 40 Mbit/s it takes five seconds.
    stage.c.sh("head -c 24000000 /dev/urandom | redis-cli -h 10.77.0.20 -x set blob")?;
    digest(stage.c)
}

pub(super) fn digest(client: &Host) -> Result<String> {
    client.sh("redis-cli -h 10.77.0.20 debug digest")
}

fn filler_killed(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let before = filled_redis(&stage)?;
    // Whenever a worker shows up, it is killed; ten of them.
    let mut killer = stage
        .b
        .command(["sh", "-c", "n=0; for i in $(seq 20000); do for p in $(pgrep -f '[e]xe work'); do kill -9 $p && n=$((n+1)) && echo $n > /tmp/killed; done; [ $n -ge 10 ] && break; done"])
        .spawn()?;
    let report = moved("web", stage.a, stage.b, &[])?;
    ensure!(report["memory"]["path"] == "lazy", "{}", report["memory"]);
    let after = digest(stage.c)?;
    let _ = killer.kill();
    killer.wait()?;
    ensure!(before == after, "the content is another: {before} and {after}");
    let killed = std::fs::read_to_string(stage.b.path("/tmp/killed")).unwrap_or_default();
    ensure!(!killed.trim().is_empty() && killed.trim() != "0", "no worker was killed");
    Ok(())
}

fn agent_killed(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let before = filled_redis(&stage)?;
    moved("web", stage.a, stage.b, &[])?;
    stage.b.sh("pkill -KILL -x longhaul-dest")?;
    let after = digest(stage.c)?;
    agents::start(stage.b, Agent::Dest)?;
    agents::wait_ready(stage.b)?;
    ensure!(before == after, "the content is another: {before} and {after}");
    ensure!(digest(stage.c)? == before, "the content changed when the agent came back");
    Ok(())
}

fn connection_broken(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let before = filled_redis(&stage)?;
    let words = ["migrate", "web", "--to", &stage.b.name, "-q", "--format", "json", "--bandwidth", "60M"];
    let moving = stage.a.command(words).stdout(std::process::Stdio::piped()).spawn()?;
    // The connection that has sent the most is the one with the pages. It is reset twice.
    for _ in 0..2 {
        stage.b.sh(
            "for i in $(seq 400); do \
               port=$(ss -tinO state established '( sport = :7474 )' | sed -n 's/.*:7474 *[^ ]*:\\([0-9]*\\) .*bytes_received:\\([0-9]*\\).*/\\2 \\1/p' | sort -n | tail -1); \
               set -- $port; [ \"${1:-0}\" -gt 20000000 ] && ss -K state established sport = :7474 dport = :$2 >/dev/null && exit 0; \
               sleep 0.01; done; exit 1",
        )?;
    }
    let output = moving.wait_with_output()?;
    let report: Value = serde_json::from_slice(&output.stdout).context("read the report")?;
    ensure!(report["outcome"] == "moved", "{}", report["error"]);
    let after = digest(stage.c)?;
    ensure!(before == after, "the content is another: {before} and {after}");
    let log = std::fs::read_to_string(stage.a.path(&Agent::Source.log())).unwrap_or_default();
    ensure!(log.contains("the page connection broke; connecting again"), "it was never broken");
    Ok(())
}

fn eager(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let before = filled_redis(&stage)?;
    let report = moved("web", stage.a, stage.b, &["--eager"])?;
    ensure!(report["memory"]["path"] == "eager", "{}", report["memory"]);
    let running = stage.b.sh("pgrep -x longhaul-fill || true")?;
    ensure!(running.trim().is_empty(), "memory is still being filled in");
    ensure!(digest(stage.c)? == before, "the content is another");
    Ok(())
}

fn no_library(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let client = counter(stage.c)?;
    let library = "/usr/local/libexec/longhaul/liblonghaul_criu_filter.so";
    stage.a.sh(&format!("mv {library} {library}.away"))?;
    let report = moved("web", stage.a, stage.b, &[]);
    let strict = migrate(stage.b, &["web", "--to", &stage.a.name, "-q"]);
    stage.a.sh(&format!("mv {library}.away {library}"))?;
    must_be_in_images(&report?, "is not installed")?;
    ensure!(strict?.code == 0, "the way back does not need it there");
    goes_on(client, stage.a)
}

fn must_be_in_images(report: &Value, why: &str) -> Result<()> {
    let memory = &report["memory"];
    let is_said = memory["fallback"].as_str().is_some_and(|reason| reason.contains(why));
    ensure!(memory["path"] == "images" && is_said, "{memory}");
    Ok(())
}

fn no_tracker(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let client = counter(stage.c)?;
    stage.a.sh("sed -i '1i tracker = \"none\"' /etc/longhaul/source.toml")?;
    agents::stop(stage.a, Agent::Source)?;
    agents::start(stage.a, Agent::Source)?;
    agents::wait_ready(stage.a)?;
    must_be_in_images(&moved("web", stage.a, stage.b, &[])?, "tracker = \"none\"")?;
    agents::configure(lab, stage.a)?;
    agents::stop(stage.a, Agent::Source)?;
    agents::start(stage.a, Agent::Source)?;
    goes_on(client, stage.b)
}

fn goes_on(mut client: Client, host: &Host) -> Result<()> {
    client.wait_progress("operations", 500)?;
    must_have_counted_on(&client.finish()?)?;
    ensure!(runs(host, "web")?, "the container does not run on {}", host.name);
    Ok(())
}

fn too_fast(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    memcheck(stage.a, stage.c, "32", "40000")?;
    let said = migrate(
        stage.a,
        &["memory", "--to", &stage.b.name, "-q", "--bandwidth", "20M", "--max-downtime", "200ms", "--max-rounds", "2"],
    )?;
    ensure!(
        said.code == 1
            // The second where moves have taken so long before that the rest of a downtime is too much already.
            && said.report["error"]
                .as_str()
                .is_some_and(|why| why.contains("MiB/s") || why.contains("nothing left to copy")),
        "{}",
        said.text()
    );
    must_be_right(stage.c)?;
    let said = migrate(stage.a, &["memory", "--to", &stage.b.name, "-q", "--bandwidth", "20M", "--timeout", "2s"])?;
    ensure!(said.code == 1, "{}", said.text());
    must_be_right(stage.c)?;
    // Told to, it is moved all the same.
    moved("memory", stage.a, stage.b, &["--bandwidth", "20M", "--timeout", "2s", "--timeout-action", "freeze"])?;
    must_be_right(stage.c)
}
