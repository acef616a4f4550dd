//! Memory that verifies itself while it is written: each 4 KiB page carries its id, a counter and a checksum, and the
//! counters are kept a second time elsewhere, so that lost, mixed up, torn and stale pages all show.

mod churn;
mod common;
mod page;
mod process;
mod slice;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::common::Common;
use self::process::{Plan, Summary, Writers};
use super::check::{self, Server};
use super::pace::TICK;
use super::{report, sys};

/// Verifying a GiB takes half a second on one core; a loaded machine needs a multiple.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(50);

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Write and verify until SIGTERM
    Run(RunOptions),
    /// Ask a running memory check to verify all pages; exits 1 if anything is wrong
    Query(check::QueryOptions),
}

#[derive(Args, Debug)]
pub(crate) struct RunOptions {
    /// Self-checking memory, all processes together
    #[arg(long)]
    mib: usize,
    /// Pages written a second, all processes together
    #[arg(long)]
    rate: u64,
    /// Where to answer `check` requests
    #[arg(long)]
    listen: SocketAddr,
    /// Processes that write
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    procs: u32,
    /// Writing threads of each process
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// Only write pages: no mmap, mremap, madvise or fork meanwhile
    #[arg(long)]
    no_churn: bool,
    /// Decides every choice of the workload
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the final report to this file on SIGTERM
    #[arg(long)]
    report: Option<PathBuf>,
}

/// Runs the workload, or asks one.
pub(crate) fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Run(options) => run_workload(&options),
        Command::Query(options) => check::query(&options),
    }
}

fn run_workload(options: &RunOptions) -> anyhow::Result<bool> {
    sys::signal::stop_on_terminate()?;
    let procs = options.procs as usize;
    let plan = |index| Plan {
        index,
        bytes: (options.mib << 20) / procs,
        rate: options.rate / procs as u64,
        threads: options.threads as usize,
        churn: !options.no_churn,
        seed: options.seed,
    };
    // One process shares with nobody.
    let common = if procs > 1 { Some(Arc::new(Common::create()?)) } else { None };
    // The children first: a fork wants a process with one thread.
    let mut children = Vec::new();
    for index in 1..procs {
        let child = Child::fork(plan(index), common.as_ref(), &mut children)?;
        children.push(child);
    }
    let server = Server::bind(options.listen)?;
    let writers = Writers::start(plan(0), common.as_ref())?;
    for child in &mut children {
        child.verify().context("start a process")?;
    }
    println!("ready");
    while !sys::signal::stop_requested() {
        server.serve(TICK, || verdict(&writers, &mut children))?;
    }
    let verdict = verdict(&writers, &mut children);
    report::publish(&verdict, options.report.as_deref())?;
    Ok(verdict["ok"] == true)
}

fn verdict(writers: &Writers, children: &mut [Child]) -> Value {
    let mut total = writers.verify();
    for child in children {
        match child.verify() {
            Ok(summary) => {
                total.pages += summary.pages;
                total.updates += summary.updates;
                total.failures.extend(summary.failures);
            }
            Err(error) => total.failures.push(format!("process {}: {error:#}", child.pid)),
        }
    }
    let Summary { pages, updates, failures } = total;
    json!({"ok": failures.is_empty(), "failures": failures, "pages": pages, "updates": updates})
}

/// A forked process with writers, asked over a socket line by line. It ends with its parent.
struct Child {
    pid: i32,
    control: BufReader<UnixStream>,
}

impl Child {
    fn fork(plan: Plan, common: Option<&Arc<Common>>, siblings: &mut Vec<Child>) -> anyhow::Result<Self> {
        let (parent_end, child_end) = UnixStream::pair()?;
        parent_end.set_read_timeout(Some(VERIFY_TIMEOUT))?;
        let mut parent_end = Some(parent_end);
        let pid = sys::process::fork(|| {
            // These ends belong to the parent: while they are open here, its end goes unnoticed.
            siblings.clear();
            parent_end = None;
            match serve(plan, common, child_end) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("process {}: {error:#}", plan.index);
                    1
                }
            }
        })?;
        let control = BufReader::new(parent_end.context("the parent keeps its end")?);
        Ok(Self { pid, control })
    }

    fn verify(&mut self) -> anyhow::Result<Summary> {
        self.control.get_mut().write_all(b"check\n").context("ask")?;
        let mut line = String::new();
        if self.control.read_line(&mut line).context("read the answer")? == 0 {
            bail!("it has ended");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

fn serve(plan: Plan, common: Option<&Arc<Common>>, control: UnixStream) -> anyhow::Result<()> {
    sys::process::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64)?;
    sys::process::set_name(c"mc-child")?;
    let writers = Writers::start(plan, common)?;
    let mut requests = BufReader::new(control);
    let mut line = String::new();
    while requests.read_line(&mut line)? > 0 {
        line.clear();
        let summary = serde_json::to_string(&writers.verify())?;
        writeln!(requests.get_mut(), "{summary}")?;
    }
    Ok(())
}
