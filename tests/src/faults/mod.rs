//! `cargo lab test faults`: one mishap after another at every point of a move, and after each of them proof that the container ran
//! once, forgot nothing, and runs now.
//!
//! The proof is a ledger (`lab-tool ledger`) on the third host. The container may end up on either host; where the agents
//! can't know, because the link stays cut, an operator decides, who looks at the destination.

pub(crate) mod mishap;
pub(crate) mod plan;

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::json;

use self::mishap::{Mishap, Route};
use self::plan::{Injection, injections};
use crate::agents::{self, Agent, ask_fault};
use crate::client::Client;
use crate::container::ContainerSpec;
use crate::harness::{self, Counts};
use crate::lab::{Host, Lab};
use crate::scenarios::runs;

/// Labs side by side, as for scenarios.
const WORKERS: usize = 2;
/// How long both agents may take to agree once they are back, and a move to end.
const SETTLE: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Counts after each mishap: the container runs, and its connection does.
const COUNTS: u64 = 30;
const CONTAINER: &str = "ledger";
/// The file with the host's name is each host's own.
const OPTIONS: [&str; 2] = ["--volumes", "/here=shared"];
const LEDGER: &str = "10.77.0.3:7100";

/// What `--json` ends with.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Tally {
    injections: u64,
    /// The container ran on the destination afterwards.
    moved: u64,
    /// It ran where it was.
    stayed: u64,
    /// Of both, those that an operator decided.
    in_doubt_resolved: u64,
    /// A container that is gone or was set back.
    lost: u64,
    /// One that ran twice.
    doubled: u64,
    /// One that runs nowhere or serves nobody, or a move that does not end.
    stuck: u64,
    /// One that runs where it should not.
    unexpected: u64,
    seconds: f64,
}

impl Tally {
    fn wrong(&self) -> u64 {
        self.lost + self.doubled + self.stuck + self.unexpected
    }

    fn is_fine(&self) -> bool {
        self.injections > 0 && self.wrong() == 0
    }
}

/// Where it ended.
pub(crate) struct Ended {
    pub(crate) moved: bool,
    pub(crate) decided: bool,
}

/// What must never be, by the column it counts in.
pub(crate) enum Wrong {
    Lost(anyhow::Error),
    Doubled(anyhow::Error),
    Stuck(anyhow::Error),
    Unexpected(anyhow::Error),
}

impl Wrong {
    /// Whatever it is.
    pub(crate) fn into_error(self) -> anyhow::Error {
        match self {
            Self::Lost(error) | Self::Doubled(error) | Self::Stuck(error) | Self::Unexpected(error) => error,
        }
    }
}

impl From<anyhow::Error> for Wrong {
    fn from(error: anyhow::Error) -> Self {
        Self::Stuck(error)
    }
}

/// Runs those whose point or mishap has `only` in its name; what came of them.
pub fn run(only: &str, json: bool) -> Result<bool> {
    let tally = sweep(|injection| format!("{} {:?}", injection.point, injection.mishap).contains(only));
    if json {
        println!("{}", serde_json::to_string(&tally)?);
    } else {
        println!("{tally:?}\n{} passed, {} failed", tally.injections - tally.wrong(), tally.wrong());
    }
    Ok(tally.is_fine())
}

/// What every test run has time for: both agents killed at every point, and CRIU on the destination.
pub fn short() -> Counts {
    let tally = sweep(|injection| matches!(injection.mishap, Mishap::KillBoth | Mishap::KillCriuThere));
    Counts { passed: tally.injections - tally.wrong(), failed: tally.wrong() }
}

fn sweep(wanted: impl Fn(&Injection) -> bool) -> Tally {
    let start = Instant::now();
    let queue: Mutex<VecDeque<Injection>> = Mutex::new(injections().into_iter().filter(wanted).collect());
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (queue, tally) = (&queue, &tally);
            scope.spawn(move || work(worker, queue, tally));
        }
    });
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.seconds = (start.elapsed().as_secs_f64() * 10.0).round() / 10.0;
    tally
}

fn work(worker: usize, queue: &Mutex<VecDeque<Injection>>, tally: &Mutex<Tally>) {
    let name = format!("faults-{}-{worker}", std::process::id());
    let mut subject: Option<Subject> = None;
    while let Some(injection) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
        let number = {
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            tally.injections += 1;
            tally.injections
        };
        let start = Instant::now();
        let result = match &mut subject {
            Some(subject) => subject.suffer(number, injection),
            None => Subject::start(&name)
                .map_err(Wrong::from)
                .and_then(|fresh| subject.insert(fresh).suffer(number, injection)),
        };
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        let what = format!("{number}: {:?} at {}", injection.mishap, injection.point);
        let seconds = start.elapsed().as_secs_f64();
        let wrong = match result {
            Ok(Ended { moved, decided }) => {
                tally.moved += u64::from(moved);
                tally.stayed += u64::from(!moved);
                tally.in_doubt_resolved += u64::from(decided);
                let where_to = if moved { "moved" } else { "stayed" };
                eprintln!("ok      {what}: {where_to}{} ({seconds:.1} s)", if decided { ", decided" } else { "" });
                continue;
            }
            Err(Wrong::Lost(error)) => {
                tally.lost += 1;
                ("LOST", error)
            }
            Err(Wrong::Doubled(error)) => {
                tally.doubled += 1;
                ("DOUBLED", error)
            }
            Err(Wrong::Stuck(error)) => {
                tally.stuck += 1;
                ("STUCK", error)
            }
            Err(Wrong::Unexpected(error)) => {
                tally.unexpected += 1;
                ("WRONG", error)
            }
        };
        eprintln!("{:7} {what} ({seconds:.1} s)\n{:#}", wrong.0, wrong.1);
        if let Some(subject) = subject.take() {
            eprint!("{}", harness::logs(&subject.lab));
        }
    }
}

/// A container that counts, and who counts with it.
struct Subject {
    lab: Lab,
    server: Option<Client>,
    at: usize,
}

impl Subject {
    fn start(name: &str) -> Result<Self> {
        let lab = Lab::up(name, 3)?;
        agents::install(&lab)?;
        let [a, b, c] = lab.hosts.as_slice() else { bail!("three hosts are wanted") };
        for host in [a, b] {
            host.sh(&format!("mkdir -p /srv/volumes/here; echo {} > /srv/volumes/here/name", host.name))?;
        }
        let serve = ["ledger", "serve", "--listen", LEDGER, "--file", "/var/log/ledger", "--epoch-file", "/tmp/epoch"];
        let server = Client::start(c, &serve)?;
        c.sh(&format!("lab-tool wait-port {LEDGER} --seconds 10"))?;
        let words = ["lab-tool", "ledger", "run", "--to", LEDGER, "--host-file", "/here/name"];
        let mut spec = ContainerSpec::new(CONTAINER, Ipv4Addr::new(10, 77, 0, 20), &words);
        let options = json!(["rbind", "rw"]);
        spec.mounts =
            vec![json!({ "destination": "/here", "type": "bind", "source": "/srv/volumes/here", "options": options })];
        spec.start(a)?;
        let mut subject = Self { lab, server: Some(server), at: 0 };
        // The first move of an image reads all of it: to there and back, so that the next ones take no time.
        for (from, to) in [(0, 1), (1, 0)] {
            let mut moving = begin(&subject.lab, CONTAINER, &OPTIONS, Route { from, to })?;
            ensure!(moving.wait()?.success(), "a move fails although nothing happens to it");
        }
        subject.serves()?;
        Ok(subject)
    }

    fn host(&self, index: usize) -> &Host {
        &self.lab.hosts[index]
    }

    /// One mishap, and everything after it until all is well again.
    fn suffer(&mut self, number: u64, injection: Injection) -> Result<Ended, Wrong> {
        let route = Route { from: self.at, to: 1 - self.at };
        std::fs::write(self.host(2).path("/tmp/epoch"), number.to_string())
            .context("tell the ledger of a new epoch")?;
        let moving = reach(&self.lab, CONTAINER, &OPTIONS, route, injection)?;
        if injection.mishap == Mishap::PowerCycle {
            self.lab.power_cycle(route.to)?;
        } else {
            injection.mishap.strike(&self.lab, route)?;
        }
        let ended = survive(&self.lab, CONTAINER, route, injection, moving)?;
        self.at = if ended.moved { route.to } else { route.from };
        if injection.must_move().is_some_and(|must| must != ended.moved) {
            let where_to = if ended.moved { "moved" } else { "stayed" };
            return Err(Wrong::Unexpected(anyhow::anyhow!("it {where_to}, although that host had no right to it")));
        }
        self.serves()?;
        self.must_be_right()?;
        Ok(ended)
    }

    /// It counts on.
    fn serves(&mut self) -> Result<()> {
        self.server.as_mut().context("the ledger is kept")?.wait_progress("counts", COUNTS)
    }

    fn must_be_right(&self) -> Result<(), Wrong> {
        let status = self.server.as_ref().and_then(Client::status).context("the ledger has a status")?;
        let error = || anyhow::anyhow!("the ledger says {status}");
        if status["doubled"] != 0 {
            return Err(Wrong::Doubled(error()));
        }
        if status["lost"] != 0 || status["repeated"] != 0 || status["connections"] != 1 {
            return Err(Wrong::Lost(error()));
        }
        if status["host"] != self.host(self.at).name {
            return Err(Wrong::Doubled(error().context("counts come from another host")));
        }
        Ok(())
    }
}

fn begin(lab: &Lab, container: &str, options: &[&str], route: Route) -> Result<Child> {
    lab.hosts[route.from]
        .command(["migrate", container, "--to", &lab.hosts[route.to].name, "-q"].iter().chain(options))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("begin a move")
}

fn holder(lab: &Lab, route: Route, injection: Injection) -> &Host {
    &lab.hosts[if injection.agent() == Agent::Source { route.from } else { route.to }]
}

/// Begins a move and holds it at the point of an injection.
pub(crate) fn reach(lab: &Lab, container: &str, options: &[&str], route: Route, injection: Injection) -> Result<Child> {
    let holder = holder(lab, route, injection);
    ask_fault(holder, injection.agent(), injection.point, "hold")?;
    let moving = begin(lab, container, options, route)?;
    agents::wait_reached(holder, injection.agent())?;
    Ok(moving)
}

/// After a mishap has struck: lets the move go on, mends what is broken, and waits until both agents are done with it.
pub(crate) fn survive(
    lab: &Lab,
    container: &str,
    route: Route,
    injection: Injection,
    mut moving: Child,
) -> Result<Ended, Wrong> {
    agents::clear_fault(holder(lab, route, injection), injection.agent())?;
    match injection.mishap.lasts() {
        Some(time) => std::thread::sleep(time),
        None => end_of(&mut moving)?,
    }
    let decided = injection.mishap == Mishap::CutForGood && decide(lab, container, route)?;
    injection.mishap.mend(lab, route)?;
    end_of(&mut moving)?;
    let moved = settled(lab, container, route)? == route.to;
    Ok(Ended { moved, decided })
}

/// What an operator does who can't wait for the link, and has a console on each host.
fn decide(lab: &Lab, container: &str, route: Route) -> Result<bool> {
    let (from, to) = (&lab.hosts[route.from], &lab.hosts[route.to]);
    if from.output(["migrate", "recover", container])?.status.code() != Some(5) {
        return Ok(false);
    }
    let choice = if runs(to, container)? { "--gone" } else { "--keep-here" };
    from.sh(&format!("migrate recover {container} {choice}"))?;
    Ok(true)
}

/// The host it runs on, once both agents are done with it.
fn settled(lab: &Lab, container: &str, route: Route) -> Result<usize, Wrong> {
    let (from, to) = (&lab.hosts[route.from], &lab.hosts[route.to]);
    let start = Instant::now();
    loop {
        let (here, there) = (runs(from, container)?, runs(to, container)?);
        let leaving = from.sh("ls /var/lib/longhaul/source; ls /run/longhaul/source")?;
        let arriving = to.sh("ls /run/longhaul/dest")?;
        let is_clean = |left: &str| !left.contains(container);
        // A runtime calls a container running that was restored and is held: whether two ran, the beats tell.
        match (here, there) {
            (true, false) if is_clean(&leaving) && is_clean(&arriving) => return Ok(route.from),
            (false, true) if is_clean(&leaving) => return Ok(route.to),
            _ => {}
        }
        if start.elapsed() > SETTLE {
            let state =
                anyhow::anyhow!("runs here {here}, there {there}; leaving: {leaving:?}, arriving: {arriving:?}");
            let is_known =
                |host: &Host| host.output(["runc", "state", container]).is_ok_and(|output| output.status.success());
            return Err(match (here, there) {
                (true, true) => Wrong::Doubled(state),
                _ if is_known(from) || is_known(to) => Wrong::Stuck(state),
                _ => Wrong::Lost(state),
            });
        }
        std::thread::sleep(LOOK);
    }
}

/// Waits until the command has ended, however.
fn end_of(moving: &mut Child) -> Result<()> {
    let start = Instant::now();
    while moving.try_wait()?.is_none() {
        ensure!(start.elapsed() < SETTLE, "`migrate` does not end");
        std::thread::sleep(LOOK);
    }
    Ok(())
}
