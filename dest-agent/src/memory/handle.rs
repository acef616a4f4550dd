//! The agent's hold on the filler of one container.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use longhaul_common::leftovers::FILLER_ENV;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// How long it may take to be ready: it only has to listen.
const READY_DEADLINE: Duration = Duration::from_secs(5);
/// The socket's name in CRIU's work directory (criu/uffd.c, 4.2).
const SOCKET: &str = "lazy-pages.socket";

/// A filler that does not do its part.
#[derive(Debug, Error)]
pub enum FillError {
    /// It can't be started.
    #[error("can't start {program}, which fills in the container's memory")]
    Start {
        /// Which.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It has ended, or says something else.
    #[error("the program that fills in the container's memory has ended early: its reason is in this agent's log")]
    Ended,
}

/// See the module.
#[derive(Debug)]
pub struct Filler {
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Filler {
    /// Starts it, for the store in `pages` and a CRIU that works in `work`. `hold` marks it as a process of this migration.
    pub async fn start(program: &Path, pages: &Path, work: &Path, hold: &Path) -> Result<Self, FillError> {
        let failed = |source| FillError::Start { program: program.display().to_string(), source };
        let mut command = Command::new(program);
        command.arg("keep").arg(pages).arg(work.join(SOCKET)).env(FILLER_ENV, hold);
        // It outlives this agent, and must not end with its terminal.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(FillError::Ended);
        };
        let mut filler = Self { child, input, lines: BufReader::new(output).lines() };
        match tokio::time::timeout(READY_DEADLINE, filler.line()).await {
            Ok(Some(line)) if line == "ready" => Ok(filler),
            _ => {
                filler.stop().await;
                Err(FillError::Ended)
            }
        }
    }

    async fn line(&mut self) -> Option<String> {
        self.lines.next_line().await.ok().flatten()
    }

    /// Fill in from now on, and not for faults alone.
    pub async fn go(&mut self) -> Result<(), FillError> {
        self.input.write_all(b"go\n").await.map_err(|_| FillError::Ended)
    }

    /// Waits until all memory is in place.
    pub async fn filled(&mut self) -> Result<(), FillError> {
        while let Some(line) = self.line().await {
            if line == "filled" {
                let _ = self.child.wait().await;
                return Ok(());
            }
        }
        Err(FillError::Ended)
    }

    /// Ends it. Tasks that wait for a page wait for ever: they must be gone or about to go.
    pub async fn stop(mut self) {
        let _ = self.input.write_all(b"stop\n").await;
        if tokio::time::timeout(READY_DEADLINE, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}
