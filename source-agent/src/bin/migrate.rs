//! The command an operator types.

use std::process::ExitCode;

use clap::Parser;
use longhaul_source::cli::{Cli, exit, run};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("migrate: {error:#}");
            ExitCode::from(exit::FAILED)
        }
    }
}
