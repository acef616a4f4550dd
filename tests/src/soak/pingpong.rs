//! One container to and fro, hundreds of times: what the agents and the kernel keep for a move must go with it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::Value;

use super::migration::{Ending, migrate};
use super::plan::Way;
use crate::agents;
use crate::client::Client;
use crate::container::{ContainerSpec, REDIS};
use crate::lab::{Host, Lab};
use crate::scenarios::settle;

/// Moves before the first look: caches, pools and threads come into being, and each source agent remembers the reports of its last 100
/// migrations.
const WARM_UP: u64 = 210;
/// What memory of an agent may grow by: allocators give back when they like, not everything at once.
const MEMORY_SLACK_KIB: u64 = 8 << 10;
const CONTAINER: &str = "ball";
const SERVER: &str = "10.77.0.40:6379";

/// What is counted on each host; all but the memory must stay the same.
const COUNTED: &str = r#"
    for agent in longhaul-source longhaul-dest; do
        pid=$(pgrep -x $agent)
        echo "$agent.fds $(ls /proc/$pid/fd | wc -l)"
        echo "$agent.threads $(ls /proc/$pid/task | wc -l)"
        echo "$agent.memory_kib $(awk '/^VmRSS/ {print $2}' /proc/$pid/status)"
    done
    echo "mounts $(wc -l < /proc/mounts)"
    echo "processes $(ls -d /proc/[0-9]* | wc -l)"
    echo "cgroups $(find /sys/fs/cgroup -type d | wc -l)"
    echo "interfaces $(ls /sys/class/net | wc -l)"
    echo "addresses $(ip -o address | wc -l)"
    echo "forwarding_entries $(bridge fdb | grep -c permanent)"
    echo "firewall_rules $(nft list ruleset | wc -l)"
    echo "namespaces $(ls -l /proc/[0-9]*/ns/net 2>/dev/null | awk '{print $NF}' | sort -u | wc -l)"
    echo "working_files $(find /run/longhaul | wc -l)"
    echo "source_journal $(ls /var/lib/longhaul/source | wc -l)"
"#;

/// What `--json` ends with.
#[derive(Debug, Default, Serialize)]
struct Tally {
    moves: u64,
    lost: u64,
    repeated: u64,
    connection_survived: bool,
    /// What grew: the host and what, from, to.
    grown: Vec<(String, u64, u64)>,
    seconds: f64,
}

/// Moves a redis under a counting client so often; whether nothing was lost and nothing grew.
pub(super) fn run(moves: u64, json: bool) -> Result<bool> {
    ensure!(moves > WARM_UP, "the first {WARM_UP} moves don't count: ask for more");
    ensure!(moves.is_multiple_of(2), "an even number, please: it must end where it was when things were counted first");
    let start = std::time::Instant::now();
    let lab = Lab::up(&format!("ping-pong-{}", std::process::id()), 3)?;
    agents::install(&lab)?;
    let [a, b, c] = lab.hosts.as_slice() else { bail!("three hosts are wanted") };
    ContainerSpec::new(CONTAINER, std::net::Ipv4Addr::new(10, 77, 0, 40), &REDIS).start(a)?;
    c.sh(&format!("lab-tool wait-port {SERVER} --seconds 20"))?;
    let mut client = Client::start(c, &["redis-incr", "--addr", SERVER, "--interval-us", "500"])?;
    client.wait_progress("operations", 100)?;
    let mut before = None;
    for number in 0..moves {
        if number == WARM_UP {
            before = Some(look([a, b])?);
        }
        let (from, to) = if number % 2 == 0 { (a, b) } else { (b, a) };
        match migrate(CONTAINER, from, to, Way::Default, None)? {
            Ending::Moved { .. } => {}
            other => bail!("move {number}: {other:?}"),
        }
        if number % 50 == 49 {
            eprintln!("{} of {moves} moves", number + 1);
        }
    }
    client.wait_progress("operations", 100)?;
    let after = look([a, b])?;
    let seen: Value = client.finish()?;
    let grown = grown(&before.context("there was a warm-up")?, &after);
    let tally = Tally {
        moves,
        lost: seen["lost"].as_u64().unwrap_or(u64::MAX),
        repeated: seen["repeated"].as_u64().unwrap_or(u64::MAX),
        connection_survived: seen["connection_survived"] == true,
        grown,
        seconds: (start.elapsed().as_secs_f64() * 10.0).round() / 10.0,
    };
    if json {
        println!("{}", serde_json::to_string(&tally)?);
    } else {
        println!("{tally:?}\n{}", shown(&after));
    }
    Ok(tally.lost == 0 && tally.repeated == 0 && tally.connection_survived && tally.grown.is_empty())
}

type Counts = BTreeMap<String, u64>;

fn look(hosts: [&Host; 2]) -> Result<Counts> {
    let mut counts = Counts::new();
    for host in hosts {
        settle(host)?;
        // What ends a move goes on for a moment after its report: the directory of the way, the namespace that was left.
        host.sh("for i in $(seq 100); do [ -z \"$(ls /run/longhaul/dest /run/longhaul/source | grep -v : | grep .)\" ] && exit 0; sleep 0.1; done")?;
        // Agents give memory back 5 s after a migration.
        std::thread::sleep(std::time::Duration::from_secs(7));
        for line in host.sh(COUNTED)?.lines() {
            let (name, count) = line.split_once(' ').with_context(|| format!("counted {line:?}"))?;
            counts.insert(format!("{} {name}", host.name), count.trim().parse().with_context(|| line.to_owned())?);
        }
    }
    Ok(counts)
}

fn grown(before: &Counts, after: &Counts) -> Vec<(String, u64, u64)> {
    let slack = |name: &str| if name.ends_with("memory_kib") { MEMORY_SLACK_KIB } else { 0 };
    after
        .iter()
        .filter_map(|(name, &now)| {
            let then = *before.get(name)?;
            // Threads of a pool come with load and go when they are idle.
            let may_vary = name.ends_with("threads");
            (!may_vary && now > then + slack(name)).then(|| (name.clone(), then, now))
        })
        .collect()
}

fn shown(counts: &Counts) -> String {
    counts.iter().map(|(name, count)| format!("{name}: {count}\n")).collect()
}
