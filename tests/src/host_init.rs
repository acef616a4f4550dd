//! What runs as PID 1 of a lab host: builds the host's view of the machine, then reaps.
//!
//! `lab host-init` is started already inside its cgroups. It unshares every namespace, forks the init, and
//! the init mounts an overlay of the image, moves into it with `pivot_root` (CRIU needs real mount
//! parents, a chroot is not enough) and stays.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pivot_root, sethostname};
use serde::{Deserialize, Serialize};

use crate::cgroup::Hierarchy;

/// Everything a host's init has to know, passed as JSON on its command line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostSpec {
    /// Its hostname.
    pub name: String,
    /// The image its root is an overlay of; empty for the switch, which only needs a network.
    pub image: Option<PathBuf>,
    /// A directory of the outer machine that holds what the host writes.
    pub disk: PathBuf,
    /// The cgroup hierarchies to mount.
    pub hierarchies: Vec<Hierarchy>,
    /// Names and addresses for `/etc/hosts`.
    pub etc_hosts: String,
    /// Read end of a pipe: the host ends when the lab's process does. Without it the host stays up.
    pub lifeline: Option<i32>,
}

/// Directories of the host that lie on the outer machine's real filesystem, since an overlay can't hold another's upper layer.
const REAL_DIRS: [&str; 4] = ["srv", "var/lib/longhaul", "var/lib/docker", "var/lib/containers"];

/// Never returns in the init; the outer half returns the init's fate as an exit status.
pub fn run(spec: &HostSpec) -> Result<i32> {
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET;
    if !spec.hierarchies.is_empty() {
        flags |= CloneFlags::CLONE_NEWCGROUP;
    }
    unshare(flags).context("unshare the host's namespaces")?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }.context("fork the host's init")? {
        ForkResult::Parent { child } => {
            println!("{child}");
            // The child reports through our standard output; the reader sees its end when both closed it.
            nix::unistd::close(1).context("close standard output")?;
            Ok(match waitpid(child, None).context("wait for the host's init")? {
                WaitStatus::Exited(_, code) => code,
                _ => 137,
            })
        }
        ForkResult::Child => {
            if let Err(error) = init(spec) {
                eprintln!("lab: host {}: {error:#}", spec.name);
                std::process::exit(1);
            }
            std::process::exit(0);
        }
    }
}

fn init(spec: &HostSpec) -> Result<()> {
    sethostname(&spec.name).context("set the hostname")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make mounts private")?;
    if let Some(image) = &spec.image {
        enter_root(spec, image)?;
    }
    println!("ready");
    // The starter waits for the end of this pipe's lines, not for ours.
    nix::unistd::close(1).context("close standard output")?;
    reap_until_told(spec.lifeline)
}

fn enter_root(spec: &HostSpec, image: &Path) -> Result<()> {
    let [upper, work, root] = ["upper", "work", "root"].map(|name| spec.disk.join(name));
    for dir in [&upper, &work, &root] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", image.display(), upper.display(), work.display());
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .context("mount the host's root overlay")?;
    for dir in REAL_DIRS {
        let outer = spec.disk.join("real").join(dir);
        let inner = root.join(dir);
        fs::create_dir_all(&outer)?;
        fs::create_dir_all(&inner)?;
        mount(Some(&outer), &inner, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("bind {}", inner.display()))?;
    }
    // The image itself, read-only: the lower layer of containers made in the lab.
    let lower = root.join("srv/image");
    fs::create_dir_all(&lower)?;
    mount(Some(image), &lower, None::<&str>, MsFlags::MS_BIND, None::<&str>).context("bind the image")?;
    mount(
        None::<&str>,
        &lower,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .context("make the image read-only")?;

    mount_kernel_filesystems(&root)?;
    make_dev(&root)?;
    mount_cgroups(&root, &spec.hierarchies)?;

    let old = root.join("mnt");
    pivot_root(&root, &old).context("pivot_root")?;
    std::env::set_current_dir("/")?;
    umount2("/mnt", MntFlags::MNT_DETACH).context("leave the outer machine's mounts")?;
    // As systemd does it: container runtimes and CRIU must cope with shared mounts.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)
        .context("make mounts shared")?;
    fs::write("/etc/hostname", format!("{}\n", spec.name))?;
    fs::write("/etc/hosts", &spec.etc_hosts)?;
    Ok(())
}

fn mount_kernel_filesystems(root: &Path) -> Result<()> {
    let none = MsFlags::empty();
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mounts: [(&str, &str, MsFlags, &str); 4] = [
        ("proc", "proc", quiet | MsFlags::MS_NOEXEC, ""),
        ("sysfs", "sys", quiet | MsFlags::MS_NOEXEC, ""),
        ("tmpfs", "run", quiet, "mode=755"),
        ("tmpfs", "tmp", none, "mode=1777"),
    ];
    for (fstype, dir, flags, data) in mounts {
        let target = root.join(dir);
        fs::create_dir_all(&target)?;
        mount(Some(fstype), &target, Some(fstype), flags, Some(data))
            .with_context(|| format!("mount {fstype} on {}", target.display()))?;
    }
    fs::create_dir_all(root.join("run/lock"))?;
    Ok(())
}

fn make_dev(root: &Path) -> Result<()> {
    let dev = root.join("dev");
    mount(Some("tmpfs"), &dev, Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=755")).context("mount /dev")?;
    let nodes = [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
        ("fuse", 10, 229),
    ];
    for (name, major, minor) in nodes {
        let node = dev.join(name);
        mknod(&node, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
            .with_context(|| format!("make {}", node.display()))?;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
    }
    fs::create_dir(dev.join("net"))?;
    mknod(&dev.join("net/tun"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(10, 200))
        .context("make /dev/net/tun")?;
    for (name, target) in
        [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx")]
    {
        symlink(target, dev.join(name))?;
    }
    for (dir, fstype, data) in [
        ("pts", "devpts", "newinstance,ptmxmode=0666,mode=620"),
        ("shm", "tmpfs", "mode=1777"),
        ("mqueue", "mqueue", ""),
    ] {
        let target = dev.join(dir);
        fs::create_dir(&target)?;
        mount(Some(fstype), &target, Some(fstype), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, Some(data))
            .with_context(|| format!("mount {fstype}"))?;
    }
    Ok(())
}

fn mount_cgroups(root: &Path, hierarchies: &[Hierarchy]) -> Result<()> {
    let base = root.join("sys/fs/cgroup");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if let [only] = hierarchies
        && only.unified
    {
        return mount(Some("cgroup2"), &base, Some("cgroup2"), flags, None::<&str>).context("mount cgroup2");
    }
    mount(Some("tmpfs"), &base, Some("tmpfs"), flags, Some("mode=755")).context("mount /sys/fs/cgroup")?;
    for hierarchy in hierarchies {
        let name = hierarchy.mount.file_name().context("a cgroup hierarchy is mounted at /")?;
        let target = base.join(name);
        fs::create_dir(&target)?;
        let (fstype, options) =
            if hierarchy.unified { ("cgroup2", None) } else { ("cgroup", Some(hierarchy.options.as_str())) };
        mount(Some(fstype), &target, Some(fstype), flags, options)
            .with_context(|| format!("mount cgroup hierarchy {}", target.display()))?;
    }
    Ok(())
}

/// PID 1's only work: reap what is orphaned, and end when the lab's process is gone.
fn reap_until_told(lifeline: Option<i32>) -> Result<()> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        mask.add(signal);
    }
    mask.thread_block().context("block signals")?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC).context("signalfd")?;
    // SAFETY: the starter passed this descriptor for us alone.
    let lifeline = lifeline.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    loop {
        let watched = lifeline.as_ref().map_or(signals.as_raw_fd(), AsRawFd::as_raw_fd);
        // SAFETY: `watched` is one of the two descriptors that live as long as this function.
        let watched = unsafe { BorrowedFd::borrow_raw(watched) };
        let mut fds = [
            PollFd::new(std::os::fd::AsFd::as_fd(&signals), PollFlags::POLLIN),
            PollFd::new(watched, PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => bail!("poll: {errno}"),
        }
        let hung_up = lifeline.is_some()
            && fds[1].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR));
        if hung_up {
            return Ok(());
        }
        while let Ok(Some(info)) = signals.read_signal_nonblocking() {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                return Ok(());
            }
        }
        while matches!(waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
        {
        }
    }
}

/// Reading a signalfd that may be empty.
trait ReadNonblocking {
    fn read_signal_nonblocking(&self) -> nix::Result<Option<nix::sys::signalfd::siginfo>>;
}

impl ReadNonblocking for SignalFd {
    fn read_signal_nonblocking(&self) -> nix::Result<Option<nix::sys::signalfd::siginfo>> {
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(self), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO)? == 0 {
            return Ok(None);
        }
        self.read_signal()
    }
}
