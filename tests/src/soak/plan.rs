//! What is done, in which order: decided by the seed alone, so that a run can be had again.

use std::time::Duration;

use crate::faults::mishap::Mishap;
use crate::faults::plan::{Injection, anywhere};

/// How a move is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// As it is without options.
    Default,
    /// All memory in place before the container runs.
    Eager,
    /// Memory at a limited rate.
    Bandwidth,
    /// Hardly any rounds, so that much is left for the freeze.
    FewRounds,
    /// All of its own memory after it runs there.
    PostCopy,
    /// What could not be copied after it runs there.
    Hybrid,
}

impl Way {
    const ALL: [Self; 6] = [Self::Default, Self::Eager, Self::Bandwidth, Self::FewRounds, Self::PostCopy, Self::Hybrid];

    fn is_postcopy(self) -> bool {
        matches!(self, Self::PostCopy | Self::Hybrid)
    }

    /// The options of `migrate`.
    pub(crate) fn options(self) -> &'static [&'static str] {
        match self {
            Self::Default => &[],
            Self::Eager => &["--eager"],
            Self::Bandwidth => &["--bandwidth", "200M"],
            Self::FewRounds => &["--max-rounds", "3"],
            Self::PostCopy => &["--postcopy", "now"],
            Self::Hybrid => &["--postcopy", "auto", "--bandwidth", "50M"],
        }
    }
}

/// What happens to a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing: it goes on to its end.
    Move,
    /// It is cancelled some time after it entered a phase, if it is still under way.
    Cancel { phase: &'static str, after: Duration },
    /// So many workers that fill in memory are killed, each some time after it was started.
    KillWorkers { workers: u32, after: Duration },
    /// A mishap at some point of it.
    Mishap(Injection),
    /// The next move begins at once, most likely while memory is still being filled in.
    Again { way: Way },
}

/// One step: a container, where to being the other host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Which container, by its place in the fleet.
    pub(super) container: usize,
    /// How it is moved.
    pub(super) way: Way,
    /// What happens to it.
    pub(super) action: Action,
    /// Whether its memory is in place before it is asked; otherwise the question fetches it.
    pub(super) settle: bool,
}

/// Phases in which a move can be cancelled, as `migrate --progress json` names them.
const PHASES: [&str; 8] =
    ["negotiate", "preflight", "rootfs-presync", "pre-copy", "arm", "freeze", "final-state", "restore"];
/// The longest pause between entering a phase and a cancellation: phases last 5 to 500 ms.
const LONGEST_PHASE_MS: u64 = 100;
/// The longest life of a worker that is killed, in milliseconds: small containers are filled in within 50.
const LONGEST_LIFE_MS: u64 = 40;

/// Steps without end.
pub(super) struct Plan {
    random: u64,
    containers: usize,
}

impl Plan {
    /// The plan that belongs to a seed and so many containers.
    pub(super) fn new(seed: u64, containers: usize) -> Self {
        Self { random: seed, containers }
    }

    /// The next number below `bound`: SplitMix64, which takes every seed.
    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound.max(1)
    }

    fn one_of<T: Copy>(&mut self, of: &[T], otherwise: T) -> T {
        let index = self.below(of.len() as u64);
        usize::try_from(index).ok().and_then(|index| of.get(index)).copied().unwrap_or(otherwise)
    }

    fn millis(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(most + 1))
    }

    fn way(&mut self) -> Way {
        self.one_of(&Way::ALL, Way::Default)
    }

    /// Less than half of all moves are left alone.
    fn action(&mut self) -> Action {
        match self.below(15) {
            0 | 1 => Action::Cancel { phase: self.one_of(&PHASES, "pre-copy"), after: self.millis(LONGEST_PHASE_MS) },
            2 | 3 => Action::KillWorkers {
                workers: u32::try_from(self.below(3)).unwrap_or(0) + 1,
                after: self.millis(LONGEST_LIFE_MS),
            },
            4 | 5 => Action::Again { way: self.way() },
            6..9 => {
                let all = anywhere();
                let first = all[0];
                Action::Mishap(self.one_of(&all, first))
            }
            _ => Action::Move,
        }
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let container = usize::try_from(self.below(self.containers as u64)).unwrap_or(0);
        let (way, action) = (self.way(), self.action());
        // While it fetches its memory a container is lost with either host: that is what was asked for.
        let loses = |injection: Injection| matches!(injection.mishap, Mishap::PowerCycle | Mishap::CutForGood);
        let way = match action {
            Action::Mishap(injection) if loses(injection) && way.is_postcopy() => Way::Default,
            _ => way,
        };
        Some(Step { container, way, action, settle: self.below(3) == 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Plan, Step};

    fn steps(seed: u64) -> Vec<Step> {
        Plan::new(seed, 4).take(200).collect()
    }

    #[test]
    fn a_seed_is_a_plan() {
        assert_eq!(steps(7), steps(7));
        assert_ne!(steps(7), steps(8));
        assert_ne!(steps(0), steps(1), "0 is a seed like others");
    }

    #[test]
    fn everything_happens_to_every_container() {
        let all = steps(1);
        let happens = |wanted: fn(&Action) -> bool| {
            (0..4).all(|container| all.iter().any(|step| step.container == container && wanted(&step.action)))
        };
        assert!(happens(|action| *action == Action::Move));
        assert!(happens(|action| matches!(action, Action::Cancel { .. })));
        assert!(happens(|action| matches!(action, Action::KillWorkers { .. })));
        assert!(happens(|action| matches!(action, Action::Again { .. })));
        assert!(happens(|action| matches!(action, Action::Mishap(_))));
    }
}
