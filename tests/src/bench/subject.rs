//! Containers that are measured.

use std::net::Ipv4Addr;
use std::process::Child;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Bench, Row};
use crate::container::ContainerSpec;
use crate::lab::Host;

/// One thing that is measured.
pub(super) struct Measure {
    pub(super) name: &'static str,
    pub(super) run: fn(&Bench) -> Result<Vec<Row>>,
}

/// A container that is removed in the end, wherever it is.
pub(super) struct Subject<'a> {
    pub(super) name: &'static str,
    /// Where it is, and where it goes next.
    pub(super) hosts: [&'a Host; 2],
}

impl<'a> Subject<'a> {
    pub(super) fn start(bench: &'a Bench, name: &'static str, last: u8, command: &[&str]) -> Result<Self> {
        Self::start_as(bench, name, &ContainerSpec::new(name, Ipv4Addr::new(10, 77, 0, last), command))
    }

    pub(super) fn start_as(bench: &'a Bench, name: &'static str, spec: &ContainerSpec) -> Result<Self> {
        let (a, b, _) = bench.hosts()?;
        spec.start(a)?;
        Ok(Self { name, hosts: [a, b] })
    }

    /// Moves it to the other host, from where the next sample moves it back; the report.
    pub(super) fn moved(&mut self, options: &[&str]) -> Result<Value> {
        let report = migrate(self.name, self.hosts[0], self.hosts[1], options)?;
        self.hosts.swap(0, 1);
        Ok(report)
    }
}

impl Drop for Subject<'_> {
    fn drop(&mut self) {
        for host in self.hosts {
            let name = self.name;
            let _ = host.sh(&format!(
                "runc delete --force {name} 2>/dev/null || true; umount -l /srv/containers/{name}/rootfs 2>/dev/null || true; \
                 rm -rf /srv/containers/{name} /var/log/containers/{name}.log"
            ));
        }
    }
}

/// Runs `migrate`, which must succeed; its report.
pub(super) fn migrate(name: &str, from: &Host, to: &Host, options: &[&str]) -> Result<Value> {
    let report = try_migrate(name, from, to, options)?;
    ensure!(report["outcome"] == "moved", "the move failed: {}", report["error"]);
    // Where the time goes is what one wants to know next.
    eprintln!(
        "  {name}: downtime {} ms, {}, of {} ms, {}",
        report["downtime_ms"], report["downtime_steps"], report["total_ms"], report["phases"]
    );
    Ok(report)
}

pub(super) fn try_migrate(name: &str, from: &Host, to: &Host, options: &[&str]) -> Result<Value> {
    let words = ["migrate", name, "--to", &to.name, "-q", "--format", "json"];
    let output = from.output(words.iter().chain(options))?;
    serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

pub(super) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

pub(super) fn wait_ready(host: &Host, name: &str) -> Result<()> {
    host.sh(&format!(
        "for i in $(seq 600); do grep -q ready /var/log/containers/{name}.log && exit 0; sleep 0.1; done; exit 1"
    ))
    .map(drop)
}

/// A program on a host that ends with this value.
pub(super) struct Running(pub(super) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = self.0.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}
