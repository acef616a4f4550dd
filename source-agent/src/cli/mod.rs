//! The `migrate` command: arguments, one call of the agent, and its answer for a person or a script.

mod args;
mod output;
mod progress;
mod run;

pub use args::{Cli, command};
pub use run::run;

/// Exit codes, as in docs/operating.md.
pub mod exit {
    /// Moved, or nothing is in the way.
    pub const DONE: u8 = 0;
    /// It failed; the container runs on the source.
    pub const FAILED: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// Something is in the way; nothing was touched.
    pub const REFUSED: u8 = 3;
    /// Whether the destination took the container is not known; it is frozen here.
    pub const IN_DOUBT: u8 = 5;
    /// The source agent can't be reached.
    pub const NO_AGENT: u8 = 125;
}
