//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use longhaul_common::pages::MAX_STREAMS;

use crate::options::{Tuning, VolumeRule};

/// Move a running container to another host; its clients stay connected.
#[derive(Debug, Parser)]
#[command(
    name = "migrate",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 moved · 1 failed, the container runs here · 2 usage · 3 refused, nothing was touched · \
                  5 in doubt · 125 the source agent can't be reached"
)]
pub struct Cli {
    /// What to do, if not move a container.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// A move.
    #[command(flatten)]
    pub migrate: MigrateArgs,
    /// What holds for every command.
    #[command(flatten)]
    pub global: GlobalArgs,
}

/// What holds for every command.
#[derive(Debug, Args)]
pub struct GlobalArgs {
    /// The source agent's socket
    #[arg(long, global = true, env = "LONGHAUL_SOCKET", hide_env = true, default_value = longhaul_common::config::AGENT_SOCKET)]
    pub socket: PathBuf,
    /// How results are printed
    #[arg(long, global = true, value_enum, default_value_t = Format::Human)]
    pub format: Format,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For a person
    Human,
    /// One JSON document
    Json,
}

/// How progress is shown, on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// A bar on a terminal, a line a step elsewhere
    Auto,
    /// One JSON object a step
    Json,
    /// A line a step
    Plain,
    /// Nothing
    None,
}

/// The arguments of a move.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The container's id
    pub container: Option<String>,
    /// Where it goes: a host of /etc/longhaul/source.toml, or NAME[:PORT]
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
    /// Only tell whether it would work
    #[arg(long)]
    pub dry_run: bool,
    /// How long the move may take (30s, 10m)
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub timeout: Option<Duration>,
    /// What happens at the timeout, or when the container writes too fast: give up, with the container untouched, or
    /// freeze it all the same
    #[arg(long, value_enum, default_value_t = TimeoutChoice::Abort)]
    pub timeout_action: TimeoutChoice,
    /// The downtime wanted; memory is copied in rounds until it would be no longer [default: 300ms]
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub max_downtime: Option<Duration>,
    /// The most rounds over memory [default: 30]
    #[arg(long, value_name = "N")]
    pub max_rounds: Option<u32>,
    /// The most bytes a second for memory while the container runs (100M, 1G)
    #[arg(long, value_parser = rate, value_name = "RATE")]
    pub bandwidth: Option<u64>,
    /// Connections for memory, 1 to 8 [default: 2; 1 with --bandwidth]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_STREAMS)))]
    pub streams: Option<u32>,
    /// Have all memory in place before the container runs there, for a longer downtime
    #[arg(long, conflicts_with = "postcopy")]
    pub eager: bool,
    /// Take processor time from the container, in steps, if it writes faster than can be copied; it has all of it back at its
    /// destination, or where the move ends
    #[arg(long)]
    pub auto_converge: bool,
    /// Let the container run there before all of its memory has come, which it then fetches: auto, if it writes faster than can be
    /// copied; now, at once. Until all has come, the loss of either host is the loss of the container [default: never]
    #[arg(long, value_enum, value_name = "WHEN")]
    pub postcopy: Option<PostCopyChoice>,
    /// The log that an output by a pipe goes on in, there
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// What of the move does with volumes.
    #[command(flatten)]
    pub volumes: VolumeArgs,
    /// How progress is shown
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
    /// No progress
    #[arg(short, long)]
    pub quiet: bool,
}

/// What happens when a move takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TimeoutChoice {
    /// Give up; the container stays, untouched
    Abort,
    /// Freeze the container and go on
    Freeze,
}

/// Whether the container may run before all of its memory has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PostCopyChoice {
    /// If it writes faster than can be copied
    Auto,
    /// Never
    Never,
    /// At once
    Now,
}

/// What becomes of volumes.
#[derive(Debug, Args)]
pub struct VolumeArgs {
    /// What becomes of bind mounts: copy, shared or refuse, for all or for one (/data=copy); may be repeated
    #[arg(long = "volumes", value_name = "[MOUNT=]MODE")]
    pub rules: Vec<VolumeRule>,
}

/// The other commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Find what is in the way of a move; with neither argument, look at this host
    Check {
        /// The container's id
        container: Option<String>,
        /// The destination
        #[arg(long, value_name = "HOST")]
        to: Option<String>,
        /// What becomes of volumes.
        #[command(flatten)]
        volumes: VolumeArgs,
    },
    /// Show migrations under way and the last ones that ended
    Status,
    /// End a migration; its container stays here, untouched
    Cancel {
        /// Its container or its id; the only one under way, if left out
        which: Option<String>,
    },
    /// Change a move whose memory is being copied
    Tune {
        /// Its container or its id; the only one under way, if left out
        which: Option<String>,
        /// The downtime wanted
        #[arg(long, value_parser = duration, value_name = "TIME")]
        max_downtime: Option<Duration>,
        /// The most bytes a second for memory (100M, 1G, unlimited)
        #[arg(long, value_parser = rate_or_none, value_name = "RATE")]
        bandwidth: Option<u64>,
        /// Whether processor time may be taken from the container
        #[arg(long, value_name = "on|off", value_parser = on_or_off)]
        auto_converge: Option<bool>,
    },
    /// Show a migration in doubt, and what can be decided about it; with a choice, decide it
    Recover {
        /// Its container or its id; the only one in doubt, if left out
        which: Option<String>,
        /// The container goes on here
        #[arg(long, conflicts_with = "gone")]
        keep_here: bool,
        /// The container is ended here
        #[arg(long)]
        gone: bool,
    },
    /// Make certificates for mutual TLS
    Pki {
        /// What to make.
        #[command(subcommand)]
        command: PkiCommand,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write man pages into a directory
    Man {
        /// Where to
        directory: PathBuf,
    },
}

/// What certificates to make.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make the private authority that signs all hosts' certificates
    Init {
        /// Where it is kept
        #[arg(long, default_value = longhaul_common::tls::pki::DEFAULT_DIR)]
        dir: PathBuf,
    },
    /// Make a host's certificate and key
    Issue {
        /// The host's name, as others call it
        host: String,
        /// Further names and addresses of it
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
        /// How long it is valid, in days
        #[arg(long, default_value_t = longhaul_common::tls::pki::HOST_DAYS, allow_negative_numbers = true)]
        days: i64,
        /// Where the authority is kept
        #[arg(long, default_value = longhaul_common::tls::pki::DEFAULT_DIR)]
        dir: PathBuf,
    },
}

/// The command line's definition, for completions and man pages.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Reads `300ms`, `30s`, `10m`, `1h`, or seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits.parse().map_err(|_| format!("{text:?} is no time, such as 30s or 10m"))?;
    let unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("{other:?} is no unit of time: ms, s, m or h")),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| format!("{text:?} is no time that can be waited"))
}

/// Reads `100M`, `1G` or plain bytes a second; units are powers of 1024, as for QEMU and libvirt.
fn rate(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits.parse().map_err(|_| format!("{text:?} is no rate, such as 100M or 1G"))?;
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        other => return Err(format!("{other:?} is no unit of bytes: K, M or G")),
    };
    let bytes = number * (1u64 << shift) as f64;
    if bytes < 1.0 || bytes > u64::MAX as f64 {
        Err(format!("{text:?} is no rate that can be kept"))
    } else {
        Ok(bytes as u64)
    }
}

/// The same, or `unlimited`.
fn rate_or_none(text: &str) -> Result<u64, String> {
    if text == "unlimited" { Ok(Tuning::NO_LIMIT) } else { rate(text) }
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} is neither `on` nor `off`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn a_container_may_be_named_like_nothing_else() {
        let cli = Cli::try_parse_from(["migrate", "web", "--to", "host2", "--volumes", "/a=copy"]).expect("parses");
        assert_eq!(cli.migrate.container.as_deref(), Some("web"));
        let check = Cli::try_parse_from(["migrate", "check", "web"]).expect("parses");
        assert!(matches!(check.command, Some(Command::Check { .. })));
    }

    #[test]
    fn rates_have_units() {
        assert_eq!(rate("100M"), Ok(100 << 20));
        assert_eq!(rate("1.5G"), Ok(3 << 29));
        assert_eq!(rate("42"), Ok(42));
        for bad in ["", "M", "5T", "-1M", "0"] {
            rate(bad).expect_err(bad);
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        for bad in ["", "x", "5y", "-1s", "nans"] {
            duration(bad).expect_err(bad);
        }
    }
}
