//! Only hosts that prove a name on the list get in, and each refusal says why.

use anyhow::{Result, ensure};

use super::{Stage, migrate, redis};
use crate::agents::{self, Agent};
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![Scenario { name: "a wrong, missing, unlisted or expired identity is refused by its cause", run: identities }]
}

/// Restarts the source agent of `host` with what `script` made of its TLS files, and asks it for a move.
fn attempt(host: &Host, script: &str) -> Result<String> {
    host.sh("rm -rf /tmp/tls; cp -r /etc/longhaul/tls /tmp/tls")?;
    host.sh(script)?;
    restart(host)?;
    let said = migrate(host, &["web", "--to", "host2", "-q"])?;
    host.sh("rm -rf /etc/longhaul/tls; cp -r /tmp/tls /etc/longhaul/tls")?;
    ensure!(said.code == 1, "not refused: {}", said.text());
    Ok(said.text())
}

fn restart(host: &Host) -> Result<()> {
    agents::stop(host, Agent::Source)?;
    agents::start(host, Agent::Source)?;
    agents::wait_ready(host)
}

fn identities(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let install = "cp /tmp/pki/hosts/host1/* /etc/longhaul/tls/";
    let wrong_ca = attempt(
        stage.a,
        &format!("rm -rf /tmp/pki; migrate pki init --dir /tmp/pki; migrate pki issue host1 --dir /tmp/pki; {install}"),
    )?;
    ensure!(wrong_ca.contains("another authority"), "{wrong_ca}");
    // Ours signed by another authority, while we trust theirs: it is they who refuse.
    let foreign = attempt(
        stage.a,
        "rm -rf /tmp/pki; migrate pki init --dir /tmp/pki; migrate pki issue host1 --dir /tmp/pki; cp /tmp/pki/hosts/host1/cert.pem /tmp/pki/hosts/host1/key.pem /etc/longhaul/tls/",
    )?;
    ensure!(foreign.contains("refused our certificate") && foreign.contains("another authority"), "{foreign}");
    let expired = attempt(
        stage.a,
        "migrate pki issue host1 --days=-2; cp /etc/longhaul/pki/hosts/host1/*.pem /etc/longhaul/tls/",
    )?;
    ensure!(expired.contains("expired"), "{expired}");
    let unlisted =
        attempt(stage.a, "migrate pki issue stranger; cp /etc/longhaul/pki/hosts/stranger/*.pem /etc/longhaul/tls/")?;
    ensure!(unlisted.contains("stranger") && unlisted.contains("allow-list"), "{unlisted}");
    restart(stage.a)?;
    // No certificate at all: a bare TLS client.
    let script = "curl -sk https://10.77.0.2:7474/ 2>&1 || true; \
                  openssl s_client -connect 10.77.0.2:7474 -alpn h2 </dev/null 2>&1 | grep -i -e 'alert' -e 'required' || true";
    let bare = stage.c.sh(script).unwrap_or_default();
    let log = stage.b.sh(&format!("cat {}", Agent::Dest.log()))?;
    ensure!(bare.is_empty() || log.contains("no certificate"), "a client without a certificate got in: {bare}");
    Ok(())
}
