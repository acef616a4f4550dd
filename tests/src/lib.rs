//! The lab: real hosts on one machine, and what is tried in them.
//!
//! Hosts are namespaces over an overlay of a Debian 13 root filesystem, joined by a bridge in a namespace of its
//! own. Agents, runtimes and CRIU run in them unmodified. Nothing outside the namespaces is touched but the
//! image cache and the lab's own state directories.

pub mod agents;
pub mod bench;
pub mod cgroup;
pub mod client;
pub mod container;
pub mod demo;
pub mod enter;
pub mod faults;
pub mod fuzz;
pub mod harness;
pub mod host_init;
pub mod image;
pub mod lab;
pub mod machine;
pub mod scenarios;
pub mod soak;
pub mod vm;
