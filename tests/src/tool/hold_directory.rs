//! A directory in which nobody can make a file for a while.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::sys;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The directory
    directory: PathBuf,
    /// For how long
    #[arg(long)]
    seconds: f64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    sys::directory::hold(&File::open(&options.directory)?, Duration::from_secs_f64(options.seconds))?;
    Ok(true)
}
