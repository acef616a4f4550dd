//! Who owns a container while it moves: the protocol of the hand-over as two pure state machines.
//!
//! Both agents run these machines, and [`explore`](self) (in the tests) runs the same ones against every order of crashes,
//! restarts, and lost, repeated and late messages. A machine is told an [event](source::Event) and answers with what has
//! to be done, in that order. Nothing happens in between: an agent that is killed after some of it comes back with what its
//! journal says and goes on from there.
//!
//! What holds, whatever happens:
//! - never do both hosts run the container;
//! - once both agents are back and talk, one of them runs it.
//!
//! An operator's decision ([`source::Event::Keep`], [`source::Event::Disown`]) is above the protocol: it is made because
//! the other side can't be asked. It raises the epoch, so that the side which was overruled learns it as soon as they talk.

pub mod destination;
#[cfg(test)]
mod explore;
pub mod source;

use serde::{Deserialize, Serialize};

/// Counts the decisions about one migration: 1 for the move itself, more for each time an operator overruled it.
pub type Epoch = u64;

/// What the source tells the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Request {
    /// Take the container.
    Commit(Epoch),
    /// Have you taken it? Who has not by then never will.
    Ask(Epoch),
    /// An operator decided that the container is the source's.
    Supersede(Epoch),
}

impl Request {
    /// The decision it is about.
    pub fn epoch(self) -> Epoch {
        match self {
            Self::Commit(epoch) | Self::Ask(epoch) | Self::Supersede(epoch) => epoch,
        }
    }
}

/// What the destination tells the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Answer {
    /// It owns the container.
    Committed(Epoch),
    /// It does not, and never will.
    Aborted(Epoch),
    /// It has given way to the operator's decision.
    Superseded(Epoch),
}

/// What the source's journal says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourcePhase {
    /// A checkpoint is held or the container is frozen, and it is this host's.
    Held,
    /// Offered, and not known whether taken: it stays frozen until the destination answers.
    Committing,
    /// An operator kept it here: it runs, and the destination is still to be told.
    Kept,
    /// An operator gave it away: it is ended here.
    Disowned,
}

/// What the destination's journal says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DestinationPhase {
    /// Undone if the agent finds it at its start.
    Arriving,
    /// This host owns the container.
    Committed,
    /// Refused for ever.
    Aborted,
    /// It was this host's until an operator decided otherwise: what is here must not run.
    Superseded,
}
