//! The destination's half.

use super::{Answer, DestinationPhase, Epoch, Request};

/// Something that happens to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A container is announced.
    Prepare,
    /// It is restored, and stopped.
    Restored,
    /// The source says something.
    Heard(Request),
    /// The source is gone, gave up, or something failed here.
    Lost,
    /// The record that the last event asked for could not be written.
    RecordFailed,
    /// It can't be resumed, and none of its tasks has run.
    NotResumed,
}

/// Something the destination has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Write it down, durably. If that fails, nothing after it is done, and [`Event::RecordFailed`] follows.
    Record(DestinationPhase, Epoch),
    /// Take everything away, the restored tasks first.
    Undo,
    /// Let the restored container run, and onto its network.
    Resume,
    /// Stop the container that runs here, and take it off its network.
    Fence,
    /// Say it.
    Tell(Answer),
}

impl Action {
    /// Its name: `record:committed`, `undo`, `resume`, `fence`, `tell`.
    pub fn name(self) -> String {
        match self {
            Self::Record(phase, _) => format!("record:{phase:?}").to_lowercase(),
            Self::Undo => "undo".to_owned(),
            Self::Resume => "resume".to_owned(),
            Self::Fence => "fence".to_owned(),
            Self::Tell(_) => "tell".to_owned(),
        }
    }
}

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// It knows nothing of the migration.
    Unknown,
    /// Something of the container is here.
    Arriving,
    /// All of it is, restored and stopped.
    Stopped,
    /// It is this host's.
    Committed,
    /// It will never be.
    Aborted,
    /// It was, and its tasks died before they ran.
    NotResumed,
    /// It was, until an operator decided otherwise.
    Superseded,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Destination {
    state: State,
    epoch: Epoch,
}

impl Destination {
    /// Before anything has happened.
    pub fn new(epoch: Epoch) -> Self {
        Self { state: State::Unknown, epoch }
    }

    /// After a restart, from its record; and what is to be done first.
    pub fn recover(phase: DestinationPhase, epoch: Epoch) -> (Self, Vec<Action>) {
        let (state, actions) = match phase {
            DestinationPhase::Arriving => {
                (State::Aborted, vec![Action::Undo, Action::Record(DestinationPhase::Aborted, epoch)])
            }
            // It may have been killed before it let it run.
            DestinationPhase::Committed => (State::Committed, vec![Action::Resume]),
            DestinationPhase::Aborted => (State::Aborted, Vec::new()),
            DestinationPhase::Superseded => (State::Superseded, vec![Action::Fence]),
        };
        (Self { state, epoch }, actions)
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// What an event leads to. Events that are not due lead to nothing.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        use Action::{Fence, Record, Resume, Tell, Undo};
        let epoch = self.epoch;
        let abort = |answer: Option<Answer>| {
            let mut actions = vec![Undo, Record(DestinationPhase::Aborted, epoch)];
            // Durable before it is said: this migration is refused from now on.
            actions.extend(answer.map(Tell));
            (State::Aborted, actions)
        };
        let (next, actions) = match (self.state, event) {
            (State::Unknown, Event::Prepare) => (State::Arriving, vec![Record(DestinationPhase::Arriving, epoch)]),
            (State::Arriving, Event::Restored) => (State::Stopped, Vec::new()),
            (State::Stopped, Event::Heard(Request::Commit(of))) if of == epoch => (
                State::Committed,
                // ---- the point of no return is between these two ----
                vec![Record(DestinationPhase::Committed, epoch), Resume, Tell(Answer::Committed(epoch))],
            ),
            (State::Arriving | State::Stopped, Event::Lost) => abort(None),
            // Nothing was resumed; and what can't be written down can't be kept either.
            (State::Arriving | State::Committed, Event::RecordFailed) => abort(None),
            // It has never run here: its source still has all of it. Said only once it is written down: as long as the journal has
            // it as this host's, an agent that is killed would say so.
            (State::Committed, Event::NotResumed) => {
                (State::NotResumed, vec![Record(DestinationPhase::Aborted, epoch), Undo, Tell(Answer::Aborted(epoch))])
            }
            (State::NotResumed, Event::Heard(request)) => {
                let answer = match request {
                    Request::Commit(of) | Request::Ask(of) => Answer::Aborted(of),
                    Request::Supersede(of) => Answer::Superseded(of),
                };
                (State::NotResumed, vec![Record(DestinationPhase::Aborted, epoch), Undo, Tell(answer)])
            }
            (State::Superseded, Event::RecordFailed) => (State::Committed, Vec::new()),
            // A commit too early, of another epoch or of nothing, and a question before it had committed, are refused for ever.
            (
                State::Unknown | State::Arriving | State::Stopped,
                Event::Heard(Request::Commit(of) | Request::Ask(of)),
            ) => abort(Some(Answer::Aborted(of))),
            (State::Unknown | State::Arriving | State::Stopped, Event::Heard(Request::Supersede(of))) => {
                abort(Some(Answer::Superseded(of)))
            }
            (State::Committed, Event::Heard(Request::Commit(_) | Request::Ask(_))) => {
                (State::Committed, vec![Tell(Answer::Committed(epoch))])
            }
            (State::Committed, Event::Heard(Request::Supersede(of))) if of > epoch => (
                State::Superseded,
                vec![Record(DestinationPhase::Superseded, epoch), Fence, Tell(Answer::Superseded(of))],
            ),
            (State::Aborted, Event::Heard(Request::Commit(of) | Request::Ask(of))) => {
                (State::Aborted, vec![Tell(Answer::Aborted(of))])
            }
            (State::Aborted | State::Superseded, Event::Heard(Request::Supersede(of))) => {
                (self.state, vec![Tell(Answer::Superseded(of))])
            }
            (state, _) => (state, Vec::new()),
        };
        self.state = next;
        actions
    }
}
