//! `lab enter`: runs a command inside a host, by joining its namespaces.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, execvpe, fork};

/// Namespaces in the order they are joined: the mount namespace last, since `/proc` is read before.
const NAMESPACES: [(&str, CloneFlags); 6] = [
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Joins the host whose init is `pid`, runs `command` there and returns its exit status.
///
/// A process may enter a PID namespace only for its children: hence the fork.
pub fn run(pid: i32, cgroup_procs: &[PathBuf], command: &[OsString]) -> Result<i32> {
    let files =
        NAMESPACES.map(|(name, flag)| File::open(format!("/proc/{pid}/ns/{name}")).map(|file| (name, file, flag)));
    for procs in cgroup_procs {
        std::fs::write(procs, "0").with_context(|| format!("join cgroup {}", procs.display()))?;
    }
    for opened in files {
        let (name, file, flag) = opened.with_context(|| format!("the host's init {pid} is gone"))?;
        setns(file, flag).with_context(|| format!("join the host's {name} namespace"))?;
    }
    std::env::set_current_dir("/").context("enter the host's root")?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => loop {
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(code),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("wait for the command"),
            }
        },
        ForkResult::Child => {
            // The command must not outlive `lab enter`, which is what the caller can kill.
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("set the parent death signal")?;
            let words: Vec<CString> = command
                .iter()
                .map(|word| CString::new(word.as_bytes()).context("a NUL byte in the command"))
                .collect::<Result<_>>()?;
            let program = words.first().context("no command given")?;
            let environment = [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME=/root",
                "LANG=C.UTF-8",
                "RUST_BACKTRACE=1",
            ]
            .map(|entry| CString::new(entry).expect("no NUL byte in a literal"));
            let term = std::env::var("TERM").ok().and_then(|term| CString::new(format!("TERM={term}")).ok());
            let environment: Vec<&CString> = environment.iter().chain(term.as_ref()).collect();
            // SAFETY comment not needed: the two environment variables are set through execve alone.
            std::env::set_current_dir("/root").or_else(|_| std::env::set_current_dir("/"))?;
            let Err(errno) = execvpe_in_path(program, &words, &environment);
            eprintln!("lab: can't run {}: {errno}", program.to_string_lossy());
            std::process::exit(127);
        }
    }
}

/// `execvpe` looks programs up in *this* process's PATH; the host's is wanted.
fn execvpe_in_path(
    program: &CString,
    words: &[CString],
    environment: &[&CString],
) -> nix::Result<std::convert::Infallible> {
    if program.as_bytes().contains(&b'/') {
        return execvpe(program, words, environment);
    }
    let mut last = nix::errno::Errno::ENOENT;
    for dir in ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        let Ok(path) = CString::new([dir.as_bytes(), b"/", program.as_bytes()].concat()) else { continue };
        if std::path::Path::new(&*path.to_string_lossy()).exists() {
            let Err(errno) = execvpe(&path, words, environment);
            last = errno;
        }
    }
    Err(last)
}
