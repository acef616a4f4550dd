//! How long a container is away, and what it notices besides.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::subject::{Measure, Running, Subject, number, try_migrate, wait_ready};
use super::{Bench, Row, round, stop_and_copy};
use crate::client::Client;
use crate::container::{ContainerSpec, REDIS, pss};
use crate::lab::Host;
use crate::scenarios::settle;

/// All, in the order of the table.
pub(super) const MEASURES: &[Measure] = &[
    Measure { name: "small redis", run: small_redis },
    Measure { name: "idle 4 GiB", run: idle },
    Measure { name: "redis 1 GiB, 20,000 writes/s", run: busy_redis },
    Measure { name: "memory throughput", run: throughput },
    Measure { name: "redis while memory is copied", run: during },
    Measure { name: "bytes on the wire", run: wire },
    Measure { name: "writer faster than the link", run: too_fast },
];

/// Keys of 900 bytes that make a GiB.
const KEYS: u64 = 1_000_000;

/// The gap a probe saw, and the reports, of moves to and fro under it.
fn probed(bench: &Bench, subject: &mut Subject<'_>, address: &str) -> Result<(Vec<f64>, Vec<Value>)> {
    let (_, _, c) = bench.hosts()?;
    let (mut gaps, mut reports) = (Vec::new(), Vec::new());
    for _ in 0..bench.samples {
        let mut probe = Client::start(c, &["net-probe", "--addr", address])?;
        probe.wait_progress("operations", 200)?;
        let report = subject.moved(&[])?;
        probe.wait_progress("operations", 200)?;
        let seen = probe.finish()?;
        ensure!(seen["connection_survived"] == true, "the connection broke: {seen}");
        gaps.push(round(number(&seen["longest_gap_ms"])));
        reports.push(report);
        settle(subject.hosts[0])?;
    }
    Ok((gaps, reports))
}

fn small_redis(bench: &Bench) -> Result<Vec<Row>> {
    let (_, _, c) = bench.hosts()?;
    let mut subject = Subject::start(bench, "small", 30, &REDIS)?;
    c.sh("lab-tool wait-port 10.77.0.30:6379 --seconds 20")?;
    subject.moved(&[])?;
    let (gaps, _) = probed(bench, &mut subject, "10.77.0.30:6379")?;
    Ok(vec![Row::alone("client gap, 8 MiB redis", "ms", gaps, "<= 100 ms", 100.0)])
}

fn idle(bench: &Bench) -> Result<Vec<Row>> {
    let mut small = Subject::start(bench, "idle8m", 31, &["lab-tool", "idle-memory", "--mib", "8", "--random"])?;
    let mut downtimes = Vec::new();
    for _ in 0..=bench.samples {
        downtimes.push(number(&small.moved(&[])?["downtime_ms"]));
    }
    // The first move of a host has cold caches.
    let base = super::median(&downtimes[1..]);
    drop(small);
    let command = ["lab-tool", "idle-memory", "--mib", "4096", "--random"];
    let mut big = Subject::start(bench, "idle4g", 32, &command)?;
    let (a, b, _) = bench.hosts()?;
    wait_ready(a, "idle4g")?;
    let before = pss(a, "idle4g")?;
    let (mut more, mut pss_ratios) = (Vec::new(), Vec::new());
    for _ in 0..bench.samples.min(3) {
        let report = big.moved(&[])?;
        more.push(round(number(&report["downtime_ms"]) - base));
        settle(big.hosts[0])?;
        pss_ratios.push(round(pss(big.hosts[0], "idle4g")? / before));
    }
    drop(big);
    let by_hand = stop_and_copy::spec("idle4gh", 33, &command);
    stop_and_copy::start(&by_hand, a)?;
    stop_and_copy::wait_ready(&by_hand, a)?;
    let moved = stop_and_copy::move_by_hand(&by_hand, a, b);
    stop_and_copy::clean(&by_hand, [a, b])?;
    let by_hand_ms = moved?.as_secs_f64() * 1000.0;
    Ok(vec![
        Row::beside(
            "downtime at 4 GiB idle minus at 8 MiB",
            "ms",
            more,
            &[by_hand_ms],
            "<= 100 ms; baseline: stop-and-copy of 4 GiB",
            |value, _| value <= 100.0,
        ),
        Row::alone("sum of PSS after the fill / before", "", pss_ratios, "<= 1.1", 1.1),
    ])
}

fn populate(c: &Host, address: &str) -> Result<()> {
    c.sh(&format!(
        "lab-tool wait-port {address}:6379 --seconds 20; redis-cli -h {address} debug populate {KEYS} key 900"
    ))
    .map(drop)
}

fn writer(c: &Host, address: &str) -> Result<Running> {
    let keys = KEYS.to_string();
    let words = ["lab-tool", "redis-write", "--addr", address, "--rate", "20000", "--keys", &keys];
    let child = c.command(words).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    Ok(Running(child))
}

fn busy_redis(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, c) = bench.hosts()?;
    let mut subject = Subject::start(bench, "busy", 34, &REDIS)?;
    populate(c, "10.77.0.34")?;
    let writing = writer(c, "10.77.0.34:6379")?;
    // A host's first GiB is memory that its own hypervisor may have to find yet: that is not what is measured.
    for _ in 0..2 {
        subject.moved(&[])?;
        settle(subject.hosts[0])?;
    }
    let (gaps, reports) = probed(bench, &mut subject, "10.77.0.34:6379")?;
    drop(writing);
    let stops: Vec<f64> = reports.iter().map(|report| number(&report["memory"]["longest_stop_ms"])).collect();
    let recovery = recovery(bench, &mut subject)?;
    drop(subject);

    let by_hand = stop_and_copy::spec("busyh", 35, &REDIS);
    stop_and_copy::start(&by_hand, a)?;
    let gap = by_hand_gap(&by_hand, a, b, c);
    stop_and_copy::clean(&by_hand, [a, b])?;
    let baseline = [gap?];
    Ok(vec![
        Row::beside(
            "client gap, 1 GiB redis, 20,000 writes/s",
            "ms",
            gaps,
            &baseline,
            "<= 150 ms and <= 1/20 of stop-and-copy",
            |value, ratio| value <= 150.0 && ratio <= 0.05,
        ),
        Row::alone("longest stop caused by a pre-copy round", "ms", stops, "<= 2 ms", 2.0),
        Row::alone("latency back to normal after resuming, 1 GiB", "ms", recovery, "<= 1000 ms", 1000.0),
    ])
}

fn by_hand_gap(spec: &ContainerSpec, a: &Host, b: &Host, c: &Host) -> Result<f64> {
    populate(c, "10.77.0.35")?;
    let writing = writer(c, "10.77.0.35:6379")?;
    let mut probe = Client::start(c, &["net-probe", "--addr", "10.77.0.35:6379"])?;
    probe.wait_progress("operations", 200)?;
    stop_and_copy::move_by_hand(spec, a, b)?;
    probe.wait_progress("operations", 200)?;
    drop(writing);
    Ok(round(number(&probe.finish()?["longest_gap_ms"])))
}

/// The probe's pause between an answer and the next question, in milliseconds.
const PROBE_INTERVAL_MS: f64 = 1.0;

/// How long after the gap the first second began whose 99.9th percentile is normal again: no more than twice what it was
/// before, or 1 ms.
fn recovery(bench: &Bench, subject: &mut Subject<'_>) -> Result<Vec<f64>> {
    let (_, _, c) = bench.hosts()?;
    let mut found = Vec::new();
    for _ in 0..bench.samples.min(3) {
        let words = ["net-probe", "--addr", "10.77.0.34:6379", "--seconds", "2"];
        let quiet: Value = serde_json::from_slice(&c.output(["lab-tool"].iter().chain(&words))?.stdout)?;
        // A gap is the pause between two questions, and the answer's time.
        let normal = PROBE_INTERVAL_MS + number(&quiet["p999_us"]).max(500.0) / 1000.0 * 2.0;
        let threshold = format!("{normal:.3}");
        let words =
            ["net-probe", "--addr", "10.77.0.34:6379", "--seconds", "8", "--events", "--events-above-ms", &threshold];
        let probe =
            c.command(["lab-tool"].iter().chain(&words)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        std::thread::sleep(Duration::from_millis(500));
        subject.moved(&[])?;
        let output = probe.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let events: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let over = |event: &Value| number(&event["over_unix_ms"]);
        let Some(gap) = events.iter().max_by(|a, b| number(&a["gap_ms"]).total_cmp(&number(&b["gap_ms"]))) else {
            continue;
        };
        let slow: Vec<f64> = events.iter().map(over).filter(|at| *at > over(gap)).map(|at| at - over(gap)).collect();
        found.push(first_normal_second(&slow));
        settle(subject.hosts[0])?;
    }
    Ok(found)
}

/// A probe that asks every millisecond gets 800 to 900 answers a second: one slow one is within the 99.9th percentile.
fn first_normal_second(slow_ms: &[f64]) -> f64 {
    const STEP_MS: f64 = 50.0;
    let is_normal = |from: f64| slow_ms.iter().filter(|at| (from..from + 1000.0).contains(*at)).count() <= 1;
    (0..200).map(|step| f64::from(step) * STEP_MS).find(|from| is_normal(*from)).unwrap_or(f64::INFINITY)
}

fn throughput(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, _) = bench.hosts()?;
    let mut subject = Subject::start(bench, "rand", 36, &["lab-tool", "idle-memory", "--mib", "1024", "--random"])?;
    wait_ready(a, "rand")?;
    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    for _ in 0..bench.samples {
        raw.push(raw_stream(a, b)?);
        let report = subject.moved(&[])?;
        ours.push(number(&report["memory"]["rounds"][0]["mib_per_s"]));
        settle(subject.hosts[0])?;
    }
    Ok(vec![Row::beside(
        "memory throughput, unshaped link",
        "MiB/s",
        ours,
        &raw,
        ">= 0.8 of one raw rustls stream",
        |_, ratio| ratio >= 0.8,
    )])
}

fn raw_stream(a: &Host, b: &Host) -> Result<f64> {
    let listen = format!("{}:9200", b.address);
    let mut sink = b.command(["lab-tool", "tls-sink", "--listen", &listen]).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    if let Some(stdout) = sink.stdout.as_mut() {
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    }
    let words = ["lab-tool", "tls-source", "--addr", &listen, "--name", &b.name, "--mib", "1024"];
    let output = a.output(words)?;
    sink.wait()?;
    let said: Value =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(round(number(&said["mib_per_s"])))
}

/// Operations a second of a client that waits for every answer.
fn rate(client: &Client, span: Duration) -> f64 {
    let count = || client.status().map_or(0.0, |status| number(&status["operations"]));
    let (start, before) = (Instant::now(), count());
    std::thread::sleep(span);
    (count() - before) / start.elapsed().as_secs_f64()
}

fn during(bench: &Bench) -> Result<Vec<Row>> {
    let (_, _, c) = bench.hosts()?;
    let mut subject = Subject::start(bench, "served", 37, &REDIS)?;
    populate(c, "10.77.0.37")?;
    let mut rows = Vec::new();
    for (row, bandwidth, bar, least) in [
        ("redis throughput during pre-copy at 100M", "100M", ">= 0.9 of without", 0.9),
        ("redis throughput during pre-copy, unlimited", "64G", "reported only", 0.0),
    ] {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..bench.samples {
            let mut client = Client::start(c, &["redis-incr", "--addr", "10.77.0.37:6379"])?;
            client.wait_progress("operations", 2000)?;
            without.push(round(rate(&client, Duration::from_millis(1500))));
            let [from, to] = subject.hosts;
            let words = ["migrate", subject.name, "--to", &to.name, "-q", "--format", "json", "--bandwidth", bandwidth];
            let moving = from.command(words).stdout(Stdio::piped()).spawn()?;
            wait_phase(from, "pre-copy")?;
            let span = if bandwidth == "100M" { 1500 } else { 300 };
            with.push(round(rate(&client, Duration::from_millis(span))));
            let report: Value = serde_json::from_slice(&moving.wait_with_output()?.stdout)?;
            ensure!(report["outcome"] == "moved", "the move failed: {}", report["error"]);
            let seen = client.finish()?;
            ensure!(seen["connection_survived"] == true, "the connection broke: {seen}");
            subject.hosts.swap(0, 1);
            settle(subject.hosts[0])?;
        }
        rows.push(Row::beside(row, "1/s", with, &without, bar, |_, ratio| ratio >= least));
    }
    Ok(rows)
}

fn wait_phase(host: &Host, phase: &str) -> Result<()> {
    host.sh(&format!(
        "for i in $(seq 400); do migrate status --format json | grep -q '\"phase\": *\"{phase}\"' && exit 0; sleep 0.01; done; exit 1"
    ))
    .map(drop)
}

fn wire(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, _) = bench.hosts()?;
    let mut rows = Vec::new();
    for (row, name, last, content, bar, most, shaped) in [
        ("bytes on the wire / memory, random", "wirer", 38, "--random", "<= 1.05", 1.05, false),
        ("bytes on the wire / memory, text, 1 Gbit/s", "wiret", 39, "--text", "<= 0.5", 0.5, true),
    ] {
        let mut subject = Subject::start(bench, name, last, &["lab-tool", "idle-memory", "--mib", "512", content])?;
        wait_ready(a, name)?;
        let mut shares = Vec::new();
        for _ in 0..bench.samples.min(3) {
            let _shaped = shaped.then(|| Shaped::new([a, b])).transpose()?;
            let report = subject.moved(&[])?;
            let pages: f64 =
                rounds(&report).map(|round| number(&round["pages"]) - number(&round["zero_pages"])).sum::<f64>();
            shares.push(round(number(&report["bytes_on_wire"]) / (pages * 4096.0)));
            settle(subject.hosts[0])?;
        }
        rows.push(Row::alone(row, "", shares, bar, most));
    }
    Ok(rows)
}

fn rounds(report: &Value) -> impl Iterator<Item = &Value> {
    report["memory"]["rounds"].as_array().into_iter().flatten().chain(Some(&report["memory"]["last_round"]))
}

/// A link of 1 Gbit/s between two hosts, for as long as this value lives.
pub(super) struct Shaped<'a>([&'a Host; 2]);

impl<'a> Shaped<'a> {
    pub(super) fn new(hosts: [&'a Host; 2]) -> Result<Self> {
        for host in hosts {
            host.sh("tc qdisc replace dev eth0 root tbf rate 1gbit burst 256k latency 20ms")?;
        }
        Ok(Self(hosts))
    }
}

impl Drop for Shaped<'_> {
    fn drop(&mut self) {
        for host in self.0 {
            let _ = host.sh("tc qdisc delete dev eth0 root");
        }
    }
}

fn too_fast(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, c) = bench.hosts()?;
    // 300 MB that are written faster than 1 Gbit/s carries: 60,000 pages a second are 234 MiB/s.
    let command =
        ["lab-tool", "memcheck", "run", "--mib", "300", "--rate", "60000", "--listen", "0.0.0.0:7001", "--no-churn"];
    let subject = Subject::start(bench, "fast", 40, &command)?;
    c.sh("lab-tool wait-port 10.77.0.40:7001 --seconds 20")?;
    let _shaped = Shaped::new([a, b])?;
    let mut late = Vec::new();
    for _ in 0..bench.samples.min(3) {
        let start = Instant::now();
        let report = try_migrate(subject.name, a, b, &["--timeout", "10s", "--max-rounds", "1000"])?;
        late.push(round(start.elapsed().as_secs_f64() - 10.0));
        ensure!(report["outcome"] == "failed", "a writer faster than the link was moved: {report}");
        c.sh("lab-tool memcheck query --addr 10.77.0.40:7001").context("the container is not as it was")?;
        ensure!(b.sh("runc list -q")?.trim().is_empty(), "something is left on the destination");
    }
    Ok(vec![Row::alone("writer faster than the link: end after its timeout", "s", late, "untouched, within 1 s", 1.0)])
}
