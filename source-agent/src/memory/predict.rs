//! When to stop pre-copy: the whole downtime is predicted, not the pages alone.

use std::time::Duration;

/// What a downtime is made of, as known before it begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// Bytes that would have to be sent while frozen.
    pub residual_bytes: u64,
    /// Bytes a second that the last rounds sent.
    pub bytes_per_second: f64,
    /// Memory of the container, in bytes: CRIU reads its page tables.
    pub memory_bytes: u64,
    /// Round trip to the destination.
    pub round_trip: Duration,
    /// What the rest takes: freeze, CRIU's dump and restore, the switch of the network.
    pub fixed: Duration,
}

/// Round trips within a downtime: files and images, restore, commit, and one for what overlaps badly.
const ROUND_TRIPS: u32 = 4;
/// What CRIU takes for each GiB of mapped memory, whatever is in it (it reads smaps; measured: 29 ms for 2 GiB).
const PER_GIB: Duration = Duration::from_millis(15);

impl Outlook {
    /// The predicted downtime.
    pub fn downtime(&self) -> Duration {
        let residual = if self.bytes_per_second > 0.0 {
            Duration::from_secs_f64((self.residual_bytes as f64 / self.bytes_per_second).min(86_400.0))
        } else {
            Duration::ZERO
        };
        let tables = PER_GIB.mul_f64(self.memory_bytes as f64 / (1u64 << 30) as f64);
        // The residual travels while CRIU reads: the longer of the two counts, and half of the other for two busy cores.
        let overlapping = residual.max(tables) + residual.min(tables) / 2;
        self.fixed + overlapping + self.round_trip * ROUND_TRIPS
    }
}

/// What the user allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The downtime wanted.
    pub max_downtime: Duration,
    /// The most rounds.
    pub max_rounds: u32,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Freeze: the downtime would be as wanted, and another round would not make it much shorter.
    Freeze,
    /// Another round.
    Round,
    /// The downtime would be longer than wanted, and all rounds are used up.
    GiveUp,
}

/// Rounds that may pass without an improvement before they count as useless: one may be unlucky.
const PATIENCE: usize = 3;
/// An improvement is at least a tenth.
const IMPROVEMENT: f64 = 0.9;
/// A residual no larger is not worth another round once the downtime is as wanted. In bytes.
const SMALL: u64 = 1 << 20;

/// Decides before a round is sent: `residuals` are the bytes that were found written by each one so far, the last of them
/// what would have to be sent while frozen now; `prediction` is the downtime that would be.
pub fn decide(prediction: Duration, residuals: &[u64], limits: Limits) -> Next {
    let Some(&residual) = residuals.last() else { return Next::Round };
    let used_up = residuals.len() > limits.max_rounds as usize;
    if prediction <= limits.max_downtime && (residual <= SMALL || used_up || !still_falling(residuals)) {
        return Next::Freeze;
    }
    if used_up { Next::GiveUp } else { Next::Round }
}

/// Whether one of the last rounds left clearly less than all before it.
fn still_falling(residuals: &[u64]) -> bool {
    if residuals.len() <= PATIENCE {
        return true;
    }
    let (before, recent) = residuals.split_at(residuals.len() - PATIENCE);
    let best_before = before.iter().min().copied().unwrap_or(u64::MAX);
    recent.iter().any(|&residual| (residual as f64) < best_before as f64 * IMPROVEMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_downtime: Duration::from_millis(300), max_rounds: 30 };
    const MIB: u64 = 1 << 20;

    fn after(residuals: &[u64], milliseconds: u64) -> Next {
        decide(Duration::from_millis(milliseconds), residuals, LIMITS)
    }

    #[test]
    fn rounds_go_on_while_they_help() {
        assert_eq!(after(&[500 * MIB], 4000), Next::Round);
        assert_eq!(after(&[500 * MIB, 100 * MIB, 20 * MIB], 350), Next::Round);
        // As short as wanted, but cheap to make shorter.
        assert_eq!(after(&[500 * MIB, 100 * MIB, 5 * MIB], 150), Next::Round);
        assert_eq!(after(&[500 * MIB, 100 * MIB, MIB / 2], 120), Next::Freeze);
    }

    #[test]
    fn rounds_that_do_not_help_end() {
        assert_eq!(after(&[300 * MIB; 5], 250), Next::Freeze);
        assert_eq!(after(&[300 * MIB; 5], 2500), Next::Round);
        assert_eq!(after(&[300 * MIB; 31], 2500), Next::GiveUp);
        assert_eq!(after(&[300 * MIB; 31], 200), Next::Freeze);
    }

    #[test]
    fn a_downtime_has_all_its_parts() {
        let outlook = Outlook {
            residual_bytes: 10 * MIB,
            bytes_per_second: 100.0 * MIB as f64,
            memory_bytes: 2 << 30,
            round_trip: Duration::from_millis(10),
            fixed: Duration::from_millis(100),
        };
        // 100 fixed, 100 for the residual, half of 30 for the page tables, four round trips.
        assert_eq!(outlook.downtime(), Duration::from_millis(255));
        assert!(Outlook { bytes_per_second: 0.0, ..outlook }.downtime() < outlook.downtime());
    }
}
