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
    "Name",
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "NoNewPrivs",
    "Seccomp",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "Threads",
    "VmLck",
];

/// The lines of the first thread's status that must not change. Not of the calling thread's, though it is the same: CRIU restores no
/// descriptor of a file below `/proc/<pid>/task`, and the freeze may come while it is open.
fn stable_status() -> anyhow::Result<Vec<String>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let is_stable = |line: &&str| line.split_once(':').is_some_and(|(key, _)| STABLE.contains(&key));
    Ok(status.lines().filter(is_stable).map(str::to_owned).collect())
}

/// The process's status, limits, priority and so on, as they are at the first verification.
pub(super) fn unchanged() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut first: Option<Vec<String>> = None;
    Ok(move || {
        let now = facts()?;
        let first = first.get_or_insert_with(|| now.clone());
        now.iter().zip(&*first).try_for_each(|(now, first)| same("a property", now, first))?;
        same("the number of properties", &now.len(), &first.len())
    })
}

fn facts() -> anyhow::Result<Vec<String>> {
    let kinds = [
        Resource::RLIMIT_NOFILE,
        Resource::RLIMIT_CORE,
        Resource::RLIMIT_STACK,
        Resource::RLIMIT_MEMLOCK,
        Resource::RLIMIT_FSIZE,
    ];
    let mut facts = stable_status()?;
    for kind in kinds {
        facts.push(format!("{kind:?} {:?}", getrlimit(kind)?));
    }
    let [pid, group, session] = [nix::unistd::getpid(), nix::unistd::getpgrp(), nix::unistd::getsid(None)?];
    facts.push(format!("process {pid}, group {group}, session {session}"));
    facts.push(format!("nice {}, scheduler {}", process::nice(), process::scheduler()?));
    facts.push(format!("subreaper {}, robust list {:#x}", process::is_subreaper()?, mutex::robust_list()?));
    facts.push(format!("command line {:?}", fs::read_to_string("/proc/self/cmdline")?));
    // A process that changed its user may not read its own link.
    facts.push(format!("executable {:?}", fs::read_link("/proc/self/exe").ok()));
    Ok(facts)
}

/// An execution domain that is not the default. CRIU 4.2.1 dumps it and does not restore it.
pub(super) fn personality() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    process::personality(libc::ADDR_NO_RANDOMIZE as u64)?;
    Ok(|| same("the personality", &process::personality(0xffff_ffff)?, &libc::ADDR_NO_RANDOMIZE))
}

/// A filter of core dumps that is not the default. CRIU 4.2.1 does not know it.
pub(super) fn core_filter() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    const FILE: &str = "/proc/self/coredump_filter";
    fs::write(FILE, "0x7").context("set the filter of core dumps")?;
    let wanted = fs::read_to_string(FILE)?;
    Ok(move || same("the filter", &fs::read_to_string(FILE)?, &wanted))
}

/// Lowers limits and priority: a process unlike its parent.
pub(super) fn become_peculiar() -> anyhow::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, 700, 900)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 4096)?;
    setrlimit(Resource::RLIMIT_FSIZE, 1 << 30, 2 << 30)?;
    process::set_nice(5)?;
    process::set_scheduler(libc::SCHED_BATCH)?;
    process::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
    Ok(())
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

/// A capability that the bounding set loses: rebooting is nothing that a container does.
const BOUNDING_LOSES: u64 = 22;

/// Stays root by name, without capabilities and with unusual groups.
pub(super) fn become_powerless() -> anyhow::Result<()> {
    setgroups(&GROUPS.map(Gid::from_raw)).context("set the groups")?;
    process::prctl(libc::PR_CAPBSET_DROP, BOUNDING_LOSES).context("limit the bounding set")?;
    process::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    process::drop_capabilities().context("drop all capabilities")
}

/// What powerless root may not do: take another user's identity, or groups.
pub(super) fn is_powerless() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    Ok(|| {
        let may = (setgroups(&[]).is_ok(), process::prctl(libc::PR_CAPBSET_DROP, 1).is_ok());
        same("may it set groups and bounding set, which", &may, &(false, false))?;
        let groups: Vec<u32> = nix::unistd::getgroups()?.into_iter().map(Gid::as_raw).collect();
        same("the groups", &groups, &GROUPS.to_vec())
    })
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
