//! Every order of events, crashes at every step, restarts, failed writes, and lost, repeated and late messages: explored
//! until nothing new comes up.

use std::collections::{BTreeSet, HashSet};

use super::destination::{self, Destination};
use super::source::{self, Source};
use super::{Answer, DestinationPhase, Epoch, Request, SourcePhase};

/// A message to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ToDestination {
    Prepare,
    Say(Request),
}

/// A message to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ToSource {
    Restored,
    Say(Answer),
}

/// The container on the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Here {
    Runs,
    Frozen,
    Ended,
}

/// The container on the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum There {
    Nothing,
    Stopped,
    Runs,
    Fenced,
}

/// Everything there is. Agents forget what they know when they are killed; journals, containers and messages stay.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: Option<Source>,
    source_record: Option<(SourcePhase, Epoch)>,
    here: Here,
    destination: Option<Destination>,
    destination_record: Option<(DestinationPhase, Epoch)>,
    there: There,
    to_destination: BTreeSet<ToDestination>,
    to_source: BTreeSet<ToSource>,
    begun: bool,
    /// The restored tasks died after they were this host's and before they ran, and then the agent was killed, or its disk was full,
    /// before it could write that down. Nobody can know any more that the source's copy is the only one.
    unlucky: bool,
}

/// When an operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    /// Never.
    Absent,
    /// After looking at the destination's journal and making sure that nothing changes there any more.
    Informed,
    /// At any time.
    Rash,
}

const EPOCH: Epoch = 1;

impl World {
    fn new() -> Self {
        Self {
            source: Some(Source::new(EPOCH)),
            source_record: None,
            here: Here::Runs,
            destination: Some(Destination::new(EPOCH)),
            destination_record: None,
            there: There::Nothing,
            to_destination: BTreeSet::new(),
            to_source: BTreeSet::new(),
            begun: false,
            unlucky: false,
        }
    }

    fn do_for_source(&mut self, action: source::Action) {
        match action {
            source::Action::Record(phase, epoch) => {
                if phase == SourcePhase::Held {
                    self.here = Here::Frozen;
                    self.to_destination.insert(ToDestination::Prepare);
                }
                self.source_record = Some((phase, epoch));
            }
            source::Action::LetGo => {
                assert_ne!(self.here, Here::Ended, "what was ended is let go: {self:?}");
                self.here = Here::Runs;
            }
            source::Action::End => {
                assert_ne!(self.here, Here::Runs, "what runs is ended: {self:?}");
                self.here = Here::Ended;
            }
            source::Action::Tell(request) => drop(self.to_destination.insert(ToDestination::Say(request))),
            source::Action::Erase => self.source_record = None,
        }
    }

    fn do_for_destination(&mut self, action: destination::Action) {
        match action {
            destination::Action::Record(phase, epoch) => self.destination_record = Some((phase, epoch)),
            destination::Action::Undo => {
                assert_ne!(self.there, There::Runs, "what runs is undone: {self:?}");
                self.there = There::Nothing;
            }
            // Nothing is left of it if it was resumed before the agent was killed and has been fenced since.
            destination::Action::Resume => {
                if !self.unlucky {
                    assert_ne!(self.there, There::Nothing, "there is nothing to resume: {self:?}");
                    self.there = There::Runs;
                }
            }
            destination::Action::Fence => self.there = There::Fenced,
            destination::Action::Tell(answer) => drop(self.to_source.insert(ToSource::Say(answer))),
        }
    }

    /// What comes of actions of the source, killed after each of them, or with a record that fails.
    fn after_source(&self, machine: Source, actions: &[source::Action], found: &mut Vec<Self>) {
        let mut world = self.clone();
        for action in actions {
            found.push(Self { source: None, ..world.clone() });
            if matches!(action, source::Action::Record(..)) {
                let mut failed = machine;
                assert!(failed.on(source::Event::RecordFailed).is_empty(), "a failed record leads to nothing here");
                found.push(Self { source: Some(failed), ..world.clone() });
            }
            world.do_for_source(*action);
        }
        world.source = Some(machine);
        found.push(world);
    }

    fn after_destination(&self, machine: Destination, actions: &[destination::Action], found: &mut Vec<Self>) {
        let mut world = self.clone();
        for action in actions {
            found.push(Self { destination: None, ..world.clone() });
            if matches!(action, destination::Action::Record(..)) {
                let mut failed = machine;
                let then = failed.on(destination::Event::RecordFailed);
                // The record of the abort fails as well, or does not.
                let mut other = world.clone();
                for action in &then {
                    if !matches!(action, destination::Action::Record(..)) {
                        other.do_for_destination(*action);
                    }
                }
                other.destination = Some(failed);
                found.push(other.clone());
                for action in &then {
                    other.do_for_destination(*action);
                }
                found.push(other);
            }
            if *action == destination::Action::Resume && world.there == There::Stopped && self.destination.is_some() {
                // Its tasks have died before they ran.
                let mut failed = machine;
                let then = failed.on(destination::Event::NotResumed);
                let mut then_found = Vec::new();
                Self { there: There::Nothing, ..world.clone() }.after_destination(failed, &then, &mut then_found);
                for world in &mut then_found {
                    world.unlucky |= world.destination_record == self.destination_record
                        || world.destination_record == Some((DestinationPhase::Committed, EPOCH));
                }
                found.extend(then_found);
            }
            world.do_for_destination(*action);
        }
        world.destination = Some(machine);
        found.push(world);
    }

    fn source_event(&self, event: source::Event, found: &mut Vec<Self>) {
        let Some(mut machine) = self.source else { return };
        let actions = machine.on(event);
        self.after_source(machine, &actions, found);
    }

    fn destination_event(&self, event: destination::Event, found: &mut Vec<Self>) {
        let Some(mut machine) = self.destination else { return };
        let actions = machine.on(event);
        let mut world = self.clone();
        if event == destination::Event::Restored && machine.state() == destination::State::Stopped {
            world.there = There::Stopped;
            world.to_source.insert(ToSource::Restored);
        }
        world.after_destination(machine, &actions, found);
    }

    /// Everything that may happen next.
    fn next(&self, operator: Operator) -> Vec<Self> {
        let mut found = Vec::new();
        if let Some(source) = self.source {
            if !self.begun {
                Self { begun: true, ..self.clone() }.source_event(source::Event::Hold, &mut found);
            }
            self.source_event(source::Event::GiveUp, &mut found);
            self.source_event(source::Event::Silence, &mut found);
            if self.has_all_memory() {
                self.source_event(source::Event::Complete, &mut found);
            }
            if source.epoch() == EPOCH && matches!(source.state(), source::State::Committing | source::State::Taken) {
                let phase = self.destination_record.map(|(phase, _)| phase);
                let settled = phase == Some(DestinationPhase::Aborted)
                    || (self.destination.is_none() && phase != Some(DestinationPhase::Committed));
                // What a killed agent has ended already can't be kept: `migrate recover` looks.
                let settled = settled && self.here == Here::Frozen;
                let rash = operator == Operator::Rash && self.here == Here::Frozen;
                if rash || (operator == Operator::Informed && settled) {
                    self.source_event(source::Event::Keep, &mut found);
                }
                let taken = phase == Some(DestinationPhase::Committed);
                if operator == Operator::Informed && taken {
                    self.source_event(source::Event::Disown, &mut found);
                }
            }
            found.push(Self { source: None, ..self.clone() });
        } else {
            self.restart_source(&mut found);
        }
        if self.destination.is_some() {
            self.destination_event(destination::Event::Restored, &mut found);
            self.destination_event(destination::Event::Lost, &mut found);
            found.push(Self { destination: None, ..self.clone() });
        } else {
            self.restart_destination(&mut found);
        }
        for message in &self.to_destination {
            let mut taken = self.clone();
            taken.to_destination.remove(message);
            // It may come again, or never come.
            self.hear_at_destination(*message, &mut found);
            taken.hear_at_destination(*message, &mut found);
            found.push(taken);
        }
        for message in &self.to_source {
            let mut taken = self.clone();
            taken.to_source.remove(message);
            self.hear_at_source(*message, &mut found);
            taken.hear_at_source(*message, &mut found);
            found.push(taken);
        }
        found
    }

    fn hear_at_destination(&self, message: ToDestination, found: &mut Vec<Self>) {
        let event = match message {
            ToDestination::Prepare => destination::Event::Prepare,
            ToDestination::Say(request) => destination::Event::Heard(request),
        };
        self.destination_event(event, found);
    }

    fn hear_at_source(&self, message: ToSource, found: &mut Vec<Self>) {
        let event = match message {
            ToSource::Restored => source::Event::Restored,
            ToSource::Say(answer) => source::Event::Heard(answer),
        };
        self.source_event(event, found);
    }

    fn restart_source(&self, found: &mut Vec<Self>) {
        let (machine, actions) = match self.source_record {
            Some((phase, epoch)) => Source::recover(phase, epoch),
            None => (Source::new(EPOCH), Vec::new()),
        };
        self.after_source(machine, &actions, found);
    }

    fn restart_destination(&self, found: &mut Vec<Self>) {
        let (machine, actions) = match self.destination_record {
            Some((phase, epoch)) => Destination::recover(phase, epoch),
            None => (Destination::new(EPOCH), Vec::new()),
        };
        self.after_destination(machine, &actions, found);
    }

    /// The source knows that the container was taken, and the destination says that nothing is owed: it may at any time.
    fn has_all_memory(&self) -> bool {
        let taken = self.source.is_some_and(|source| source.state() == source::State::Taken);
        taken && matches!(self.destination_record, Some((DestinationPhase::Committed, _)))
    }

    fn copies(&self) -> usize {
        usize::from(self.here == Here::Runs) + usize::from(self.there == There::Runs)
    }

    /// Both agents come back and talk, and nothing fails any more.
    fn settled(&self) -> Self {
        let last = |mut found: Vec<Self>| found.pop().expect("the one without a failure comes last");
        let with = |world: &Self, step: &dyn Fn(&Self, &mut Vec<Self>)| {
            let mut found = Vec::new();
            step(world, &mut found);
            if found.is_empty() { world.clone() } else { last(found) }
        };
        let mut world = self.clone();
        if world.source.is_none() {
            world = with(&world, &|world, found| world.restart_source(found));
        }
        if world.destination.is_none() {
            world = with(&world, &|world, found| world.restart_destination(found));
        }
        for _ in 0..8 {
            while let Some(message) = world.to_destination.pop_first() {
                world = with(&world, &|world, found| world.hear_at_destination(message, found));
            }
            while let Some(message) = world.to_source.pop_first() {
                world = with(&world, &|world, found| world.hear_at_source(message, found));
            }
            world = with(&world, &|world, found| world.source_event(source::Event::GiveUp, found));
            world = with(&world, &|world, found| world.source_event(source::Event::Silence, found));
            if world.has_all_memory() {
                world = with(&world, &|world, found| world.source_event(source::Event::Complete, found));
            }
        }
        world
    }
}

fn must_be_one(world: &World, settled: &World) {
    let copies = settled.copies();
    assert!(copies == 1 || (settled.unlucky && copies == 0), "in the end {copies} run: {world:?} became {settled:?}");
}

/// All worlds that can be reached.
fn explore(operator: Operator) -> HashSet<World> {
    let mut known = HashSet::from([World::new()]);
    let mut open = vec![World::new()];
    while let Some(world) = open.pop() {
        for next in world.next(operator) {
            if known.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    known
}

#[test]
fn never_two_and_in_the_end_one() {
    let worlds = explore(Operator::Absent);
    assert!(worlds.len() > 1000, "only {} worlds were found", worlds.len());
    for world in &worlds {
        assert!(world.copies() <= 1, "two copies run: {world:?}");
        let settled = world.settled();
        must_be_one(world, &settled);
    }
    // The explorer sees what it is there to see.
    assert!(worlds.iter().any(|world| world.there == There::Runs && world.here == Here::Frozen));
    assert!(worlds.iter().any(|world| world.there == There::Runs && world.source_record.is_none()));
    let taken = |world: &World| world.source.map(|machine| machine.state()) == Some(source::State::Taken);
    assert!(worlds.iter().any(|world| taken(world) && world.here == Here::Frozen && world.there == There::Runs));
    let not_resumed =
        |world: &World| world.destination.map(|machine| machine.state()) == Some(destination::State::NotResumed);
    assert!(worlds.iter().any(|world| not_resumed(world) && !world.unlucky && world.here == Here::Runs));
}

#[test]
fn an_operator_who_looked_keeps_it_so() {
    for world in explore(Operator::Informed) {
        assert!(world.copies() <= 1, "two copies run: {world:?}");
        let settled = world.settled();
        must_be_one(&world, &settled);
    }
}

#[test]
fn an_operator_who_did_not_look_is_put_right_as_soon_as_they_talk() {
    for world in explore(Operator::Rash) {
        let settled = world.settled();
        must_be_one(&world, &settled);
    }
}
