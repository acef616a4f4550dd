//! The destination agent: takes containers in.
//!
//! [`service`] is the network edge; [`arrival`] one migration as the destination sees it; [`preflight`] decides
//! whether it may come; [`staging`] owns every path, mount and interface made for it, and takes them away again.

#![forbid(unsafe_code)]

pub mod arrival;
pub mod image_entries;
pub mod images;
pub mod intake;
pub mod memory;
pub mod one_file;
pub mod owing;
pub mod pagemap;
pub mod preflight;
pub mod record;
pub mod restore;
pub mod service;
pub mod staging;
pub mod timerfd;
