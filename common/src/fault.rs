//! Points at which the lab makes an agent fail: killed, stopped, or held until something else has happened.
//!
//! An agent that was started with [`VARIABLE`] names a file there; nothing happens without. The file's first line is a point
//! and what happens when it is reached, once:
//!
//! ```text
//! destination:record:committed kill
//! ```
//!
//! Points are `source:phase:<phase>`, `source:look` (at the frozen memory, before CRIU is told of it), `source:<action>`, `destination:heard:<message>`, `destination:<action>`, `destination:restored` and
//! `destination:say:<message>`; actions are those of the hand-over ([`crate::handover`]), before they are done.
//!
//! | action | |
//! |---|---|
//! | `kill` | SIGKILL to itself |
//! | `stop` | SIGSTOP to itself |
//! | `hold` | waits until the file is gone |
//!
//! When a point is reached the file is renamed to `<file>.reached` first, so that a restarted agent goes on; `hold` waits for
//! that one to be removed.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, raise};

/// The environment variable that names the file.
pub const VARIABLE: &str = "LONGHAUL_FAULT";

/// How often a held agent looks whether it may go on.
const POLL: Duration = Duration::from_millis(2);

/// The agent has reached a point.
pub fn point(name: &str) {
    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let Some(file) = FILE.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from)) else { return };
    let Ok(text) = std::fs::read_to_string(file) else { return };
    let Some((_, action)) = text.trim().split_once(' ').filter(|(wanted, _)| *wanted == name) else { return };
    let reached = file.with_extension("reached");
    if std::fs::rename(file, &reached).is_err() {
        return;
    }
    tracing::warn!(name, action, "a fault was asked for");
    match action {
        "kill" => drop(raise(Signal::SIGKILL)),
        "stop" => drop(raise(Signal::SIGSTOP)),
        "hold" => hold(&reached),
        other => tracing::error!(other, "that is no fault"),
    }
}

/// Everything else goes on meanwhile.
fn hold(reached: &Path) {
    let wait = || {
        while reached.exists() {
            std::thread::sleep(POLL);
        }
    };
    match tokio::runtime::Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(tokio::runtime::RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
        _ => wait(),
    }
}
