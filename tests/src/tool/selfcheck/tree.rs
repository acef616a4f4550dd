//! The process tree: sessions, groups, names, a zombie.

use std::fs;
use std::path::Path;
use std::rc::Rc;

use anyhow::Context;
use nix::unistd::{Pid, setpgid, setsid};

use super::shared::{self, Shared, Side};
use super::suite::{Suite, same};
use super::worker::Worker;
use super::{files, identity, locks, sockets};
use crate::tool::sys::process;

/// What a zombie exited with.
const ZOMBIE_EXIT: i32 = 42;

/// The children of the main process, with what the main process checks about them.
///
/// ```text
/// main ─┬─ session   a session of its own; holds the file locks, serves the named socket, shares memory with main
///       │     └─ member   in that session, but in a process group of its own
///       ├─ group     a process group of its own; low limits, nice, batch; parent of the zombie
///       ├─ powerless uid 0 without capabilities, no new privileges
///       └─ user      uid 1000, no new privileges; CRIU needs CAP_SYS_RESOURCE for it (prlimit across users)
/// ```
pub(super) fn fork(dir: &Path, shared: &Rc<Shared>, suite: &mut Suite) -> anyhow::Result<Vec<Worker>> {
    let mut workers = Vec::new();
    let without = suite.without().to_vec();
    let session = Worker::fork("session", &mut workers, || session(dir, shared, &without))?;
    workers.push(session);
    let wanted = |name: &str| !without.iter().any(|skipped| skipped == name);
    if wanted("worker-group") {
        let group = Worker::fork("group", &mut workers, || group(&without))?;
        workers.push(group);
    }
    if wanted("worker-powerless") {
        let powerless = Worker::fork("powerless", &mut workers, || powerless(&without))?;
        workers.push(powerless);
    }
    if wanted("worker-user") {
        let user = Worker::fork("user", &mut workers, || user(&without))?;
        workers.push(user);
    }
    let pids: Vec<i32> = workers.iter().map(Worker::pid).collect();
    suite.add("process-tree", || relations(&pids, std::process::id() as i32))?;
    Ok(workers)
}

fn session(dir: &Path, shared: &Rc<Shared>, without: &[String]) -> anyhow::Result<Suite> {
    setsid().context("start a session")?;
    let mut suite = Suite::new(without);
    let member = Worker::fork("member", &mut Vec::new(), || {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        let mut suite = Suite::new(without);
        suite.add("member-identity", identity::unchanged)?;
        suite.add("member-unlinked", || files::unlinked(dir, 85, 16 << 10))?;
        Ok(suite)
    })?;
    let member_pid = member.pid();
    suite.add("member", || Ok(move || member.ask()))?;
    suite.add("session-tree", || relations(&[member_pid], std::process::id() as i32))?;
    suite.add("session-identity", identity::unchanged)?;
    suite.add("session-memory", || shared::memories(Rc::clone(shared), Side::Child))?;
    suite.add("session-mutex", || shared::counter(Rc::clone(shared)))?;
    suite.add("session-locks", || locks::hold(dir))?;
    suite.add("session-socket", || sockets::named_server(dir))?;
    shared::holds_mutex(shared)?;
    Ok(suite)
}

fn group(without: &[String]) -> anyhow::Result<Suite> {
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    identity::become_peculiar()?;
    let mut suite = Suite::new(without);
    suite.add("zombie", zombie)?;
    suite.add("personality", identity::personality)?;
    suite.add("core-filter", identity::core_filter)?;
    suite.add("group-identity", identity::unchanged)?;
    Ok(suite)
}

fn powerless(without: &[String]) -> anyhow::Result<Suite> {
    identity::become_powerless()?;
    let mut suite = Suite::new(without);
    suite.add("powerless", identity::is_powerless)?;
    suite.add("powerless-identity", identity::unchanged)?;
    Ok(suite)
}

fn user(without: &[String]) -> anyhow::Result<Suite> {
    identity::become_user()?;
    let mut suite = Suite::new(without);
    suite.add("user", identity::is_user)?;
    suite.add("user-identity", identity::unchanged)?;
    Ok(suite)
}

/// A child that exited and is never waited for.
fn zombie() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let pid = process::fork(|| ZOMBIE_EXIT)?;
    Ok(move || {
        // The child may need a moment to die: only the first verification can meet it alive.
        let status = peek(pid)?;
        same("the exit code", &status, &ZOMBIE_EXIT)?;
        let stat = Stat::of(pid)?;
        same("its state and parent", &(stat.state, stat.parent), &('Z', std::process::id() as i32))
    })
}

/// The exit code of a dead child, which stays a zombie; waits for its death.
fn peek(pid: i32) -> anyhow::Result<i32> {
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    match waitid(Id::Pid(Pid::from_raw(pid)), flags).context("look at the zombie")? {
        WaitStatus::Exited(_, code) => Ok(code),
        other => anyhow::bail!("the zombie is {other:?}"),
    }
}

/// The fields of `/proc/PID/stat` that make up the tree, and the name.
#[derive(Clone, Debug, PartialEq)]
struct Stat {
    name: String,
    state: char,
    parent: i32,
    group: i32,
    session: i32,
}

impl Stat {
    fn of(pid: i32) -> anyhow::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
        let (name, rest) = text.rsplit_once(") ").context("a line of stat")?;
        let mut fields = rest.split(' ');
        let state = fields.next().and_then(|state| state.chars().next()).context("the state")?;
        let mut number = || fields.next().and_then(|field| field.parse().ok()).context("a number in stat");
        let (parent, group, session) = (number()?, number()?, number()?);
        let name = name.split_once('(').map_or(name, |(_, name)| name).to_owned();
        Ok(Self { name, state, parent, group, session })
    }
}

/// The calling process's children keep their ids, names, groups and sessions.
fn relations(pids: &[i32], parent: i32) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    // A child that waits sleeps, one that was just asked may still run: the state is nobody's property.
    let read = |pid: &i32| Stat::of(*pid).map(|stat| Stat { state: if stat.state == 'Z' { 'Z' } else { 'S' }, ..stat });
    let pids = pids.to_vec();
    let first: Vec<Stat> = pids.iter().map(read).collect::<Result<_, _>>()?;
    for stat in &first {
        same("a child's parent", &stat.parent, &parent)?;
    }
    Ok(move || {
        for (pid, first) in pids.iter().zip(&first) {
            same(&format!("process {pid}"), &read(pid)?, first)?;
        }
        Ok(())
    })
}
