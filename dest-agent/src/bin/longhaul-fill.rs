//! Fills in the memory of one restored container: the keeper (`keep`) and its worker (`work`). Agents start it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use longhaul_common::telemetry;
use longhaul_dest::memory::channel::Channel;
use longhaul_dest::memory::filler::Filler;
use longhaul_dest::memory::keeper::Keeper;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Fills in the memory of one restored container. The destination agent starts it.
#[derive(Parser)]
#[command(name = "longhaul-fill", version)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Hold the container's userfaultfds and keep a worker alive
    Keep {
        /// The page store's directory
        dir: PathBuf,
        /// Where CRIU connects
        socket: PathBuf,
    },
    /// Answer faults and fill; standard input is the keeper's channel
    Work {
        /// The page store's directory
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    telemetry::init();
    // A descriptor for each address space, and one more for each that is forked meanwhile.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let done = match Cli::parse().role {
        Role::Keep { dir, socket } => Keeper::bind(&dir, &socket).and_then(Keeper::run),
        // Started as /proc/self/exe, which would be its name.
        Role::Work { dir } => std::fs::write("/proc/self/comm", "longhaul-fill").and_then(|()| {
            std::os::fd::AsFd::as_fd(&std::io::stdin())
                .try_clone_to_owned()
                .and_then(|input| Filler::open(&dir, Channel::of(input)))
                .and_then(Filler::run)
        }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the container's memory can't be filled in");
            ExitCode::FAILURE
        }
    }
}
