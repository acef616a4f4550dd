//! Where the kernel writes a thread's CPU number: `struct rseq` of linux/rseq.h.

use std::io;
use std::ops::Range;

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// `PTRACE_GET_RSEQ_CONFIGURATION` of linux/ptrace.h; the C library does not name it everywhere.
const GET_CONFIGURATION: libc::c_uint = 0x420f;

/// `struct ptrace_rseq_configuration` of linux/ptrace.h.
#[repr(C)]
#[derive(Default)]
struct Configuration {
    address: u64,
    size: u32,
    signature: u32,
    flags: u32,
    padding: u32,
}

/// Fields that the kernel writes whenever the thread runs on another CPU: `cpu_id_start` and `cpu_id`; `node_id` and
/// `mm_cid`.
const WRITTEN: [Range<u64>; 2] = [0..8, 20..28];

/// Addresses at which the kernel itself writes into the memory of a thread, which is stopped for a moment to ask. None
/// if the thread has not registered any.
pub(crate) fn written_by_kernel(thread: i32) -> io::Result<Vec<Range<u64>>> {
    let thread = Pid::from_raw(thread);
    ptrace::seize(thread, ptrace::Options::empty())?;
    let configuration = ptrace::interrupt(thread)
        .and_then(|()| waitpid(thread, Some(WaitPidFlag::__WALL)).map(drop))
        .map_err(io::Error::from)
        .and_then(|()| read(thread));
    ptrace::detach(thread, None)?;
    let Configuration { address, size, .. } = configuration?;
    let fields = WRITTEN.iter().filter(|field| field.end <= u64::from(size));
    Ok(fields.map(|field| address + field.start..address + field.end).collect())
}

fn read(thread: Pid) -> io::Result<Configuration> {
    let mut configuration = Configuration::default();
    // SAFETY: the kernel writes at most the size it is told, into a structure of that size.
    super::check(unsafe {
        libc::ptrace(GET_CONFIGURATION, thread.as_raw(), size_of::<Configuration>(), &raw mut configuration)
    })?;
    Ok(configuration)
}
