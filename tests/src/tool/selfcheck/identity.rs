//! What a process is: credentials, limits, priority, personality.

use std::fs;

use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::suite::same;
use crate::tool::sys::{mutex, process};

/// The user that one child becomes.
const USER: u32 = 1000;
/// Groups of that user.
const GROUPS: [u32; 2] = [1000, 1007];
/// Lines of `/proc/self/status` that must never change. Signal masks are among them.
const STABLE: [&str; 17] = [
    "Name", "Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
    "SigBlk", "SigIgn", "SigCgt", "Threads", "VmLck",
];

/// The lines of the calling thread's status that must not change.
fn stable_status() -> anyhow::Result<Vec<String>> {
    let status = fs::read_to_string("/proc/thread-self/status")?;
    let is_stable = |line: &&str| line.split_once(':').is_some_and(|(key, _)| STABLE.contains(&key));
    Ok(status.lines().filter(is_stable).map(str::to_owned).collect())
}

/// The process's status, limits, priority and so on, as they are at the first verification.
pub(super) fn unchanged() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut first = None;
    Ok(move || {
        let now = Identity::read()?;
        let first = first.get_or_insert_with(|| now.clone());
        for (now, first) in now.status.iter().zip(&first.status) {
            same("a line of the status", now, first)?;
        }
        same("the identity", &now, first)
    })
}

#[derive(Clone, Debug, PartialEq)]
struct Identity {
    status: Vec<String>,
    limits: Vec<(u64, u64)>,
    nice: i32,
    scheduler: i32,
    personality: i32,
    core_filter: String,
    subreaper: i32,
    robust_list: usize,
    ids: [i32; 3],
    command_line: Vec<u8>,
    executable: std::path::PathBuf,
}

impl Identity {
    fn read() -> anyhow::Result<Self> {
        let kinds = [
            Resource::RLIMIT_NOFILE,
            Resource::RLIMIT_CORE,
            Resource::RLIMIT_STACK,
            Resource::RLIMIT_MEMLOCK,
            Resource::RLIMIT_FSIZE,
        ];
        let own = |name: &str| fs::read(format!("/proc/self/{name}")).with_context(|| format!("read {name}"));
        Ok(Self {
            status: stable_status()?,
            limits: kinds.into_iter().map(getrlimit).collect::<Result<_, _>>()?,
            nice: process::nice(),
            scheduler: process::scheduler()?,
            personality: process::personality(0xffff_ffff)?,
            core_filter: String::from_utf8_lossy(&own("coredump_filter").unwrap_or_default()).into_owned(),
            subreaper: process::is_subreaper()?,
            robust_list: mutex::robust_list()?,
            ids: [nix::unistd::getpid(), nix::unistd::getpgrp(), nix::unistd::getsid(None)?].map(nix::unistd::Pid::as_raw),
            command_line: own("cmdline")?,
            executable: fs::read_link("/proc/self/exe").unwrap_or_default(),
        })
    }
}

/// Lowers limits and priority, and takes a personality: a process unlike its parent.
pub(super) fn become_peculiar() -> anyhow::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, 700, 900)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 4096)?;
    setrlimit(Resource::RLIMIT_FSIZE, 1 << 30, 2 << 30)?;
    process::set_nice(5)?;
    process::set_scheduler(libc::SCHED_BATCH)?;
    process::personality(libc::ADDR_NO_RANDOMIZE as u64)?;
    process::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
    fs::write("/proc/self/coredump_filter", "0x7").context("set the filter of core dumps")
}

/// Becomes user 1000 without capabilities, for good.
pub(super) fn become_user() -> anyhow::Result<()> {
    setgroups(&GROUPS.map(Gid::from_raw)).context("set the groups")?;
    let (gid, uid) = (Gid::from_raw(USER), Uid::from_raw(USER));
    setresgid(gid, gid, gid).context("set the group")?;
    setresuid(uid, uid, uid).context("set the user")?;
    process::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    Ok(())
}

/// What user 1000 may not do: be root again, or read what belongs to root.
pub(super) fn is_user() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    Ok(|| {
        same("may this user be root again, which", &nix::unistd::setuid(Uid::from_raw(0)).is_ok(), &false)?;
        let ids = nix::unistd::getresuid()?;
        same("the user", &[ids.real, ids.effective, ids.saved].map(Uid::as_raw), &[USER; 3])?;
        let groups: Vec<u32> = nix::unistd::getgroups()?.into_iter().map(Gid::as_raw).collect();
        same("the groups", &groups, &GROUPS.to_vec())
    })
}
