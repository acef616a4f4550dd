//! The network edge to the destination: one connection for control, one for bulk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::handover;
use longhaul_common::host::Capabilities;
use longhaul_common::net::Neighbour;
use longhaul_common::obstacle::Obstacle;
use longhaul_common::tls::{Identity, PeerAddress, TlsError, connect, explain};
use longhaul_proto::peer;
use longhaul_proto::peer::destination_message::Message as Reply;
use longhaul_proto::peer::peer_client::PeerClient;
use longhaul_proto::peer::source_message::Message as Request;
use thiserror::Error;
use tokio::sync::{Mutex, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use crate::images::Sent;

/// Heartbeats while the container runs.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Control messages that may wait: there is never more than one and a heartbeat.
const QUEUE: usize = 8;
/// How long the destination may take for one step. A preflight may have to digest gigabytes of layers.
pub const STEP_DEADLINE: Duration = Duration::from_secs(120);

/// A destination that does not do its part.
#[derive(Debug, Error)]
pub enum PeerError {
    /// It could not be connected.
    #[error(transparent)]
    Connect(#[from] TlsError),
    /// A call failed.
    #[error("the destination {host} refused: {message}")]
    Refused {
        /// Its name.
        host: String,
        /// What it said.
        message: String,
    },
    /// It went away.
    #[error("the connection to the destination {host} broke: {message}")]
    Broken {
        /// Its name.
        host: String,
        /// What is known.
        message: String,
    },
    /// It failed.
    #[error("the destination {host} failed: {message}")]
    Failed {
        /// Its name.
        host: String,
        /// What it said.
        message: String,
    },
    /// It was silent.
    #[error("the destination {host} was silent for {seconds} s")]
    Silent {
        /// Its name.
        host: String,
        /// How long.
        seconds: f64,
    },
    /// It answered something else.
    #[error("the destination {host} answered out of turn: {got}, where {expected} was due")]
    OutOfTurn {
        /// Its name.
        host: String,
        /// What came.
        got: String,
        /// What was due.
        expected: &'static str,
    },
}

/// A connected destination.
#[derive(Debug, Clone)]
pub struct Peer {
    host: String,
    control: PeerClient<Channel>,
    bulk: PeerClient<Channel>,
    round_trip: Duration,
}

impl Peer {
    /// Connects twice and says hello.
    pub async fn connect(
        identity: &Identity,
        address: &PeerAddress,
        ours: Capabilities,
    ) -> Result<(Self, Capabilities), PeerError> {
        let control = connect(identity, address).await?;
        let bulk = connect(identity, address).await?;
        let mut peer = Self {
            host: address.host.clone(),
            control: longhaul_proto::peer_client(control),
            bulk: longhaul_proto::peer_client(bulk),
            round_trip: Duration::ZERO,
        };
        let hello = peer::HelloRequest { source: Some(ours.into()) };
        let reply = peer.control.hello(hello.clone()).await.map_err(|status| peer.status(&status))?;
        // The second time nothing has to be set up any more.
        let start = Instant::now();
        peer.control.hello(hello).await.map_err(|status| peer.status(&status))?;
        peer.round_trip = start.elapsed();
        let theirs = reply.into_inner().destination.ok_or_else(|| PeerError::OutOfTurn {
            host: peer.host.clone(),
            got: "an empty hello".to_owned(),
            expected: "its capabilities",
        })?;
        Ok((peer, theirs.into()))
    }

    /// How long a question and its answer took.
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Opens the control stream of one migration.
    pub async fn session(&self) -> Result<Session, PeerError> {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let mut control = self.control.clone();
        let call = control.session(ReceiverStream::new(receiver));
        // The server's headers come with its first message; that waits for ours, so the call must not.
        let mut replies = call.await.map_err(|status| self.status(&status))?.into_inner();
        let requests = Arc::new(requests);
        let (heard, last_heard) = watch::channel(Instant::now());
        let (arrived, waiting) = mpsc::channel(QUEUE);
        // Read all the time: that a destination is there shows while nobody waits for an answer.
        tokio::spawn(async move {
            loop {
                let message = replies.message().await;
                heard.send_replace(Instant::now());
                let is_last = !matches!(message, Ok(Some(_)));
                let is_heartbeat =
                    matches!(&message, Ok(Some(peer::DestinationMessage { message: Some(Reply::Heartbeat(_)) })));
                if !is_heartbeat && arrived.send(message).await.is_err() || is_last {
                    return;
                }
            }
        });
        let beat = Arc::downgrade(&requests);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(HEARTBEAT).await;
                let Some(requests) = beat.upgrade() else { return };
                let message = peer::SourceMessage { message: Some(Request::Heartbeat(peer::Heartbeat {})) };
                if requests.send(message).await.is_err() {
                    return;
                }
            }
        });
        Ok(Session { host: self.host.clone(), requests, replies: Mutex::new(waiting), last_heard })
    }

    /// One pass over one tree.
    pub async fn push_tree(&self, messages: mpsc::Receiver<peer::TreeMessage>) -> Result<peer::PushReply, PeerError> {
        let mut bulk = self.bulk.clone();
        let reply = bulk.push_tree(ReceiverStream::new(messages)).await;
        reply.map(tonic::Response::into_inner).map_err(|status| self.status(&status))
    }

    /// All images.
    pub async fn push_images(
        &self,
        messages: mpsc::Receiver<peer::ImageMessage>,
    ) -> Result<peer::PushReply, PeerError> {
        let mut bulk = self.bulk.clone();
        let reply = bulk.push_images(ReceiverStream::new(messages)).await;
        reply.map(tonic::Response::into_inner).map_err(|status| self.status(&status))
    }

    /// Asks what became of a migration, or tells what an operator decided about it.
    pub async fn decide(&self, migration: &str, request: handover::Request) -> Result<handover::Answer, PeerError> {
        let epoch = request.epoch();
        // An offer goes over the session; over anything else it is a question.
        let supersede = matches!(request, handover::Request::Supersede(_));
        let mut control = self.control.clone();
        let request = peer::OutcomeRequest { migration_id: migration.to_owned(), epoch, supersede };
        let reply = control.outcome(request).await.map_err(|status| self.status(&status))?;
        match reply.into_inner().outcome() {
            peer::Outcome::Committed => Ok(handover::Answer::Committed(epoch)),
            peer::Outcome::Aborted => Ok(handover::Answer::Aborted(epoch)),
            peer::Outcome::Superseded => Ok(handover::Answer::Superseded(epoch)),
            peer::Outcome::Unspecified => Err(PeerError::OutOfTurn {
                host: self.host.clone(),
                got: "an answer that this agent does not know".to_owned(),
                expected: "what became of the migration",
            }),
        }
    }

    fn status(&self, status: &Status) -> PeerError {
        let host = self.host.clone();
        if let Some(message) = explain(status) {
            return PeerError::Refused { host, message };
        }
        match status.code() {
            tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled => {
                PeerError::Broken { host, message: root_cause(status) }
            }
            _ => PeerError::Refused { host, message: status.message().to_owned() },
        }
    }
}

/// The control stream of one migration. Dropping it before the commit undoes everything on the destination.
#[derive(Debug)]
pub struct Session {
    host: String,
    requests: Arc<mpsc::Sender<peer::SourceMessage>>,
    replies: Mutex<mpsc::Receiver<Result<Option<peer::DestinationMessage>, Status>>>,
    last_heard: watch::Receiver<Instant>,
}

/// What the destination says of an offer.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// What is in the way there.
    pub obstacles: Vec<Obstacle>,
    /// Layers it lacks.
    pub missing_layers: Vec<String>,
}

/// Whether memory comes over the page connection, and when it is filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// All memory is in CRIU's images.
    None,
    /// After the container runs.
    Lazy,
    /// Before it runs.
    Eager,
}

/// Named durations, in microseconds.
pub type Timings = Vec<(String, u64)>;

impl Session {
    /// Offers a container.
    pub async fn offer(&self, offer: peer::Offer) -> Result<Verdict, PeerError> {
        self.send(Request::Offer(offer)).await?;
        match self.reply().await? {
            Reply::Verdict(verdict) => Ok(Verdict {
                obstacles: verdict.obstacles.into_iter().map(Into::into).collect(),
                missing_layers: verdict.missing_layers,
            }),
            other => Err(self.out_of_turn(&other, "a verdict")),
        }
    }

    /// Has the place made ready.
    pub async fn prepare(&self) -> Result<(), PeerError> {
        self.send(Request::Prepare(peer::Prepare {})).await?;
        match self.reply().await? {
            Reply::Prepared(_) => Ok(()),
            other => Err(self.out_of_turn(&other, "prepared")),
        }
    }

    /// Has the runtime's restore started and held.
    pub async fn arm(&self, descriptors: Vec<u8>, neighbours: Vec<Neighbour>, pages: Pages) -> Result<(), PeerError> {
        let neighbours = neighbours.into_iter().map(Into::into).collect();
        let (eager, pages) = (pages == Pages::Eager, pages != Pages::None);
        self.send(Request::Arm(peer::Arm { descriptors: descriptors.into(), neighbours, pages, eager })).await?;
        match self.reply().await? {
            Reply::Armed(_) => Ok(()),
            other => Err(self.out_of_turn(&other, "armed")),
        }
    }

    /// Has the container restored, stopped.
    pub async fn restore(&self, images: Sent, pages: Pages, shared: Vec<u64>) -> Result<(Timings, u64), PeerError> {
        let Sent { files, bytes } = images;
        let pages = pages != Pages::None;
        self.send(Request::Restore(peer::Restore { image_files: files, image_bytes: bytes, pages, shared })).await?;
        match self.reply().await? {
            Reply::Restored(restored) => Ok((timings(restored.timings), restored.stored_pages)),
            other => Err(self.out_of_turn(&other, "restored")),
        }
    }

    /// Gives the container away. An error leaves the outcome in doubt.
    pub async fn commit(&self, epoch: u64) -> Result<Timings, PeerError> {
        self.send(Request::Commit(peer::Commit { epoch })).await?;
        match self.reply().await? {
            Reply::Committed(committed) if committed.epoch == epoch => Ok(timings(committed.timings)),
            other => Err(self.out_of_turn(&other, "committed")),
        }
    }

    /// Tells the destination to undo everything. Best effort: the end of the stream says the same.
    pub async fn abort(&self, reason: &str) {
        let _ = self.send(Request::Abort(peer::Abort { reason: reason.to_owned() })).await;
        // Its word that it failed means that it has cleaned up; an answer to something earlier may come before.
        let cleaned = async { while self.reply().await.is_ok() {} };
        let _ = tokio::time::timeout(Duration::from_secs(15), cleaned).await;
    }

    /// Waits until the destination has said nothing, not even that it is there, for so long; what that means.
    pub async fn silence(&self, limit: Duration) -> PeerError {
        // Time in which this agent did not run either counts once: after a pause of this host what the peer has said is not read yet.
        const TICKS: u32 = 4;
        let mut heard = self.last_heard.clone();
        let mut ticks = 0;
        loop {
            if heard.has_changed().unwrap_or(false) {
                heard.mark_unchanged();
                ticks = 0;
            }
            tokio::select! {
                biased;
                () = tokio::time::sleep(limit / TICKS) => {
                    ticks += 1;
                    if ticks >= TICKS {
                        return PeerError::Silent { host: self.host.clone(), seconds: limit.as_secs_f64() };
                    }
                }
                changed = heard.changed() => {
                    if changed.is_err() {
                        // The stream has ended: whoever waits for an answer learns why.
                        std::future::pending::<()>().await;
                    }
                    ticks = 0;
                }
            }
        }
    }

    async fn send(&self, message: Request) -> Result<(), PeerError> {
        let sent = self.requests.send(peer::SourceMessage { message: Some(message) }).await;
        sent.map_err(|_| PeerError::Broken { host: self.host.clone(), message: "it closed the session".to_owned() })
    }

    async fn reply(&self) -> Result<Reply, PeerError> {
        let mut replies = self.replies.lock().await;
        loop {
            let next = tokio::time::timeout(STEP_DEADLINE, replies.recv())
                .await
                .map_err(|_| PeerError::Silent { host: self.host.clone(), seconds: STEP_DEADLINE.as_secs_f64() })?;
            let broken = |message: String| PeerError::Broken { host: self.host.clone(), message };
            let next = next.ok_or_else(|| broken("it ended the session".to_owned()))?;
            let message = next.map_err(|status| broken(root_cause(&status)))?;
            match message.and_then(|message| message.message) {
                Some(Reply::Heartbeat(_)) => {}
                Some(Reply::Failed(failed)) => {
                    return Err(PeerError::Failed { host: self.host.clone(), message: failed.error });
                }
                Some(other) => return Ok(other),
                None => return Err(broken("it ended the session".to_owned())),
            }
        }
    }

    fn out_of_turn(&self, got: &Reply, expected: &'static str) -> PeerError {
        let got = format!("{got:?}").chars().take(60).collect();
        PeerError::OutOfTurn { host: self.host.clone(), got, expected }
    }
}

/// What lies at the bottom of a broken connection, in words: the layers above only repeat it.
fn root_cause(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(next) = cause.source() {
        cause = next;
    }
    let text = if cause.source().is_none() && std::ptr::addr_eq(cause, status) {
        status.message().to_owned()
    } else {
        cause.to_string()
    };
    if text.contains("close_notify") || text.contains("reading a body") {
        return "it was cut off in the middle of the migration".to_owned();
    }
    text
}

fn timings(wire: Vec<peer::Timing>) -> Timings {
    wire.into_iter().map(|timing| (timing.name, timing.micros)).collect()
}
