//! One move, and what is done to it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::plan::Way;
use crate::lab::Host;

/// No move of the fleet takes that long, not even on a machine with other work: it hangs.
const HANGS_AFTER_S: u32 = 120;
/// What `timeout` exits with when that has passed.
const TIMED_OUT: i32 = 124;
/// While this file is there, workers are killed.
const KILLING: &str = "/tmp/soak-killing";

/// Where a container ended up.
#[derive(Debug)]
pub(crate) enum Ending {
    /// It runs there.
    Moved { downtime_ms: f64 },
    /// It was cancelled and runs here.
    Cancelled,
    /// It failed and should run here; why.
    Stayed(String),
}

/// A request to cancel, at some time after a phase began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cancel {
    /// The phase.
    pub(crate) phase: &'static str,
    /// The time.
    pub(crate) after: Duration,
}

/// Moves a container. An error is one of the lab, not of the move.
pub(crate) fn migrate(name: &str, from: &Host, to: &Host, way: Way, cancel: Option<Cancel>) -> Result<Ending> {
    let limit = HANGS_AFTER_S.to_string();
    let words = ["timeout", &limit, "migrate", name, "--to", &to.name, "--format", "json", "--progress", "json"];
    // The workloads write as fast as they do: the move must end all the same.
    let words = words.iter().chain(&["--timeout-action", "freeze"]).chain(way.options());
    let mut child = from.command(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let said = follow(&mut child, || cancel_in(from, name), cancel)?;
    let output = child.wait_with_output().context("wait for migrate")?;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok(match report["outcome"].as_str() {
        Some("moved") => Ending::Moved { downtime_ms: report["downtime_ms"].as_f64().unwrap_or(f64::NAN) },
        Some("cancelled") => Ending::Cancelled,
        _ if output.status.code() == Some(TIMED_OUT) => {
            Ending::Stayed(format!("it did not end within {HANGS_AFTER_S} s:\n{said}"))
        }
        _ => Ending::Stayed(format!("{}: {report}\n{said}", output.status)),
    })
}

/// Reads the progress to its end; cancels when it is time.
fn follow(child: &mut Child, cancel_now: impl Fn() -> Result<()>, cancel: Option<Cancel>) -> Result<String> {
    let stderr = child.stderr.take().context("the progress of migrate")?;
    let (mut said, mut pending) = (String::new(), cancel);
    for line in BufReader::new(stderr).lines() {
        let line = line.context("read the progress of migrate")?;
        let step: Value = serde_json::from_str(&line).unwrap_or_default();
        if let Some(Cancel { after, .. }) = pending.take_if(|cancel| step["phase"] == cancel.phase) {
            std::thread::sleep(after);
            cancel_now()?;
        }
        said.push_str(&line);
        said.push('\n');
    }
    Ok(said)
}

/// Whether it was still under way is seen from how it ended.
fn cancel_in(host: &Host, name: &str) -> Result<()> {
    host.output(["migrate", "cancel", name]).map(drop)
}

/// Kills workers that fill in memory on a host, until it has killed enough or is told to end.
pub(crate) struct Killer<'a> {
    host: &'a Host,
    child: Child,
}

impl<'a> Killer<'a> {
    /// Waits for workers; each one lives for `after`.
    pub(crate) fn start(host: &'a Host, workers: u32, after: Duration) -> Result<Self> {
        let after = after.as_secs_f64();
        let script = format!(
            "n=0; while [ -e {KILLING} ] && [ $n -lt {workers} ]; do \
               for worker in $(pgrep -f '[e]xe work'); do \
                 sleep {after}; kill -KILL $worker 2>/dev/null && n=$((n+1)); \
               done; \
               sleep 0.005; \
             done; echo $n"
        );
        host.sh(&format!("touch {KILLING}"))?;
        let child = host.command(["sh", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        Ok(Self { host, child })
    }

    /// How many it has killed.
    pub(crate) fn finish(self) -> Result<u64> {
        self.host.sh(&format!("rm -f {KILLING}"))?;
        let output = self.child.wait_with_output().context("wait for the killer")?;
        String::from_utf8_lossy(&output.stdout).trim().parse().context("how many workers were killed")
    }
}
