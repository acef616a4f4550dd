//! Registers that hold a pattern across a system call, so that a process which is frozen at any moment is most
//! likely frozen with the pattern in its registers.

/// One vector register at its widest.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Vector(pub(crate) [u64; 8]);

/// What was in the registers afterwards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Registers {
    /// xmm, ymm or zmm registers, as wide as this processor has them; the rest stays 0.
    pub(crate) vectors: [Vector; 16],
    /// r12 to r15.
    pub(crate) general: [u64; 4],
    /// The top of the x87 stack.
    pub(crate) x87: f64,
    /// The control word of the vector unit.
    pub(crate) mxcsr: u32,
}

/// The width of the vectors that [`hold`] fills, in 64-bit words.
#[cfg(target_arch = "x86_64")]
pub(crate) fn vector_words() -> usize {
    if std::arch::is_x86_feature_detected!("avx512f") {
        8
    } else if std::arch::is_x86_feature_detected!("avx") {
        4
    } else {
        2
    }
}

/// Holds `wanted` in the registers while the thread sleeps for `nanoseconds`; returns what they held afterwards.
#[cfg(target_arch = "x86_64")]
pub(crate) fn hold(wanted: &Registers, nanoseconds: i64) -> Registers {
    let mut got = Registers { vectors: [Vector([0; 8]); 16], general: [0; 4], x87: 0.0, mxcsr: 0 };
    let sleep = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
    match vector_words() {
        8 => hold_zmm(wanted, &mut got, &sleep),
        4 => hold_ymm(wanted, &mut got, &sleep),
        _ => hold_xmm(wanted, &mut got, &sleep),
    }
    got
}

/// A function that fills the registers with moves of one width, sleeps, and stores them.
#[cfg(target_arch = "x86_64")]
macro_rules! hold_with {
    ($name:ident, $move:literal, $register:literal, [$($index:literal)*]) => {
        fn $name(wanted: &Registers, got: &mut Registers, sleep: &libc::timespec) {
            let mut saved = 0_u32;
            // SAFETY: the caller has checked that the processor has these registers. Loads are within `wanted` and
            // `sleep`, stores within `got` and `saved`; every register written is declared, the x87 stack and
            // MXCSR are as before at the end, and nanosleep does not touch our memory.
            unsafe {
                std::arch::asm!(
                    "stmxcsr [{saved}]",
                    "ldmxcsr [{wanted} + {mxcsr}]",
                    "fld qword ptr [{wanted} + {x87}]",
                    $(concat!($move, " ", $register, $index, ", [{wanted} + 64 * ", $index, "]"),)*
                    "mov r12, [{wanted} + {general}]",
                    "mov r13, [{wanted} + {general} + 8]",
                    "mov r14, [{wanted} + {general} + 16]",
                    "mov r15, [{wanted} + {general} + 24]",
                    "syscall",
                    "mov [{got} + {general}], r12",
                    "mov [{got} + {general} + 8], r13",
                    "mov [{got} + {general} + 16], r14",
                    "mov [{got} + {general} + 24], r15",
                    $(concat!($move, " [{got} + 64 * ", $index, "], ", $register, $index),)*
                    "fstp qword ptr [{got} + {x87}]",
                    "stmxcsr [{got} + {mxcsr}]",
                    "ldmxcsr [{saved}]",
                    saved = in(reg) &raw mut saved,
                    wanted = in(reg) wanted,
                    got = in(reg) std::ptr::from_mut(got),
                    mxcsr = const std::mem::offset_of!(Registers, mxcsr),
                    x87 = const std::mem::offset_of!(Registers, x87),
                    general = const std::mem::offset_of!(Registers, general),
                    inlateout("rax") libc::SYS_nanosleep => _,
                    in("rdi") std::ptr::from_ref(sleep),
                    in("rsi") 0,
                    out("rcx") _, out("r11") _,
                    out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _,
                    out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack),
                );
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
hold_with!(hold_zmm, "vmovdqu64", "zmm", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
#[cfg(target_arch = "x86_64")]
hold_with!(hold_ymm, "vmovdqu", "ymm", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
#[cfg(target_arch = "x86_64")]
hold_with!(hold_xmm, "movdqu", "xmm", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
