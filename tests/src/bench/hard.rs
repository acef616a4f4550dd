//! Memory that is hard to move: shared, or in files.

use std::net::Ipv4Addr;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::subject::{Measure, Subject, number, wait_ready};
use super::{Bench, Row, median, round, stop_and_copy};
use crate::container::{ContainerSpec, pss};
use crate::lab::Host;
use crate::scenarios::settle;

/// All, in the order of the table.
pub(super) const MEASURES: &[Measure] = &[
    Measure { name: "postgresql under pgbench", run: postgresql },
    Measure { name: "2 GiB in /dev/shm", run: memory_files },
    Measure { name: "shared copy-on-write", run: prefork },
    Measure { name: "faster than the link, post-copy", run: super::converge::postcopy },
    Measure { name: "faster than the link, auto-converge", run: super::converge::auto_converge },
    Measure { name: "link cut in post-copy", run: super::converge::link_cut },
];

/// Makes a database cluster and runs its server, as its own user.
const POSTGRESQL: &str = "mkdir -p /pg && chown postgres /pg && exec setpriv --reuid postgres --regid postgres --clear-groups sh -c '\
    export PATH=$PATH:/usr/lib/postgresql/17/bin; initdb -D /pg/data -A trust -U postgres >/tmp/initdb.log 2>&1; \
    echo host all all 0.0.0.0/0 trust >>/pg/data/pg_hba.conf; \
    exec postgres -D /pg/data -c listen_addresses=0.0.0.0 -c unix_socket_directories=/tmp -c shared_buffers=1GB'";

/// Fills the server's shared buffers: 60 branches are 900 MB.
fn fill(c: &Host, address: &str) -> Result<()> {
    c.sh(&format!(
        "export PATH=$PATH:/usr/lib/postgresql/17/bin; for i in $(seq 600); do pg_isready -q -h {address} && break; sleep 0.1; done; \
         pgbench -h {address} -U postgres -i -q -s 60 postgres 2>&1; \
         psql -h {address} -U postgres -c 'create extension pg_prewarm' -c \"select pg_prewarm('pgbench_accounts')\" -c checkpoint"
    ))
    .map(drop)
}

/// Four clients, one transaction after the other, each of which is written down with how long it took.
fn clients(c: &Host, address: &str) -> Result<Child> {
    let script = format!(
        "cd /tmp; rm -f pgbench_log*; exec /usr/lib/postgresql/17/bin/pgbench -h {address} -U postgres -c 4 -T 25 --log postgres"
    );
    let mut command = c.command(["sh", "-c", &script]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Until it is at work: transactions are written down in blocks of some dozens.
    c.sh("for i in $(seq 600); do cat /tmp/pgbench_log* 2>/dev/null | grep -q . && exit 0; sleep 0.05; done; exit 1")?;
    Ok(child)
}

/// The longest that a transaction took, in milliseconds. A client that had to connect again, and a transaction that failed, are
/// errors.
fn longest(c: &Host, clients: Child) -> Result<f64> {
    let output = clients.wait_with_output()?;
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let fine = output.status.success() && said.contains("failed transactions: 0 (") && !errors.contains("abort");
    ensure!(fine, "clients saw the move: {said} {errors}");
    let micros = c.sh("cat /tmp/pgbench_log* | sort -k3 -n | tail -1 | cut -d' ' -f3")?;
    Ok(round(micros.trim().parse::<f64>().context("read pgbench's log")? / 1000.0))
}

fn postgresql(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, c) = bench.hosts()?;
    let command = ["sh", "-c", POSTGRESQL];
    let mut subject = Subject::start(bench, "pg", 50, &command)?;
    fill(c, "10.77.0.50")?;
    for _ in 0..2 {
        subject.moved(&[])?;
        settle(subject.hosts[0])?;
    }
    let mut gaps = Vec::new();
    for _ in 0..bench.samples {
        let clients = clients(c, "10.77.0.50")?;
        subject.moved(&[])?;
        gaps.push(longest(c, clients)?);
        settle(subject.hosts[0])?;
    }
    drop(subject);

    let by_hand = stop_and_copy::spec("pgh", 51, &command);
    stop_and_copy::start(&by_hand, a)?;
    let moved = fill(c, "10.77.0.51").and_then(|()| {
        let clients = clients(c, "10.77.0.51")?;
        stop_and_copy::move_by_hand(&by_hand, a, b)?;
        longest(c, clients)
    });
    stop_and_copy::clean(&by_hand, [a, b])?;
    Ok(vec![Row::beside(
        "client gap, PostgreSQL with 1 GB of shared buffers under pgbench",
        "ms",
        gaps,
        &[moved?],
        "<= 250 ms and <= 1/20 of stop-and-copy",
        |value, ratio| value <= 250.0 && ratio <= 0.05,
    )])
}

fn large_memory_files(config: &mut Value) {
    let mounts = config["mounts"].as_array_mut().into_iter().flatten();
    for mount in mounts.filter(|mount| mount["destination"] == "/dev/shm") {
        mount["options"] = json!(["nosuid", "noexec", "nodev", "mode=1777", "size=3g"]);
    }
}

fn large_memory_files_by_hand(config: &mut Value) {
    large_memory_files(config);
    stop_and_copy::pin_network(config);
}

fn memory_files(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, _) = bench.hosts()?;
    let command = ["lab-tool", "idle-memory", "--mib", "8", "--random"];
    let downtimes = |subject: &mut Subject<'_>| -> Result<Vec<f64>> {
        let mut found = Vec::new();
        for _ in 0..=bench.samples {
            found.push(number(&subject.moved(&[])?["downtime_ms"]));
            settle(subject.hosts[0])?;
        }
        // The first move of a host has cold caches.
        Ok(found.split_off(1))
    };
    let spec = |name: &str, last| ContainerSpec {
        edit: Some(large_memory_files),
        ..ContainerSpec::new(name, Ipv4Addr::new(10, 77, 0, last), &command)
    };
    let mut without = Subject::start_as(bench, "shm0", &spec("shm0", 52))?;
    wait_ready(a, "shm0")?;
    let base = median(&downtimes(&mut without)?);
    drop(without);
    let write = |name: &str| a.sh(&format!("runc exec {name} sh -c 'head -c 2147483648 /dev/urandom >/dev/shm/big'"));
    let mut with = Subject::start_as(bench, "shm2", &spec("shm2", 53))?;
    wait_ready(a, "shm2")?;
    write("shm2")?;
    let more = downtimes(&mut with)?.into_iter().map(|downtime| round(downtime - base)).collect();
    drop(with);
    let by_hand = ContainerSpec { edit: Some(large_memory_files_by_hand), ..stop_and_copy::spec("shmh", 54, &command) };
    stop_and_copy::start(&by_hand, a)?;
    let moved = stop_and_copy::wait_ready(&by_hand, a)
        .and_then(|()| write("shmh"))
        .and_then(|_| stop_and_copy::move_by_hand(&by_hand, a, b));
    stop_and_copy::clean(&by_hand, [a, b])?;
    let by_hand_ms = moved?.as_secs_f64() * 1000.0;
    Ok(vec![Row::beside(
        "downtime with 2 GiB in /dev/shm minus without",
        "ms",
        more,
        &[by_hand_ms],
        "<= 60 ms; baseline: stop-and-copy with them",
        |value, _| value <= 60.0,
    )])
}

/// A server with 500 MB that its eight workers have by fork(2).
fn prefork(bench: &Bench) -> Result<Vec<Row>> {
    let (a, b, c) = bench.hosts()?;
    let command = ["lab-tool", "prefork", "--mib", "500", "--workers", "8", "--listen", "0.0.0.0:7005"];
    let right = |address: &str| c.sh(&format!("lab-tool memcheck query --addr {address}:7005"));
    let mut subject = Subject::start(bench, "prefork", 55, &command)?;
    wait_ready(a, "prefork")?;
    right("10.77.0.55")?;
    let before = pss(a, "prefork")?;
    let mut ratios = Vec::new();
    for _ in 0..bench.samples {
        subject.moved(&[])?;
        settle(subject.hosts[0])?;
        right("10.77.0.55")?;
        ratios.push(round(pss(subject.hosts[0], "prefork")? / before));
    }
    drop(subject);
    let by_hand = stop_and_copy::spec("preforkh", 56, &command);
    stop_and_copy::start(&by_hand, a)?;
    let moved = stop_and_copy::wait_ready(&by_hand, a)
        .and_then(|()| pss(a, "preforkh"))
        .and_then(|before| stop_and_copy::move_by_hand(&by_hand, a, b).map(|_| before))
        .and_then(|before| Ok(round(pss(b, "preforkh")? / before)));
    stop_and_copy::clean(&by_hand, [a, b])?;
    Ok(vec![Row::beside(
        "sum of PSS of a prefork server with 500 MB and 8 workers, after / before",
        "",
        ratios,
        &[moved?],
        "<= 1.15; baseline: stop-and-copy",
        |value, _| value <= 1.15,
    )])
}
