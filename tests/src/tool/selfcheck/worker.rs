//! A child process with a suite of its own, asked over a seqpacket socket.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serde::{Deserialize, Serialize};

use super::events::readable;
use super::suite::Suite;
use crate::tool::sys::process;

/// A child's suite takes milliseconds; the whole check must be done within 2 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Setting up may write some MiB to files.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// The largest answer: dozens of failure lines.
const MAX_ANSWER: usize = 32 << 10;

#[derive(Serialize, Deserialize)]
struct Answer {
    checks: usize,
    failures: Vec<String>,
}

/// The parent's side of a child process. The child ends when this is dropped, or by SIGKILL when the parent dies.
pub(super) struct Worker {
    pid: i32,
    name: &'static str,
    control: OwnedFd,
    checks: usize,
}

impl Worker {
    /// Forks. The child calls `build`, which turns it into what it should be, and then answers requests. Must be
    /// called while the process has one thread. `siblings` are closed in the child.
    pub(super) fn fork(
        name: &'static str,
        siblings: &mut Vec<Worker>,
        build: impl FnOnce() -> anyhow::Result<Suite>,
    ) -> anyhow::Result<Self> {
        let (control, child_control) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let parent_end = control.as_raw_fd();
        let pid = process::fork(|| {
            siblings.clear();
            // The parent's end, inherited by the fork: while it is open here, the end of the parent goes unnoticed.
            let _ = nix::unistd::close(parent_end);
            serve(name, &child_control, build)
        })?;
        drop(child_control);
        let mut worker = Self { pid, name, control, checks: 0 };
        let ready = worker.receive(READY_TIMEOUT).with_context(|| format!("start process {name}"))?;
        if let Some(failure) = ready.failures.first() {
            bail!("start process {name}: {failure}");
        }
        worker.checks = ready.checks;
        Ok(worker)
    }

    /// The child's process id.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// The child's name in the list of checks.
    pub(super) fn check_name(&self) -> String {
        format!("worker-{}", self.name)
    }

    /// How many checks the child makes.
    pub(super) fn checks(&self) -> usize {
        self.checks
    }

    /// Lets the child verify itself; an error names all its failures.
    pub(super) fn ask(&self) -> anyhow::Result<()> {
        send(self.control.as_raw_fd(), b"check", MsgFlags::MSG_NOSIGNAL).context("ask the process")?;
        let answer = self.receive(ANSWER_TIMEOUT)?;
        if !answer.failures.is_empty() {
            bail!("{}", answer.failures.join("; "));
        }
        Ok(())
    }

    fn receive(&self, timeout: Duration) -> anyhow::Result<Answer> {
        if !readable(self.control.as_fd(), timeout)? {
            bail!("process {} ({}) does not answer", self.name, self.pid);
        }
        let mut answer = vec![0; MAX_ANSWER];
        let length = recv(self.control.as_raw_fd(), &mut answer, MsgFlags::empty()).context("read the answer")?;
        if length == 0 {
            bail!("process {} ({}) has ended", self.name, self.pid);
        }
        Ok(serde_json::from_slice(&answer[..length])?)
    }
}

fn serve(name: &str, control: &OwnedFd, build: impl FnOnce() -> anyhow::Result<Suite>) -> i32 {
    match run(name, control, build) {
        Ok(()) => 0,
        Err(error) => {
            // Either the parent reads this, or it is gone and nobody is left to tell.
            let answer = Answer { checks: 0, failures: vec![format!("{error:#}")] };
            let _ = send_answer(control, &answer);
            1
        }
    }
}

fn run(name: &str, control: &OwnedFd, build: impl FnOnce() -> anyhow::Result<Suite>) -> anyhow::Result<()> {
    process::set_name(&std::ffi::CString::new(format!("sc-{name}"))?)?;
    let mut suite = build()?;
    // After `build`, because a change of credentials clears it.
    process::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64)?;
    suite.add("parent-death-signal", || {
        Ok(|| super::suite::same("the signal", &process::parent_death_signal()?, &libc::SIGKILL))
    })?;
    send_answer(control, &Answer { checks: suite.len(), failures: Vec::new() })?;
    let mut request = [0; 16];
    loop {
        match recv(control.as_raw_fd(), &mut request, MsgFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(_) => send_answer(control, &Answer { checks: suite.len(), failures: suite.verify() })?,
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for a request"),
        }
    }
}

fn send_answer(control: &OwnedFd, answer: &Answer) -> anyhow::Result<()> {
    let answer = serde_json::to_vec(answer)?;
    send(control.as_raw_fd(), &answer[..answer.len().min(MAX_ANSWER)], MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}
