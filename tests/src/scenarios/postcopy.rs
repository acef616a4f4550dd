//! Containers that run before all of their memory has come.

use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::memory::{digest, filled_redis, memcheck, moved, must_be_right};
use super::{Stage, migrate, runs, settle};
use crate::agents::{self, Agent};
use crate::container::delete;
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "memory that comes after the container runs checks itself", run: after },
        Scenario { name: "a link that breaks during post-copy is waited for", run: link_broken },
        Scenario { name: "agents and fillers may be killed during post-copy", run: killed },
        Scenario { name: "a destination lost during post-copy leaves the choice to the operator", run: lost },
        Scenario { name: "a container that writes too fast goes by post-copy if that is allowed", run: too_fast },
    ]
}

/// A slow link out of both hosts, until this value goes: what is owed takes seconds.
pub(super) struct Slow<'a>([&'a Host; 2]);

impl<'a> Slow<'a> {
    pub(super) fn new(hosts: [&'a Host; 2], rate: &str) -> Result<Self> {
        for host in hosts {
            host.sh(&format!("tc qdisc replace dev eth0 root tbf rate {rate} burst 64k latency 20ms"))?;
        }
        Ok(Self(hosts))
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        for host in self.0 {
            let _ = host.sh("tc qdisc del dev eth0 root");
        }
    }
}

fn after(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    memcheck(stage.a, stage.c, "48", "10000")?;
    let mut hosts = [stage.a, stage.b];
    for how in ["now", "auto", "now", "now"] {
        let report = moved("memory", hosts[0], hosts[1], &["--postcopy", how])?;
        let postcopy = &report["memory"]["postcopy"];
        ensure!(
            how == "auto" || postcopy["owed_pages"].as_u64() > Some(1000),
            "nothing was owed: {}",
            report["memory"]
        );
        must_be_right(stage.c)?;
        hosts.swap(0, 1);
    }
    Ok(())
}

/// A move that is under way.
struct Moving(Child);

impl Moving {
    /// Starts one of a container whose memory takes seconds to come, and returns when it runs at its destination.
    fn start(name: &str, from: &Host, to: &Host) -> Result<Self> {
        let words = ["migrate", name, "--to", &to.name, "-q", "--format", "json", "--postcopy", "now"];
        let moving = Self(from.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
        from.sh("for i in $(seq 1000); do migrate status | grep running | grep -q post-copy && exit 0; sleep 0.01; done; migrate status; exit 1")
            .context("the move did not get as far as post-copy")?;
        Ok(moving)
    }

    fn end(self) -> Result<(Option<i32>, Value)> {
        let output = self.0.wait_with_output()?;
        let report = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        Ok((output.status.code(), report))
    }

    /// It must have moved, with this many broken connections at least.
    fn must_have_moved(self, breaks: u64) -> Result<()> {
        let (code, report) = self.end()?;
        let seen = report["memory"]["postcopy"]["breaks"].as_u64();
        ensure!(code == Some(0) && seen >= Some(breaks), "{report}");
        Ok(())
    }
}

fn link_broken(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    memcheck(stage.a, stage.c, "64", "10000")?;
    let slow = Slow::new([stage.a, stage.b], "100mbit")?;
    let moving = Moving::start("memory", stage.a, stage.b)?;
    // Reset, and then away for longer than a connection may say nothing.
    stage.b.sh(
        "ss -K state established sport = :7474 >/dev/null; sleep 1; ss -K state established sport = :7474 >/dev/null",
    )?;
    lab.cable(stage.a, false)?;
    let seen = stage.a.sh("for i in $(seq 100); do migrate status --format json | grep -q 'waits for the rest of its memory' && exit 0; sleep 0.1; done; migrate status --format json; exit 1");
    lab.cable(stage.a, true)?;
    seen.context("status does not show that both hosts wait")?;
    moving.must_have_moved(2)?;
    drop(slow);
    must_be_right(stage.c)?;
    moved("memory", stage.b, stage.a, &[]).map(drop)?;
    must_be_right(stage.c)
}

fn killed(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let before = filled_redis(&stage)?;
    // Some five seconds, in which the victim is hit.
    let slow = Slow::new([stage.a, stage.b], "40mbit")?;
    let mut hosts = [stage.a, stage.b];
    for victim in ["filler", "destination", "source"] {
        let [from, to] = hosts;
        let moving = Moving::start("web", from, to)?;
        match victim {
            "filler" => {
                to.sh("kill -9 $(pgrep -f '[e]xe work')")?;
                moving.must_have_moved(1)?;
            }
            "destination" => {
                to.sh("pkill -KILL -x longhaul-dest; while pgrep -x longhaul-dest >/dev/null; do sleep 0.02; done")?;
                std::thread::sleep(Duration::from_millis(500));
                agents::start(to, Agent::Dest)?;
                agents::wait_ready(to)?;
                moving.must_have_moved(1)?;
            }
            _ => {
                from.sh("pkill -KILL -x longhaul-source")?;
                agents::start(from, Agent::Source)?;
                agents::wait_ready(from)?;
                // Who followed it has lost sight of it.
                let mut moving = moving;
                moving.0.wait()?;
            }
        }
        ensure!(digest(stage.c)? == before, "the content is another after the {victim} was killed");
        from.sh("for i in $(seq 300); do [ -z \"$(ls /var/lib/longhaul/source)\" ] && exit 0; sleep 0.1; done; ls /var/lib/longhaul/source; exit 1")
            .context("the source does not come to an end")?;
        ensure!(runs(to, "web")? && !runs(from, "web")?, "it does not run where it went");
        hosts.swap(0, 1);
    }
    drop(slow);
    Ok(())
}

fn lost(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    filled_redis(&stage)?;
    stage.c.sh("redis-cli -h 10.77.0.20 set where here")?;
    let slow = Slow::new([stage.a, stage.b], "40mbit")?;
    let moving = Moving::start("web", stage.a, stage.b)?;
    lab.cable(stage.b, false)?;
    let ended = moving.end();
    let decided = ended.and_then(|(code, report)| {
        ensure!(code == Some(5) && report["phase"] == "post-copy", "{report}");
        let told = stage.a.output(["migrate", "recover", "web"])?;
        let text = String::from_utf8_lossy(&told.stdout).into_owned();
        ensure!(text.contains("a part of its memory is still here"), "{text}");
        let kept = stage.a.output(["migrate", "recover", "web", "--keep-here"])?;
        ensure!(kept.status.success(), "{}", String::from_utf8_lossy(&kept.stderr));
        stage.c.sh("[ \"$(redis-cli -h 10.77.0.20 get where)\" = here ]").context("what was kept does not answer")
    });
    drop(slow);
    lab.cable(stage.b, true)?;
    decided?;
    stage
        .b
        .sh("for i in $(seq 300); do runc state web | grep -q -e '\"status\": \"paused\"' -e '\"status\": \"stopped\"' && exit 0; sleep 0.1; done; exit 1")
        .context("the copy that was overruled is neither frozen nor ended")?;
    ensure!(runs(stage.a, "web")?, "it does not run where it was kept");
    stage.b.sh(&format!("{}; umount -l /srv/containers/web/rootfs; rm -rf /srv/containers/web", delete("web")))?;
    // The filler finds out that nobody waits any more.
    settle(stage.b)?;
    stage
        .b
        .sh("for i in $(seq 100); do [ -z \"$(ls /run/longhaul/dest)\" ] && exit 0; sleep 0.1; done; exit 1")
        .map(drop)
}

fn too_fast(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    memcheck(stage.a, stage.c, "96", "40000")?;
    let slow = Slow::new([stage.a, stage.b], "300mbit")?;
    let said = migrate(stage.a, &["memory", "--to", &stage.b.name, "-q", "--postcopy", "auto"])?;
    ensure!(said.code == 0, "the move failed: {}", said.text());
    ensure!(said.report["memory"]["path"] == "post-copy", "it did not go by post-copy: {}", said.report["memory"]);
    drop(slow);
    must_be_right(stage.c)
}
