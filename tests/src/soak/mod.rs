//! `cargo lab soak`: containers that check themselves are moved to and fro, with one mishap after another, for as long
//! as is wanted. What is done is decided by a seed.

mod fleet;
pub(crate) mod migration;
mod pingpong;
pub(crate) mod plan;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use self::fleet::Member;
use self::migration::{Cancel, Ending, Killer, migrate};
use self::plan::{Action, Plan, Step, Way};
use crate::agents;
use crate::faults;
use crate::faults::mishap::Route;
use crate::faults::plan::Injection;
use crate::harness;
use crate::lab::{Host, Lab};
use crate::scenarios::settle;

/// Moves, if nothing else is said.
const DEFAULT_MOVES: u64 = 200;
/// Every so many steps all containers are asked, not only the one that was moved.
const ALL_EVERY: usize = 20;
/// Moves that may fail although nothing was done to them: one is worth a look, more say the same.
const MOST_UNEXPLAINED: u64 = 5;

/// When it ends, and what it does.
#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// End after so many moves [default: 200, unless --minutes is given]
    #[arg(long)]
    pub moves: Option<u64>,
    /// End after so many minutes
    #[arg(long)]
    pub minutes: Option<u64>,
    /// Decides what is done, in which order [default: another one each time]
    #[arg(long)]
    pub seed: Option<u64>,
    /// End with one JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// Instead of all that: one container, so many times to and fro, and nothing may be left of it
    #[arg(long, value_name = "MOVES")]
    pub ping_pong: Option<u64>,
}

/// What `--json` ends with.
#[derive(Debug, Default, Serialize)]
struct Tally {
    seed: u64,
    /// Moves to the other host.
    moves: u64,
    /// Moves that were cancelled in time.
    cancelled: u64,
    /// Moves that failed although nothing was done to them.
    stayed: u64,
    workers_killed: u64,
    /// Mishaps at points of a move, as `cargo lab test faults` has them.
    mishaps: u64,
    /// Containers that were not as they should be.
    mismatches: u64,
    /// Increments that redis forgot.
    lost: u64,
    /// Increments that it did twice.
    repeated: u64,
    seconds: f64,
}

impl Tally {
    fn is_fine(&self) -> bool {
        self.stayed == 0 && self.mismatches == 0 && self.lost == 0 && self.repeated == 0
    }
}

/// Runs until the end that the options say, or until something is wrong; whether all was right.
pub fn run(options: &Options) -> Result<bool> {
    if let Some(moves) = options.ping_pong {
        return pingpong::run(moves, options.json);
    }
    let seed = options.seed.unwrap_or_else(any_seed);
    eprintln!("seed {seed}: `cargo lab soak --seed {seed}` does the same again");
    let lab = Lab::up(&format!("soak-{}", std::process::id()), 3)?;
    agents::install(&lab)?;
    let [a, b, client] = lab.hosts.as_slice() else { bail!("three hosts are wanted") };
    let fleet = fleet::start(a, client, seed)?;
    let tally = Tally { seed, ..Tally::default() };
    let mut soak = Soak { lab: &lab, hosts: [a, b], client, fleet, tally, start: Instant::now() };
    // What clients saw counts however it ended.
    let result = soak.go(options);
    let result = result.and(soak.count());
    let result = result.and_then(|()| soak.must_be_clean());
    soak.tally.seconds = (soak.start.elapsed().as_secs_f64() * 10.0).round() / 10.0;
    if let Err(error) = &result {
        soak.say(&format!("seed {seed}: {error:#}"));
        eprint!("{}", harness::logs(&lab));
    }
    if options.json {
        println!("{}", serde_json::to_string(&soak.tally)?);
    } else {
        show(&soak.tally);
    }
    Ok(result.is_ok() && soak.tally.is_fine())
}

fn any_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |age| u64::from(age.subsec_nanos()))
}

fn show(tally: &Tally) {
    let Tally { seed, moves, cancelled, stayed, workers_killed, mishaps, mismatches, lost, repeated, seconds } = tally;
    println!(
        "seed {seed}: {moves} moves, {cancelled} cancelled, {stayed} failed, {workers_killed} workers killed, \
         {mishaps} mishaps, {mismatches} mismatches, {lost} increments lost, {repeated} repeated, in {seconds} s"
    );
}

struct Soak<'a> {
    lab: &'a Lab,
    /// Where containers are moved to and fro.
    hosts: [&'a Host; 2],
    /// Where they are asked from.
    client: &'a Host,
    fleet: Vec<Member>,
    tally: Tally,
    start: Instant,
}

impl Soak<'_> {
    fn say(&self, text: &str) {
        eprintln!("[{:6.1} s] {text}", self.start.elapsed().as_secs_f64());
    }

    fn is_over(&self, options: &Options) -> bool {
        let moves = options.moves.or(if options.minutes.is_none() { Some(DEFAULT_MOVES) } else { None });
        let time = options.minutes.map(|minutes| Duration::from_secs(minutes * 60));
        moves.is_some_and(|most| self.tally.moves >= most) || time.is_some_and(|most| self.start.elapsed() >= most)
    }

    fn go(&mut self, options: &Options) -> Result<()> {
        for (number, step) in Plan::new(self.tally.seed, self.fleet.len()).enumerate() {
            if self.is_over(options) {
                break;
            }
            self.act(number, &step).with_context(|| format!("action {number}: {step:?}"))?;
            if number % ALL_EVERY == ALL_EVERY - 1 {
                self.verify_all().with_context(|| format!("after action {number}"))?;
            }
            ensure!(self.tally.stayed <= MOST_UNEXPLAINED, "too many moves fail");
        }
        self.verify_all()
    }

    /// Does one step, and asks the container.
    fn act(&mut self, number: usize, step: &Step) -> Result<()> {
        if let Action::Mishap(injection) = step.action {
            self.suffer(number, step, injection)?;
            return self.verify(step.container);
        }
        let to = self.hosts[1 - self.fleet[step.container].at];
        let killer = match step.action {
            Action::KillWorkers { workers, after } => Some(Killer::start(to, workers, after)?),
            _ => None,
        };
        let cancel = match step.action {
            Action::Cancel { phase, after } => Some(Cancel { phase, after }),
            _ => None,
        };
        self.migrate(number, step, step.way, cancel)?;
        if let Action::Again { way } = step.action {
            self.migrate(number, step, way, None)?;
        }
        if step.settle {
            settle(self.hosts[self.fleet[step.container].at])?;
        }
        self.verify(step.container)?;
        if let Some(killer) = killer {
            settle(to)?;
            self.tally.workers_killed += killer.finish()?;
            self.verify(step.container)?;
        }
        Ok(())
    }

    /// A move with a mishap, however it ends.
    fn suffer(&mut self, number: usize, step: &Step, injection: Injection) -> Result<()> {
        let member = &mut self.fleet[step.container];
        let route = Route { from: member.at, to: 1 - member.at };
        let options: Vec<&str> = ["--timeout-action", "freeze"].iter().chain(step.way.options()).copied().collect();
        let moving = faults::reach(self.lab, &member.name, &options, route, injection)?;
        injection.mishap.strike(self.lab, route)?;
        let ended = match faults::survive(self.lab, &member.name, route, injection, moving) {
            Ok(ended) => ended,
            Err(wrong) => return Err(wrong.into_error()),
        };
        let name = member.name.clone();
        if ended.moved {
            member.at = route.to;
            self.tally.moves += 1;
        }
        self.tally.mishaps += 1;
        let what = if ended.moved { "moved" } else { "stayed" };
        self.say(&format!("{number}: {name}, {:?} at {}: {what}", injection.mishap, injection.point));
        Ok(())
    }

    fn migrate(&mut self, number: usize, step: &Step, way: Way, cancel: Option<Cancel>) -> Result<()> {
        let member = &mut self.fleet[step.container];
        let (from, to) = (self.hosts[member.at], self.hosts[1 - member.at]);
        let ending = migrate(&member.name, from, to, way, cancel)?;
        let what = format!("{number}: {} {} -> {}, {way:?}, {:?}", member.name, from.name, to.name, step.action);
        match ending {
            Ending::Moved { downtime_ms } => {
                member.at = 1 - member.at;
                self.tally.moves += 1;
                self.say(&format!("{what}: moved, {downtime_ms:.0} ms"));
            }
            Ending::Cancelled => {
                ensure!(cancel.is_some(), "{what}: cancelled by nobody");
                self.tally.cancelled += 1;
                self.say(&format!("{what}: cancelled"));
            }
            Ending::Stayed(why) => {
                self.tally.stayed += 1;
                self.say(&format!("{what}: FAILED: {why}"));
                eprint!("{}", harness::logs(self.lab));
            }
        }
        Ok(())
    }

    fn verify(&mut self, container: usize) -> Result<()> {
        let result = self.fleet[container].verify(self.client);
        self.tally.mismatches += u64::from(result.is_err());
        result
    }

    fn verify_all(&mut self) -> Result<()> {
        (0..self.fleet.len()).try_for_each(|container| self.verify(container))
    }

    /// Takes in what the counters saw.
    fn count(&mut self) -> Result<()> {
        for member in &mut self.fleet {
            let Some(seen) = member.finish()? else { continue };
            self.tally.lost += seen["lost"].as_u64().unwrap_or(0);
            self.tally.repeated += seen["repeated"].as_u64().unwrap_or(0);
            ensure!(seen["connection_survived"] == true, "the connection to {} broke: {seen}", member.name);
        }
        Ok(())
    }

    /// Nothing of all the moves may be left.
    fn must_be_clean(&self) -> Result<()> {
        self.hosts.iter().try_for_each(|host| {
            settle(host)?;
            harness::tidy(host)?;
            harness::must_be_clean(host)
        })
    }
}
