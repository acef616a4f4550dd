//! Programs that run on a host while containers move.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::Host;

/// How long a client may take for anything.
const DEADLINE: Duration = Duration::from_secs(120);
/// How often its status file is looked at: it is rewritten every 100 ms.
const LOOK: Duration = Duration::from_millis(10);

/// A `lab-tool` client on a host. Killed when dropped.
pub struct Client {
    child: Child,
    status: PathBuf,
    name: String,
}

impl Client {
    /// Starts `lab-tool WORDS`, with a status file.
    pub fn start(host: &Host, words: &[&str]) -> Result<Self> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = format!("/tmp/client-{number}.json");
        let mut command = host.command(["lab-tool"].iter().chain(words));
        command.args(["--status-file", &file]);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start a client")?;
        Ok(Self { child, status: host.path(&file), name: words.join(" ") })
    }

    /// What the client last said of itself.
    pub fn status(&self) -> Option<Value> {
        serde_json::from_slice(&std::fs::read(&self.status).ok()?).ok()
    }

    /// Waits until a counter of its status has grown by `amount`.
    pub fn wait_progress(&mut self, key: &str, amount: u64) -> Result<()> {
        let count = |client: &Self| client.status().and_then(|status| status[key].as_u64());
        let deadline = Instant::now() + DEADLINE;
        let start = loop {
            match count(self) {
                Some(count) => break count,
                None if Instant::now() > deadline => return Err(self.ended("no status")),
                None => {}
            }
            if self.child.try_wait()?.is_some() {
                return Err(self.ended("it ended"));
            }
            std::thread::sleep(LOOK);
        };
        while count(self).unwrap_or(0) < start + amount {
            if self.child.try_wait()?.is_some() {
                return Err(self.ended("it ended"));
            }
            if Instant::now() > deadline {
                bail!("{}: {key} stays at {:?}", self.name, count(self));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Ends it and returns its report.
    pub fn finish(mut self) -> Result<Value> {
        self.terminate();
        let output = self.output();
        let line = output
            .lines()
            .find(|line| line.starts_with('{'))
            .with_context(|| format!("{}: no report: {output}", self.name))?;
        serde_json::from_str(line).with_context(|| format!("{}: {line}", self.name))
    }

    /// The pid of the program itself: the child of the `lab enter` that was started.
    fn terminate(&mut self) {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let _ = kill(Pid::from_raw(child), Signal::SIGTERM);
        }
    }

    fn ended(&mut self, what: &str) -> anyhow::Error {
        let output = self.output();
        anyhow::anyhow!("{}: {what}: {output}", self.name)
    }

    fn output(&mut self) -> String {
        use std::io::Read;
        self.terminate();
        let mut text = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            let _ = stdout.read_to_string(&mut text);
        }
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
