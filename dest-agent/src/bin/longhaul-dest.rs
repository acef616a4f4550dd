//! The destination agent.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use longhaul_common::config::{self, DestConfig};
use longhaul_common::daemon::{self, say_ready, told_to_end};
use longhaul_common::journal::Journal;
use longhaul_common::telemetry;
use longhaul_common::tls::{FRAME_BYTES, Identity, TlsIncoming, WINDOW_BYTES};
use longhaul_dest::record;
use longhaul_dest::service::PeerService;
use tokio::net::TcpSocket;

/// How long migrations may go on after the agent was told to end.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(20);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 128;

/// Takes in containers that other hosts' longhaul-source agents move here.
#[derive(Parser)]
#[command(name = "longhaul-dest", version)]
struct Cli {
    /// Configuration file [default: /etc/longhaul/dest.toml]
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
    let path = cli.config.clone().unwrap_or_else(|| config::DEST_FILE.into());
    let config: Arc<DestConfig> = Arc::new(config::load(&path, cli.config.is_some())?);
    let identity = Identity::load(&config.tls)?;
    // First of all: a second agent by mistake must not undo what the first is doing. Nobody is answered before that is done.
    let socket = bind(config.listen).with_context(|| format!("listen at {}", config.listen))?;
    std::fs::create_dir_all(&config.paths.run).with_context(|| format!("create {}", config.paths.run.display()))?;
    let memory = longhaul_common::memory_dir::mount(&config.paths.run.join("dest"))?;
    let journal = Journal::open(config.paths.state.join("dest"))?;
    record::recover(&config, &journal).await;

    let listener = socket.listen(BACKLOG).with_context(|| format!("listen at {}", config.listen))?;
    let service = PeerService::new(config.clone(), journal);
    let arrivals = service.arrivals();
    let (incoming, page_connections) = TlsIncoming::new(listener, identity.server());
    let pages = tokio::spawn(service.door().serve_pages(page_connections));
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .add_service(longhaul_proto::peer_server(service))
        .serve_with_incoming_shutdown(incoming, async {
            told_to_end().await;
            tracing::info!("ending: migrations that have not committed are undone");
            let pending: Vec<_> =
                arrivals.lock().map(|arrivals| arrivals.values().cloned().collect()).unwrap_or_default();
            for arrival in pending {
                arrival.abort("the destination agent was told to end").await;
            }
        });
    tracing::info!(listen = %config.listen, allow = ?config.allow, "ready");
    say_ready();
    tokio::select! {
        served = server => served.context("serve")?,
        () = async { told_to_end().await; tokio::time::sleep(SHUTDOWN_DEADLINE).await } => {
            tracing::warn!("connections were still open at the deadline");
        }
    }
    pages.abort();
    drop(memory);
    Ok(())
}

/// Takes the address, without answering at it yet.
fn bind(address: std::net::SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // The connections of an agent that has just ended may linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}
