//! `cargo lab demo`: a redis moves between two hosts while a client on a third counts on one connection.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::agents;
use crate::client::Client;
use crate::container::ContainerSpec;
use crate::lab::{Host, Lab};

/// What `--json` ends with.
#[derive(Debug, Serialize)]
struct Summary {
    moved: bool,
    connections_survived: u64,
    operations: u64,
    lost: u64,
    repeated: u64,
    client_gap_ms: f64,
    downtime_ms: f64,
    total_ms: f64,
    memory_bytes: u64,
    bytes_on_wire: u64,
    phases: BTreeMap<String, f64>,
}

/// Operations the client does before and after the move.
const OPERATIONS: u64 = 5_000;

/// Shows the move. With `json` the last line of standard output is one object.
pub fn run(json: bool) -> Result<bool> {
    let start = Instant::now();
    let say = |text: &str| eprintln!("[{:6.2} s] {text}", start.elapsed().as_secs_f64());
    say("bringing up three hosts: host1 and host2 move containers, host3 has the client");
    let lab = Lab::up(&format!("demo-{}", std::process::id()), 3)?;
    agents::install(&lab)?;
    let [a, _, c] = lab.hosts.as_slice() else { bail!("three hosts are wanted") };

    say("host1: `runc run web` — redis-server in a container with the address 10.77.0.20");
    let address = std::net::Ipv4Addr::new(10, 77, 0, 20);
    ContainerSpec::new("web", address, &["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""])
        .start(a)?;
    c.sh("lab-tool wait-port 10.77.0.20:6379 --seconds 20")?;

    say("host3: one TCP connection sends INCR, and checks that every answer is the last one plus 1");
    let mut client = Client::start(c, &["redis-incr", "--addr", "10.77.0.20:6379"])?;
    client.wait_progress("operations", OPERATIONS)?;
    show_count(&client, say);

    say("host1: `migrate web --to host2`");
    let report = migrate(a, "host2", json)?;
    client.wait_progress("operations", OPERATIONS)?;
    show_count(&client, say);
    let seen = client.finish()?;

    let summary = summarize(&report, &seen);
    if json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        show(&summary);
    }
    say("taking everything down");
    Ok(summary.moved && summary.connections_survived == 1 && summary.lost == 0 && summary.repeated == 0)
}

fn show_count(client: &Client, say: impl Fn(&str)) {
    let operations = client.status().and_then(|status| status["operations"].as_u64()).unwrap_or(0);
    say(&format!("host3: {operations} increments so far"));
}

/// Runs `migrate`, whose progress goes on to our standard error.
fn migrate(from: &Host, to: &str, json: bool) -> Result<Value> {
    let progress = if json { "plain" } else { "auto" };
    let output = from
        .command(["migrate", "web", "--to", to, "--format", "json", "--progress", progress])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("run migrate")?;
    serde_json::from_slice(&output.stdout).context("read migrate's report")
}

fn summarize(report: &Value, seen: &Value) -> Summary {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let phases = report["phases"].as_object().into_iter().flatten().map(|(name, ms)| (name.clone(), number(ms)));
    Summary {
        moved: report["outcome"] == "moved",
        connections_survived: u64::from(seen["connection_survived"] == true),
        operations: count(&seen["operations"]),
        lost: count(&seen["lost"]),
        repeated: count(&seen["repeated"]),
        client_gap_ms: number(&seen["longest_gap_ms"]),
        downtime_ms: number(&report["downtime_ms"]),
        total_ms: number(&report["total_ms"]),
        memory_bytes: count(&report["memory_bytes"]),
        bytes_on_wire: count(&report["bytes_on_wire"]),
        phases: phases.collect(),
    }
}

fn show(summary: &Summary) {
    println!();
    println!("  {}", if summary.moved { "moved: redis runs on host2" } else { "NOT moved" });
    println!("  the client's connection {}", if summary.connections_survived == 1 { "survived" } else { "was LOST" });
    println!("  {} increments, {} lost, {} repeated", summary.operations, summary.lost, summary.repeated);
    println!("  longest gap the client saw  {:8.1} ms", summary.client_gap_ms);
    println!("  downtime by the agents      {:8.1} ms", summary.downtime_ms);
    println!("  whole move                  {:8.1} ms", summary.total_ms);
    for (phase, ms) in &summary.phases {
        println!("    {phase:<16} {ms:8.1} ms");
    }
    println!();
}
