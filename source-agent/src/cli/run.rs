//! Arguments to options, one call, one answer.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use hyper_util::rt::TokioIo;
use longhaul_common::tls::pki;
use longhaul_proto::agent;
use longhaul_proto::agent::agent_client::AgentClient;
use longhaul_proto::agent::event::Event;
use serde::Serialize;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::args::{Cli, Command, Format, MigrateArgs, PkiCommand, PostCopyChoice, TimeoutChoice, VolumeArgs, command};
use super::progress::Progress;
use super::{exit, output};
use crate::options::{Options, PostCopy, TimeoutAction, Tuning};
use crate::report::{Doubt, Findings, Outcome, Report};

/// Does what the command line says; the exit code.
pub async fn run(cli: Cli) -> Result<u8> {
    let format = cli.global.format;
    let socket = &cli.global.socket;
    match cli.command {
        None => migrate(socket, format, cli.migrate).await,
        Some(Command::Check { container, to, volumes }) => check(socket, format, container, to, volumes).await,
        Some(Command::Status) => status(socket, format).await,
        Some(Command::Cancel { which }) => cancel(socket, which).await,
        Some(Command::Tune { which, max_downtime, bandwidth, auto_converge }) => {
            tune(socket, which, Tuning { max_downtime, bandwidth, auto_converge }).await
        }
        Some(Command::Recover { which, keep_here, gone }) => {
            let decision = match (keep_here, gone) {
                (true, _) => agent::Decision::KeepHere,
                (_, true) => agent::Decision::Gone,
                _ => agent::Decision::Unspecified,
            };
            recover(socket, format, which, decision).await
        }
        Some(Command::Pki { command }) => make_certificates(command),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut command(), "migrate", &mut std::io::stdout());
            Ok(exit::DONE)
        }
        Some(Command::Man { directory }) => {
            std::fs::create_dir_all(&directory)?;
            clap_mangen::generate_to(command(), &directory).context("write the man pages")?;
            Ok(exit::DONE)
        }
    }
}

async fn migrate(socket: &Path, format: Format, args: MigrateArgs) -> Result<u8> {
    let usage = |what: &str| {
        eprintln!("migrate: {what}\n\n{}", command().render_usage());
        Ok(exit::USAGE)
    };
    let Some(container) = args.container else { return usage("name a container") };
    let Some(to) = args.to else { return usage("say where to: --to HOST") };
    let log = args.log.map(|log| log.to_str().map(str::to_owned).ok_or_else(|| anyhow!("the log's path is not UTF-8")));
    let options = Options {
        volumes: args.volumes.rules,
        dry_run: args.dry_run,
        log: log.transpose()?,
        timeout: args.timeout,
        timeout_action: match args.timeout_action {
            TimeoutChoice::Abort => TimeoutAction::Abort,
            TimeoutChoice::Freeze => TimeoutAction::Freeze,
        },
        bandwidth: args.bandwidth,
        streams: args.streams,
        max_downtime: args.max_downtime,
        max_rounds: args.max_rounds,
        eager: args.eager,
        auto_converge: args.auto_converge,
        postcopy: match args.postcopy {
            None | Some(PostCopyChoice::Never) => PostCopy::Never,
            Some(PostCopyChoice::Auto) => PostCopy::Auto,
            Some(PostCopyChoice::Now) => PostCopy::Now,
        },
    };
    let Some(mut client) = connect(socket).await else { return Ok(exit::NO_AGENT) };
    let request = agent::MigrateRequest { container, to, options: Some(options.into()) };
    let mut events = match client.migrate(request).await {
        Ok(events) => events.into_inner(),
        Err(status) => return Ok(refused(&status)),
    };
    let progress = Progress::new(args.progress, args.quiet);
    let mut id = String::new();
    let mut interrupted = false;
    loop {
        let event = tokio::select! {
            event = events.message() => event,
            _ = tokio::signal::ctrl_c() => {
                progress.say(if interrupted {
                    "still ending: past the commit a migration goes on to its end"
                } else {
                    "cancelling: before the commit the container stays here, after it the move goes on to its end"
                });
                interrupted = true;
                let _ = client.cancel(agent::CancelRequest { which: id.clone() }).await;
                continue;
            }
        };
        let event = event.map_err(|status| {
            anyhow!("the source agent went away ({}): `migrate status` once it is back", status.message())
        })?;
        let Some(event) = event.and_then(|event| event.event) else {
            return Err(anyhow!("the source agent ended the migration's events without its end: `migrate status`"));
        };
        match event {
            Event::Started(started) => id = started.migration_id,
            Event::Finished(finished) => {
                progress.end();
                let report: Report = serde_json::from_str(&finished.report).context("read the report")?;
                print(format, &report, output::report)?;
                return Ok(report.exit_code());
            }
            other => progress.show(&other),
        }
    }
}

async fn check(
    socket: &Path,
    format: Format,
    container: Option<String>,
    to: Option<String>,
    volumes: VolumeArgs,
) -> Result<u8> {
    let Some(mut client) = connect(socket).await else { return Ok(exit::NO_AGENT) };
    let options = Options { volumes: volumes.rules, ..Options::default() };
    let request = agent::CheckRequest {
        container: container.unwrap_or_default(),
        to: to.unwrap_or_default(),
        options: Some(options.into()),
    };
    match client.check(request).await {
        Err(status) => Ok(refused(&status)),
        Ok(reply) => {
            let found: Findings = serde_json::from_str(&reply.into_inner().findings).context("read the findings")?;
            print(format, &found, output::findings)?;
            Ok(if found.obstacles.is_empty() { exit::DONE } else { exit::REFUSED })
        }
    }
}

async fn status(socket: &Path, format: Format) -> Result<u8> {
    let Some(mut client) = connect(socket).await else { return Ok(exit::NO_AGENT) };
    let reply = client.status(agent::StatusRequest {}).await.map_err(|status| anyhow!("{}", status.message()))?;
    let reports: Vec<Report> = serde_json::from_str(&reply.into_inner().migrations).context("read the status")?;
    print(format, &reports, |reports| output::status(reports))?;
    Ok(exit::DONE)
}

async fn cancel(socket: &Path, which: Option<String>) -> Result<u8> {
    let Some(mut client) = connect(socket).await else { return Ok(exit::NO_AGENT) };
    match client.cancel(agent::CancelRequest { which: which.unwrap_or_default() }).await {
        Err(status) => Ok(refused(&status)),
        Ok(reply) => {
            println!("cancelling {}", reply.into_inner().migration_id);
            Ok(exit::DONE)
        }
    }
}

async fn tune(socket: &Path, which: Option<String>, tuning: Tuning) -> Result<u8> {
    if tuning == Tuning::default() {
        eprintln!("migrate: say what to change: --max-downtime, --bandwidth or --auto-converge");
        return Ok(exit::USAGE);
    }
    let Some(mut client) = connect(socket).await else { return Ok(exit::NO_AGENT) };
    match client.tune(tuning.request(which.unwrap_or_default())).await {
        Err(status) => Ok(refused(&status)),
        Ok(reply) => {
            println!("changed {}", reply.into_inner().migration_id);
            Ok(exit::DONE)
        }
    }
}

async fn recover(socket: &Path, format: Format, which: Option<String>, decision: agent::Decision) -> Result<u8> {
    let Some(mut client) = connect(socket).await else { return Ok(exit::NO_AGENT) };
    let request = agent::RecoverRequest { which: which.unwrap_or_default(), decision: decision.into() };
    match client.recover(request).await {
        Err(status) => Ok(refused(&status)),
        Ok(reply) => {
            let doubt: Doubt = serde_json::from_str(&reply.into_inner().doubt).context("read what is in doubt")?;
            print(format, &doubt, output::doubt)?;
            Ok(if doubt.outcome == Outcome::InDoubt { exit::IN_DOUBT } else { exit::DONE })
        }
    }
}

fn make_certificates(command: PkiCommand) -> Result<u8> {
    match command {
        PkiCommand::Init { dir } => {
            pki::init(&dir)?;
            println!(
                "authority in {}: keep ca-key.pem here, and issue certificates with `migrate pki issue HOST`",
                dir.display()
            );
        }
        PkiCommand::Issue { host, names, days, dir } => {
            let made = pki::issue(&dir, &host, &names, days)?;
            println!("{}: copy its three files to /etc/longhaul/tls/ on {host}", made.display());
        }
    }
    Ok(exit::DONE)
}

fn print<T: Serialize>(format: Format, value: &T, human: impl Fn(&T) -> String) -> Result<()> {
    match format {
        Format::Json => println!("{}", serde_json::to_string_pretty(value)?),
        Format::Human => println!("{}", human(value)),
    }
    Ok(())
}

fn refused(status: &Status) -> u8 {
    eprintln!("migrate: {}", status.message());
    match status.code() {
        tonic::Code::InvalidArgument => exit::USAGE,
        _ => exit::FAILED,
    }
}

/// The agent; nothing, with the reason printed, if it can't be reached.
async fn connect(socket: &Path) -> Option<AgentClient<Channel>> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    match Endpoint::from_static("http://longhaul.invalid").connect_with_connector(connector).await {
        Ok(channel) => Some(longhaul_proto::agent_client(channel)),
        Err(error) => {
            eprintln!(
                "migrate: can't reach the source agent at {}: {}\n  start it with `systemctl start longhaul-source`, and run migrate as root",
                socket.display(),
                longhaul_common::chain(&error)
            );
            None
        }
    }
}
