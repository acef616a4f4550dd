//! A container's memory on its way to another host, while the container runs.
//!
//! A [`tracker`] says which pages were written, the [`pump`] reads them and leaves out what is zero or known, the
//! [`link`] carries them, one of several [`lanes`], and [`predict`] decides when to stop. What could not be
//! sent in time is [served](serve) when the container runs there. [`filter`] keeps CRIU from saving them once more.

pub mod filter;
pub mod flags;
pub mod inject;
pub(crate) mod kernel_types;
pub mod lanes;
pub mod link;
pub mod maps;
mod packing;
pub mod precopy;
pub mod predict;
pub mod pump;
mod sent;
pub mod serve;
mod several;
pub mod shared;
pub mod soft_dirty;
pub mod throttle;
pub mod tracker;
mod versions;
pub mod watch;
