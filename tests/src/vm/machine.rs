//! One machine under QEMU.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::kernel::Kernel;
use super::quiet;

/// How long a machine may take to boot: some ten seconds when it is alone.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);
/// How long one command may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(300);

/// See the module. It ends with this value.
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) address: String,
    dir: PathBuf,
    qemu: Child,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Machine {
    /// Boots the machine of this number, 1 or 2, and waits until it takes commands. The first must be there before the second:
    /// it has the network.
    pub(super) fn boot(site: &Path, number: u32, kernel: &Kernel, [base, programs]: [&Path; 2]) -> Result<Self> {
        let dir = site.join(format!("host{number}"));
        std::fs::create_dir_all(&dir)?;
        let disk = dir.join("disk.img");
        quiet(Command::new("truncate").args(["-s", "4G"]).arg(&disk))?;
        quiet(
            Command::new("mke2fs")
                .args(["-q", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1"])
                .arg(&disk),
        )?;
        let lan = site.join("lan.sock");
        let net = if number == 1 { "on" } else { "off" };
        // Of the root alone it is sure where it is: several NVMe disks are numbered as they come up.
        let append = format!(
            "root=/dev/nvme0n1 rootfstype=ext4 ro init=/lab-init console=ttyS0 lab.name=host{number} lab.number={number} \
             mitigations=off quiet loglevel=4 panic=-1 random.trust_cpu=on tsc=reliable net.ifnames=0"
        );
        let drive =
            |file: &Path, id: &str, rest: &str| format!("file={},format=raw,if=none,id={id},{rest}", file.display());
        let read_only = "read-only=on,file.locking=off";
        // However the lab ends, the machine ends with it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        // The processor is an old one, without 16-byte compare and exchange: QEMU 7.2 emulates that so that kernels and programs end with
        // faults that make no sense (a kernel panicked behind it in `__kmalloc`). It is the oldest with AES, though: without, encrypting takes
        // most of a move.
        command.args([
            "-M",
            "q35",
            "-accel",
            "tcg,thread=single,tb-size=256",
            "-cpu",
            "Westmere-v2,-cx16",
            "-smp",
            "1",
            "-m",
            "1024",
        ]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-monitor", "none"]);
        command.arg("-kernel").arg(kernel.image()?).args(["-append", &append]);
        command.arg("-serial").arg(format!("file:{}", dir.join("console.log").display()));
        command.arg("-drive").arg(drive(base, "base", read_only)).args(["-device", "nvme,serial=base,drive=base"]);
        command.arg("-drive").arg(drive(&disk, "disk", "cache=unsafe,discard=unmap"));
        command.args(["-device", "virtio-blk-pci,drive=disk,serial=disk"]);
        command.arg("-drive").arg(drive(programs, "programs", read_only));
        command.args(["-device", "virtio-blk-pci,drive=programs,serial=programs"]);
        command.arg("-netdev").arg(format!("stream,id=lan,server={net},addr.type=unix,addr.path={}", lan.display()));
        command.arg("-device").arg(format!("virtio-net-pci,netdev=lan,mac=02:77:02:00:00:0{number},romfile="));
        command.args(["-device", "virtio-serial-pci,max_ports=4"]);
        for port in 0..PORTS {
            let socket = dir.join(format!("lab{port}.sock"));
            command.arg("-chardev").arg(format!("socket,id=lab{port},path={},server=on,wait=off", socket.display()));
            command.arg("-device").arg(format!("virtserialport,chardev=lab{port},name=lab{port}"));
        }
        let log = std::fs::File::create(dir.join("qemu.log"))?;
        let qemu = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("start QEMU")?;
        let machine = Self { name: format!("host{number}"), address: format!("10.77.0.{number}"), dir, qemu };
        let start = Instant::now();
        while number == 1 && !lan.exists() && start.elapsed() < BOOT_DEADLINE {
            std::thread::sleep(Duration::from_millis(20));
        }
        machine.wait_up(start)?;
        Ok(machine)
    }

    fn wait_up(&self, start: Instant) -> Result<()> {
        loop {
            if let Ok(said) = self.ask(0, "echo up", Duration::from_secs(5))
                && said["code"] == 0
            {
                return Ok(());
            }
            ensure!(start.elapsed() < BOOT_DEADLINE, "{} did not come up: {}", self.name, self.last_words());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What a script says, and its exit code.
    fn ask(&self, port: u32, script: &str, deadline: Duration) -> Result<Value> {
        let connected = UnixStream::connect(self.dir.join(format!("lab{port}.sock")));
        let mut socket = connected.with_context(|| format!("{} does not listen: {}", self.name, self.last_words()))?;
        socket.set_read_timeout(Some(deadline))?;
        // A number, since what an earlier request left may still come.
        let id = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos().to_string();
        socket.write_all(format!("{}\n", json!({"id": id, "script": script})).as_bytes())?;
        for line in BufReader::new(socket).lines() {
            let said: Value = serde_json::from_str(&line?).unwrap_or_default();
            if said["id"] == id.as_str() {
                return Ok(said);
            }
        }
        bail!("{} has ended: {}", self.name, self.last_words())
    }

    /// What QEMU and the kernel said last.
    fn last_words(&self) -> String {
        let tail = |file: &str| {
            let text = std::fs::read_to_string(self.dir.join(file)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(25)..].join("\n")
        };
        format!("{}\n{}", tail("qemu.log"), tail("console.log"))
    }

    /// The output of a script and its exit code, over one of the machine's lines.
    pub(super) fn output(&self, port: u32, script: &str) -> Result<(String, i64)> {
        let said = self.ask(port, script, COMMAND_DEADLINE).with_context(|| format!("on {}: {script}", self.name))?;
        Ok((said["out"].as_str().unwrap_or_default().to_owned(), said["code"].as_i64().unwrap_or(-1)))
    }

    /// The output of a script that must succeed.
    pub(super) fn sh(&self, script: &str) -> Result<String> {
        let (output, code) = self.output(0, script)?;
        ensure!(code == 0, "on {}: {script}\nexit code {code}: {output}", self.name);
        Ok(output)
    }
}

/// Lines that take commands: one for the moves, one for what watches them.
pub(super) const PORTS: u32 = 2;
