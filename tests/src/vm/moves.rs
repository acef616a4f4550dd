//! What is moved between the machines: a redis, whose content must be the same, and the workload whose every page checks itself.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::machine::Machine;
use super::{NEW, OLD};

/// One pair of machines.
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) kernels: [&'static str; 2],
    /// What tells which pages were written, by the kernel of the source: as it is chosen, or as it is asked for.
    trackers: [(&'static str, &'static str); 2],
}

pub(super) const PLANS: &[Plan] = &[
    Plan {
        name: "between 6.1 with soft-dirty bits and 6.12 with write protection",
        kernels: [OLD, NEW],
        trackers: [("auto", "soft-dirty"), ("auto", "userfaultfd-wp")],
    },
    Plan {
        name: "between two 6.12, with soft-dirty bits",
        kernels: [NEW, NEW],
        trackers: [("soft-dirty", "soft-dirty"), ("soft-dirty", "soft-dirty")],
    },
];

/// Memory that checks itself, with one process that changes its address space: on an emulated machine more leaves no time for the move.
const MEMCHECK: &str = "lab-tool memcheck run --mib 16 --rate 200 --threads 2 --listen 0.0.0.0:7003";

/// What is moved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    /// A redis, whose content is compared after each move.
    Web,
    /// The workload whose every page checks itself.
    Memory,
}

/// Those whose names have `word`.
pub(super) fn containers(word: &str) -> Result<Vec<Container>> {
    let found: Vec<_> =
        [Container::Web, Container::Memory].into_iter().filter(|each| each.name().contains(word)).collect();
    ensure!(!found.is_empty(), "no container has `{word}` in its name: there are web and memory");
    Ok(found)
}

impl Container {
    fn name(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Memory => "memory",
        }
    }

    fn start(self, on: &Machine) -> Result<()> {
        match self {
            Self::Web => {
                let server = "redis-server --bind 0.0.0.0 --protected-mode no --save '' --enable-debug-command yes";
                on.sh(&container(self.name(), 20, server))?;
                on.sh("lab-tool wait-port 10.77.0.20:6379 --seconds 120")?;
                on.sh("redis-cli -h 10.77.0.20 debug populate 20000 key 1000")?;
            }
            Self::Memory => {
                on.sh(&container(self.name(), 26, MEMCHECK))?;
                on.sh("lab-tool wait-port 10.77.0.26:7003 --seconds 120")?;
            }
        }
        Ok(())
    }

    /// Asks it for what it holds, which must stay the same; an error where it found itself damaged.
    fn content(self, from: &Machine) -> Result<String> {
        match self {
            Self::Web => from.sh("redis-cli -h 10.77.0.20 debug digest"),
            Self::Memory => from.sh("lab-tool memcheck query --addr 10.77.0.26:7003").map(|_| String::new()),
        }
    }
}

/// Moves them to and fro; what was seen, for the line that is printed.
pub(super) fn run(
    plan: &Plan,
    first: &Machine,
    second: &Machine,
    containers: &[Container],
    moves: usize,
) -> Result<String> {
    install(plan, [first, second])?;
    let mut held = Vec::new();
    for container in containers {
        container.start(first)?;
        held.push((*container, container.content(first)?));
    }
    let mut downtimes = Vec::new();
    let mut again = 0;
    for turn in 0..moves {
        let (from, to, tracker) =
            if turn % 2 == 0 { (first, second, plan.trackers[0].1) } else { (second, first, plan.trackers[1].1) };
        let start = std::time::Instant::now();
        for container in containers {
            let (report, tries) = migrate(container.name(), from, to)?;
            again += tries - 1;
            let memory = &report["memory"];
            ensure!(memory["tracker"] == tracker, "tracked by something else than {tracker}: {memory}");
            ensure!(memory["path"] == "lazy", "{memory}");
            downtimes.push(report["downtime_ms"].as_f64().unwrap_or(f64::NAN));
        }
        let moved = start.elapsed().as_secs_f64();
        for (container, before) in &held {
            let name = container.name();
            let after = container.content(first).with_context(|| {
                let seen =
                    format!("runc list; tail -n 5 /var/log/containers/{name}.log; ip -br link; dmesg | tail -n 20");
                format!("move {turn}; on {}:\n{}", to.name, to.sh(&seen).unwrap_or_default())
            })?;
            ensure!(after == *before, "move {turn}: {name} holds something else: {before} and {after}");
        }
        let checked = start.elapsed().as_secs_f64() - moved;
        eprintln!("lab: {} of {moves}: moved in {moved:.1} s, looked at in {checked:.1} s", turn + 1);
    }
    downtimes.sort_by(f64::total_cmp);
    let median = downtimes.get(downtimes.len() / 2).copied().unwrap_or(f64::NAN);
    Ok(format!("{} moves, {again} of them tried again, downtime {median:.0} ms (emulated)", downtimes.len()))
}

/// Moves a container; the report, and how often it was tried. While this machine is busy with something else an emulated one may not
/// answer for seconds, which ends a move as it should: where the container still runs, that is no failure of the move.
fn migrate(name: &str, from: &Machine, to: &Machine) -> Result<(Value, u32)> {
    const TRIES: u32 = 3;
    // Memory that is written faster than an emulated machine copies it must not keep it here.
    let script = format!(
        "migrate {name} --to {} -q --format json --max-rounds 4 --timeout-action freeze 2>/tmp/migrate.err",
        to.name
    );
    let mut tries = 0;
    loop {
        tries += 1;
        let (output, code) = from.output(0, &script)?;
        let report: Value = serde_json::from_str(&output).with_context(|| {
            format!("{name}: exit code {code}: {output} {}", from.sh("cat /tmp/migrate.err").unwrap_or_default())
        })?;
        if report["outcome"] == "moved" {
            return Ok((report, tries));
        }
        let stayed = report["outcome"] == "failed" && from.sh(&format!("runc state {name} | grep -q running")).is_ok();
        let timed_out = report["error"].as_str().is_some_and(|error| error.contains("timed out"));
        if stayed && timed_out && tries < TRIES {
            eprintln!("lab: {name} stays on {} for now: {}", from.name, report["error"]);
            continue;
        }
        let logs = "tail -n 8 /var/lib/longhaul/failed/*/*.log 2>/dev/null || true";
        bail!(
            "{name} from {}: {report}\n{}\n{}",
            from.name,
            from.sh(&format!("tail -n 3 /var/log/longhaul-source.log; {logs}")).unwrap_or_default(),
            to.sh(&format!("tail -n 3 /var/log/longhaul-dest.log; {logs}")).unwrap_or_default(),
        );
    }
}

/// Certificates, configuration and agents, as an operator would.
fn install(plan: &Plan, machines: [&Machine; 2]) -> Result<()> {
    let [first, second] = machines;
    first.sh(
        "migrate pki init >/dev/null; for h in 1 2; do migrate pki issue host$h --name 10.77.0.$h >/dev/null; done; \
         mkdir -p /etc/longhaul/tls; cp /etc/longhaul/pki/hosts/host1/* /etc/longhaul/tls/",
    )?;
    let files = first.sh("tar -C /etc/longhaul/pki/hosts/host2 -cf - . | base64 -w0")?;
    second.sh(&format!(
        "mkdir -p /etc/longhaul/tls; echo {} | base64 -d | tar -C /etc/longhaul/tls -xf -",
        files.trim()
    ))?;
    for (index, machine) in machines.iter().enumerate() {
        let other = machines[1 - index];
        let tracker = plan.trackers[index].0;
        machine.sh(&format!(
            "printf 'tracker = \"{tracker}\"\\nfrozen_silence_ms = 5000\\n[hosts.{other}]\\naddress = \"{other}\"\\n' >/etc/longhaul/source.toml; \
             printf 'listen = \"{address}:7474\"\\nallow = [\"host1\", \"host2\"]\\n' >/etc/longhaul/dest.toml; \
             for p in longhaul-dest longhaul-source; do $p </dev/null >>/var/log/$p.log 2>&1 & done",
            other = other.name,
            address = machine.address,
        ))?;
    }
    for machine in machines {
        machine.sh(&format!(
            "for i in $(seq 300); do migrate status >/dev/null 2>&1 && lab-tool wait-port {}:7474 --seconds 1 >/dev/null 2>&1 && exit 0; sleep 0.2; done; \
             cat /var/log/longhaul-*.log; exit 1",
            machine.address
        ))?;
    }
    Ok(())
}

/// Starts a container on an overlay of the small image, as the lab's hosts do.
fn container(name: &str, last: u8, command: &str) -> String {
    let args = command.replace("''", "");
    let args: Vec<String> = args.split_whitespace().map(|word| format!("\"{word}\"")).collect();
    let save = if command.contains("''") {
        args.join(", ").replace("\"--save\"", "\"--save\", \"\"")
    } else {
        args.join(", ")
    };
    format!(
        "b=/srv/containers/{name}; mkdir -p $b/rootfs $b/upper/usr/local/bin $b/work /var/log/containers; \
         cp /usr/local/bin/lab-tool $b/upper/usr/local/bin/; \
         mount -t overlay overlay -o lowerdir=/srv/image,upperdir=$b/upper,workdir=$b/work $b/rootfs; cd $b; runc spec; \
         python3 -S -c 'import json, sys; c = json.load(open(\"config.json\")); \
            caps = [\"CAP_\" + x for x in \"CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP SETUID SYS_CHROOT AUDIT_WRITE\".split()]; \
            p = c[\"process\"]; [p[\"capabilities\"].__setitem__(s, caps) for s in (\"bounding\", \"effective\", \"permitted\")]; \
            p[\"terminal\"] = False; p[\"args\"] = [{save}]; p[\"rlimits\"] = [dict(type=\"RLIMIT_NOFILE\", hard=4096, soft=4096)]; \
            c[\"root\"] = dict(path=\"rootfs\", readonly=False); c[\"hostname\"] = \"{name}\"; json.dump(c, open(\"config.json\", \"w\"))'; \
         runc create --bundle $b {name} </dev/null >>/var/log/containers/{name}.log 2>&1 || {{ cat /var/log/containers/{name}.log; exit 1; }}; \
         pid=$(runc state {name} | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p'); \
         ip link add v{last} address fe:77:00:00:00:{last:02x} type veth peer name eth0 address 02:77:00:00:00:{last:02x} netns $pid; \
         ip link set v{last} master br0 up; \
         nsenter -t $pid -n sh -ec 'ip link set lo up; ip link set eth0 up; ip address add 10.77.0.{last}/24 dev eth0; \
            ip route add default via 10.77.0.1'; \
         runc start {name}"
    )
}
