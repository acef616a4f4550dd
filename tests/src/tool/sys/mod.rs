//! System calls that neither std nor nix (with the features this workspace enables) wraps safely: one small safe
//! function each.

pub(crate) mod cpu;
pub(crate) mod directory;
pub(crate) mod event;
pub(crate) mod ipc;
pub(crate) mod lock;
pub(crate) mod mem;
pub(crate) mod mutex;
pub(crate) mod process;
pub(crate) mod rseq;
pub(crate) mod signal;

use std::io;

/// The result of a call that returns -1 and sets errno.
fn check<T: PartialOrd + From<i8>>(result: T) -> io::Result<T> {
    if result < T::from(0) { Err(io::Error::last_os_error()) } else { Ok(result) }
}
