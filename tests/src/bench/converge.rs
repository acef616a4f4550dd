//! Memory that is written faster than the link carries.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::blackout::Shaped;
use super::subject::{Subject, number, wait_ready};
use super::{Bench, Row, round, stop_and_copy};
use crate::client::Client;
use crate::lab::Host;
use crate::scenarios::settle;

/// A redis, for a client to see a gap of, and beside it 300 MB that are rewritten at 234 MiB/s: twice what 1 Gbit/s carries.
const REWRITER: [&str; 9] = [
    "sh",
    "-c",
    "redis-server --save '' --bind 0.0.0.0 --protected-mode no >/dev/null & exec \"$@\"",
    "sh",
    "lab-tool",
    "rewrite",
    "--mib=300",
    "--rate",
    "60000",
];
/// The link, in bytes a second.
const LINK: f64 = 125e6;

/// One move under a client's eyes.
struct Seen {
    gap_ms: f64,
    report: Value,
}

fn moved(c: &Host, subject: &mut Subject<'_>, address: &str, options: &[&str]) -> Result<Seen> {
    let mut probe = Client::start(c, &["net-probe", "--addr", address])?;
    probe.wait_progress("operations", 500)?;
    let report = subject.moved(options)?;
    probe.wait_progress("operations", 500)?;
    // What comes after the move counts as well.
    std::thread::sleep(Duration::from_secs(4));
    Ok(Seen { gap_ms: round(number(&probe.finish()?["longest_gap_ms"])), report })
}

/// What the rewriter wrote in each interval: when it ended, in ms, and pages.
fn written(host: &Host, name: &str) -> Result<Vec<(f64, f64)>> {
    let log = host.sh(&format!("cat /var/log/containers/{name}.log"))?;
    let line = |line: &str| {
        let (at, pages) = line.split_once(' ')?;
        Some((at.parse().ok()?, pages.parse().ok()?))
    };
    Ok(log.lines().filter_map(line).collect())
}

/// The slowest second within 8 s after the move, divided by the median second before it. The move is where most time passed
/// between two intervals.
fn slowest_second(intervals: &[(f64, f64)], since: f64) -> Option<f64> {
    let recent: Vec<(f64, f64)> = intervals.iter().copied().filter(|(at, _)| *at > since - 5000.0).collect();
    let away = (1..recent.len())
        .max_by(|a, b| (recent[*a].0 - recent[a - 1].0).total_cmp(&(recent[*b].0 - recent[b - 1].0)))?;
    let rate = |part: &[(f64, f64)]| {
        let (first, last) = (part.first()?, part.last()?);
        Some(part[1..].iter().map(|(_, pages)| pages).sum::<f64>() / (last.0 - first.0) * 1000.0)
    };
    let normal =
        rate(&intervals.iter().copied().filter(|(at, _)| (since - 4000.0..since).contains(at)).collect::<Vec<_>>())?;
    let after = &recent[away..];
    let windows = after.iter().enumerate().filter_map(|(first, (start, _))| {
        let end = after[first..].iter().position(|(at, _)| at - start >= 1000.0)?;
        (start - after[0].0 < 8000.0).then(|| rate(&after[first..=first + end]))?
    });
    windows.map(|rate| rate / normal).min_by(f64::total_cmp)
}

pub(super) fn postcopy(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, c) = bench.hosts()?;
    let mut subject = Subject::start(bench, "rewriter", 55, &REWRITER)?;
    wait_ready(a, "rewriter")?;
    let shaped = Shaped::new([a, b])?;
    // The first move of each host reads layers and has cold caches.
    for _ in 0..2 {
        moved(c, &mut subject, "10.77.0.55:6379", &["--postcopy", "auto"])?;
        settle(subject.hosts[0])?;
    }
    let (mut gaps, mut slowest, mut totals) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.samples {
        std::thread::sleep(Duration::from_secs(4));
        let seen = moved(c, &mut subject, "10.77.0.55:6379", &["--postcopy", "auto"])?;
        ensure!(seen.report["memory"]["path"] == "post-copy", "it converged: {}", seen.report["memory"]);
        std::thread::sleep(Duration::from_secs(5));
        let intervals = written(subject.hosts[0], "rewriter")?;
        let since = number(&seen.report["started_unix_ms"]);
        slowest.push(round(100.0 * slowest_second(&intervals, since).context("the rewriter says nothing")?));
        gaps.push(seen.gap_ms);
        let fastest = number(&seen.report["memory_bytes"]) / LINK * 1000.0;
        totals.push(round(number(&seen.report["total_ms"]) / fastest));
        settle(subject.hosts[0])?;
    }
    drop(subject);
    let by_hand = stop_and_copy::spec("rewriterh", 56, &REWRITER);
    stop_and_copy::start(&by_hand, a)?;
    let gap = by_hand_gap(&by_hand, a, b, c);
    stop_and_copy::clean(&by_hand, [a, b])?;
    drop(shaped);
    let gap = gap?;
    Ok(vec![
        Row::beside(
            "client gap, 300 MB rewritten faster than 1 Gbit/s, post-copy",
            "ms",
            gaps,
            &[gap],
            "<= 200 ms; baseline: stop-and-copy",
            |value, _| value <= 200.0,
        ),
        Row::at_least("slowest second after resuming / normal, post-copy", "%", slowest, ">= 30 %", 30.0),
        Row::alone("total time / (memory / link), post-copy", "", totals, "<= 1.3", 1.3),
    ])
}

fn by_hand_gap(spec: &crate::container::ContainerSpec, a: &Host, b: &Host, c: &Host) -> Result<f64> {
    stop_and_copy::wait_ready(spec, a)?;
    let mut probe = Client::start(c, &["net-probe", "--addr", "10.77.0.56:6379"])?;
    probe.wait_progress("operations", 200)?;
    stop_and_copy::move_by_hand(spec, a, b)?;
    probe.wait_progress("operations", 200)?;
    Ok(round(number(&probe.finish()?["longest_gap_ms"])))
}

/// The downtime that is asked for, in milliseconds.
const ASKED_MS: f64 = 300.0;

pub(super) fn auto_converge(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, _) = bench.hosts()?;
    let mut subject = Subject::start(bench, "throttled", 57, &REWRITER)?;
    wait_ready(a, "throttled")?;
    let _shaped = Shaped::new([a, b])?;
    let options = ["--auto-converge", "--max-downtime", "300ms"];
    let mut downtimes = Vec::new();
    for _ in 0..=bench.samples {
        let report = subject.moved(&options)?;
        ensure!(number(&report["memory"]["throttled"]["steps"]) > 0.0, "it was not throttled: {}", report["memory"]);
        downtimes.push(number(&report["downtime_ms"]));
        settle(subject.hosts[0])?;
        // At full speed again.
        std::thread::sleep(Duration::from_secs(2));
    }
    Ok(vec![Row::alone(
        "downtime, the same with --auto-converge --max-downtime 300ms",
        "ms",
        downtimes.split_off(1),
        "<= 360 ms",
        ASKED_MS * 1.2,
    )])
}

/// Moves whose link is cut in the middle of post-copy.
const CUTS: usize = 20;

pub(super) fn link_cut(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, c) = bench.hosts()?;
    let command =
        ["lab-tool", "memcheck", "run", "--mib", "200", "--rate", "20000", "--procs", "2", "--listen", "0.0.0.0:7003"];
    let mut subject = Subject::start(bench, "cut", 58, &command)?;
    c.sh("lab-tool wait-port 10.77.0.58:7003 --seconds 20")?;
    // It fills its memory meanwhile, and its layers are read for the first time.
    subject.moved(&[])?;
    settle(subject.hosts[0])?;
    let _shaped = Shaped::new([a, b])?;
    let mut failed = 0;
    for turn in 0..CUTS {
        let [from, to] = subject.hosts;
        let words = ["migrate", "cut", "--to", &to.name, "-q", "--format", "json", "--postcopy", "now"];
        let moving = from.command(words).stdout(std::process::Stdio::piped()).spawn()?;
        let seen = "for i in $(seq 2000); do migrate status | grep running | grep -q post-copy && exit 0; sleep 0.005; done; exit 1";
        if let Err(error) = from.sh(seen) {
            let output = moving.wait_with_output()?;
            return Err(error.context(format!("move {turn}: {}", String::from_utf8_lossy(&output.stdout))));
        }
        bench.lab.cable(from, false)?;
        std::thread::sleep(Duration::from_secs(5));
        bench.lab.cable(from, true)?;
        let output = moving.wait_with_output()?;
        let report: Value = serde_json::from_slice(&output.stdout).context("read the report")?;
        let checked = c.sh("lab-tool memcheck query --addr 10.77.0.58:7003");
        if report["outcome"] != "moved" || checked.is_err() {
            failed += 1;
            eprintln!("move {turn} with a cut link: {report} {checked:?}");
        }
        subject.hosts.swap(0, 1);
        settle(subject.hosts[0])?;
    }
    Ok(vec![Row::alone(
        "of 20 moves with the link cut for 5 s in post-copy: not completed or not clean",
        "",
        vec![f64::from(failed)],
        "0",
        0.0,
    )])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_second_is_found() {
        let mut intervals: Vec<(f64, f64)> = (0..50).map(|n| (f64::from(n) * 100.0, 1000.0)).collect();
        // Away for 300 ms, then at half speed for two seconds.
        intervals.extend((0..20).map(|n| (5200.0 + f64::from(n) * 100.0, 500.0)));
        intervals.extend((0..50).map(|n| (7200.0 + f64::from(n) * 100.0, 1000.0)));
        let slowest = slowest_second(&intervals, 4500.0).expect("found");
        assert!((slowest - 0.5).abs() < 0.01, "{slowest}");
    }
}
