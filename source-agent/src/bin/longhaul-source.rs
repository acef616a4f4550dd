//! The source agent.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use longhaul_common::config::{self, SourceConfig};
use longhaul_common::daemon::{self, Alone, say_ready, told_to_end};
use longhaul_common::host::Capabilities;
use longhaul_common::journal::Journal;
use longhaul_common::layers::LayerDigests;
use longhaul_common::telemetry;
use longhaul_common::tls::Identity;
use longhaul_source::jobs::Jobs;
use longhaul_source::memory::{soft_dirty, throttle};
use longhaul_source::migration::{Calibration, Env};
use longhaul_source::record;
use longhaul_source::service::AgentService;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// How long migrations that have committed may take to end after the agent was told to.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(20);

/// Moves containers of this host to other hosts, as `migrate` asks.
#[derive(Parser)]
#[command(name = "longhaul-source", version)]
struct Cli {
    /// Configuration file [default: /etc/longhaul/source.toml]
    #[arg(long)]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    telemetry::init();
    match daemon::run(run(&cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: &Cli) -> Result<()> {
    let path = cli.config.clone().unwrap_or_else(|| config::SOURCE_FILE.into());
    let config: SourceConfig = config::load(&path, cli.config.is_some())?;
    let identity = Identity::load(&config.tls)?;
    // First of all: a second agent by mistake must not undo what the first is doing.
    let _alone = Alone::in_directory(&config.paths.state.join("source"))
        .with_context(|| format!("another source agent uses {}", config.paths.state.display()))?;
    std::fs::create_dir_all(&config.paths.run).with_context(|| format!("create {}", config.paths.run.display()))?;
    let run = config.paths.run.join("source");
    let memory = longhaul_common::memory_dir::mount(&run)?;
    let journal = Journal::open(config.paths.state.join("source"))?;
    let throttled = Journal::open(config.paths.state.join("throttled"))?;
    throttle::recover(&throttled);
    let paused = Journal::open(config.paths.state.join("paused"))?;
    soft_dirty::recover(&paused, |migration| journal.read::<record::Record>(migration).is_some());
    let open = record::recover(&journal, &config.engine.runtime(), &run).await;
    let socket = config.socket.clone().unwrap_or_else(|| config::AGENT_SOCKET.into());
    let env = Arc::new(Env {
        fixed_downtime: Calibration::default(),
        capabilities: Capabilities::of_this_host(&config.engine),
        digests: LayerDigests::open(&config.paths.state),
        config,
        identity,
        journal,
        throttled,
        paused,
    });
    let jobs = Arc::new(Jobs::default());
    let service = AgentService::new(env, jobs.clone());
    service.resume(open);
    let listener = listen(&socket)?;
    let server = tonic::transport::Server::builder()
        .add_service(longhaul_proto::agent_server(service))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            told_to_end().await;
            tracing::info!("ending: migrations that have not committed are cancelled");
            for job in jobs.all_running() {
                job.cancel.cancel();
            }
        });
    tracing::info!(socket = %socket.display(), "ready");
    say_ready();
    tokio::select! {
        served = server => served.context("serve")?,
        () = async { told_to_end().await; tokio::time::sleep(SHUTDOWN_DEADLINE).await } => {
            tracing::warn!("commands were still connected at the deadline");
        }
    }
    while !jobs.all_running().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _ = std::fs::remove_file(&socket);
    drop(memory);
    Ok(())
}

/// Root alone may ask for migrations.
fn listen(socket: &Path) -> Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        anyhow::bail!("another source agent answers at {}", socket.display());
    }
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("listen at {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
