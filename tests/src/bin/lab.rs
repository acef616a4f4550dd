//! `cargo lab`: the demo, the tests, and hosts to try things in.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use longhaul_lab::container::{ContainerSpec, Rootfs};
use longhaul_lab::lab::Lab;
use longhaul_lab::{agents, enter, host_init, machine};

#[derive(Parser)]
#[command(name = "cargo lab", about = "Two real hosts on one machine: demo, tests, benchmarks", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
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
        Command::Up { hosts } => {
            machine::check()?;
            machine::install_tools()?;
            Lab::sweep();
            agents::build()?;
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

fn in_host(host: &str, command: &[OsString]) -> Result<i32> {
    let lab = Lab::open(&lab_name())?;
    let status = lab.host(host)?.command(command).status()?;
    Ok(status.code().unwrap_or(1))
}

/// The lab that `up`, `exec` and `down` mean: several can be up at once.
fn lab_name() -> String {
    std::env::var("LONGHAUL_LAB").unwrap_or_else(|_| "lab".to_owned())
}
