//! Does what the hand-over's machine says ([`longhaul_common::handover`]), in its order: for a migration of this agent's life,
//! or for one that an earlier life left behind.

use std::future::Future;
use std::time::{Duration, Instant};

use longhaul_common::fault;
use longhaul_common::handover::source::{Action, Event, Source, State};
use longhaul_common::handover::{Answer, Epoch, Request, SourcePhase};
use longhaul_common::host::Capabilities;
use longhaul_common::journal::JournalError;
use longhaul_common::tls::{Identity, PeerAddress};
use tokio::sync::watch;

use crate::memory::serve::{Served, Serving};
use crate::peer::{Peer, PeerError};

/// How often a destination that owes an answer is asked.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How long an answer may take until the migration counts as in doubt.
const DOUBT_SHOWN_AFTER: Duration = Duration::from_secs(10);

/// What the machine's actions are done with.
pub trait Hands: Send {
    /// Writes the record.
    fn record(&mut self, phase: SourcePhase, epoch: Epoch) -> Result<(), JournalError>;
    /// Removes it.
    fn erase(&mut self);
    /// Lets the container run, with all that was done to it taken back.
    fn let_go(&mut self, why: &str) -> impl Future<Output = ()> + Send;
    /// Ends the frozen container.
    fn end(&mut self) -> impl Future<Output = ()> + Send;
}

/// What an operator decided of a migration in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The container stays here.
    Keep,
    /// It is not here any more.
    Disown,
}

/// See the module.
pub struct Custody<H> {
    machine: Source,
    hands: H,
}

impl<H: Hands> Custody<H> {
    /// Of a migration that begins.
    pub fn new(hands: H, epoch: Epoch) -> Self {
        Self { machine: Source::new(epoch), hands }
    }

    /// Of one with a record. What has to be done first is done.
    pub async fn recover(hands: H, phase: SourcePhase, epoch: Epoch) -> Self {
        let (machine, actions) = Source::recover(phase, epoch);
        let mut custody = Self { machine, hands };
        // What it had to say it says when it is asked to settle.
        if let Err(error) = custody.perform(actions, "the agent was killed").await {
            tracing::error!(%error, "can't write down what became of a migration");
        }
        custody
    }

    /// Whether nothing is left to be done.
    pub fn is_settled(&self) -> bool {
        matches!(self.machine.state(), State::Running | State::Gone)
    }

    /// Where the container is.
    pub fn state(&self) -> State {
        self.machine.state()
    }

    /// What its actions are done with.
    pub fn hands(&mut self) -> &mut H {
        &mut self.hands
    }

    /// Tells the machine and does what it wants; what it has to say.
    ///
    /// # Errors
    /// Its record could not be written: the event did not happen.
    pub async fn on(&mut self, event: Event, why: &str) -> Result<Option<Request>, JournalError> {
        let actions = self.machine.on(event);
        self.perform(actions, why).await
    }

    async fn perform(&mut self, actions: Vec<Action>, why: &str) -> Result<Option<Request>, JournalError> {
        let mut said = None;
        for action in actions {
            tracing::debug!(?action, "hand-over");
            fault::point(&format!("source:{}", action.name()));
            match action {
                Action::Record(phase, epoch) => {
                    if let Err(error) = self.hands.record(phase, epoch) {
                        self.machine.on(Event::RecordFailed);
                        return Err(error);
                    }
                }
                Action::LetGo => self.hands.let_go(why).await,
                Action::End => self.hands.end().await,
                Action::Tell(request) => said = Some(request),
                Action::Erase => self.hands.erase(),
            }
        }
        Ok(said)
    }

    /// Whether the destination has answered, or an operator has decided.
    fn is_answered(&self) -> bool {
        self.is_settled() || self.machine.state() == State::Taken
    }

    /// Asks, until the destination has answered or an operator has decided. `doubt` is called once the answer is late; `kept` once
    /// an operator's decision has been carried out here, which is then told to the destination for as long as it takes.
    pub async fn settle(
        &mut self,
        line: &mut Line,
        decisions: &mut watch::Receiver<Option<Decision>>,
        mut doubt: impl FnMut(String),
        mut kept: impl FnMut(),
    ) {
        let start = Instant::now();
        let mut shown = false;
        loop {
            let decision = *decisions.borrow_and_update();
            if let Some(decision) = decision
                && self.state() == State::Committing
            {
                let event = if decision == Decision::Keep { Event::Keep } else { Event::Disown };
                match self.on(event, "an operator kept it here").await {
                    Ok(_) => kept(),
                    Err(error) => doubt(longhaul_common::chain(&error)),
                }
            }
            if self.is_answered() {
                return;
            }
            let Ok(Some(request)) = self.on(Event::Silence, "").await else { return };
            let silent = match line.tell(request).await {
                Ok(answer) => {
                    if let Err(error) = self.on(Event::Heard(answer), "the destination undid it").await {
                        tracing::error!(%error, "can't write down what the destination answered");
                    }
                    if self.is_answered() {
                        return;
                    }
                    format!("the destination answered {answer:?}")
                }
                Err(error) => longhaul_common::chain(&error),
            };
            tracing::warn!(error = silent, "the destination does not answer");
            if !shown && start.elapsed() > DOUBT_SHOWN_AFTER {
                shown = true;
                doubt(silent);
            }
            tokio::select! {
                () = tokio::time::sleep(ASK_AGAIN) => {}
                changed = decisions.changed() => if changed.is_err() { tokio::time::sleep(ASK_AGAIN).await },
            }
        }
    }
}

impl<H: Hands> Custody<H> {
    /// Serves what is owed until the destination has all of it, or an operator has decided. `tell` is called as it gets on, and with the reason
    /// while there is no connection.
    pub async fn serve(
        &mut self,
        mut serving: Serving,
        decisions: &mut watch::Receiver<Option<Decision>>,
        mut tell: impl FnMut(&Served),
    ) -> Option<Decision> {
        let event = loop {
            let served = serving.served.borrow_and_update().clone();
            tell(&served);
            let decision = *decisions.borrow_and_update();
            match decision {
                _ if served.complete => break Event::Complete,
                Some(Decision::Keep) => break Event::Keep,
                Some(Decision::Disown) => break Event::Disown,
                None => {
                    let changed = async { tokio::join!(serving.served.changed(), tokio::time::sleep(TOLD_EVERY)) };
                    tokio::select! {
                        _ = changed => {}
                        _ = decisions.changed() => {}
                    }
                }
            }
        };
        // Nobody is to be given pages of a container that runs here again.
        drop(serving);
        loop {
            match self.on(event, "an operator kept it here").await {
                Ok(_) => {
                    return match event {
                        Event::Keep => Some(Decision::Keep),
                        Event::Disown => Some(Decision::Disown),
                        _ => None,
                    };
                }
                Err(error) => {
                    tracing::error!(%error, "can't write down what became of a migration");
                    tokio::time::sleep(ASK_AGAIN).await;
                }
            }
        }
    }
}

/// How often it is told how far pages that are owed have come.
const TOLD_EVERY: Duration = Duration::from_millis(100);

/// To a destination that may not be there.
pub struct Line {
    /// This host.
    pub identity: Identity,
    /// What it is able to do.
    pub capabilities: Capabilities,
    /// The other one.
    pub address: PeerAddress,
    /// The migration.
    pub migration: String,
    /// A connection that may still work.
    pub peer: Option<Peer>,
}

/// How long the destination may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

impl Line {
    async fn tell(&mut self, request: Request) -> Result<Answer, PeerError> {
        let silent = || PeerError::Silent { host: self.address.host.clone(), seconds: ANSWER_DEADLINE.as_secs_f64() };
        let asked = async {
            let peer = match self.peer.take() {
                Some(peer) => peer,
                None => Peer::connect(&self.identity, &self.address, self.capabilities.clone()).await?.0,
            };
            let answer = peer.decide(&self.migration, request).await;
            Ok::<_, PeerError>((peer, answer?))
        };
        let (peer, answer) = tokio::time::timeout(ANSWER_DEADLINE, asked).await.map_err(|_| silent())??;
        self.peer = Some(peer);
        Ok(answer)
    }
}
