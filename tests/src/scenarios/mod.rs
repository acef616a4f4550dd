//! What is tried with the real thing. A name is a sentence that must hold.

mod clients;
mod converge;
mod doubt;
mod failures;
mod files;
mod hostile;
mod memory;
mod postcopy;
mod refusals;
mod trust;

use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::client::Client;
use crate::container::{ContainerSpec, REDIS};
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

/// All scenarios; the slowest first, so that two workers end together.
pub fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(clients::scenarios());
    all.extend(memory::scenarios());
    all.extend(postcopy::scenarios());
    all.extend(converge::scenarios());
    all.extend(files::scenarios());
    all.extend(doubt::scenarios());
    all.extend(failures::scenarios());
    all.extend(refusals::scenarios());
    all.extend(trust::scenarios());
    all.extend(hostile::scenarios());
    all
}

/// The first two hosts move containers; the third is for clients.
struct Stage<'a> {
    a: &'a Host,
    b: &'a Host,
    c: &'a Host,
}

impl<'a> Stage<'a> {
    fn of(lab: &'a Lab) -> Result<Self> {
        let [a, b, c] = lab.hosts.as_slice() else { bail!("three hosts are wanted") };
        Ok(Self { a, b, c })
    }
}

/// Where redis is in scenarios that have one.
const REDIS_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 20);

/// A redis that answers.
fn redis(host: &Host, client: &Host) -> Result<ContainerSpec> {
    let spec = ContainerSpec::new("web", REDIS_ADDRESS, &REDIS);
    spec.start(host)?;
    wait_port(client, "10.77.0.20:6379")?;
    Ok(spec)
}

fn wait_port(client: &Host, address: &str) -> Result<()> {
    client.sh(&format!("lab-tool wait-port {address} --seconds 20")).map(drop)
}

/// A client that counts with INCR, once it counts.
fn counter(client: &Host) -> Result<Client> {
    let mut counter = Client::start(client, &["redis-incr", "--addr", "10.77.0.20:6379"])?;
    counter.wait_progress("operations", 100)?;
    Ok(counter)
}

/// What `migrate` said: its exit code and its report.
struct Said {
    code: i32,
    report: Value,
    stderr: String,
}

impl Said {
    fn text(&self) -> String {
        format!("exit code {}: {} {}", self.code, self.report, self.stderr)
    }

    /// The obstacles it names.
    fn obstacles(&self) -> String {
        self.report["obstacles"].to_string()
    }
}

/// Runs `migrate WORDS --format json` on a host.
fn migrate(host: &Host, words: &[&str]) -> Result<Said> {
    let output = host.output(["migrate", "--format", "json"].iter().chain(words))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(Said {
        code: output.status.code().context("migrate was killed")?,
        report: serde_json::from_str(&stdout).unwrap_or(Value::Null),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Moves a container; anything but success is an error.
fn move_to(container: &str, from: &Host, to: &Host) -> Result<Value> {
    let said = migrate(from, &[container, "--to", &to.name, "-q"])?;
    ensure!(said.code == 0 && said.report["outcome"] == "moved", "the move failed: {}", said.text());
    ensure!(runs(to, container)?, "{container} does not run on {}", to.name);
    ensure!(!knows(from, container)?, "{container} is still known on {}", from.name);
    Ok(said.report)
}

/// Waits until all memory of the containers that came here is in place.
pub(crate) fn settle(host: &Host) -> Result<()> {
    host.sh("for i in $(seq 600); do pgrep -x longhaul-fill >/dev/null || exit 0; sleep 0.1; done; exit 1").map(drop)
}

pub(crate) fn runs(host: &Host, container: &str) -> Result<bool> {
    let output = host.output(["runc", "state", container])?;
    Ok(String::from_utf8_lossy(&output.stdout).contains("\"status\": \"running\""))
}

fn knows(host: &Host, container: &str) -> Result<bool> {
    Ok(host.output(["runc", "state", container])?.status.success())
}

/// The counter lost nothing, repeated nothing, and kept its one connection.
fn must_have_counted_on(report: &Value) -> Result<()> {
    let fine = report["lost"] == 0
        && report["repeated"] == 0
        && report["connection_survived"] == true
        && report["connections"] == 1;
    ensure!(fine, "the client saw the move: {report}");
    Ok(())
}
