//! Runs scenarios, each on hosts that are clean before and must be clean after.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::agents;
use crate::container::{CONTAINER_LOGS, delete};
use crate::lab::{Host, Lab};

/// One scenario: a sentence for a name, and what is done on three hosts.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&Lab) -> Result<()>,
}

/// Counts of a run.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    /// Passed.
    pub passed: u64,
    /// Failed.
    pub failed: u64,
}

/// Hosts of every scenario: two that move containers, one for clients.
const HOSTS: usize = 3;
/// Scenarios at a time: as many as the smallest machine has cores.
const WORKERS: usize = 2;

/// Runs the scenarios whose name contains `filter`, on two labs at once.
pub fn run_scenarios(scenarios: &[Scenario], filter: &str) -> Result<Counts> {
    let queue: Mutex<VecDeque<&Scenario>> =
        Mutex::new(scenarios.iter().filter(|scenario| scenario.name.contains(filter)).collect());
    let counts = Mutex::new(Counts::default());
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (queue, counts) = (&queue, &counts);
            scope.spawn(move || work(worker, queue, counts));
        }
    });
    counts.into_inner().map_err(|_| anyhow::anyhow!("a worker panicked"))
}

fn work(worker: usize, queue: &Mutex<VecDeque<&Scenario>>, counts: &Mutex<Counts>) {
    let name = format!("test-{}-{worker}", std::process::id());
    let mut lab: Option<Lab> = None;
    while let Some(scenario) = queue.lock().ok().and_then(|mut queue| queue.pop_front()) {
        let start = Instant::now();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if lab.is_none() {
                let fresh = Lab::up(&name, HOSTS)?;
                agents::install(&fresh)?;
                lab = Some(fresh);
            }
            let lab = lab.as_ref().context("just made")?;
            (scenario.run)(lab)?;
            lab.hosts.iter().try_for_each(|host| tidy(host).and_then(|()| must_be_clean(host)))
        }));
        let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked")));
        let seconds = start.elapsed().as_secs_f64();
        let Ok(mut counts) = counts.lock() else { return };
        match result {
            Ok(()) => {
                counts.passed += 1;
                println!("ok      {} ({seconds:.1} s)", scenario.name);
            }
            Err(error) => {
                counts.failed += 1;
                println!("FAILED  {} ({seconds:.1} s)\n{}", scenario.name, indent(&format!("{error:#}")));
                if let Some(lab) = &lab {
                    print!("{}", indent(&logs(lab)));
                }
                // Whatever it left must not fail the next one.
                lab = None;
            }
        }
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("        {line}\n")).collect()
}

/// The last lines of the agents' and the containers' logs.
pub(crate) fn logs(lab: &Lab) -> String {
    let mut text = String::new();
    for host in &lab.hosts {
        let mut files = [agents::Agent::Source, agents::Agent::Dest].map(|agent| host.path(&agent.log())).to_vec();
        let of_containers = std::fs::read_dir(host.path(CONTAINER_LOGS)).into_iter().flatten().flatten();
        files.extend(of_containers.map(|entry| entry.path()));
        for file in files {
            let log = std::fs::read(&file).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().filter(|line| !line.contains("\"INFO\"")).collect();
            let last = lines[lines.len().saturating_sub(6)..].join("\n");
            if !last.is_empty() {
                let name = file.file_stem().unwrap_or_default().to_string_lossy();
                text.push_str(&format!("--- {} {name}\n{last}\n", host.name));
            }
        }
    }
    text
}

/// Ends the containers that a scenario started, as an operator would.
pub(crate) fn tidy(host: &Host) -> Result<()> {
    host.sh(&format!(
        "for id in $(runc list -q); do {}; done; \
         for mount in $(awk '$2 ~ /^\\/srv\\/(containers|volumes|disk)/ {{print $2}}' /proc/mounts); do umount -l $mount; done; \
         rm -rf /srv/containers/* /srv/volumes /srv/disk /var/log/containers /var/lib/longhaul/logs /tmp/*",
        delete("$id")
    ))
    .map(drop)
}

/// How long what a scenario needed may take to be gone.
const CLEAN_WITHIN: Duration = Duration::from_secs(30);

/// After a scenario nothing of any move may be left.
pub(crate) fn must_be_clean(host: &Host) -> Result<()> {
    let script = r#"
        # A namespace's interfaces go some time after its last task: one thread of the kernel's ends all namespaces of the machine, those of
        # other labs as well, one after the other.
        for try in $(seq 1200); do
            ip -o link show type veth | grep -v ' eth0@' >/dev/null || break
            sleep 0.05
        done
        if ip -o link show type veth | grep ' eth0@' -v | sed 's/^/interface left: /' | grep .; then
            # Who has a namespace open, or is in one.
            for link in /proc/[0-9]*/ns/net /proc/[0-9]*/fd/*; do
                echo "$(readlink $link) $link"
            done | grep '^net:' | sort | sed 's/^/network namespace: /'
        fi
        ls /run/netns 2>/dev/null | sed 's/^/network namespace left: /'
        nft list tables 2>/dev/null | sed 's/^/firewall table left: /'
        ls /run/longhaul/source /run/longhaul/dest | grep -v -e : -e '^$' | sed 's/^/working directory left: /'
        grep -c . /proc/net/nf_conntrack 2>/dev/null | grep -v '^0' | sed 's/^/conntrack entries left: /'
        awk '$2 ~ /^\/srv\/containers/ || $2 ~ /criu/ {print "mount left: " $2}' /proc/mounts
        for dir in $(find /sys/fs/cgroup -mindepth 2 -type d 2>/dev/null | grep -v -e /init$); do
            echo "cgroup left: $dir" $(cat $dir/cgroup.procs)
        done
        pgrep -a 'criu|runc|longhaul-criu|longhaul-fill' | sed 's/^/process left: /'
        ls /var/lib/longhaul/source 2>/dev/null | sed 's/^/journal left: /'
    "#;
    // Agents and the kernel take away what is not needed any more in their own time.
    let end = Instant::now() + CLEAN_WITHIN;
    loop {
        let left = host.output(["sh", "-c", script])?;
        let left = String::from_utf8_lossy(&left.stdout).trim().to_owned();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("on {} after it:\n{left}", host.name);
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Runs the workspace's unit tests; their output goes on to ours.
pub fn run_unit_tests() -> Result<Counts> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let mut child = Command::new(cargo)
        .args(["test", "--quiet", "--profile", "lab", "--workspace", "--manifest-path"])
        .arg(manifest)
        .stdout(Stdio::piped())
        .spawn()
        .context("start cargo test")?;
    let mut counts = Counts::default();
    let stdout = child.stdout.take().context("cargo's output")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some(rest) = line.strip_prefix("test result: ") {
            counts.passed += number_before(rest, " passed");
            counts.failed += number_before(rest, " failed");
        }
        println!("{line}");
    }
    let status = child.wait()?;
    if !status.success() && counts.failed == 0 {
        bail!("the unit tests did not run to their end ({status})");
    }
    Ok(counts)
}

/// The number in front of a word: `ok. 12 passed; 0 failed`.
fn number_before(text: &str, word: &str) -> u64 {
    let Some(end) = text.find(word) else { return 0 };
    text[..end].rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::number_before;

    #[test]
    fn counts_are_read_from_cargos_line() {
        let line = "ok. 12 passed; 3 failed; 0 ignored";
        assert_eq!(number_before(line, " passed"), 12);
        assert_eq!(number_before(line, " failed"), 3);
    }
}
