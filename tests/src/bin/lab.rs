//! `cargo lab`: the demo, the tests, and hosts to try things in.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use longhaul_lab::bench::Table;
use longhaul_lab::container::{ContainerSpec, Rootfs};
use longhaul_lab::harness::Counts;
use longhaul_lab::lab::Lab;
use longhaul_lab::{agents, bench, demo, enter, faults, harness, host_init, machine, scenarios, soak, vm};

#[derive(Parser)]
#[command(name = "cargo lab", about = "Two real hosts on one machine: demo, tests, benchmarks", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Move a redis between two hosts under a client's eyes
    Demo {
        /// End with one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Run the unit tests and every scenario; with a word, only scenarios whose name has it
    Test {
        /// Part of a scenario's name; `unit` for the unit tests alone; `faults` for a mishap at every point of a move
        filter: Option<String>,
        /// Of `faults`, those whose point or mishap has this in its name
        #[arg(long, default_value = "")]
        only: String,
        /// End `faults` with one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Measure, side by side with what others do
    Bench {
        /// What to measure
        #[command(subcommand)]
        what: BenchCommand,
    },
    /// Move containers that check themselves to and fro, with mishaps, by a seed
    Soak(soak::Options),
    /// Move containers between machines with other kernels, under QEMU
    Vm {
        /// Moves of each container, between each pair of machines
        #[arg(long, default_value_t = 4)]
        moves: usize,
        /// Only pairs of machines whose name has this word
        #[arg(long, default_value = "")]
        only: String,
        /// Only containers whose name has this word: web (redis) or memory (checks itself)
        #[arg(long, default_value = "")]
        container: String,
    },
    /// Bring up hosts that stay up
    Up {
        /// How many hosts
        #[arg(long, default_value_t = 3)]
        hosts: usize,
    },
    /// Run a command in a host
    Exec {
        /// The host, e.g. host1
        host: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Open a shell in a host
    Shell {
        /// The host
        host: String,
    },
    /// Start a container in a host: an overlay of the lab's image, under runc
    Run {
        /// The host
        host: String,
        /// The container's name
        name: String,
        /// Its address on the lab's network (10.77.0.0/24; 1 to 9 are hosts)
        #[arg(long)]
        ip: Option<std::net::Ipv4Addr>,
        /// Give it a directory of its own in place of an overlay
        #[arg(long)]
        plain: bool,
        /// Its command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// List the hosts that are up
    Ps,
    /// Stop and remove everything that is up
    Down,
    /// PID 1 of a host (internal)
    #[command(hide = true)]
    HostInit { spec: String },
    /// Run a command in a host's namespaces (internal)
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        pid: i32,
        #[arg(long)]
        cgroup: Vec<PathBuf>,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Subcommand)]
enum BenchCommand {
    /// How long a container is away, by its memory, beside stop-and-copy by hand
    Blackout(BenchOptions),
    /// The same for memory that is hard to move: shared, or in files
    Hard(BenchOptions),
}

#[derive(clap::Args)]
struct BenchOptions {
    /// One JSON object a row
    #[arg(long)]
    json: bool,
    /// Only measures whose name has this word
    #[arg(long, default_value = "")]
    only: String,
    /// Samples of each measure
    #[arg(long, default_value_t = 5)]
    samples: usize,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::HostInit { spec } => host_init::run(&serde_json::from_str(&spec)?),
        Command::Enter { pid, cgroup, command } => enter::run(pid, &cgroup, &command),
        Command::Demo { json } => {
            prepare()?;
            Ok(i32::from(!demo::run(json)?))
        }
        Command::Test { filter, only, json } if filter.as_deref() == Some("faults") => {
            prepare()?;
            Ok(i32::from(!faults::run(&only, json)?))
        }
        Command::Test { filter, .. } => test(filter.as_deref()),
        Command::Bench { what } => {
            prepare()?;
            let (table, BenchOptions { json, only, samples }) = match what {
                BenchCommand::Blackout(options) => (Table::Blackout, options),
                BenchCommand::Hard(options) => (Table::Hard, options),
            };
            Ok(i32::from(!bench::run(table, json, &only, samples)?))
        }
        Command::Soak(options) => {
            prepare()?;
            Ok(i32::from(!soak::run(&options)?))
        }
        Command::Vm { moves, only, container } => {
            prepare()?;
            Ok(i32::from(!vm::run(moves, &only, &container)?))
        }
        Command::Up { hosts } => {
            prepare()?;
            let mut lab = Lab::up_detached(&lab_name(), hosts)?;
            if let Err(error) = agents::install(&lab) {
                lab.down();
                return Err(error);
            }
            for host in &lab.hosts {
                println!("{}\t{}", host.name, host.address);
            }
            Ok(0)
        }
        Command::Exec { host, command } => in_host(&host, &command),
        Command::Shell { host } => in_host(&host, &["bash".into(), "-l".into()]),
        Command::Run { host, name, ip, plain, command } => {
            let lab = Lab::open(&lab_name())?;
            let rootfs = if plain { Rootfs::Plain } else { Rootfs::Overlay };
            let spec = ContainerSpec { name, command, address: ip, rootfs, mounts: Vec::new(), edit: None };
            spec.start(lab.host(&host)?)?;
            Ok(0)
        }
        Command::Ps => {
            for name in Lab::list() {
                for host in &Lab::open(&name)?.hosts {
                    println!("{name}\t{}\t{}", host.name, host.address);
                }
            }
            Ok(0)
        }
        Command::Down => {
            Lab::sweep();
            if Lab::list().contains(&lab_name()) {
                Lab::open(&lab_name())?.down();
            }
            Ok(0)
        }
    }
}

/// What every run needs: a machine that can do it, its tools, nothing left of an earlier run, and fresh programs.
fn prepare() -> Result<()> {
    machine::check()?;
    machine::install_tools()?;
    end_labs_on_signal();
    Lab::sweep();
    agents::build()
}

fn test(filter: Option<&str>) -> Result<i32> {
    prepare()?;
    let mut counts = Counts::default();
    if matches!(filter, None | Some("unit")) {
        counts = harness::run_unit_tests()?;
    }
    if filter != Some("unit") {
        let scenarios = harness::run_scenarios(&scenarios::all(), filter.unwrap_or_default())?;
        counts.passed += scenarios.passed;
        counts.failed += scenarios.failed;
    }
    if filter.is_none() {
        let faults = faults::short();
        counts.passed += faults.passed;
        counts.failed += faults.failed;
    }
    println!("{} passed, {} failed", counts.passed, counts.failed);
    Ok(i32::from(counts.failed > 0 || counts.passed == 0))
}

/// A Ctrl-C or a kill must leave nothing: the labs of this process are taken down before it ends.
fn end_labs_on_signal() {
    std::thread::spawn(|| {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            eprintln!("lab: taking the hosts down");
            Lab::remove_own();
            std::process::exit(130);
        });
    });
}

fn in_host(host: &str, command: &[OsString]) -> Result<i32> {
    let lab = Lab::open(&lab_name())?;
    let status = lab.host(host)?.command(command).status()?;
    Ok(status.code().unwrap_or(1))
}

/// The lab that `up`, `exec` and `down` mean: several can be up at once.
fn lab_name() -> String {
    std::env::var("LONGHAUL_LAB").unwrap_or_else(|_| "lab".to_owned())
}
