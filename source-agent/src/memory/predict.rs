//! When to stop pre-copy: the whole downtime is predicted, not the pages alone.

use std::time::Duration;

/// What a downtime is made of, as known before it begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// Bytes that would have to be sent while frozen.
    pub residual_bytes: u64,
    /// Bytes a second that the last rounds sent.
    pub bytes_per_second: f64,
    /// Memory of the container, in bytes.
    pub memory_bytes: u64,
    /// CRIU reads smaps (`super::flags` says when it need not).
    pub reads_smaps: bool,
    /// Round trip to the destination.
    pub round_trip: Duration,
    /// What the rest takes: freeze, CRIU's dump and restore, the switch of the network.
    pub fixed: Duration,
}

/// Round trips within a downtime: files and images, restore, commit, and one for what overlaps badly.
const ROUND_TRIPS: u32 = 4;
/// What each GiB of mapped memory takes, whatever is in it: the last scan, the index, larger page tables (measured: 39 ms for 4 GiB).
const PER_GIB: Duration = Duration::from_millis(10);
/// What it takes besides where CRIU reads smaps (measured: 29 ms for 2 GiB).
const SMAPS_PER_GIB: Duration = Duration::from_millis(15);

impl Outlook {
    /// The predicted downtime.
    pub fn downtime(&self) -> Duration {
        let residual = if self.bytes_per_second > 0.0 {
            Duration::from_secs_f64((self.residual_bytes as f64 / self.bytes_per_second).min(86_400.0))
        } else {
            Duration::ZERO
        };
        let per_gib = if self.reads_smaps { PER_GIB + SMAPS_PER_GIB } else { PER_GIB };
        let tables = per_gib.mul_f64(self.memory_bytes as f64 / (1u64 << 30) as f64);
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
    /// What can't be copied in time may be fetched when the container runs there.
    pub postcopy: bool,
    /// Its processor time may be taken from it.
    pub auto_converge: bool,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Freeze: the downtime would be as wanted, and another round would not make it much shorter.
    Freeze,
    /// Another round.
    Round,
    /// The downtime would be longer than wanted, and all rounds are used up, or would change nothing.
    GiveUp,
    /// Freeze, and have what was written last fetched later: rounds do not help.
    PostCopy,
    /// Take processor time from the container, and go on: rounds do not help.
    Throttle,
}

/// Rounds that may pass without an improvement before they count as useless: one may be unlucky.
const PATIENCE: usize = 3;
/// An improvement is at least a tenth.
const IMPROVEMENT: f64 = 0.9;
/// A residual no larger is not worth another round once the downtime is as wanted. In bytes.
const SMALL: u64 = 1 << 20;

/// Decides before a round is sent, after `rounds`: `residuals` are the bytes that were found written by each one since the container
/// was last given less processor time, the last of them what would have to be sent while frozen now; `prediction` is the downtime that
/// would be.
pub fn decide(prediction: Duration, residuals: &[u64], rounds: usize, limits: Limits) -> Next {
    let Some(&residual) = residuals.last() else { return Next::Round };
    let used_up = rounds > limits.max_rounds as usize;
    if prediction <= limits.max_downtime && (residual <= SMALL || used_up || !still_falling(residuals)) {
        return Next::Freeze;
    }
    if residual <= SMALL && residuals.len() > PATIENCE && !still_falling(residuals) {
        // Nothing is left that rounds, or less processor time, could make shorter.
        return Next::GiveUp;
    }
    if limits.auto_converge && !used_up && !still_falling(residuals) {
        return Next::Throttle;
    }
    if limits.postcopy && (used_up || !still_falling(residuals)) {
        return Next::PostCopy;
    }
    if used_up { Next::GiveUp } else { Next::Round }
}

/// How a round that is under way gets on against the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Race {
    /// Since the round began.
    pub at: Duration,
    /// Bytes of memory that were sent since.
    pub sent: u64,
    /// Bytes that were written since, each page once.
    pub written: u64,
}

/// Whether a round can't be won: in both of the last two intervals more was written anew than sent, and what was written by now could not be
/// sent within the downtime wanted. Only then is it certain that the next round would be no shorter; a container that writes the
/// same few pages over and over writes nothing anew.
pub fn is_lost(looks: &[Race], max_downtime: Duration) -> bool {
    let [.., first, second, third] = looks else { return false };
    let lost = |one: &Race, next: &Race| {
        let sent = next.sent.saturating_sub(one.sent);
        sent > 0 && next.written.saturating_sub(one.written) >= sent
    };
    let pace = (third.sent.saturating_sub(first.sent)) as f64 / third.at.saturating_sub(first.at).as_secs_f64();
    lost(first, second) && lost(second, third) && third.written as f64 > pace * max_downtime.as_secs_f64()
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

    const LIMITS: Limits =
        Limits { max_downtime: Duration::from_millis(300), max_rounds: 30, postcopy: false, auto_converge: false };
    const MIB: u64 = 1 << 20;

    fn after(residuals: &[u64], milliseconds: u64) -> Next {
        decide(Duration::from_millis(milliseconds), residuals, residuals.len(), LIMITS)
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
        // The rest of the downtime alone is longer than wanted.
        assert_eq!(after(&[0; 3], 700), Next::Round);
        assert_eq!(after(&[0; 4], 700), Next::GiveUp);
    }

    #[test]
    fn what_rounds_can_not_bring_is_fetched_later() {
        let limits = Limits { postcopy: true, ..LIMITS };
        let after = |residuals: &[u64], ms| decide(Duration::from_millis(ms), residuals, residuals.len(), limits);
        assert_eq!(after(&[300 * MIB; 3], 2500), Next::Round);
        assert_eq!(after(&[300 * MIB; 5], 2500), Next::PostCopy);
        assert_eq!(after(&[300 * MIB; 5], 250), Next::Freeze);
    }

    #[test]
    fn processor_time_is_taken_before_anything_else() {
        let limits = Limits { postcopy: true, auto_converge: true, ..LIMITS };
        let after = |residuals: &[u64], rounds| decide(Duration::from_millis(2500), residuals, rounds, limits);
        assert_eq!(after(&[300 * MIB; 5], 5), Next::Throttle);
        assert_eq!(after(&[300 * MIB; 2], 7), Next::Round);
        assert_eq!(after(&[300 * MIB; 5], 31), Next::PostCopy);
    }

    #[test]
    fn a_lost_race_is_seen() {
        let look = |(sent, written)| (sent * MIB, written * MIB);
        let looks = |looks: &[(u64, u64)]| -> Vec<Race> {
            let times = (0..).map(|nth| Duration::from_millis(200) * nth);
            let looks = looks.iter().copied().map(look).zip(times);
            looks.map(|((sent, written), at)| Race { at, sent, written }).collect()
        };
        let lost = |all: &[(u64, u64)]| is_lost(&looks(all), Duration::from_millis(300));
        assert!(lost(&[(0, 0), (20, 40), (40, 80)]));
        // One look may be unlucky; a slow writer is caught up with; the same pages again are nothing new.
        assert!(!lost(&[(0, 0), (20, 40)]));
        assert!(!lost(&[(0, 0), (20, 10), (40, 20)]));
        assert!(!lost(&[(0, 0), (20, 40), (40, 41)]));
        // So little that it fits into the downtime.
        let little = [(0, 0), (20, 20), (40, 40)];
        assert!(lost(&little) && !is_lost(&looks(&little), Duration::from_secs(1)));
        // A link on which nothing moves says nothing.
        assert!(!lost(&[(0, 0), (0, 40), (0, 80)]));
    }

    #[test]
    fn a_downtime_has_all_its_parts() {
        let outlook = Outlook {
            residual_bytes: 10 * MIB,
            bytes_per_second: 100.0 * MIB as f64,
            memory_bytes: 2 << 30,
            reads_smaps: false,
            round_trip: Duration::from_millis(10),
            fixed: Duration::from_millis(100),
        };
        // 100 fixed, 100 for the residual, half of 20 for the page tables, four round trips.
        assert_eq!(outlook.downtime(), Duration::from_millis(250));
        assert_eq!(Outlook { reads_smaps: true, ..outlook }.downtime(), Duration::from_millis(265));
        assert!(Outlook { bytes_per_second: 0.0, ..outlook }.downtime() < outlook.downtime());
    }
}
