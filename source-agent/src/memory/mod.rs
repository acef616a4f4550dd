//! A container's memory on its way to another host, while the container runs.
//!
//! A [`tracker`] says which pages were written, the [`pump`] reads them and leaves out what is zero or known, the
//! [`link`] carries them, one of several [`lanes`], and [`predict`] decides when to stop. [`filter`] keeps CRIU from saving them once more.

pub mod filter;
pub mod inject;
pub mod lanes;
pub mod link;
pub mod maps;
mod packing;
pub mod precopy;
pub mod predict;
pub mod pump;
mod sent;
pub mod tracker;
