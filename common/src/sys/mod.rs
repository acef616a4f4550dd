//! System calls no library wraps. The only modules of this crate with `unsafe`.

pub mod bpf;
pub mod ipc;
pub mod memory;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `SIOCBRADDIF`, linux/sockios.h.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// `SIOCBRDELIF`, linux/sockios.h.
const SIOCBRDELIF: libc::c_ulong = 0x89a3;

/// What to do with a port of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BridgePort {
    /// Make the interface a port.
    Attach,
    /// Take it off.
    Detach,
}

/// Attaches an interface, by its index, to a bridge of the calling thread's network namespace, or takes it off.
///
/// The ioctl of bridge-utils: a fraction of a millisecond, where `ip link set master` is a process start.
///
/// # Errors
/// `ENODEV`: no such bridge or interface; `EBUSY`: it is a port already; `EINVAL`: it is none.
pub fn bridge_port(bridge: &str, interface_index: u32, action: BridgePort) -> io::Result<()> {
    if bridge.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let index = libc::c_int::try_from(interface_index).map_err(io::Error::other)?;
    // SAFETY: socket(2) takes no pointer.
    let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: `ifreq` is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bridge.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_ifindex = index;
    let code = match action {
        BridgePort::Attach => SIOCBRADDIF,
        BridgePort::Detach => SIOCBRDELIF,
    };
    // SAFETY: the request outlives the call, and both codes take a pointer to an `ifreq`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), code as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a bridge forwards frames from and to a port (`BR_STATE_*`, linux/if_bridge.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// It does not.
    Disabled = 0,
    /// It does.
    Forwarding = 3,
}

/// Sets the state of a bridge's port, by its interface's index in the calling thread's network namespace.
///
/// It holds when this returns and takes microseconds. Taking the port off the bridge waits for an RCU grace period, 20 ms
/// on an idle machine.
///
/// # Errors
/// `EINVAL`: the interface is no port; `EBUSY`: the bridge runs the spanning tree protocol, which owns the state;
/// `ENETDOWN`: the interface is down.
pub fn set_port_state(interface_index: u32, state: PortState) -> io::Result<()> {
    const RTM_SETLINK: u16 = 19;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const IFLA_PROTINFO_NESTED: u16 = 12 | 0x8000;
    const IFLA_BRPORT_STATE: u16 = 1;
    const NLMSG_ERROR: u16 = 2;
    const LENGTH: u32 = 16 + 16 + 4 + 8;
    let mut message = Vec::with_capacity(LENGTH as usize);
    // nlmsghdr
    message.extend(LENGTH.to_ne_bytes());
    message.extend(RTM_SETLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]);
    // ifinfomsg
    message.extend([libc::AF_BRIDGE as u8, 0, 0, 0]);
    message.extend(interface_index.to_ne_bytes());
    message.extend([0; 8]);
    // IFLA_PROTINFO, and in it IFLA_BRPORT_STATE, padded to 4 bytes
    message.extend(12u16.to_ne_bytes());
    message.extend(IFLA_PROTINFO_NESTED.to_ne_bytes());
    message.extend(5u16.to_ne_bytes());
    message.extend(IFLA_BRPORT_STATE.to_ne_bytes());
    message.extend([state as u8, 0, 0, 0]);

    let socket = netlink_socket(libc::NETLINK_ROUTE)?;
    send_frame(socket.as_fd(), &message)?;
    let mut answer = [0u8; 256];
    let length = receive(socket.as_fd(), &mut answer)?;
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    if length < 20 || kind != Some(NLMSG_ERROR) {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

/// A netlink socket in the calling thread's network namespace.
///
/// # Errors
/// Those of socket(2).
pub fn netlink_socket(protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointer.
    let socket = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// Receives one message; its length.
///
/// # Errors
/// Those of recv(2).
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length describe `buffer`, which outlives the call.
    let length = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// A raw packet socket on one interface of the calling thread's network namespace. It receives nothing.
///
/// # Errors
/// Those of socket(2) and bind(2); `ENODEV` where there is no such interface.
pub fn packet_socket(interface_index: u32) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointer. Protocol 0: no packet is received.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: `sockaddr_ll` is plain data for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::sa_family_t;
    address.sll_ifindex = libc::c_int::try_from(interface_index).map_err(io::Error::other)?;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: address and length describe one `sockaddr_ll` that outlives the call.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// Sends one frame whole.
///
/// # Errors
/// Those of send(2).
pub fn send_frame(socket: BorrowedFd<'_>, frame: &[u8]) -> io::Result<()> {
    // SAFETY: pointer and length describe `frame`, which outlives the call.
    let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The start of a command inside a network namespace: joins it between fork and exec.
pub trait InNetns {
    /// Runs the command in the namespace behind `netns`, which must stay open until the command is started.
    fn in_netns(&mut self, netns: BorrowedFd<'_>) -> &mut Self;
}

impl InNetns for std::process::Command {
    fn in_netns(&mut self, netns: BorrowedFd<'_>) -> &mut Self {
        use std::os::unix::process::CommandExt;
        let netns = netns.as_raw_fd();
        // SAFETY: setns(2) alone is called between fork and exec, on a descriptor the caller keeps open.
        unsafe {
            self.pre_exec(move || {
                if libc::setns(netns, libc::CLONE_NEWNET) < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            })
        }
    }
}

/// The blocked signals of a thread that the caller has stopped by ptrace.
///
/// # Errors
/// `ESRCH`: it is not, or is gone.
pub fn signal_mask(thread: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the address is that of a mask of the size given.
    let done = unsafe { libc::ptrace(libc::PTRACE_GETSIGMASK, thread, size_of::<u64>(), &raw mut mask) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(mask) }
}

/// Sets them.
///
/// # Errors
/// As of [`signal_mask`].
pub fn set_signal_mask(thread: i32, mask: u64) -> io::Result<()> {
    // SAFETY: the address is that of a mask of the size given.
    let done = unsafe { libc::ptrace(libc::PTRACE_SETSIGMASK, thread, size_of::<u64>(), &raw const mask) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Where a thread that the caller has stopped by ptrace keeps its restartable sequences (rseq(2)): the address of its
/// `struct rseq`, 0 if it has none.
///
/// # Errors
/// `ESRCH`: it is not stopped, or is gone; `EIO` before Linux 5.13.
pub fn rseq_of(thread: i32) -> io::Result<u64> {
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        pointer: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut configuration = Configuration::default();
    // SAFETY: the address is that of a configuration of the size given.
    let done = unsafe {
        libc::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, thread, size_of::<Configuration>(), &raw mut configuration)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(configuration.pointer) }
}

/// Takes over a descriptor that came with a message (`SCM_RIGHTS`): the kernel has just installed it for its receiver, and
/// nobody else knows its number.
pub fn adopt(fd: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: as the documentation says; the one caller passes on what recvmsg(2) gave it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Whether two tasks have one address space (kcmp(2), `KCMP_VM`).
///
/// # Errors
/// `ESRCH`: one of them is gone.
pub fn share_memory(one: i32, other: i32) -> io::Result<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: kcmp(2) with KCMP_VM takes no pointer.
    let compared = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) };
    if compared < 0 { Err(io::Error::last_os_error()) } else { Ok(compared == 0) }
}
