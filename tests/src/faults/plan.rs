//! Which mishaps happen at which points of a move.

use super::mishap::Mishap;
use crate::agents::Agent;

/// One move with one mishap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Injection {
    /// Where (`longhaul_common::fault`).
    pub(crate) point: &'static str,
    /// What.
    pub(crate) mishap: Mishap,
}

impl Injection {
    /// Where the container must run afterwards: whether it moved. Nothing, if that depends on who is faster.
    pub(crate) fn must_move(self) -> Option<bool> {
        let (_, owner) = POINTS.iter().find(|(point, _)| *point == self.point)?;
        match (owner, self.mishap) {
            (Owner::Destination, mishap) => (!matches!(mishap, Mishap::KillCriuThere)).then_some(true),
            (Owner::Undecided, Mishap::KillSource) => Some(true),
            // There is no room for what CRIU is told.
            (_, Mishap::MemoryFullHere) => Some(false),
            (Owner::Undecided | Owner::Source, Mishap::KillDest) => Some(false),
            (_, Mishap::KillBoth) | (Owner::Alone | Owner::Source, Mishap::KillSource) => Some(false),
            _ => None,
        }
    }

    /// Whose point it is.
    pub(crate) fn agent(self) -> Agent {
        if self.point.starts_with("source:") { Agent::Source } else { Agent::Dest }
    }
}

/// Whose the container is when a move has come to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The source's, and the destination knows nothing of it yet.
    Alone,
    /// The source's.
    Source,
    /// The source's until the destination, which was told to take it, has written down that it did.
    Undecided,
    /// The destination's.
    Destination,
}

/// Every phase, every journal write, every message and every step of the hand-over of a move that succeeds, in order.
const POINTS: [(&str, Owner); 32] = [
    ("source:phase:negotiate", Owner::Alone),
    ("source:phase:preflight", Owner::Alone),
    ("destination:heard:offer", Owner::Source),
    ("destination:say:verdict", Owner::Source),
    ("source:phase:prepare", Owner::Source),
    ("destination:heard:prepare", Owner::Source),
    ("destination:record:arriving", Owner::Source),
    ("destination:say:prepared", Owner::Source),
    ("source:phase:rootfs-presync", Owner::Source),
    ("source:phase:pre-copy", Owner::Source),
    ("source:phase:arm", Owner::Source),
    ("source:record:held", Owner::Source),
    ("destination:heard:arm", Owner::Source),
    ("destination:say:armed", Owner::Source),
    ("source:phase:freeze", Owner::Source),
    ("source:phase:final-state", Owner::Source),
    ("source:look", Owner::Source),
    ("source:phase:restore", Owner::Source),
    ("destination:heard:restore", Owner::Source),
    ("destination:restored", Owner::Source),
    ("destination:say:restored", Owner::Source),
    ("source:phase:commit", Owner::Source),
    ("source:record:committing", Owner::Source),
    ("source:tell", Owner::Source),
    ("destination:heard:commit", Owner::Undecided),
    ("destination:record:committed", Owner::Undecided),
    ("destination:resume", Owner::Destination),
    ("destination:tell", Owner::Destination),
    ("destination:say:committed", Owner::Destination),
    ("source:phase:after", Owner::Destination),
    ("source:end", Owner::Destination),
    ("source:erase", Owner::Destination),
];

/// What may happen at any moment.
const ANYWHERE: [Mishap; 6] =
    [Mishap::KillSource, Mishap::KillDest, Mishap::KillBoth, Mishap::StopSource, Mishap::StopDest, Mishap::CutBriefly];

/// What makes a difference at some of them.
const SOMEWHERE: [(Mishap, &[&str]); 10] = [
    (
        Mishap::CutForGood,
        &[
            "source:phase:prepare",
            "source:phase:pre-copy",
            "source:phase:final-state",
            "destination:restored",
            "source:tell",
            "destination:heard:commit",
            "destination:record:committed",
            "destination:resume",
            "destination:say:committed",
        ],
    ),
    (
        Mishap::LoseAnswers,
        &[
            "destination:say:verdict",
            "destination:say:prepared",
            "destination:say:armed",
            "destination:say:restored",
            "destination:record:committed",
            "destination:tell",
            "destination:say:committed",
        ],
    ),
    (
        Mishap::CorruptBytes,
        &[
            "source:phase:rootfs-presync",
            "source:phase:pre-copy",
            "source:phase:final-state",
            "destination:say:restored",
            "destination:heard:commit",
            "destination:say:committed",
        ],
    ),
    (
        Mishap::DiskFull,
        &[
            "destination:heard:prepare",
            "destination:record:arriving",
            "destination:heard:commit",
            "destination:record:committed",
        ],
    ),
    (Mishap::MemoryFullThere, &["source:phase:pre-copy", "source:phase:arm", "source:phase:final-state"]),
    (Mishap::MemoryFullHere, &["source:phase:arm", "source:phase:final-state", "source:look"]),
    (
        Mishap::OutOfMemory,
        &["source:phase:pre-copy", "source:phase:final-state", "destination:heard:restore", "destination:heard:commit"],
    ),
    (Mishap::KillCriuHere, &["source:phase:freeze", "source:phase:final-state", "source:look"]),
    (
        Mishap::KillCriuThere,
        &[
            "destination:say:armed",
            "destination:heard:restore",
            "destination:restored",
            "destination:heard:commit",
            "destination:record:committed",
            "destination:resume",
        ],
    ),
    (
        Mishap::PowerCycle,
        &[
            "source:phase:prepare",
            "source:phase:pre-copy",
            "source:phase:final-state",
            "destination:heard:restore",
            "destination:restored",
            "destination:heard:commit",
            "destination:record:committed",
        ],
    ),
];

/// Those that may happen at any point, and leave other containers of the hosts alone.
pub(crate) fn anywhere() -> Vec<Injection> {
    POINTS.iter().flat_map(|(point, _)| ANYWHERE.iter().map(move |&mishap| Injection { point, mishap })).collect()
}

/// All of them.
pub(crate) fn injections() -> Vec<Injection> {
    let somewhere = SOMEWHERE
        .iter()
        .flat_map(|(mishap, points)| points.iter().map(move |point| Injection { point, mishap: *mishap }));
    anywhere().into_iter().chain(somewhere).collect()
}

/// The table of docs/failure-model.md.
#[cfg(test)]
fn table() -> String {
    let mut text = "| when a move has come to | the container is | source agent killed | destination agent killed | both killed |\n|---|---|---|---|---|\n".to_owned();
    for (point, owner) in POINTS {
        let owner = match owner {
            Owner::Alone | Owner::Source => "the source's",
            Owner::Undecided => "the source's, if the destination does not take it now",
            Owner::Destination => "the destination's",
        };
        let cell = |mishap| match (Injection { point, mishap }).must_move() {
            Some(true) => "moves",
            Some(false) => "stays",
            None => "either",
        };
        let cells = [Mishap::KillSource, Mishap::KillDest, Mishap::KillBoth].map(cell).join(" | ");
        text.push_str(&format!("| `{point}` | {owner} | {cells} |\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failure_model_shows_what_is_tested() {
        let docs = include_str!("../../../docs/failure-model.md");
        let table = table();
        assert!(docs.contains(&table), "docs/failure-model.md must have this table:\n{table}");
    }

    #[test]
    fn there_are_enough_of_them() {
        let all = injections();
        assert!(all.len() >= 150, "only {} injections", all.len());
        let known = |point: &str| POINTS.iter().any(|(known, _)| *known == point);
        assert!(all.iter().all(|injection| known(injection.point)), "a point nobody knows");
    }
}
