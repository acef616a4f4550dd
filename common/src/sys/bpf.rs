//! Small programs in the kernel that walk over a task's areas, or count what the kernel does: bpf(2),
//! Documentation/bpf/bpf_iterators.rst, linux/bpf.h.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;

use super::memory::Mapping;

/// `BPF_MAP_CREATE`.
const MAP_CREATE: libc::c_long = 0;
/// `BPF_PROG_LOAD`.
const PROG_LOAD: libc::c_long = 5;
/// `BPF_RAW_TRACEPOINT_OPEN`.
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
/// `BPF_LINK_CREATE`.
const LINK_CREATE: libc::c_long = 28;
/// `BPF_ITER_CREATE`.
const ITER_CREATE: libc::c_long = 33;

/// `BPF_PROG_TYPE_RAW_TRACEPOINT`.
const TYPE_RAW_TRACEPOINT: u32 = 17;
/// `BPF_PROG_TYPE_TRACING`.
const TYPE_TRACING: u32 = 26;
/// `BPF_TRACE_ITER`.
const TRACE_ITER: u32 = 28;
/// `BPF_MAP_TYPE_ARRAY`.
const MAP_ARRAY: u32 = 2;
/// `BPF_F_MMAPABLE`.
const MAP_MAPPABLE: u32 = 1 << 10;

/// One instruction (Documentation/bpf/standardization/instruction-set.rst).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// Its registers: the destination's number in the lower half, the source's in the upper one.
    pub registers: u8,
    /// An offset, in bytes for memory, in instructions for jumps.
    pub offset: i16,
    /// A number.
    pub immediate: i32,
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, up to the last field that is used.
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

/// `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// `union bpf_attr` for `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
struct TracepointAttr {
    name: u64,
    prog_fd: u32,
    _padding: u32,
}

/// `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    _padding: u32,
}

/// `union bpf_iter_link_info` for tasks.
#[repr(C)]
#[derive(Default)]
struct TaskInfo {
    tid: u32,
    pid: u32,
    pid_fd: u32,
}

/// `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct IterAttr {
    link_fd: u32,
    flags: u32,
}

const _: () = assert!(size_of::<LoadAttr>() == 112 && size_of::<LinkAttr>() == 32 && size_of::<Instruction>() == 8);

fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attribute outlives the call and has the size that is given; the kernel reads it only.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the commands used here return a descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn load(instructions: &[Instruction], license: &CStr, kind: &LoadAttr) -> io::Result<OwnedFd> {
    let attr = LoadAttr {
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..*kind
    };
    bpf(PROG_LOAD, &attr)
}

/// Loads a program that the kernel calls for each item of an iterator; `iterator` is the id of the iterator's function in
/// the kernel's types (`/sys/kernel/btf/vmlinux`).
///
/// # Errors
/// `EPERM` without `CAP_BPF` and `CAP_PERFMON`; `EACCES`, `EINVAL`: the kernel's verifier refuses the program, or knows no such iterator.
pub fn load_iterator(instructions: &[Instruction], iterator: u32, license: &CStr) -> io::Result<OwnedFd> {
    let kind = LoadAttr {
        prog_type: TYPE_TRACING,
        expected_attach_type: TRACE_ITER,
        attach_btf_id: iterator,
        ..LoadAttr::default()
    };
    load(instructions, license, &kind)
}

/// Has the kernel call a program at one of its tracepoints, with the tracepoint's arguments as 64 bits each, until the result is
/// dropped.
///
/// # Errors
/// As of [`load_iterator`]; `ENOENT`: this kernel has no such tracepoint.
pub fn trace(tracepoint: &CStr, instructions: &[Instruction], license: &CStr) -> io::Result<OwnedFd> {
    let kind = LoadAttr { prog_type: TYPE_RAW_TRACEPOINT, ..LoadAttr::default() };
    let program = load(instructions, license, &kind)?;
    let attr = TracepointAttr { name: tracepoint.as_ptr() as u64, prog_fd: number(&program), _padding: 0 };
    bpf(RAW_TRACEPOINT_OPEN, &attr)
}

/// Numbers that programs count up, 64 bits each, and that are read here.
#[derive(Debug)]
pub struct Counters {
    map: File,
    values: Mapping,
}

impl Counters {
    /// `count` of them, all 0.
    ///
    /// # Errors
    /// `EPERM` without `CAP_BPF`; `EINVAL` before Linux 5.5.
    pub fn new(count: u32) -> io::Result<Self> {
        let value_size = count * 8;
        let attr = MapAttr { map_type: MAP_ARRAY, key_size: 4, value_size, max_entries: 1, map_flags: MAP_MAPPABLE };
        let map = File::from(bpf(MAP_CREATE, &attr)?);
        let values = Mapping::of(&map, value_size.into())?;
        Ok(Self { map, values })
    }

    /// One of them now.
    pub fn get(&self, index: usize) -> u64 {
        let bytes = self.values.bytes().as_ptr();
        assert!(index < self.values.bytes().len() / 8, "there are not so many counters");
        // SAFETY: within the mapping, which begins at a page's border; others change it, as one does an atomic.
        unsafe { &*bytes.cast::<AtomicU64>().add(index) }.load(Ordering::Acquire)
    }

    /// The two instructions that load the first one's place into a register (`BPF_LD | BPF_IMM | BPF_DW` with
    /// `BPF_PSEUDO_MAP_VALUE`).
    pub fn address_in(&self, register: u8) -> [Instruction; 2] {
        const PSEUDO_MAP_VALUE: u8 = 2;
        let immediate = self.map.as_raw_fd();
        [
            Instruction { code: 0x18, registers: PSEUDO_MAP_VALUE << 4 | register, offset: 0, immediate },
            Instruction { code: 0, registers: 0, offset: 0, immediate: 0 },
        ]
    }
}

/// Begins to run an iterator's program over one task: reading gives what it writes. Once it is through, another read may begin anew
/// (seen with `task_vma` on Linux 6.18).
///
/// # Errors
/// `EINVAL` before Linux 6.1, which can't choose a task.
pub fn iterate_task(program: &OwnedFd, tid: i32) -> io::Result<File> {
    let info = TaskInfo { tid: tid.unsigned_abs(), ..TaskInfo::default() };
    let attr = LinkAttr {
        prog_fd: number(program),
        attach_type: TRACE_ITER,
        iter_info: &raw const info as u64,
        iter_info_len: size_of::<TaskInfo>() as u32,
        ..LinkAttr::default()
    };
    let link = bpf(LINK_CREATE, &attr)?;
    let iterator = bpf(ITER_CREATE, &IterAttr { link_fd: number(&link), flags: 0 })?;
    Ok(File::from(iterator))
}
