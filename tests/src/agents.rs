//! Installs Longhaul in a lab's hosts as an operator would: programs, certificates, configuration, agents.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use longhaul_common::fault;

use crate::lab::{Host, Lab};

/// Where each program goes in a host.
const PROGRAMS: [(&str, &str); 7] = [
    ("migrate", "usr/local/bin"),
    ("longhaul-source", "usr/local/bin"),
    ("longhaul-dest", "usr/local/bin"),
    ("lab-tool", "usr/local/bin"),
    ("longhaul-criu", "usr/local/libexec/longhaul"),
    ("longhaul-fill", "usr/local/libexec/longhaul"),
    ("liblonghaul_criu_filter.so", "usr/local/libexec/longhaul"),
];
/// How long an agent may take to say that it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// How long a move may take to a point where a fault was asked for.
const REACH_DEADLINE: Duration = Duration::from_secs(60);

/// Builds everything that runs in hosts, with the profile of the lab itself.
pub fn build() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--profile", "lab", "--workspace", "--bins", "--lib", "--manifest-path"])
        .arg(manifest)
        .status()
        .context("start cargo")?;
    if !status.success() {
        bail!("the build failed");
    }
    Ok(())
}

/// The directory programs are built into: the lab's own.
fn built() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("find the lab's own program")?;
    Ok(exe.parent().context("the lab's program has no directory")?.to_owned())
}

/// Installs programs, certificates and configuration in every host, and starts both agents on each.
pub fn install(lab: &Lab) -> Result<()> {
    for host in &lab.hosts {
        install_programs(host)?;
    }
    let first = lab.hosts.first().context("the lab has no host")?;
    first.sh("migrate pki init")?;
    for host in &lab.hosts {
        first.sh(&format!("migrate pki issue {} --name {}", host.name, host.address))?;
        let from = first.path(&format!("/etc/longhaul/pki/hosts/{}", host.name));
        let to = host.path("/etc/longhaul/tls");
        fs::create_dir_all(&to)?;
        for file in ["ca.pem", "cert.pem", "key.pem"] {
            fs::copy(from.join(file), to.join(file))?;
        }
        configure(lab, host)?;
    }
    for host in &lab.hosts {
        start(host, Agent::Dest)?;
        start(host, Agent::Source)?;
    }
    lab.hosts.iter().try_for_each(wait_ready)
}

fn install_programs(host: &Host) -> Result<()> {
    stage_programs(&host.path("/"))
}

/// Copies the programs to where they go below a root.
pub(crate) fn stage_programs(root: &Path) -> Result<()> {
    let built = built()?;
    for (program, dir) in PROGRAMS {
        let dir = root.join(dir);
        fs::create_dir_all(&dir)?;
        fs::copy(built.join(program), dir.join(program)).with_context(|| format!("install {program}"))?;
    }
    Ok(())
}

/// Writes both agents' configuration.
pub fn configure(lab: &Lab, host: &Host) -> Result<()> {
    let names: Vec<String> = lab.hosts.iter().map(|host| format!("\"{}\"", host.name)).collect();
    // Several hosts share two cores, and labs run side by side: a thread may not get one for longer than an operator's host
    // would let it wait. Scenarios about a silent destination set their own.
    let mut source = format!("frozen_silence_ms = {LOADED_SILENCE_MS}\n");
    for other in lab.hosts.iter().filter(|other| other.name != host.name) {
        source.push_str(&format!("[hosts.{}]\naddress = \"{}\"\n", other.name, other.name));
    }
    let dest = format!("listen = \"{}:7474\"\nallow = [{}]\n", host.address, names.join(", "));
    fs::write(host.path("/etc/longhaul/source.toml"), source)?;
    fs::write(host.path("/etc/longhaul/dest.toml"), dest)?;
    Ok(())
}

/// How long a destination may be silent in a lab, in milliseconds.
const LOADED_SILENCE_MS: u64 = 2000;

/// One of the two agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// `longhaul-source`.
    Source,
    /// `longhaul-dest`.
    Dest,
}

impl Agent {
    /// Its program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Source => "longhaul-source",
            Self::Dest => "longhaul-dest",
        }
    }

    /// Its log in the host.
    pub fn log(self) -> String {
        format!("/var/log/{}.log", self.program())
    }

    /// The file in the host that asks for a fault (`longhaul_common::fault`).
    fn fault_file(self) -> String {
        format!("/tmp/{}.fault", self.program())
    }

    /// What becomes of it when the fault's point is reached.
    pub fn reached_file(self) -> String {
        format!("/tmp/{}.reached", self.program())
    }
}

/// Asks an agent for a fault at a point: `kill`, `stop`, `hold`.
pub fn ask_fault(host: &Host, agent: Agent, point: &str, action: &str) -> Result<()> {
    Ok(fs::write(host.path(&agent.fault_file()), format!("{point} {action}\n"))?)
}

/// Waits until an agent has reached the point of its fault.
pub fn wait_reached(host: &Host, agent: Agent) -> Result<()> {
    let reached = host.path(&agent.reached_file());
    let deadline = Instant::now() + REACH_DEADLINE;
    while !reached.exists() {
        if Instant::now() > deadline {
            bail!("{} of {} did not reach the point of its fault", agent.program(), host.name);
        }
        // Polled: `/proc/<pid>/root` tells nobody of changes.
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Forgets a fault, whether its point was reached or not; an agent that was held there goes on.
pub fn clear_fault(host: &Host, agent: Agent) -> Result<()> {
    for file in [agent.fault_file(), agent.reached_file()] {
        match fs::remove_file(host.path(&file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

/// Starts an agent that was killed, once it is gone: until then its address is taken.
pub fn come_back(host: &Host, agent: Agent) -> Result<()> {
    host.sh(&format!(
        "for i in $(seq 2000); do pgrep -x {} >/dev/null || exit 0; sleep 0.005; done; exit 1",
        agent.program()
    ))?;
    start(host, agent)?;
    wait_ready(host)
}

/// Starts an agent; its log is appended to.
pub fn start(host: &Host, agent: Agent) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let log = fs::OpenOptions::new().create(true).append(true).open(host.path(&agent.log()))?;
    let child = host
        .command(["env", &format!("{}={}", fault::VARIABLE, agent.fault_file()), agent.program()])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {} on {}", agent.program(), host.name))?;
    // Reaped by a thread of its own: a restarted agent must not leave a zombie in a long test run.
    std::thread::spawn(move || {
        let mut child = child;
        child.wait()
    });
    Ok(())
}

/// Ends an agent and waits until it is gone.
pub fn stop(host: &Host, agent: Agent) -> Result<()> {
    let program = agent.program();
    host.sh(&format!("pkill -TERM -x {program} || true; while pgrep -x {program} >/dev/null; do sleep 0.02; done"))
        .map(drop)
}

/// Waits until both agents answer.
pub fn wait_ready(host: &Host) -> Result<()> {
    let deadline = Instant::now() + READY_DEADLINE;
    let script = format!("migrate status >/dev/null && lab-tool wait-port {}:7474 --seconds 1", host.address);
    loop {
        let output = host.output(["sh", "-c", &script])?;
        if output.status.success() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let logs = [Agent::Source, Agent::Dest]
                .map(|agent| fs::read_to_string(host.path(&agent.log())).unwrap_or_default())
                .concat();
            bail!("the agents of {} did not come up: {}\n{logs}", host.name, String::from_utf8_lossy(&output.stderr));
        }
        // Polled: a process in another PID namespace has no way to tell us.
        std::thread::sleep(Duration::from_millis(20));
    }
}
