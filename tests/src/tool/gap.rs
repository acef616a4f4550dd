//! The longest time a client heard nothing.

use std::time::{Duration, Instant};

use clap::Args;

use super::report;

/// A silence longer than this is worth an event line unless told otherwise: 20 ms is well above scheduling noise on a busy lab machine
/// and well below any downtime a migration reaches.
const EVENT_AFTER_MS: f64 = 20.0;

/// Measures the silences between signs of life.
pub(crate) struct GapMeter {
    last: Option<Instant>,
    longest: Duration,
    at_unix_ms: u64,
    events_after: Option<Duration>,
}

/// Which silences are told of.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Events {
    /// One JSON line on stderr whenever a long gap is over
    #[arg(long)]
    events: bool,
    /// What a long gap is
    #[arg(long, default_value_t = EVENT_AFTER_MS)]
    events_above_ms: f64,
}

impl GapMeter {
    /// A meter, which may print one JSON line on stderr for each long silence, when it is over.
    pub(crate) fn new(events: Events) -> Self {
        let events_after = events.events.then(|| Duration::from_secs_f64(events.events_above_ms / 1000.0));
        Self { last: None, longest: Duration::ZERO, at_unix_ms: 0, events_after }
    }

    /// A sign of life came. The first one only starts the clock.
    pub(crate) fn mark(&mut self) {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.note(now - last);
        }
    }

    /// Counts the silence that is still open, so that a connection which hung until the end is not a short gap.
    pub(crate) fn finish(&mut self) {
        if self.last.is_some() {
            self.mark();
        }
    }

    /// The longest silence in milliseconds.
    pub(crate) fn longest_ms(&self) -> f64 {
        milliseconds(self.longest)
    }

    /// When the longest silence ended, in milliseconds since 1970; 0 if there was none.
    pub(crate) fn at_unix_ms(&self) -> u64 {
        self.at_unix_ms
    }

    fn note(&mut self, gap: Duration) {
        if gap > self.longest {
            self.longest = gap;
            self.at_unix_ms = report::unix_ms();
        }
        if self.events_after.is_some_and(|after| gap > after) {
            eprintln!("{}", serde_json::json!({"gap_ms": milliseconds(gap), "over_unix_ms": report::unix_ms()}));
        }
    }
}

/// Milliseconds with three decimals.
fn milliseconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}
