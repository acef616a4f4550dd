//! The source agent: moves containers away, and the `migrate` command that asks it to.
//!
//! [`migration`] is the journey of one migration and the only place that knows its order. [`inspect`] looks at a
//! container before anything is touched; [`checkpoint`], [`images`] and [`push`] carry its state; [`peer`] is the
//! network edge to the destination, [`service`] the one to the command.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod cli;
pub mod custody;
pub mod file_watch;
pub mod images;
pub mod inspect;
pub mod jobs;
pub mod memory;
pub mod migration;
pub mod options;
pub mod peer;
mod programs;
pub mod push;
pub mod record;
pub mod report;
pub mod retire;
pub mod service;
