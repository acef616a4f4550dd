//! When a client ends: after `--seconds`, or on SIGTERM or SIGINT.

use std::time::{Duration, Instant};

use clap::Args;

use super::sys;

/// How long a read blocks before a client looks at its clock and at the signals.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// The end of a run.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunTime {
    /// Stop after this many seconds; without it only SIGTERM or SIGINT ends the run
    #[arg(long)]
    pub(crate) seconds: Option<f64>,
}

/// Tells when a run is over.
#[derive(Clone, Copy)]
pub(crate) struct Deadline {
    at: Option<Instant>,
}

impl RunTime {
    /// Starts the clock, and takes SIGTERM and SIGINT as a request to stop.
    pub(crate) fn start(&self) -> anyhow::Result<Deadline> {
        sys::signal::stop_on_terminate()?;
        Ok(Deadline { at: self.seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds)) })
    }
}

impl Deadline {
    /// Whether the run should end now.
    pub(crate) fn is_over(&self) -> bool {
        sys::signal::stop_requested() || self.at.is_some_and(|at| Instant::now() >= at)
    }

    /// Sleeps for `span`, in ticks, and returns early when the run is over.
    pub(crate) fn sleep(&self, span: Duration) {
        let until = Instant::now() + span;
        while !self.is_over() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(TICK));
        }
    }
}
