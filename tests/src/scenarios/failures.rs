//! A move that fails or is cancelled leaves the container and its clients as they were.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Stage, counter, migrate, move_to, must_have_counted_on, redis, runs};
use crate::agents::{self, Agent, ask_fault};
use crate::client::Client;
use crate::harness::Scenario;
use crate::lab::{Host, Lab};
use crate::soak;
use crate::soak::migration::{Cancel, Ending};
use crate::soak::plan::Way;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "a restore that fails leaves the source running and connected", run: failed_restore },
        Scenario { name: "a cancelled move leaves the source running and connected", run: cancelled },
        Scenario { name: "a move cancelled at any moment of its restore leaves nothing there", run: cancelled_restore },
        Scenario {
            name: "a destination agent that is killed leaves the source running and connected",
            run: dest_killed,
        },
        Scenario {
            name: "a source agent that is killed leaves the container running and connected",
            run: source_killed,
        },
        Scenario { name: "a dry run touches nothing", run: dry_run },
        Scenario { name: "an agent told to end ends and comes back", run: restart },
    ]
}

fn goes_on(client: Client, host: &Host) -> Result<()> {
    let mut client = client;
    client.wait_progress("operations", 500)?;
    must_have_counted_on(&client.finish()?)?;
    ensure!(runs(host, "web")?, "the container does not run on {}", host.name);
    Ok(())
}

fn destination_is_empty(host: &Host) -> Result<()> {
    let left = host.sh("runc list -q; find /srv/containers -mindepth 1 2>/dev/null | head; find /run/runc -mindepth 1 2>/dev/null; true")?;
    ensure!(left.trim().is_empty(), "on {} is left: {left}", host.name);
    Ok(())
}

/// Fills redis, so that a move takes long enough to be met in the middle.
fn grow(client: &Host) -> Result<()> {
    client.sh("redis-cli -h 10.77.0.20 debug populate 300000 key 400").map(drop)
}

fn failed_restore(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let client = counter(stage.c)?;
    // CRIU there can't read its images: everything before the restore works.
    stage.b.sh(
        "sed -i '/engine/,$d' /etc/longhaul/dest.toml; printf '[engine]\\ncriu = \"/usr/local/bin/criu-unprivileged\"\\n' >> /etc/longhaul/dest.toml; \
         printf '#!/bin/sh\\n[ \"$1\" = swrk ] && exec setpriv --bounding-set -sys_admin --inh-caps -sys_admin /usr/sbin/criu \"$@\"\\nexec /usr/sbin/criu \"$@\"\\n' > /usr/local/bin/criu-unprivileged; \
         chmod +x /usr/local/bin/criu-unprivileged",
    )?;
    restart_agent(stage.b, Agent::Dest)?;
    let said = migrate(stage.a, &["web", "--to", &stage.b.name, "-q"])?;
    stage.b.sh("sed -i '/engine/,$d' /etc/longhaul/dest.toml")?;
    restart_agent(stage.b, Agent::Dest)?;
    ensure!(said.code == 1 && said.report["outcome"] == "failed", "{}", said.text());
    goes_on(client, stage.a)?;
    destination_is_empty(stage.b)?;
    // And with the cause gone it moves.
    move_to("web", stage.a, stage.b)?;
    Ok(())
}

fn restart_agent(host: &Host, agent: Agent) -> Result<()> {
    agents::stop(host, agent)?;
    agents::start(host, agent)?;
    agents::wait_ready(host)
}

fn cancelled(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    grow(stage.c)?;
    let client = counter(stage.c)?;
    ask_fault(stage.a, Agent::Source, "source:phase:final-state", "hold")?;
    let mut moving = stage.a.command(["migrate", "web", "--to", &stage.b.name, "--progress", "plain"]).spawn()?;
    agents::wait_reached(stage.a, Agent::Source)?;
    let told = stage.a.sh("migrate cancel web");
    agents::clear_fault(stage.a, Agent::Source)?;
    told?;
    let status = moving.wait()?;
    ensure!(status.code() == Some(1), "migrate ended with {status}");
    // And at moments that nobody has chosen: before its state is saved, and while.
    let mut hosts = [stage.a, stage.b];
    for after in [0, 20, 40].map(Duration::from_millis) {
        let [here, there] = hosts;
        let cancel = Cancel { phase: "final-state", after };
        match soak::migration::migrate("web", here, there, Way::Default, Some(cancel))? {
            Ending::Cancelled => destination_is_empty(there).with_context(|| format!("{after:?}"))?,
            Ending::Moved { .. } => hosts.swap(0, 1),
            Ending::Stayed(why) => bail!("{after:?}: {why}"),
        }
    }
    goes_on(client, hosts[0])
}

fn cancelled_restore(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let client = counter(stage.c)?;
    let mut hosts = [stage.a, stage.b];
    for way in [Way::Default, Way::PostCopy] {
        for after in [0, 10, 20, 40, 60, 80].map(Duration::from_millis) {
            let [here, there] = hosts;
            let cancel = Cancel { phase: "restore", after };
            match soak::migration::migrate("web", here, there, way, Some(cancel))? {
                Ending::Cancelled => destination_is_empty(there).with_context(|| format!("{way:?}, {after:?}"))?,
                Ending::Moved { .. } => hosts.swap(0, 1),
                Ending::Stayed(why) => bail!("{way:?}, {after:?}: {why}"),
            }
        }
    }
    goes_on(client, hosts[0])
}

fn dest_killed(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    grow(stage.c)?;
    let client = counter(stage.c)?;
    ask_fault(stage.b, Agent::Dest, "destination:heard:restore", "kill")?;
    let mut moving = stage.a.command(["migrate", "web", "--to", &stage.b.name, "--progress", "plain"]).spawn()?;
    let status = moving.wait()?;
    agents::clear_fault(stage.b, Agent::Dest)?;
    ensure!(status.code() == Some(1), "migrate ended with {status}");
    goes_on(client, stage.a)?;
    agents::start(stage.b, Agent::Dest)?;
    agents::wait_ready(stage.b)?;
    destination_is_empty(stage.b)
}

fn source_killed(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    grow(stage.c)?;
    let client = counter(stage.c)?;
    ask_fault(stage.a, Agent::Source, "source:phase:final-state", "kill")?;
    let mut moving = stage.a.command(["migrate", "web", "--to", &stage.b.name, "--progress", "plain"]).spawn()?;
    let _ = moving.wait()?;
    agents::clear_fault(stage.a, Agent::Source)?;
    agents::start(stage.a, Agent::Source)?;
    agents::wait_ready(stage.a)?;
    goes_on(client, stage.a)?;
    stage.b.sh(
        "for i in $(seq 1000); do [ -z \"$(runc list -q)$(ls /srv/containers)\" ] && exit 0; sleep 0.02; done; exit 1",
    )?;
    destination_is_empty(stage.b)
}

fn dry_run(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let client = counter(stage.c)?;
    let said = migrate(stage.a, &["web", "--to", &stage.b.name, "--dry-run", "-q"])?;
    ensure!(said.code == 0 && said.report["outcome"] == "would-move", "{}", said.text());
    goes_on(client, stage.a)?;
    destination_is_empty(stage.b)
}

fn restart(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    for agent in [Agent::Source, Agent::Dest] {
        restart_agent(stage.a, agent)?;
    }
    ensure!(
        !stage
            .a
            .sh("cat /proc/mounts")?
            .lines()
            .any(|line| line.starts_with("longhaul /run/longhaul") && line.contains("deleted")),
        "a mount is left"
    );
    Ok(())
}
