//! The parts of `lab-tool`, one concept a file. Unsafe code lives below [`sys`] only.
#![deny(unsafe_code)]

pub(crate) mod address_hash;
pub(crate) mod check;
pub(crate) mod game;
pub(crate) mod gap;
pub(crate) mod histogram;
pub(crate) mod hold;
pub(crate) mod hold_directory;
pub(crate) mod idle;
pub(crate) mod ledger;
pub(crate) mod memcheck;
pub(crate) mod pace;
pub(crate) mod prefork;
pub(crate) mod redis;
pub(crate) mod redis_write;
pub(crate) mod report;
pub(crate) mod rewrite;
pub(crate) mod selfcheck;
pub(crate) mod stream;
pub(crate) mod subject;
#[allow(unsafe_code, reason = "the system calls that neither std nor nix wraps safely")]
pub(crate) mod sys;
pub(crate) mod tls_pipe;
pub(crate) mod udp;
pub(crate) mod varied;
pub(crate) mod vm_agent;
pub(crate) mod wait_port;
