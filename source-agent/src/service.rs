//! The local edge: what `migrate` asks for, over a unix socket that only root can open.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use longhaul_common::chain;
use longhaul_common::config::DEFAULT_PORT;
use longhaul_common::handover::source::State;
use longhaul_common::host::compare;
use longhaul_common::obstacle::Obstacle;
use longhaul_common::tls::PeerAddress;
use longhaul_proto::agent;
use longhaul_proto::agent::agent_server::Agent;
use longhaul_proto::peer::Offer;
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

use crate::custody::{Custody, Decision, Line};
use crate::inspect::inspect;
use crate::jobs::{Job, JobEvent, Jobs};
use crate::migration::{self, Env, FIRST_EPOCH, MigrationError};
use crate::options::{Options, Tuning};
use crate::peer::Peer;
use crate::record::{Recovered, tasks_in};
use crate::report::{Doubt, Findings, Outcome, Report};

/// The service.
pub struct AgentService {
    env: Arc<Env>,
    jobs: Arc<Jobs>,
}

impl AgentService {
    /// A service over these migrations.
    pub fn new(env: Arc<Env>, jobs: Arc<Jobs>) -> Self {
        Self { env, jobs }
    }

    /// Takes up what a killed agent left in doubt. Its containers stay frozen until their destinations answer.
    pub fn resume(&self, open: Vec<Custody<Recovered>>) {
        for mut custody in open {
            let is_kept = custody.state() == State::Kept;
            let hands = custody.hands();
            let migration = hands.migration().to_owned();
            let (container, to) = (hands.record().container.clone(), hands.record().to.clone());
            let mut report = Report::begin(&migration, &container, &to);
            report.outcome = if is_kept { Outcome::Kept } else { Outcome::InDoubt };
            report.error = Some(if is_kept {
                "an operator kept the container here; the destination is still to be told".to_owned()
            } else {
                MigrationError::InDoubt.to_string()
            });
            "commit".clone_into(&mut report.phase);
            match (self.jobs.start(report), self.address(&to)) {
                (Ok(job), Ok(address)) => {
                    job.hold(custody.hands().record().cgroup.clone());
                    let line = Line {
                        identity: self.env.identity.clone(),
                        capabilities: self.env.capabilities.clone(),
                        address,
                        migration,
                        peer: None,
                    };
                    tokio::spawn(migration::go_on(job, line, custody));
                }
                (Err(error), _) => tracing::error!(migration, %error, "can't take up a migration in doubt"),
                (_, Err(status)) => {
                    tracing::error!(migration, error = status.message(), "can't take up a migration in doubt");
                }
            }
        }
    }

    /// Where a host is: an entry of the configuration, or `[tcp://]name[:port]`.
    fn address(&self, to: &str) -> Result<PeerAddress, Status> {
        if to.is_empty() {
            return Err(Status::invalid_argument("no destination was named: `--to HOST`"));
        }
        if let Some(entry) = self.env.config.hosts.get(to) {
            let address = with_port(&entry.address);
            let certificate_name = entry.name.clone().unwrap_or_else(|| to.to_owned());
            return Ok(PeerAddress { host: to.to_owned(), address, certificate_name });
        }
        if to.starts_with("ssh://") {
            return Err(Status::invalid_argument("ssh:// is not supported: name a host that runs longhaul-dest"));
        }
        let plain = to.strip_prefix("tcp://").unwrap_or(to);
        let address = with_port(plain);
        let name = address.rsplit_once(':').map_or(plain, |(name, _)| name);
        let certificate_name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(PeerAddress { host: plain.to_owned(), address, certificate_name })
    }

    async fn find_obstacles(&self, request: &agent::CheckRequest) -> Result<Findings, Status> {
        let options = Options::from(request.options.clone().unwrap_or_default());
        let mut findings = Findings {
            container: (!request.container.is_empty()).then(|| request.container.clone()),
            to: (!request.to.is_empty()).then(|| request.to.clone()),
            obstacles: compare(&self.env.capabilities, &self.env.capabilities),
            passed: Vec::new(),
        };
        if findings.obstacles.is_empty() {
            findings.passed.push(format!("host {} can move containers", self.env.capabilities.host));
        }
        let inspection = match &findings.container {
            None => None,
            Some(container) => {
                let found = inspect(&self.env.config, &self.env.digests, container, &options).await;
                let found = found.map_err(|error| Status::not_found(chain(&error)))?;
                if found.obstacles.is_empty() {
                    findings.passed.push(format!("container {container} can be saved"));
                }
                findings.obstacles.extend(found.obstacles.iter().cloned());
                Some(found)
            }
        };
        if request.to.is_empty() {
            return Ok(findings);
        }
        let address = self.address(&request.to)?;
        match Peer::connect(&self.env.identity, &address, self.env.capabilities.clone()).await {
            Err(error) => findings.obstacles.push(Obstacle::new(
                format!("host {}", request.to),
                chain(&error),
                "see what the message says; `journalctl -u longhaul-dest` there has the other side's view",
            )),
            Ok((peer, theirs)) => {
                findings.passed.push(format!("host {} answers, and both trust each other", request.to));
                let known = findings.obstacles.len();
                findings.obstacles.extend(
                    compare(&self.env.capabilities, &theirs)
                        .into_iter()
                        .filter(|obstacle| !findings.obstacles[..known].contains(obstacle))
                        .collect::<Vec<_>>(),
                );
                if let Some(inspection) = inspection {
                    let verdict = async {
                        let session = peer.session().await?;
                        session
                            .offer(Offer {
                                migration_id: new_id(&inspection.description.id),
                                epoch: FIRST_EPOCH,
                                description: inspection.description.to_json().into(),
                                dry_run: true,
                            })
                            .await
                    };
                    let verdict = verdict.await.map_err(|error| Status::unavailable(chain(&error)))?;
                    if verdict.obstacles.is_empty() {
                        findings.passed.push(format!("host {} would take {}", request.to, inspection.description.id));
                    }
                    findings.obstacles.extend(verdict.obstacles);
                }
            }
        }
        Ok(findings)
    }
}

fn with_port(address: &str) -> String {
    let has_port = address
        .rsplit_once(':')
        .is_some_and(|(name, port)| port.parse::<u16>().is_ok() && (!name.contains(':') || name.ends_with(']')));
    if has_port {
        address.to_owned()
    } else if address.contains(':') && !address.starts_with('[') {
        format!("[{address}]:{DEFAULT_PORT}")
    } else {
        format!("{address}:{DEFAULT_PORT}")
    }
}

/// An id for a migration: the container's name, shortened, and 64 bits of time and process.
pub fn new_id(container: &str) -> String {
    let name: String = container.chars().filter(char::is_ascii_alphanumeric).take(20).collect();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let unique = (now.as_nanos() as u64) ^ (u64::from(std::process::id()) << 48);
    format!("{name}-{unique:016x}")
}

type Events = Pin<Box<dyn tokio_stream::Stream<Item = Result<agent::Event, Status>> + Send>>;

#[tonic::async_trait]
impl Agent for AgentService {
    type MigrateStream = Events;

    async fn migrate(&self, request: Request<agent::MigrateRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        let address = self.address(&request.to)?;
        let options = Options::from(request.options.unwrap_or_default());
        let report = Report::begin(&new_id(&request.container), &request.container, &request.to);
        let id = report.migration.clone();
        let job = self.jobs.start(report).map_err(|error| Status::already_exists(error.to_string()))?;
        let events = follow(&job, id);
        tokio::spawn(migration::run(self.env.clone(), job, address, options));
        Ok(Response::new(events))
    }

    async fn check(&self, request: Request<agent::CheckRequest>) -> Result<Response<agent::CheckReply>, Status> {
        let findings = self.find_obstacles(&request.into_inner()).await?;
        let findings = serde_json::to_string(&findings).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(agent::CheckReply { findings }))
    }

    async fn status(&self, _request: Request<agent::StatusRequest>) -> Result<Response<agent::StatusReply>, Status> {
        let migrations =
            serde_json::to_string(&self.jobs.reports()).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(agent::StatusReply { migrations }))
    }

    async fn recover(&self, request: Request<agent::RecoverRequest>) -> Result<Response<agent::RecoverReply>, Status> {
        let request = request.into_inner();
        let job = self.jobs.in_doubt(&request.which).map_err(|error| Status::not_found(error.to_string()))?;
        let decision = match request.decision() {
            agent::Decision::Unspecified => None,
            agent::Decision::KeepHere => Some(Decision::Keep),
            agent::Decision::Gone => Some(Decision::Disown),
        };
        if let Some(decision) = decision {
            decide(&job, decision).await?;
        }
        let doubt = Doubt::of(job.report(), held_tasks(&job));
        let doubt = serde_json::to_string(&doubt).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(agent::RecoverReply { doubt }))
    }

    async fn tune(&self, request: Request<agent::TuneRequest>) -> Result<Response<agent::TuneReply>, Status> {
        let request = request.into_inner();
        let job = self.jobs.running(&request.which).map_err(|error| Status::not_found(error.to_string()))?;
        let report = job.report();
        if !TUNABLE.contains(&report.phase.as_str()) {
            let (container, phase) = (report.container, report.phase);
            return Err(Status::failed_precondition(format!(
                "{container} is in phase {phase}: only while its memory is copied can a move be changed"
            )));
        }
        let tuning = Tuning::from(request);
        job.tuning.send_modify(|before| *before = before.then(tuning));
        Ok(Response::new(agent::TuneReply { migration_id: report.migration }))
    }

    async fn cancel(&self, request: Request<agent::CancelRequest>) -> Result<Response<agent::CancelReply>, Status> {
        let job =
            self.jobs.running(&request.into_inner().which).map_err(|error| Status::not_found(error.to_string()))?;
        job.cancel.cancel();
        Ok(Response::new(agent::CancelReply { migration_id: job.report().migration }))
    }
}

/// Phases in which what is changed still counts.
const TUNABLE: [&str; 6] = ["", "negotiate", "preflight", "prepare", "rootfs-presync", "pre-copy"];

/// Tasks of the container that are held here.
fn held_tasks(job: &Job) -> usize {
    job.held().map_or(0, |cgroup| tasks_in(&cgroup))
}

/// How long a decision may take to be carried out: CRIU takes back what it did to gigabytes of tasks.
const DECISION_DEADLINE: Duration = Duration::from_secs(90);

/// Has an operator's decision carried out.
async fn decide(job: &Job, decision: Decision) -> Result<(), Status> {
    if decision == Decision::Keep && held_tasks(job) == 0 {
        let container = job.report().container;
        return Err(Status::failed_precondition(format!(
            "nothing of {container} is here any more that could be kept: its tasks have ended"
        )));
    }
    job.decision.send_replace(Some(decision));
    let carried_out = async {
        while job.report().outcome == Outcome::InDoubt {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DECISION_DEADLINE, carried_out).await.map_err(|_| {
        Status::deadline_exceeded("the decision is not carried out yet: `migrate status` and the agent's log say more")
    })
}

/// A job's events from its beginning to its end.
fn follow(job: &Arc<Job>, id: String) -> Events {
    let mut events = job.follow();
    let job = job.clone();
    Box::pin(async_stream::stream! {
        yield Ok(wire(agent::event::Event::Started(agent::Started { migration_id: id })));
        loop {
            match events.recv().await {
                Ok(JobEvent::Phase(name)) => {
                    yield Ok(wire(agent::event::Event::Phase(agent::PhaseStarted { name: name.to_owned() })));
                }
                Ok(JobEvent::Progress { phase, what, done, total }) => {
                    let progress =
                        agent::Progress { phase: phase.to_owned(), what, done_bytes: done, total_bytes: total };
                    yield Ok(wire(agent::event::Event::Progress(progress)));
                }
                Ok(JobEvent::Finished(report)) => {
                    yield Ok(finished(&report));
                    return;
                }
                // A follower that was too slow has missed some progress.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => {
                    yield Ok(finished(&job.report()));
                    return;
                }
            }
        }
    })
}

fn finished(report: &Report) -> agent::Event {
    let report = serde_json::to_string(report).unwrap_or_default();
    wire(agent::event::Event::Finished(agent::Finished { report }))
}

fn wire(event: agent::event::Event) -> agent::Event {
    agent::Event { event: Some(event) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_may_be_left_out() {
        assert_eq!(with_port("host2"), "host2:7474");
        assert_eq!(with_port("host2:7"), "host2:7");
        assert_eq!(with_port("fd00::2"), "[fd00::2]:7474");
        assert_eq!(with_port("[fd00::2]:7"), "[fd00::2]:7");
    }

    #[test]
    fn ids_can_be_file_names() {
        assert!(longhaul_common::journal::is_migration_id(&new_id("we/b..x_1")));
    }
}
