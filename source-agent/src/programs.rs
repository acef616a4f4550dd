//! Small programs for the kernel's BPF machine, put together instruction by instruction: they count.

use longhaul_common::sys::bpf::{Counters, Instruction};

/// The kernel lends the helper that reads its memory to programs under the GPL only. These may be had under it as well as under
/// this project's licences.
pub(crate) const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";

// BPF_LDX | BPF_MEM | BPF_DW, and so on: class, mode and width, linux/bpf_common.h.
pub(crate) const LOAD: u8 = 0x79;
pub(crate) const ADD_IN_MEMORY: u8 = 0xdb;
pub(crate) const JUMP_IF: u8 = 0x15;
pub(crate) const JUMP_UNLESS_EQUAL: u8 = 0x5d;
pub(crate) const AND: u8 = 0x57;
pub(crate) const SHIFT_LEFT: u8 = 0x67;
pub(crate) const ADD: u8 = 0x0f;
pub(crate) const ADD_NUMBER: u8 = 0x07;
pub(crate) const MOVE: u8 = 0xbf;
pub(crate) const MULTIPLY: u8 = 0x27;
pub(crate) const SHIFT_RIGHT: u8 = 0x77;
pub(crate) const SET: u8 = 0xb7;
pub(crate) const CALL: u8 = 0x85;
pub(crate) const EXIT: u8 = 0x95;
/// `bpf_probe_read_kernel(to, length, from)`.
pub(crate) const READ: i32 = 113;
// Registers: a function's result, its first three arguments, some that calls keep, the end of the stack.
pub(crate) const RESULT: u8 = 0;
pub(crate) const FIRST: u8 = 1;
pub(crate) const SECOND: u8 = 2;
pub(crate) const THIRD: u8 = 3;
pub(crate) const SUBJECT: u8 = 6;
pub(crate) const STATE: u8 = 7;
pub(crate) const VALUE: u8 = 8;
pub(crate) const TREE: u8 = 9;
pub(crate) const STACK: u8 = 10;

pub(crate) const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// Ends the program, for now with no destination.
pub(crate) const fn end_if(code: u8, to: u8, from: u8) -> Instruction {
    instruction(code, to, from, i16::MAX, 0)
}

/// `VALUE`: what is at a place from a pointer; 0 if nothing can be read there.
pub(crate) const fn read(pointer: u8, place: i16) -> [Instruction; 7] {
    [
        instruction(MOVE, THIRD, pointer, 0, 0),
        instruction(ADD_NUMBER, THIRD, 0, 0, place as i32),
        instruction(SET, SECOND, 0, 0, 8),
        instruction(MOVE, FIRST, STACK, 0, 0),
        instruction(ADD_NUMBER, FIRST, 0, 0, -8),
        instruction(CALL, 0, 0, 0, READ),
        instruction(LOAD, VALUE, STACK, -8, 0),
    ]
}

/// Counts up one of `count` counters, a power of two: that of the lower bits of `VALUE`, and ends.
pub(crate) fn count(mut program: Vec<Instruction>, counters: &Counters, count: u32) -> Vec<Instruction> {
    program.extend([instruction(AND, VALUE, 0, 0, count as i32 - 1), instruction(SHIFT_LEFT, VALUE, 0, 0, 3)]);
    program.extend(counters.address_in(FIRST));
    program.extend([
        instruction(ADD, FIRST, VALUE, 0, 0),
        instruction(SET, VALUE, 0, 0, 1),
        instruction(ADD_IN_MEMORY, FIRST, VALUE, 0, 0),
    ]);
    let end = program.len() as i16;
    for (index, jump) in program.iter_mut().enumerate().filter(|(_, jump)| jump.offset == i16::MAX) {
        jump.offset = end - index as i16 - 1;
    }
    program.extend([instruction(SET, RESULT, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    program
}
