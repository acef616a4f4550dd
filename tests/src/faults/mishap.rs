//! What happens to hosts, agents and the link while a container moves.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::agents::{self, Agent};
use crate::lab::{Host, Lab};

/// How long a link that comes back is cut, and a process that goes on is stopped.
const BRIEFLY: Duration = Duration::from_secs(2);

/// One kind of mishap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mishap {
    KillSource,
    KillDest,
    KillBoth,
    /// SIGSTOP, for 2 s.
    StopSource,
    StopDest,
    /// The destination's cable is pulled, for 2 s.
    CutBriefly,
    /// Until the operator has decided what the agents can't.
    CutForGood,
    /// What the destination says gets lost, for 2 s.
    LoseAnswers,
    /// One packet in five from the destination has a wrong byte, for 2 s.
    CorruptBytes,
    /// The destination's journal can't grow.
    DiskFull,
    /// Nor what it keeps in memory.
    MemoryFullThere,
    /// What the source agent keeps in memory has no room left.
    MemoryFullHere,
    /// The kernel kills the destination agent because it has no memory left.
    OutOfMemory,
    /// CRIU is killed, and the hold between it and the runtime, which has its name.
    KillCriuHere,
    KillCriuThere,
    /// The destination loses power and comes up again.
    PowerCycle,
}

/// The hosts of a move, by their places in the lab.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl Mishap {
    /// Does it. The agent at whose point it happens is held there. A power cycle is the lab's own ([`Lab::power_cycle`]).
    pub(crate) fn strike(self, lab: &Lab, route: Route) -> Result<()> {
        let (from, to) = (&lab.hosts[route.from], &lab.hosts[route.to]);
        match self {
            Self::KillSource => signal(from, "KILL", Agent::Source.program()),
            Self::KillDest => signal(to, "KILL", Agent::Dest.program()),
            Self::KillBoth => {
                signal(from, "KILL", Agent::Source.program())?;
                signal(to, "KILL", Agent::Dest.program())
            }
            Self::StopSource => signal(from, "STOP", Agent::Source.program()),
            Self::StopDest => signal(to, "STOP", Agent::Dest.program()),
            Self::CutBriefly | Self::CutForGood => lab.cable(to, false),
            Self::LoseAnswers => on_answers(to, "drop"),
            // The first byte of what a segment carries, behind a header with timestamps. Between virtual interfaces nobody looks at
            // checksums: it arrives like that.
            Self::CorruptBytes => on_answers(to, "numgen random mod 5 == 0 @th,256,8 set 0x5a"),
            Self::DiskFull => fill_journal(to),
            Self::MemoryFullThere => limit_memory_dir(to, "dest"),
            Self::MemoryFullHere => limit_memory_dir(from, "source"),
            Self::OutOfMemory => starve(to),
            Self::KillCriuHere => signal(from, "KILL", "criu"),
            // What it had restored must end with it, and not run before its time.
            Self::KillCriuThere => to
                .sh("pkill -KILL -x criu; for i in $(seq 2000); do pgrep -f '[l]edger run' >/dev/null || exit 0; sleep 0.01; done; exit 1")
                .map(drop)
                .context("tasks outlive the CRIU that restored them"),
            Self::PowerCycle => bail!("a lab that is lent can't lose a host"),
        }
    }

    /// How long it lasts before it is mended; nothing, if that depends.
    pub(crate) fn lasts(self) -> Option<Duration> {
        match self {
            Self::KillSource | Self::KillDest | Self::KillBoth | Self::PowerCycle => Some(Duration::ZERO),
            Self::StopSource | Self::StopDest | Self::CutBriefly | Self::LoseAnswers | Self::CorruptBytes => {
                Some(BRIEFLY)
            }
            Self::CutForGood
            | Self::DiskFull
            | Self::MemoryFullThere
            | Self::MemoryFullHere
            | Self::OutOfMemory
            | Self::KillCriuHere
            | Self::KillCriuThere => None,
        }
    }

    /// Takes it back, as an operator would: what was killed is started again.
    pub(crate) fn mend(self, lab: &Lab, route: Route) -> Result<()> {
        let (from, to) = (&lab.hosts[route.from], &lab.hosts[route.to]);
        match self {
            Self::StopSource => signal(from, "CONT", Agent::Source.program())?,
            Self::StopDest => signal(to, "CONT", Agent::Dest.program())?,
            Self::CutBriefly | Self::CutForGood => lab.cable(to, true)?,
            Self::LoseAnswers | Self::CorruptBytes => to.sh("nft delete table inet mishap").map(drop)?,
            Self::DiskFull => free_journal(to)?,
            Self::MemoryFullThere => to.sh("mount -o remount,size=90% /run/longhaul/dest").map(drop)?,
            Self::MemoryFullHere => from.sh("mount -o remount,size=90% /run/longhaul/source").map(drop)?,
            Self::OutOfMemory => feed(to)?,
            Self::PowerCycle => {
                for agent in [Agent::Source, Agent::Dest] {
                    agents::start(to, agent)?;
                }
                agents::wait_ready(to)?;
            }
            Self::KillSource => agents::come_back(from, Agent::Source)?,
            Self::KillDest => agents::come_back(to, Agent::Dest)?,
            Self::KillBoth => {
                agents::come_back(from, Agent::Source)?;
                agents::come_back(to, Agent::Dest)?;
            }
            Self::KillCriuHere | Self::KillCriuThere => {}
        }
        // What died of it.
        for (host, agent) in [(from, Agent::Source), (to, Agent::Dest)] {
            if !host.output(["pgrep", "-x", agent.program()])?.status.success() {
                agents::come_back(host, agent)?;
            }
        }
        Ok(())
    }
}

fn signal(host: &Host, signal: &str, program: &str) -> Result<()> {
    host.sh(&format!("pkill -{signal} -x {program} || true")).map(drop)
}

/// Has something happen to what the destination agent sends.
fn on_answers(host: &Host, what: &str) -> Result<()> {
    host.sh(&format!(
        "nft add table inet mishap; nft add chain inet mishap out '{{ type filter hook output priority 0; }}'; \
         nft add rule inet mishap out tcp sport 7474 {what}"
    ))
    .map(drop)
}

const JOURNAL: &str = "/var/lib/longhaul/dest";
const SMALL: &str = "/run/full";

/// Puts what is there on a filesystem that has no room for more.
pub(crate) fn fill_journal(host: &Host) -> Result<()> {
    host.sh(&format!(
        "mkdir -p {SMALL}; mount -t tmpfs -o size=$(( $(du -sk {JOURNAL} | cut -f1) + 256 ))k tmpfs {SMALL}; cp -a {JOURNAL}/. {SMALL}/; \
         cat /dev/zero > {SMALL}/.filler 2>/dev/null || true; mount --bind {SMALL} {JOURNAL}"
    ))
    .map(drop)
}

/// What was written there meanwhile is kept.
pub(crate) fn free_journal(host: &Host) -> Result<()> {
    host.sh(&format!(
        "umount {JOURNAL}; rm {SMALL}/.filler; rm -rf {JOURNAL}/*; cp -a {SMALL}/. {JOURNAL}/; sync; umount {SMALL}; rmdir {SMALL}"
    ))
    .map(drop)
}

/// A size of what is used now, if that is anything: a size of 0 is none.
fn limit_memory_dir(host: &Host, whose: &str) -> Result<()> {
    host.sh(&format!(
        "dir=/run/longhaul/{whose}; used=$(df --output=used -B1 $dir | tail -1 | tr -d ' '); \
         mount -o remount,size=$((used > 4096 ? used : 4096)) $dir"
    ))
    .map(drop)
}

/// The cgroup of an agent that has too little, and its limit.
const STARVED: &str = "dir=/sys/fs/cgroup; [ ! -d $dir/memory ] || dir=$dir/memory; dir=$dir/starved; mkdir -p $dir; \
                       limit=$dir/memory.max; [ -e $limit ] || limit=$dir/memory.limit_in_bytes;";

/// Gives the destination agent so little memory that its next page is one too many.
fn starve(host: &Host) -> Result<()> {
    host.sh(&format!("{STARVED} echo 64K > $limit; pgrep -x {} > $dir/cgroup.procs", Agent::Dest.program())).map(drop)
}

/// One that got by lives on with enough.
fn feed(host: &Host) -> Result<()> {
    host.sh(&format!("{STARVED} echo 8G > $limit; for pid in $(cat $dir/cgroup.procs); do echo $pid > $dir/../cgroup.procs; done; rmdir $dir")).map(drop)
}
