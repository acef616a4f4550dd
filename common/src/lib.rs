//! What both agents stand on.
//!
//! The crate knows no terminal and no agent: it describes containers ([`description`]), carries directory trees
//! ([`tree`]), rebuilds networks ([`net`]), holds CRIU ([`criu`]) and proves identities ([`tls`]).

#![deny(unsafe_code)]

pub mod cgroup;
pub mod config;
pub mod criu;
pub mod daemon;
pub mod description;
pub mod fault;
pub mod handover;
pub mod host;
pub mod journal;
pub mod layers;
pub mod leftovers;
pub mod memory_dir;
pub mod moved;
pub mod net;
pub mod obstacle;
pub mod pages;
pub mod runtime;
#[allow(unsafe_code, reason = "system calls no library wraps")]
pub mod sys;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod tree;
pub mod warm;
pub mod wire;

/// An error with all its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
