//! The network edge: wire types in, domain types on.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longhaul_common::chain;
use longhaul_common::config::DestConfig;
use longhaul_common::description::Description;
use longhaul_common::fault;
use longhaul_common::handover::{Answer, Request as Told};
use longhaul_common::host::Capabilities;
use longhaul_common::journal::{Journal, is_migration_id};
use longhaul_common::layers::LayerDigests;
use longhaul_common::obstacle::Obstacle;
use longhaul_common::pages::FETCH;
use longhaul_common::tls::{PageConnections, PeerIdentity, TlsConnection};
use longhaul_common::wire::{WireError, neighbour, tree_item};
use longhaul_proto::peer;
use longhaul_proto::peer::destination_message::Message as Reply;
use longhaul_proto::peer::image_message::Message as ImagePart;
use longhaul_proto::peer::peer_server::Peer;
use longhaul_proto::peer::source_message::Message as Request;
use longhaul_proto::peer::tree_message::Message as TreePart;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};
use tracing::Instrument;

use crate::arrival::{Arrival, ArrivalError, Timings};
use crate::memory::receive;
use crate::owing::pass_on;
use crate::preflight::{self, Findings};
use crate::record::{Record, decide_ended};
use crate::restore::MemoryFrom;

/// How often a source is told that this host is there: its container may be frozen for it.
const HEARTBEAT: Duration = Duration::from_millis(50);
/// How long a source may be silent before its migration is undone. It sends a heartbeat every second.
const SILENCE_DEADLINE: Duration = Duration::from_secs(10);
/// Messages between the network and the thread that applies them, each at most a data item of 256 KiB.
const QUEUE: usize = 32;

/// The service.
pub struct PeerService {
    config: Arc<DestConfig>,
    capabilities: Capabilities,
    journal: Journal,
    digests: Arc<LayerDigests>,
    arrivals: Arc<Mutex<HashMap<String, Arc<Arrival>>>>,
    door: Door,
}

impl PeerService {
    /// A service that takes migrations in.
    pub fn new(config: Arc<DestConfig>, journal: Journal) -> Self {
        let capabilities = Capabilities::of_this_host(&config.engine);
        let digests = Arc::new(LayerDigests::open(&config.paths.state));
        let arrivals: Arc<Mutex<HashMap<String, Arc<Arrival>>>> = Arc::default();
        let (host, known) = (capabilities.host.clone(), arrivals.clone());
        let door = Door { config: config.clone(), host, journal: journal.clone(), arrivals: known };
        Self { config, capabilities, journal, digests, arrivals, door }
    }

    /// Undoes every migration that has not committed: the agent is about to end.
    pub fn arrivals(&self) -> Arc<Mutex<HashMap<String, Arc<Arrival>>>> {
        self.arrivals.clone()
    }

    /// Only hosts on the allow-list get further than the handshake.
    fn admit<T>(&self, request: &tonic::Request<T>) -> Result<PeerIdentity, Status> {
        let Some(identity) = request.extensions().get::<PeerIdentity>() else {
            return Err(Status::unauthenticated("the connection has no identity"));
        };
        self.door.check(identity).map_err(Status::permission_denied)?;
        Ok(identity.clone())
    }

    fn find(&self, migration: &str, peer: &PeerIdentity) -> Result<Arc<Arrival>, Status> {
        self.door.find(migration, peer).map_err(Status::failed_precondition)
    }

    /// For page connections, which have the same guests.
    pub fn door(&self) -> Door {
        self.door.clone()
    }
}

/// Who may come in, and to what.
#[derive(Clone)]
pub struct Door {
    config: Arc<DestConfig>,
    host: String,
    journal: Journal,
    arrivals: Arc<Mutex<HashMap<String, Arc<Arrival>>>>,
}

impl Door {
    fn check(&self, identity: &PeerIdentity) -> Result<(), String> {
        if identity.names.iter().any(|name| self.config.allow.contains(name)) {
            return Ok(());
        }
        let names = identity.names.join(", ");
        tracing::warn!(names, peer = %identity.address, "refused a host that is not on the allow-list");
        Err(format!(
            "{names} is not on the allow-list of {}: add it to `allow` in its dest.toml and restart its agent",
            self.host
        ))
    }

    fn find(&self, migration: &str, peer: &PeerIdentity) -> Result<Arc<Arrival>, String> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let found = arrivals.get(migration).filter(|arrival| arrival.peer == peer.names).cloned();
        found.ok_or_else(|| "there is no such migration under way from this host".to_owned())
    }

    /// Serves page connections until there are no more.
    pub async fn serve_pages(self, mut connections: PageConnections) {
        while let Some(connection) = connections.recv().await {
            let door = self.clone();
            tokio::spawn(async move { door.serve_page_connection(connection).await });
        }
    }

    async fn serve_page_connection(self, mut connection: TlsConnection) {
        let opened = async {
            self.check(connection.identity())?;
            let identity = connection.identity().clone();
            let hello = receive::hello(&mut connection).await.map_err(|error| chain(&error))?;
            if hello.stream == FETCH {
                return Ok((hello, None));
            }
            let arrival = self.find(&hello.migration, &identity)?;
            Ok::<_, String>((hello, Some(arrival.intake().memory().map_err(|error| chain(&error))?)))
        };
        let (hello, memory) = match opened.await {
            Ok(opened) => opened,
            Err(reason) => {
                tracing::warn!(reason, "refused a page connection");
                return receive::refuse(&mut connection, &reason).await;
            }
        };
        let Some(memory) = memory else { return pass_on(connection, &self.journal, &hello.migration).await };
        let span = tracing::info_span!("pages", migration = hello.migration);
        let received = receive::receive(connection, hello.stream, memory).instrument(span).await;
        if let Err(error) = received {
            tracing::warn!(migration = hello.migration, error = chain(&error), "a page connection ended");
        }
    }
}

type Replies = Pin<Box<dyn tokio_stream::Stream<Item = Result<peer::DestinationMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Peer for PeerService {
    type SessionStream = Replies;

    async fn hello(&self, request: tonic::Request<peer::HelloRequest>) -> Result<Response<peer::HelloReply>, Status> {
        self.admit(&request)?;
        Ok(Response::new(peer::HelloReply { destination: Some(self.capabilities.clone().into()) }))
    }

    async fn session(
        &self,
        request: tonic::Request<Streaming<peer::SourceMessage>>,
    ) -> Result<Response<Replies>, Status> {
        let identity = self.admit(&request)?;
        let (replies, receiver) = mpsc::channel(QUEUE);
        let session = Session {
            config: self.config.clone(),
            journal: self.journal.clone(),
            digests: self.digests.clone(),
            arrivals: self.arrivals.clone(),
            identity,
            replies,
        };
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn push_tree(
        &self,
        request: tonic::Request<Streaming<peer::TreeMessage>>,
    ) -> Result<Response<peer::PushReply>, Status> {
        let identity = self.admit(&request)?;
        let mut stream = request.into_inner();
        let Some(TreePart::Start(start)) = stream.message().await?.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("a tree stream begins with its start message"));
        };
        let arrival = self.find(&start.migration_id, &identity)?;
        let (send, mut receive) = mpsc::channel::<Result<TreePart, ArrivalError>>(QUEUE);
        let applier = arrival.clone();
        let applied = tokio::task::spawn_blocking(move || {
            let items = std::iter::from_fn(|| receive.blocking_recv())
                .map(|part| part.and_then(|part| tree_item(part).map_err(ArrivalError::from)));
            applier.intake().apply_pass(start.tree, items)
        });
        let mut ended = false;
        // However it breaks off, what came of it must not pass for the whole.
        while let Ok(Some(message)) = stream.message().await {
            let Some(part) = message.message else { break };
            if let TreePart::End(_) = part {
                ended = true;
                break;
            }
            // A closed channel: applying failed, and its error comes below.
            if send.send(Ok(part)).await.is_err() {
                break;
            }
        }
        if !ended && !send.is_closed() {
            let _ = send.send(Err(WireError::Truncated("tree").into())).await;
        }
        drop(send);
        let (items, bytes) =
            applied.await.map_err(|_| Status::internal("the writing thread panicked"))?.map_err(refuse)?;
        Ok(Response::new(peer::PushReply { items, bytes }))
    }

    async fn push_images(
        &self,
        request: tonic::Request<Streaming<peer::ImageMessage>>,
    ) -> Result<Response<peer::PushReply>, Status> {
        let identity = self.admit(&request)?;
        let mut stream = request.into_inner();
        let Some(ImagePart::Start(start)) = stream.message().await?.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("an image stream begins with its start message"));
        };
        let arrival = self.find(&start.migration_id, &identity)?;
        let mut writer = arrival.intake().image_writer().map_err(refuse)?;
        // Written by this task: a chunk goes to memory in less time than a hand-over to another thread takes.
        while let Some(message) = stream.message().await? {
            match message.message {
                Some(ImagePart::Chunk(chunk)) => writer.chunk(&chunk).map_err(refuse)?,
                Some(ImagePart::Close(close)) => writer.close(&close).map_err(refuse)?,
                Some(ImagePart::End(end)) => {
                    let (items, bytes) = writer.finish(end.files).map_err(refuse)?;
                    arrival.intake().images_arrived(items);
                    return Ok(Response::new(peer::PushReply { items, bytes }));
                }
                Some(ImagePart::Start(_)) => return Err(Status::invalid_argument("a second start in an image stream")),
                None => return Err(Status::invalid_argument(WireError::Empty("image").to_string())),
            }
        }
        Err(Status::invalid_argument(WireError::Truncated("image").to_string()))
    }

    async fn outcome(
        &self,
        request: tonic::Request<peer::OutcomeRequest>,
    ) -> Result<Response<peer::OutcomeReply>, Status> {
        let identity = self.admit(&request)?;
        let asked = request.into_inner();
        if !is_migration_id(&asked.migration_id) {
            return Err(Status::invalid_argument("that is no migration's id"));
        }
        let request = if asked.supersede { Told::Supersede(asked.epoch) } else { Told::Ask(asked.epoch) };
        let live = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).get(&asked.migration_id).cloned();
        let unavailable = |error: &dyn std::error::Error| Status::unavailable(chain(error));
        let answer = match live {
            Some(arrival) if arrival.peer != identity.names => {
                return Err(Status::permission_denied("that migration is another host's"));
            }
            // The source asks because it lost us: what is not committed by now is undone before the answer.
            Some(arrival) => arrival.decide(request).await.map_err(|error| unavailable(&error))?,
            None => decide_ended(&self.config, &self.journal, &asked.migration_id, request)
                .await
                .map_err(|error| unavailable(&error))?,
        };
        let outcome = match answer {
            Some(Answer::Committed(_)) => peer::Outcome::Committed,
            Some(Answer::Aborted(_)) => peer::Outcome::Aborted,
            Some(Answer::Superseded(_)) => peer::Outcome::Superseded,
            None => return Err(Status::failed_precondition("an operator has decided about this migration")),
        };
        Ok(Response::new(peer::OutcomeReply { outcome: outcome.into() }))
    }
}

impl From<WireError> for ArrivalError {
    fn from(error: WireError) -> Self {
        Self::Staging(crate::staging::StagingError::Path {
            operation: "read what was sent for",
            path: "the migration".into(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
        })
    }
}

fn refuse(error: impl Into<ArrivalError>) -> Status {
    let reason = chain(&error.into());
    tracing::warn!(reason, "refused what a peer pushed");
    Status::invalid_argument(reason)
}

/// One control stream.
struct Session {
    config: Arc<DestConfig>,
    journal: Journal,
    digests: Arc<LayerDigests>,
    arrivals: Arc<Mutex<HashMap<String, Arc<Arrival>>>>,
    identity: PeerIdentity,
    replies: mpsc::Sender<Result<peer::DestinationMessage, Status>>,
}

impl Session {
    async fn run(self, mut stream: Streaming<peer::SourceMessage>) {
        let offer = match hear(&mut stream).await {
            Ok(Request::Offer(offer)) => offer,
            Ok(_) => return self.fail("a session begins with an offer").await,
            Err(reason) => return self.fail(&reason).await,
        };
        let span = tracing::info_span!("migration", id = offer.migration_id);
        self.follow(offer, stream).instrument(span).await;
    }

    async fn follow(self, offer: peer::Offer, mut stream: Streaming<peer::SourceMessage>) {
        let arrival = match self.consider(offer).await {
            Ok(Some(arrival)) => arrival,
            Ok(None) => return,
            Err(reason) => return self.fail(&reason).await,
        };
        let heartbeat = tokio::spawn(beat(self.replies.clone()));
        let outcome = self.steps(&arrival, &mut stream).await;
        heartbeat.abort();
        if let Err(reason) = outcome {
            arrival.abort(&reason).await;
            self.fail(&reason).await;
        }
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).remove(&arrival.migration);
        longhaul_common::sys::memory::trim_soon();
    }

    /// Answers an offer. Nothing if it was refused, or only asked for.
    async fn consider(&self, offer: peer::Offer) -> Result<Option<Arc<Arrival>>, String> {
        if !is_migration_id(&offer.migration_id) {
            return Err(format!("{:?} is no migration id", offer.migration_id.chars().take(80).collect::<String>()));
        }
        if self.journal.read::<Record>(&offer.migration_id).is_some() {
            return Err(format!("migration {} was refused or ended here before", offer.migration_id));
        }
        let container = Description::from_json(&offer.description).map_err(|error| chain(&error))?;
        let promised = {
            let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            arrivals.values().map(|other| other.outstanding_bytes()).sum()
        };
        let mut findings = preflight::examine(&self.config, &self.digests, &container, promised).await;
        self.claim(&container, &mut findings);
        let accepted = findings.obstacles.is_empty() && !offer.dry_run;
        tracing::info!(
            container = container.id,
            obstacles = findings.obstacles.len(),
            dry_run = offer.dry_run,
            "offered"
        );
        let arrival = Arc::new(Arrival::new(
            self.config.clone(),
            self.journal.clone(),
            offer.migration_id.clone(),
            offer.epoch,
            container,
            &findings,
            self.identity.names.clone(),
        ));
        if accepted {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            if arrivals.contains_key(&offer.migration_id) {
                return Err(format!("migration {} is under way here already", offer.migration_id));
            }
            // Looked at again: another offer may have been accepted while this one was examined.
            if arrivals.values().any(|other| other.container.id == arrival.container.id) {
                return Err(format!("another migration of {} is arriving here", arrival.container.id));
            }
            arrivals.insert(offer.migration_id, arrival.clone());
        }
        let obstacles = findings.obstacles.into_iter().map(Into::into).collect();
        self.say(Reply::Verdict(peer::Verdict { obstacles, missing_layers: findings.missing_layers })).await;
        Ok(accepted.then_some(arrival))
    }

    /// Two containers of one name, or for one address, must not arrive at once.
    fn claim(&self, container: &Description, findings: &mut Findings) {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        if arrivals.values().any(|other| other.container.id == container.id) {
            findings.obstacles.push(Obstacle::new(
                format!("container {}", container.id),
                "another migration of this name is arriving at the destination",
                "wait for it: `migrate status` on its source",
            ));
        }
    }

    /// Message by message; an error text ends the migration.
    async fn steps(&self, arrival: &Arrival, stream: &mut Streaming<peer::SourceMessage>) -> Result<(), String> {
        loop {
            match hear(stream).await? {
                Request::Heartbeat(_) => {}
                Request::Prepare(_) => {
                    arrival.prepare().await.map_err(|error| chain(&error))?;
                    self.say(Reply::Prepared(peer::Prepared {})).await;
                }
                Request::Arm(arm) => {
                    let neighbours: Vec<_> = arm.neighbours.into_iter().filter_map(neighbour).collect();
                    let from = match (arm.pages, arm.eager) {
                        (false, _) => MemoryFrom::Images,
                        (true, false) => MemoryFrom::StoreLater,
                        (true, true) => MemoryFrom::StoreFirst,
                    };
                    arrival.arm(&arm.descriptors, &neighbours, from).await.map_err(|error| chain(&error))?;
                    self.say(Reply::Armed(peer::Armed {})).await;
                }
                Request::Restore(restore) => {
                    let restored = arrival.restore(&restore, lost(stream)).await;
                    let (timings, stored_pages) = restored.map_err(|error| chain(&error))?;
                    let timings = wire_timings(timings);
                    self.say(Reply::Restored(peer::Restored { timings, stored_pages })).await;
                }
                Request::Commit(commit) => {
                    let timings = arrival.commit(commit.epoch).await.map_err(|error| chain(&error))?;
                    tracing::info!(container = arrival.container.id, "the container runs here now");
                    let committed = peer::Committed { epoch: commit.epoch, timings: wire_timings(timings) };
                    self.say(Reply::Committed(committed)).await;
                    return Ok(());
                }
                Request::Abort(abort) => return Err(format!("the source gave up: {}", abort.reason)),
                Request::Offer(_) => return Err("a second offer in one session".to_owned()),
            }
        }
    }

    async fn say(&self, message: Reply) {
        fault::point(&format!("destination:say:{}", said(&message)));
        // A source that is gone shows at the next read.
        let _ = self.replies.send(Ok(peer::DestinationMessage { message: Some(message) })).await;
    }

    async fn fail(&self, reason: &str) {
        tracing::warn!(reason, "migration failed");
        self.say(Reply::Failed(peer::Failed { error: reason.to_owned() })).await;
    }
}

/// Says that this host is there, whatever else it is doing, until nobody listens.
async fn beat(replies: mpsc::Sender<Result<peer::DestinationMessage, Status>>) {
    let heartbeat = peer::DestinationMessage { message: Some(Reply::Heartbeat(peer::Heartbeat {})) };
    loop {
        tokio::time::sleep(HEARTBEAT).await;
        // With its queue full, the source hears enough; or nothing gets through.
        if let Err(mpsc::error::TrySendError::Closed(_)) = replies.try_send(Ok(heartbeat.clone())) {
            return;
        }
    }
}

async fn hear(stream: &mut Streaming<peer::SourceMessage>) -> Result<Request, String> {
    match tokio::time::timeout(SILENCE_DEADLINE, stream.message()).await {
        Err(_) => Err(format!("the source was silent for {} s", SILENCE_DEADLINE.as_secs())),
        Ok(Err(status)) => Err(format!("the connection to the source broke: {}", status.message())),
        Ok(Ok(None)) => Err("the source ended its session".to_owned()),
        Ok(Ok(Some(message))) => {
            let request = message.message.ok_or_else(|| WireError::Empty("control").to_string())?;
            fault::point(&format!("destination:heard:{}", heard(&request)));
            Ok(request)
        }
    }
}

/// Ends when the source is gone or gives up, with the reason.
async fn lost(stream: &mut Streaming<peer::SourceMessage>) -> String {
    loop {
        match hear(stream).await {
            Ok(Request::Heartbeat(_)) => {}
            Ok(Request::Abort(abort)) => return format!("the source gave up: {}", abort.reason),
            Ok(other) => return format!("the source said {} while the container was restored", heard(&other)),
            Err(reason) => return reason,
        }
    }
}

/// Names of messages, for faults.
fn heard(request: &Request) -> &'static str {
    match request {
        Request::Offer(_) => "offer",
        Request::Prepare(_) => "prepare",
        Request::Arm(_) => "arm",
        Request::Restore(_) => "restore",
        Request::Commit(_) => "commit",
        Request::Abort(_) => "abort",
        Request::Heartbeat(_) => "heartbeat",
    }
}

fn said(reply: &Reply) -> &'static str {
    match reply {
        Reply::Verdict(_) => "verdict",
        Reply::Prepared(_) => "prepared",
        Reply::Armed(_) => "armed",
        Reply::Restored(_) => "restored",
        Reply::Committed(_) => "committed",
        Reply::Failed(_) => "failed",
        Reply::Heartbeat(_) => "heartbeat",
    }
}

fn wire_timings(timings: Timings) -> Vec<peer::Timing> {
    let mut merged: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, duration) in timings {
        *merged.entry(name).or_default() += u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    }
    merged.into_iter().map(|(name, micros)| peer::Timing { name: name.to_owned(), micros }).collect()
}
