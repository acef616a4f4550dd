//! The source's half.

use super::{Answer, Epoch, Request, SourcePhase};

/// Something that happens to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The container is about to be held.
    Hold,
    /// The move failed before the container was offered.
    GiveUp,
    /// The destination has restored it, stopped.
    Restored,
    /// The destination says something.
    Heard(Answer),
    /// It says nothing.
    Silence,
    /// It has all of the container's memory.
    Complete,
    /// An operator decides that the container stays here.
    Keep,
    /// An operator decides that it is not here any more.
    Disown,
    /// The record that the last event asked for could not be written.
    RecordFailed,
}

/// Something the source has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Write it down, durably. If that fails, nothing after it is done, and [`Event::RecordFailed`] follows.
    Record(SourcePhase, Epoch),
    /// Let the container run.
    LetGo,
    /// End the frozen container without a word to its peers.
    End,
    /// Say it.
    Tell(Request),
    /// Forget the record.
    Erase,
}

impl Action {
    /// Its name: `record:held`, `let-go`, `end`, `tell`, `erase`.
    pub fn name(self) -> String {
        match self {
            Self::Record(phase, _) => format!("record:{phase:?}").to_lowercase(),
            Self::LetGo => "let-go".to_owned(),
            Self::End => "end".to_owned(),
            Self::Tell(_) => "tell".to_owned(),
            Self::Erase => "erase".to_owned(),
        }
    }
}

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// The container runs here, and nothing is under way.
    Running,
    /// It is held, and this host's.
    Held,
    /// It was offered and stays frozen.
    Committing,
    /// The destination runs it. What it lacks of its memory is in the frozen tasks here.
    Taken,
    /// It runs here by an operator's decision, which the destination has not heard.
    Kept,
    /// It is not here any more.
    Gone,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source {
    state: State,
    epoch: Epoch,
    /// The destination has said that it runs the container.
    taken: bool,
}

impl Source {
    /// Before anything has happened.
    pub fn new(epoch: Epoch) -> Self {
        Self { state: State::Running, epoch, taken: false }
    }

    /// After a restart, from its record; and what is to be done first.
    pub fn recover(phase: SourcePhase, epoch: Epoch) -> (Self, Vec<Action>) {
        let mut machine = Self { state: State::Held, epoch, taken: false };
        let actions = match phase {
            SourcePhase::Held => machine.on(Event::GiveUp),
            SourcePhase::Committing => {
                machine.state = State::Committing;
                machine.on(Event::Silence)
            }
            SourcePhase::Kept => {
                machine.state = State::Kept;
                // It may have been killed before it let go.
                vec![Action::LetGo, Action::Tell(Request::Supersede(epoch))]
            }
            SourcePhase::Disowned => {
                machine.state = State::Gone;
                vec![Action::End, Action::Erase]
            }
        };
        (machine, actions)
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// The latest decision.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What an event leads to. Events that are not due lead to nothing.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        use Action::{End, Erase, LetGo, Record, Tell};
        let epoch = self.epoch;
        let (next, actions) = match (self.state, event) {
            (State::Running, Event::Hold) => (State::Held, vec![Record(SourcePhase::Held, epoch)]),
            (State::Held, Event::GiveUp) => (State::Running, vec![LetGo, Erase]),
            (State::Held, Event::Restored) => {
                (State::Committing, vec![Record(SourcePhase::Committing, epoch), Tell(Request::Commit(epoch))])
            }
            // ---- from here the container is not this host's to let go ----
            (State::Committing, Event::Heard(Answer::Committed(of))) if of == epoch => {
                self.taken = true;
                (State::Taken, Vec::new())
            }
            // On record it is still offered: who restarts asks, and hears once more that it was taken.
            (State::Taken, Event::Complete) => (State::Gone, vec![End, Erase]),
            (State::Committing, Event::Heard(Answer::Aborted(of))) if of == epoch => {
                (State::Running, vec![LetGo, Erase])
            }
            (State::Committing, Event::Silence) => (State::Committing, vec![Tell(Request::Ask(epoch))]),
            (State::Committing | State::Taken, Event::Keep) => {
                self.epoch += 1;
                let epoch = self.epoch;
                (State::Kept, vec![Record(SourcePhase::Kept, epoch), LetGo, Tell(Request::Supersede(epoch))])
            }
            (State::Committing | State::Taken, Event::Disown) => {
                self.epoch += 1;
                (State::Gone, vec![Record(SourcePhase::Disowned, self.epoch), End, Erase])
            }
            (State::Held, Event::RecordFailed) => (State::Running, Vec::new()),
            (State::Committing, Event::RecordFailed) => (State::Held, Vec::new()),
            (State::Kept | State::Gone, Event::RecordFailed) => {
                self.epoch -= 1;
                (if self.taken { State::Taken } else { State::Committing }, Vec::new())
            }
            (State::Kept, Event::Silence) => (State::Kept, vec![Tell(Request::Supersede(epoch))]),
            (State::Kept, Event::Heard(Answer::Superseded(of))) if of == epoch => (State::Running, vec![Erase]),
            (state, _) => (state, Vec::new()),
        };
        self.state = next;
        actions
    }
}
