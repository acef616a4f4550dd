//! Exactly one copy: agents that are killed in the middle of the hand-over, and containers in doubt.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Stage, counter, migrate, move_to, must_have_counted_on, redis, runs};
use crate::agents::{self, Agent, ask_fault};
use crate::client::Client;
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "an agent killed at any step of the hand-over leaves one copy, connected",
            run: killed_anywhere,
        },
        Scenario {
            name: "an answer that is lost is asked for, and the container is where it was taken",
            run: lost_answer,
        },
        Scenario { name: "an operator keeps a container in doubt, and the destination gives way", run: kept },
        Scenario { name: "an operator who was wrong is put right as soon as the hosts talk", run: kept_wrongly },
        Scenario {
            name: "a destination that falls silent while the container is frozen is not waited for",
            run: silent,
        },
    ]
}

/// Every step of a move that succeeds, and whose it is.
const STEPS: [(Agent, &str); 9] = [
    (Agent::Source, "source:record:held"),
    (Agent::Source, "source:record:committing"),
    (Agent::Source, "source:tell"),
    (Agent::Source, "source:end"),
    (Agent::Source, "source:erase"),
    (Agent::Dest, "destination:record:arriving"),
    (Agent::Dest, "destination:record:committed"),
    (Agent::Dest, "destination:resume"),
    (Agent::Dest, "destination:tell"),
];

/// How long both agents may take to agree once they are back.
const SETTLE: Duration = Duration::from_secs(30);

fn killed_anywhere(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let mut client = counter(stage.c)?;
    let mut hosts = [stage.a, stage.b];
    for (agent, step) in STEPS {
        let [here, there] = hosts;
        let victim = if agent == Agent::Source { here } else { there };
        ask_fault(victim, agent, step, "kill")?;
        // It may end with any code: the agent it talks to may be the one that is killed.
        let mut moving = here.command(["migrate", "web", "--to", &there.name, "-q"]).spawn()?;
        wait_reached(victim, agent).with_context(|| step.to_owned())?;
        come_back(victim, agent)?;
        let where_it_is = settled(hosts).with_context(|| step.to_owned())?;
        moving.wait()?;
        client.wait_progress("operations", 300).with_context(|| step.to_owned())?;
        hosts = if where_it_is == 0 { [here, there] } else { [there, here] };
    }
    must_have_counted_on(&client.finish()?)
}

/// Waits until an agent has reached the point of its fault.
fn wait_reached(host: &Host, agent: Agent) -> Result<()> {
    let file = agent.fault_file();
    let reached = file.replace(".fault", ".reached");
    let words =
        format!("for i in $(seq 3000); do [ -e {reached} ] && rm {reached} && exit 0; sleep 0.005; done; exit 1");
    host.sh(&words).map(drop).context("the point was not reached")
}

/// Starts an agent that was killed, once it is gone: until then its address is taken.
fn come_back(host: &Host, agent: Agent) -> Result<()> {
    host.sh(&format!(
        "for i in $(seq 2000); do pgrep -x {} >/dev/null || exit 0; sleep 0.005; done; exit 1",
        agent.program()
    ))?;
    agents::start(host, agent)?;
    agents::wait_ready(host)
}

/// Which of two hosts runs the container, once one of them does and neither is in doubt.
fn settled(hosts: [&Host; 2]) -> Result<usize> {
    let start = Instant::now();
    loop {
        let running = [runs(hosts[0], "web")?, runs(hosts[1], "web")?];
        let journals = hosts[0].sh("ls /var/lib/longhaul/source")?;
        match running {
            [true, true] => bail!("two copies run"),
            [true, false] if journals.trim().is_empty() => return Ok(0),
            [false, true] if journals.trim().is_empty() => return Ok(1),
            _ => {}
        }
        ensure!(start.elapsed() < SETTLE, "not settled: running {running:?}, journal of the source: {journals}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn lost_answer(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let client = counter(stage.c)?;
    ask_fault(stage.b, Agent::Dest, "destination:tell", "kill")?;
    let moving = stage.a.command(["migrate", "web", "--to", &stage.b.name, "-q"]).spawn()?;
    wait_reached(stage.b, Agent::Dest)?;
    come_back(stage.b, Agent::Dest)?;
    let code = wait(moving)?;
    ensure!(code == Some(0), "the move ended with {code:?} although the destination has the container");
    goes_on_at(client, stage.b)
}

fn wait(mut moving: std::process::Child) -> Result<Option<i32>> {
    Ok(moving.wait()?.code())
}

fn goes_on_at(mut client: Client, host: &Host) -> Result<()> {
    client.wait_progress("operations", 500)?;
    must_have_counted_on(&client.finish()?)?;
    ensure!(runs(host, "web")?, "the container does not run on {}", host.name);
    Ok(())
}

/// What `migrate recover` says, and its exit code.
fn recover(host: &Host, words: &[&str]) -> Result<(Value, Option<i32>)> {
    let output = host.output(["migrate", "recover", "--format", "json"].iter().chain(words))?;
    let said =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok((said, output.status.code()))
}

fn kept(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let client = counter(stage.c)?;
    ask_fault(stage.b, Agent::Dest, "destination:record:committed", "kill")?;
    let said = migrate(stage.a, &["web", "--to", &stage.b.name, "-q"])?;
    ensure!(said.code == 5 && said.report["outcome"] == "in-doubt", "{}", said.text());
    stage.b.sh(&format!("rm {}", Agent::Dest.fault_file().replace(".fault", ".reached")))?;
    ensure!(!runs(stage.a, "web")?, "a container in doubt runs");
    // A second move of it is refused, also after the agent has come back.
    ensure!(migrate(stage.a, &["web", "--to", &stage.c.name, "-q"])?.code == 1, "a container in doubt was moved");
    let (known, code) = recover(stage.a, &[])?;
    ensure!(code == Some(5) && known["tasks_here"].as_u64() > Some(0), "{known}");
    let (decided, code) = recover(stage.a, &["web", "--keep-here"])?;
    ensure!(code == Some(0) && decided["outcome"] == "kept", "{decided}");
    goes_on_at(client, stage.a)?;
    come_back(stage.b, Agent::Dest)?;
    ensure!(settled([stage.a, stage.b])? == 0, "it is not where it was kept");
    move_to("web", stage.a, stage.b).map(drop)
}

fn kept_wrongly(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    // About to take the container, and then not there for a while.
    ask_fault(stage.b, Agent::Dest, "destination:record:committed", "stop")?;
    let said = migrate(stage.a, &["web", "--to", &stage.b.name, "-q"])?;
    ensure!(said.code == 5, "{}", said.text());
    let (decided, _) = recover(stage.a, &["--keep-here"])?;
    ensure!(decided["outcome"] == "kept" && runs(stage.a, "web")?, "{decided}");
    let reached = Agent::Dest.fault_file().replace(".fault", ".reached");
    stage.b.sh(&format!("rm {reached}; pkill -CONT -x longhaul-dest"))?;
    let start = Instant::now();
    while stage.b.sh("runc state web")?.contains("\"status\": \"paused\"") == runs(stage.b, "web")? {
        ensure!(start.elapsed() < SETTLE, "the copy that was overruled is not stopped");
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(settled([stage.a, stage.b])? == 0, "it is not where it was kept");
    // What is left is for the operator to look at, and to remove.
    stage.b.sh("runc delete --force web; umount -l /srv/containers/web/rootfs; rm -rf /srv/containers/web").map(drop)
}

/// Within 200 ms, and what taking back takes; with a margin for two labs on two cores. Without heartbeats it was 6 s.
const THAWED_WITHIN_MS: f64 = 3000.0;

fn silent(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    // As an operator has it.
    stage.a.sh("sed -i '/^frozen_silence_ms/d' /etc/longhaul/source.toml")?;
    agents::stop(stage.a, Agent::Source)?;
    agents::start(stage.a, Agent::Source)?;
    agents::wait_ready(stage.a)?;
    let client = counter(stage.c)?;
    let reached = Agent::Dest.fault_file().replace(".fault", ".reached");
    // On a machine this busy it may be found silent before.
    let mut stopped = false;
    for _ in 0..5 {
        // Stopped in the middle of the restore, as a host that hangs.
        ask_fault(stage.b, Agent::Dest, "destination:restored", "stop")?;
        let said = migrate(stage.a, &["web", "--to", &stage.b.name, "-q"])?;
        ensure!(said.code == 1 && said.text().contains("silent"), "{}", said.text());
        stopped = stage.b.path(&reached).exists();
        if stopped {
            stage.b.sh(&format!("rm {reached}; pkill -CONT -x longhaul-dest"))?;
            break;
        }
    }
    ensure!(stopped, "the destination was never stopped");
    let mut client = client;
    client.wait_progress("operations", 500)?;
    let seen = client.finish()?;
    must_have_counted_on(&seen)?;
    let gap = seen["longest_gap_ms"].as_f64().unwrap_or(f64::INFINITY);
    ensure!(gap < THAWED_WITHIN_MS, "the client waited {gap} ms for a destination that was gone");
    ensure!(settled([stage.a, stage.b])? == 0, "it does not run where it was");
    agents::stop(stage.a, Agent::Source)?;
    agents::configure(lab, stage.a)?;
    agents::start(stage.a, Agent::Source)?;
    agents::wait_ready(stage.a)
}
