//! Containers that write faster than can be copied: throttled, and changed while they move.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Stage;
use super::memory::{memcheck, moved, must_be_right};
use super::postcopy::Slow;
use crate::agents::{self, Agent};
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "a container that writes too fast is throttled and has its processor time back",
            run: throttled,
        },
        Scenario { name: "a container throttled by an agent that is killed has its processor time back", run: killed },
        Scenario { name: "a move is tuned while it is under way", run: tuned },
    ]
}

/// The CPU quota of the container's cgroup: `max` or -1 where there is none.
const QUOTA: &str = "pid=$(runc state memory | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p'); \
    v1=$(sed -n 's/^[0-9]*:[^:]*\\bcpu\\b[^:]*:\\(.*\\)/\\1/p' /proc/$pid/cgroup | head -1); v2=$(sed -n 's/^0::\\(.*\\)/\\1/p' /proc/$pid/cgroup); \
    cat /sys/fs/cgroup/cpu$v1/cpu.cfs_quota_us /sys/fs/cgroup/cpu,cpuacct$v1/cpu.cfs_quota_us /sys/fs/cgroup$v2/cpu.max 2>/dev/null | head -1";

fn quota(host: &Host) -> Result<String> {
    let text = host.sh(QUOTA)?;
    let word = text.split_whitespace().next().context("the container's cgroup has no CPU quota")?;
    Ok(word.to_owned())
}

fn is_free(quota: &str) -> bool {
    quota == "max" || quota == "-1"
}

/// A writer of 156 MiB a second, and links that carry 36.
fn fast<'a>(stage: &Stage<'a>) -> Result<Slow<'a>> {
    memcheck(stage.a, stage.c, "96", "40000")?;
    ensure!(is_free(&quota(stage.a)?), "it has a quota before it is moved");
    Slow::new([stage.a, stage.b], "300mbit")
}

fn throttled(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    // How long moves took under the load of other scenarios must not count here.
    agents::stop(stage.a, Agent::Source)?;
    agents::start(stage.a, Agent::Source)?;
    agents::wait_ready(stage.a)?;
    let slow = fast(&stage)?;
    let report = moved("memory", stage.a, stage.b, &["--auto-converge", "--max-downtime", "1500ms"])?;
    let throttled = &report["memory"]["throttled"];
    ensure!(throttled["steps"].as_u64() > Some(0), "it was not throttled: {}", report["memory"]);
    drop(slow);
    ensure!(is_free(&quota(stage.b)?), "it is throttled where it came to: {}", quota(stage.b)?);
    must_be_right(stage.c)?;
    // Given up, it has it back where it is.
    let slow = Slow::new([stage.b, stage.a], "100mbit")?;
    let said = super::migrate(stage.b, &["memory", "--to", &stage.a.name, "-q", "--auto-converge", "--timeout", "6s"])?;
    drop(slow);
    ensure!(said.code == 0 || said.report["memory"].is_object(), "{}", said.text());
    let here = if said.code == 0 { stage.a } else { stage.b };
    ensure!(is_free(&quota(here)?), "it is throttled after a move that was given up: {}", quota(here)?);
    must_be_right(stage.c)
}

fn killed(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let slow = fast(&stage)?;
    let mut moving = stage.a.command(["migrate", "memory", "--to", &stage.b.name, "-q", "--auto-converge"]).spawn()?;
    let mut taken = false;
    for _ in 0..400 {
        taken = !is_free(&quota(stage.a)?);
        if taken {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    stage.a.sh("pkill -KILL -x longhaul-source")?;
    moving.wait()?;
    ensure!(taken, "it was never throttled");
    ensure!(!is_free(&quota(stage.a)?), "the quota was gone before the agent came back");
    agents::come_back(stage.a, Agent::Source)?;
    ensure!(is_free(&quota(stage.a)?), "it is throttled for ever: {}", quota(stage.a)?);
    drop(slow);
    must_be_right(stage.c)
}

fn tuned(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    memcheck(stage.a, stage.c, "64", "4000")?;
    let tune = |words: &[&str]| stage.a.output(["migrate", "tune"].iter().chain(words));
    let none = tune(&["memory", "--bandwidth", "1M"])?;
    ensure!(!none.status.success(), "nothing was under way, and was tuned");
    let words = ["migrate", "memory", "--to", &stage.b.name, "-q", "--format", "json", "--bandwidth", "3M"];
    let moving = stage.a.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    stage.a.sh(
        "for i in $(seq 1000); do migrate status | grep running | grep -q pre-copy && exit 0; sleep 0.01; done; exit 1",
    )?;
    // It would take 20 s for the first round alone, and never end.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    for bad in [&["--bandwidth", "fast"][..], &["--auto-converge", "maybe"], &[]] {
        ensure!(tune(bad)?.status.code() == Some(2), "{bad:?} was taken");
    }
    let said = tune(&["memory", "--bandwidth", "unlimited", "--max-downtime", "2s", "--auto-converge", "on"])?;
    ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let output = moving.wait_with_output()?;
    let report: Value = serde_json::from_slice(&output.stdout).context("read the report")?;
    ensure!(report["outcome"] == "moved", "{report}");
    let took = report["phases"]["pre-copy"].as_f64();
    ensure!(took < Some(15_000.0), "it went on as slowly as before: {report}");
    must_be_right(stage.c)
}
