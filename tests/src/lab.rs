//! A lab: a switch and some hosts, brought up together and removed together.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::cgroup::HostCgroups;
use crate::host_init::HostSpec;
use crate::image::Image;
use crate::machine::run_quiet;

/// Where labs that are up are described, one file each.
const STATE_DIR: &str = "/run/longhaul-lab";
/// Where hosts keep what they write. On a real filesystem: overlay upper layers need one.
const DISK_DIR: &str = "/var/lib/longhaul-lab";
/// How long a host may take to come up.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);

/// One host of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Host {
    /// `host1`, `host2`, …
    pub name: String,
    /// Its address on the lab's network.
    pub address: Ipv4Addr,
    /// Its init, in the outer machine's numbering.
    pub init: i32,
    disk: PathBuf,
    cgroups: HostCgroups,
}

/// A running lab. Dropping it removes everything, unless it was [kept](Lab::keep).
#[derive(Debug, Serialize, Deserialize)]
pub struct Lab {
    /// Its name: several labs may be up at once.
    pub name: String,
    /// Its hosts.
    pub hosts: Vec<Host>,
    /// The process that owns it, or nothing if it stays up by itself.
    owner: Option<i32>,
    switch: i32,
    #[serde(skip)]
    kept: bool,
    #[serde(skip)]
    lifeline: Option<Lifeline>,
}

/// A pipe that nobody writes to. Hosts read it, and end when its other end, which this process alone has, is gone.
#[derive(Debug)]
struct Lifeline {
    read: OwnedFd,
    _write: OwnedFd,
}

impl Lab {
    /// Brings up a switch and `hosts` hosts that live as long as this value.
    pub fn up(name: &str, hosts: usize) -> Result<Self> {
        Self::start(name, hosts, true)
    }

    /// Brings up a lab that outlives this process (`cargo lab up`).
    pub fn up_detached(name: &str, hosts: usize) -> Result<Self> {
        let mut lab = Self::start(name, hosts, false)?;
        lab.kept = true;
        Ok(lab)
    }

    fn start(name: &str, hosts: usize, owned: bool) -> Result<Self> {
        if hosts == 0 || hosts > 100 {
            bail!("a lab has 1 to 100 hosts, not {hosts}");
        }
        if state_file(name).exists() {
            bail!("lab {name:?} is up already: `cargo lab down` first");
        }
        let image = Image::ensure()?;
        fs::create_dir_all(STATE_DIR)?;
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make the lifeline")?;
        let lifeline = owned.then_some(Lifeline { read, _write: write });
        let mut lab = Self {
            name: name.to_owned(),
            hosts: Vec::new(),
            owner: owned.then(|| std::process::id().cast_signed()),
            switch: 0,
            kept: false,
            lifeline,
        };
        let switch_spec = HostSpec {
            name: "switch".to_owned(),
            image: None,
            disk: PathBuf::new(),
            hierarchies: Vec::new(),
            etc_hosts: String::new(),
            lifeline: lab.lifeline_fd(),
        };
        lab.switch = spawn_init(&switch_spec, &[])?;
        // Saved at every step, so that a lab that is cut off half-way up can be removed.
        lab.save()?;
        lab.in_switch(&["ip", "link", "add", "lan", "type", "bridge"])?;
        lab.in_switch(&["ip", "link", "set", "lan", "up"])?;
        for number in 1..=hosts {
            let name = format!("host{number}");
            let address = Ipv4Addr::new(10, 77, 0, u8::try_from(number).unwrap_or(u8::MAX));
            let disk = Path::new(DISK_DIR).join(&lab.name).join(&name);
            fs::create_dir_all(&disk)?;
            let cgroups = HostCgroups::create(&lab.name, &name)?;
            lab.hosts.push(Host { name, address, init: 0, disk, cgroups });
        }
        for index in 0..hosts {
            lab.boot(&image, index)?;
        }
        Ok(lab)
    }

    fn lifeline_fd(&self) -> Option<RawFd> {
        self.lifeline.as_ref().map(|lifeline| lifeline.read.as_raw_fd())
    }

    /// Starts a host that is registered, with what its disk has.
    fn boot(&mut self, image: &Image, index: usize) -> Result<()> {
        let etc_hosts = self.hosts.iter().fold("127.0.0.1 localhost\n::1 localhost\n".to_owned(), |text, host| {
            format!("{text}{} {}\n", host.address, host.name)
        });
        let lifeline = self.lifeline_fd();
        let host = self.hosts.get_mut(index).context("no such host")?;
        let spec = HostSpec {
            name: host.name.clone(),
            image: Some(image.root.clone()),
            disk: host.disk.clone(),
            hierarchies: host.cgroups.hierarchies.clone(),
            etc_hosts,
            lifeline,
        };
        host.init = spawn_init(&spec, &host.cgroups.procs_files())?;
        let host = host.clone();
        self.save()?;
        let port = host.port();
        let init = host.init.to_string();
        self.in_switch(&["ip", "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &init])?;
        self.in_switch(&["ip", "link", "set", &port, "master", "lan", "up"])?;
        // Containers sit on the same bridge as the host's uplink: their addresses can move between hosts.
        let v6 = format!("fd77::{}/64", host.address.octets()[3]);
        let setup = format!(
            "ip link set lo up; ip link add br0 address 02:77:01:00:00:{:02x} type bridge; ip link set eth0 master br0 up; ip link set br0 up; \
             ip address add {}/24 dev br0; ip -6 address add {v6} dev br0 nodad",
            host.address.octets()[3],
            host.address
        );
        host.sh(&setup)?;
        Ok(())
    }

    /// A host loses power and comes up again: its disk is as it was, its memory and its processes are gone.
    pub fn power_cycle(&mut self, index: usize) -> Result<()> {
        let host = self.hosts.get(index).context("no such host")?;
        host.cgroups.thaw();
        end_init(host.init, Some(&host.cgroups));
        host.cgroups.remove();
        let cgroups = HostCgroups::create(&self.name, &host.name)?;
        // The switch's end of its cable went with the other one, or will soon.
        let port = host.port();
        let deadline = Instant::now() + BOOT_DEADLINE;
        while self.in_switch(&["ip", "link", "show", &port]).is_ok() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(host) = self.hosts.get_mut(index) {
            host.cgroups = cgroups;
        }
        self.boot(&Image::ensure()?, index)
    }

    /// Pulls a host's cable, or puts it back.
    pub fn cable(&self, host: &Host, is_in: bool) -> Result<()> {
        self.in_switch(&["ip", "link", "set", &host.port(), if is_in { "up" } else { "down" }])
    }

    fn in_switch(&self, words: &[&str]) -> Result<()> {
        let net = format!("--net=/proc/{}/ns/net", self.switch);
        run_quiet(Command::new("nsenter").arg(net).args(words))
    }

    /// The host of this name.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts.iter().find(|host| host.name == name).with_context(|| {
            let names: Vec<&str> = self.hosts.iter().map(|host| host.name.as_str()).collect();
            format!("lab {} has no host {name:?}, only {}", self.name, names.join(", "))
        })
    }

    /// A lab that is up, by name.
    pub fn open(name: &str) -> Result<Self> {
        let text = fs::read_to_string(state_file(name))
            .with_context(|| format!("no lab {name:?} is up: `cargo lab up` starts one"))?;
        let mut lab: Self = serde_json::from_str(&text).context("read the lab's state")?;
        lab.kept = true;
        Ok(lab)
    }

    /// Names of the labs that are up.
    pub fn list() -> Vec<String> {
        let Ok(entries) = fs::read_dir(STATE_DIR) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
            .collect()
    }

    /// Removes the labs that this process owns: it is about to end.
    pub fn remove_own() {
        for name in Self::list() {
            if let Ok(mut lab) = Self::open(&name)
                && lab.owner == Some(std::process::id().cast_signed())
            {
                lab.down();
            }
        }
    }

    /// Removes what labs of ended processes left (a lab that was killed with SIGKILL).
    pub fn sweep() {
        for name in Self::list() {
            let Ok(mut lab) = Self::open(&name) else { continue };
            let orphaned = lab.owner.is_some_and(|pid| kill(Pid::from_raw(pid), None).is_err());
            if orphaned {
                lab.down();
            }
        }
    }

    fn save(&self) -> Result<()> {
        fs::write(state_file(&self.name), serde_json::to_vec_pretty(self)?).context("write the lab's state")
    }

    /// Ends every host and removes everything the lab made.
    pub fn down(&mut self) {
        self.lifeline = None;
        for host in &self.hosts {
            host.cgroups.thaw();
            end_init(host.init, Some(&host.cgroups));
        }
        end_init(self.switch, None);
        for host in &self.hosts {
            host.cgroups.remove();
        }
        let _ = fs::remove_dir_all(Path::new(DISK_DIR).join(&self.name));
        let _ = fs::remove_dir(DISK_DIR);
        let _ = fs::remove_file(state_file(&self.name));
        let _ = fs::remove_dir(STATE_DIR);
        self.kept = true;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.kept {
            self.down();
        }
    }
}

fn state_file(name: &str) -> PathBuf {
    Path::new(STATE_DIR).join(format!("{name}.json"))
}

impl Host {
    /// Its port of the switch.
    fn port(&self) -> String {
        format!("p-{}", self.name)
    }

    /// A command that will run inside this host.
    pub fn command<I, S>(&self, words: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new("/proc/self/exe");
        command.arg("enter").arg("--pid").arg(self.init.to_string());
        for procs in self.cgroups.procs_files() {
            command.arg("--cgroup").arg(procs);
        }
        command.arg("--").args(words);
        command
    }

    /// Runs a command to its end and returns its output, whatever its exit status.
    pub fn output<I, S>(&self, words: I) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.command(words).stdin(Stdio::null()).output().with_context(|| format!("run a command in {}", self.name))
    }

    /// Runs a shell script inside the host; its standard output, or an error with all it printed.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.output(["sh", "-ec", script])?;
        if !output.status.success() {
            bail!(
                "on {}: {script}\nfailed ({}):\n{}{}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A path inside the host, seen from the outer machine.
    pub fn path(&self, inside: &str) -> PathBuf {
        Path::new("/proc").join(self.init.to_string()).join("root").join(inside.trim_start_matches('/'))
    }
}

/// Starts an init inside its cgroups and waits until it says that the host is ready.
fn spawn_init(spec: &HostSpec, cgroup_procs: &[PathBuf]) -> Result<i32> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("host-init")
        .arg(serde_json::to_string(spec)?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A Ctrl-C at the terminal is for the lab's own process, which then ends its hosts in order.
        .process_group(0);
    let procs: Vec<PathBuf> = cgroup_procs.to_vec();
    let lifeline = spec.lifeline;
    // SAFETY: between fork and exec only write(2) and fcntl(2) are called, on data made before.
    unsafe {
        command.pre_exec(move || {
            for file in &procs {
                fs::write(file, "0")?;
            }
            if let Some(fd) = lifeline {
                nix::fcntl::fcntl(
                    std::os::fd::BorrowedFd::borrow_raw(fd),
                    nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
                )?;
            }
            Ok(())
        });
    }
    let mut child = command.spawn().context("start a host")?;
    let stdout = child.stdout.take().context("the host's output")?;
    let mut lines = BufReader::new(stdout).lines();
    // Its two halves write one line each, in either order.
    let said: Vec<String> = lines.by_ref().take(2).collect::<std::io::Result<_>>()?;
    let pid = said.iter().find(|line| *line != "ready");
    let (Some(pid), 2) = (pid, said.len()) else { bail!("host {} did not come up", spec.name) };
    let pid = pid.clone();
    // Reaped by a thread of its own: an init that ended must not stay a zombie of a long test run.
    std::thread::spawn(move || child.wait());
    pid.trim().parse().context("the host's process number")
}

/// Kills an init and, with it, all its PID namespace; waits until it is gone.
fn end_init(pid: i32, cgroups: Option<&HostCgroups>) {
    if pid <= 0 {
        return;
    }
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let deadline = Instant::now() + BOOT_DEADLINE;
    while Path::new("/proc").join(pid.to_string()).exists() && Instant::now() < deadline {
        // A frozen container holds its host's init back until it thaws.
        if let Some(cgroups) = cgroups {
            cgroups.thaw();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
