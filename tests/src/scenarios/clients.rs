//! Clients do not notice more than a pause.

use std::net::Ipv4Addr;
use std::process::Stdio;

use anyhow::{Result, ensure};

use super::{Stage, counter, move_to, must_have_counted_on, redis, runs, wait_port};
use crate::client::Client;
use crate::container::{ContainerSpec, REDIS, Rootfs, delete};
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "many containers move at once, in both directions", run: many_at_once },
        Scenario { name: "nginx under load fails no request", run: nginx_under_load },
        Scenario { name: "ten moves to and fro keep one connection", run: ten_moves },
        Scenario { name: "a redis connection counts through a move", run: redis_counts },
        Scenario { name: "a container that is the client of a stream goes on", run: container_as_client },
        Scenario { name: "a udp server keeps its state", run: udp },
        Scenario { name: "a game server keeps its players", run: game },
        Scenario { name: "a hundred idle connections survive", run: idle_connections },
        Scenario { name: "a connection over ipv6 survives", run: ipv6 },
        Scenario { name: "a process tree with everything checks itself after a move", run: selfcheck },
    ]
}

fn redis_counts(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let mut client = counter(stage.c)?;
    let report = move_to("web", stage.a, stage.b)?;
    client.wait_progress("operations", 1000)?;
    must_have_counted_on(&client.finish()?)?;
    for key in ["downtime_ms", "total_ms", "memory_bytes", "bytes_on_wire"] {
        ensure!(report[key].as_f64().is_some_and(|value| value > 0.0), "the report lacks {key}: {report}");
    }
    Ok(())
}

fn ten_moves(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    redis(stage.a, stage.c)?;
    let mut client = counter(stage.c)?;
    for _ in 0..5 {
        move_to("web", stage.a, stage.b)?;
        client.wait_progress("operations", 200)?;
        move_to("web", stage.b, stage.a)?;
        client.wait_progress("operations", 200)?;
    }
    must_have_counted_on(&client.finish()?)
}

fn nginx_under_load(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    ContainerSpec::new("nginx", Ipv4Addr::new(10, 77, 0, 21), &["nginx", "-g", "daemon off;"]).start(stage.a)?;
    wait_port(stage.c, "10.77.0.21:80")?;
    let load = stage
        .c
        .command(["wrk", "-t1", "-c16", "-d6s", "--timeout", "5s", "http://10.77.0.21/"])
        .stdout(Stdio::piped())
        .spawn()?;
    let moved = move_to("nginx", stage.a, stage.b).and_then(|_| move_to("nginx", stage.b, stage.a));
    let output = load.wait_with_output()?;
    moved?;
    let text = String::from_utf8_lossy(&output.stdout);
    let fine = output.status.success()
        && text.contains("Requests/sec")
        && !text.contains("Non-2xx")
        && !text.contains("Socket errors");
    ensure!(fine, "wrk saw failures:\n{text}");
    Ok(())
}

fn container_as_client(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let mut sink = Client::start(stage.c, &["stream-sink", "--listen", "10.77.0.3:7000"])?;
    wait_listening(stage.c, 7000)?;
    let command = ["lab-tool", "stream-source", "--connect", "10.77.0.3:7000"];
    ContainerSpec::new("streamer", Ipv4Addr::new(10, 77, 0, 22), &command).start(stage.a)?;
    sink.wait_progress("bytes_in", 100_000)?;
    move_to("streamer", stage.a, stage.b)?;
    sink.wait_progress("bytes_in", 1_000_000)?;
    move_to("streamer", stage.b, stage.a)?;
    sink.wait_progress("bytes_in", 1_000_000)?;
    let report = sink.finish()?;
    ensure!(report["corrupt"] == 0, "the stream was damaged: {report}");
    Ok(())
}

/// A sink takes one connection alone, so it can't be asked by connecting.
fn wait_listening(host: &Host, port: u16) -> Result<()> {
    host.sh(&format!(
        "for i in $(seq 500); do ss -Hltn sport = :{port} | grep -q . && exit 0; sleep 0.02; done; exit 1"
    ))
    .map(drop)
}

fn udp(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let command = ["lab-tool", "udp-echo", "--listen", "0.0.0.0:7001"];
    ContainerSpec::new("echo", Ipv4Addr::new(10, 77, 0, 23), &command).start(stage.a)?;
    let mut client = Client::start(stage.c, &["udp-ping", "--addr", "10.77.0.23:7001"])?;
    client.wait_progress("received", 20)?;
    move_to("echo", stage.a, stage.b)?;
    client.wait_progress("received", 100)?;
    let report = client.finish()?;
    ensure!(report["server_restarted"] == false && report["corrupt"] == 0, "the server lost its state: {report}");
    Ok(())
}

fn game(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let command = ["lab-tool", "game-server", "--listen", "0.0.0.0:7002"];
    ContainerSpec::new("game", Ipv4Addr::new(10, 77, 0, 24), &command).start(stage.a)?;
    let mut client = Client::start(stage.c, &["game-client", "--addr", "10.77.0.24:7002"])?;
    client.wait_progress("snapshots", 60)?;
    move_to("game", stage.a, stage.b)?;
    client.wait_progress("snapshots", 120)?;
    let report = client.finish()?;
    ensure!(report["state_lost"] == false || report["state_lost"] == 0, "the player was forgotten: {report}");
    ensure!(report["ticks_back"] == 0, "time went backwards: {report}");
    Ok(())
}

fn idle_connections(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let command = ["lab-tool", "tcp-echo", "--listen", "0.0.0.0:7003"];
    ContainerSpec::new("hold", Ipv4Addr::new(10, 77, 0, 25), &command).start(stage.a)?;
    wait_port(stage.c, "10.77.0.25:7003")?;
    let mut client =
        Client::start(stage.c, &["tcp-hold", "--addr", "10.77.0.25:7003", "--conns", "100", "--seconds", "60"])?;
    client.wait_progress("connected", 0)?;
    move_to("hold", stage.a, stage.b)?;
    let report = client.finish()?;
    ensure!(report["survived"] == 100 && report["failed"] == 0, "connections were lost: {report}");
    Ok(())
}

fn ipv6(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let command = ["redis-server", "--bind", "::", "--protected-mode", "no", "--save", ""];
    ContainerSpec::new("web6", Ipv4Addr::new(10, 77, 0, 26), &command).start(stage.a)?;
    wait_port(stage.c, "[fd77::1:1a]:6379")?;
    let mut client = Client::start(stage.c, &["redis-incr", "--addr", "[fd77::1:1a]:6379"])?;
    client.wait_progress("operations", 100)?;
    move_to("web6", stage.a, stage.b)?;
    client.wait_progress("operations", 500)?;
    move_to("web6", stage.b, stage.a)?;
    client.wait_progress("operations", 500)?;
    must_have_counted_on(&client.finish()?)
}

fn selfcheck(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let command = [
        "lab-tool",
        "selfcheck",
        "run",
        "--dir",
        "/work",
        "--listen",
        "0.0.0.0:7004",
        "--with",
        "timerfd-periodic",
        "--without",
        WITHOUT,
    ];
    for (name, rootfs) in [("check-overlay", Rootfs::Overlay), ("check-plain", Rootfs::Plain)] {
        let mut spec = ContainerSpec::new(name, Ipv4Addr::new(10, 77, 0, 27), &command);
        spec.rootfs = rootfs;
        spec.mounts = vec![serde_json::json!({
            "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=1777"]
        })];
        spec.start(stage.a)?;
        wait_port(stage.c, "10.77.0.27:7004")?;
        let check = "lab-tool selfcheck query --addr 10.77.0.27:7004";
        stage.c.sh(check)?;
        move_to(name, stage.a, stage.b)?;
        stage.c.sh(check)?;
        move_to(name, stage.b, stage.a)?;
        stage.c.sh(check)?;
        stage.a.sh(&delete(name))?;
    }
    Ok(())
}

/// A task of another user that has changed its own rlimits can't be restored without `CAP_SYS_RESOURCE`, which this machine
/// may not give.
pub(super) const WITHOUT: &str = "worker-user";

/// Containers on each side.
const EACH: u8 = 3;
/// Addresses of the first of them.
const FIRST: u8 = 60;

fn many_at_once(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    let mut clients = Vec::new();
    let mut moves = Vec::new();
    for number in 0..2 * EACH {
        let (from, to) = if number < EACH { (stage.a, stage.b) } else { (stage.b, stage.a) };
        let (name, address) = (format!("many{number}"), Ipv4Addr::new(10, 77, 0, FIRST + number));
        ContainerSpec::new(&name, address, &REDIS).start(from)?;
        let server = format!("{address}:6379");
        wait_port(stage.c, &server)?;
        let mut client = Client::start(stage.c, &["redis-incr", "--addr", &server, "--interval-us", "2000"])?;
        client.wait_progress("operations", 50)?;
        clients.push(client);
        moves.push((name, from, to));
    }
    let start = |(name, from, to): &(String, &Host, &Host)| {
        from.command(["migrate", name, "--to", &to.name, "-q"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()
    };
    // The first is asked for twice: whichever request comes first moves it, the other is refused.
    let (twice, rest) = moves.split_at(1);
    let rivals = [start(&twice[0])?, start(&twice[0])?];
    let under_way = rest.iter().map(start).collect::<std::io::Result<Vec<_>>>()?;
    let mut refused = 0;
    for rival in rivals {
        let output = rival.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            ensure!(
                output.status.code() == Some(1) && said.contains("being moved already"),
                "{:?}: {said}",
                output.status
            );
            refused += 1;
        }
    }
    ensure!(refused == 1, "of two requests to move one container at the same time, {refused} were refused");
    for (moving, (name, ..)) in under_way.into_iter().zip(rest) {
        let output = moving.wait_with_output()?;
        ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for (name, from, to) in &moves {
        ensure!(runs(to, name)? && !runs(from, name)?, "{name} does not run where it was moved to");
    }
    for mut client in clients {
        client.wait_progress("operations", 50)?;
        must_have_counted_on(&client.finish()?)?;
    }
    Ok(())
}
