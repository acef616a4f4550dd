//! The hold: a small process between the OCI runtime and CRIU that an agent steers.
//!
//! A runtime finds `criu` on its `PATH`. Longhaul puts `longhaul-criu` there, which talks to the runtime
//! and to the real CRIU in CRIU's own RPC, and to the agent over a unix socket:
//!
//! ```text
//!  runc ──criu_req──▶ longhaul-criu ──criu_req + addition──▶ criu swrk
//!                          │  ▲
//!                    Hello,│  │Prepare, Go, Verdict, Cancel
//!                    Event ▼  │
//!                        agent
//! ```
//!
//! It serves three ends. The runtime and CRIU are started *before* the freeze and wait at [`ToHold::go`], so
//! that their start-up costs no downtime. The agent adds options (an external network namespace, inherited
//! files) that the runtime has no flag for. And at the notifications the agent names (`post-dump`,
//! `pre-resume`) CRIU waits for the agent's verdict: the PREPARED states of the commit protocol. An action
//! script would do for the last alone, at 14 shells (about 4 ms each) a migration.
//!
//! The hold is a process of its own so that a killed agent does not end CRIU's wait: it reconnects for ever.

use std::io;
use std::path::{Path, PathBuf};

use prost::Message;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::rpc;

/// The agent's socket, in the environment of the runtime.
pub const SOCKET_ENV: &str = "LONGHAUL_HOLD";
/// The real CRIU, in the environment of the runtime.
pub const CRIU_ENV: &str = "LONGHAUL_CRIU";
/// The largest frame between hold and agent, in bytes: a request with a few hundred external mounts is 64 KiB.
pub const MAX_FRAME_BYTES: usize = 1 << 20;

/// From the hold to the agent.
#[derive(Clone, PartialEq, Message)]
pub struct ToAgent {
    /// First on every connection.
    #[prost(message, optional, tag = "1")]
    pub hello: Option<Hello>,
    /// A notification that waits for a verdict.
    #[prost(message, optional, tag = "2")]
    pub event: Option<Event>,
    /// CRIU's last answer.
    #[prost(message, optional, tag = "3")]
    pub end: Option<End>,
}

/// Who calls.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// What the runtime asked for.
    #[prost(enumeration = "rpc::RequestType", tag = "1")]
    pub operation: i32,
    /// Set on a reconnection: the notification that has been waiting.
    #[prost(string, optional, tag = "2")]
    pub waiting_at: Option<String>,
}

/// CRIU has reached a held moment.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// `post-dump`, `pre-resume`, …
    #[prost(string, tag = "1")]
    pub script: String,
    /// The root task, where CRIU says it.
    #[prost(int32, tag = "2")]
    pub pid: i32,
}

/// CRIU is done.
#[derive(Clone, PartialEq, Message)]
pub struct End {
    /// Whether it succeeded.
    #[prost(bool, tag = "1")]
    pub success: bool,
    /// Its first error line.
    #[prost(string, tag = "2")]
    pub error: String,
}

/// From the agent to the hold.
#[derive(Clone, PartialEq, Message)]
pub struct ToHold {
    /// Start CRIU and wait.
    #[prost(message, optional, tag = "1")]
    pub prepare: Option<Prepare>,
    /// Send the request.
    #[prost(bool, tag = "2")]
    pub go: bool,
    /// The answer to an event.
    #[prost(bool, optional, tag = "3")]
    pub verdict: Option<bool>,
    /// Fail the request without having sent it.
    #[prost(bool, tag = "4")]
    pub cancel: bool,
}

/// What to do with the runtime's request.
#[derive(Clone, PartialEq, Message)]
pub struct Prepare {
    /// Merged into the runtime's options.
    #[prost(message, optional, tag = "1")]
    pub addition: Option<rpc::Options>,
    /// Files to open in CRIU's process.
    #[prost(message, repeated, tag = "2")]
    pub files: Vec<OpenFile>,
    /// Notifications that wait for a verdict.
    #[prost(string, repeated, tag = "3")]
    pub held: Vec<String>,
    /// Environment of CRIU's process, `NAME=value`.
    #[prost(string, repeated, tag = "4")]
    pub environment: Vec<String>,
    /// The network namespace CRIU is started in; empty: the runtime's.
    #[prost(string, tag = "5")]
    pub netns: String,
}

/// A descriptor CRIU inherits.
#[derive(Clone, PartialEq, Message)]
pub struct OpenFile {
    /// Its number there.
    #[prost(int32, tag = "1")]
    pub fd: i32,
    /// What is opened.
    #[prost(string, tag = "2")]
    pub path: String,
    /// open(2) flags.
    #[prost(int32, tag = "3")]
    pub flags: i32,
    /// File offset to seek to.
    #[prost(int64, tag = "4")]
    pub offset: i64,
}

/// Descriptors given to CRIU start here, above everything a runtime passes.
pub const FIRST_INHERITED_FD: i32 = 100;

/// A failed exchange with a hold.
#[derive(Debug, Error)]
pub enum HoldError {
    /// The socket could not be made.
    #[error("listen for CRIU's hold on {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the hold in front of CRIU went away")]
    Io(#[from] io::Error),
    /// What came was no message.
    #[error("the hold in front of CRIU sent an undecodable message")]
    Decode(#[from] prost::DecodeError),
    /// It said something out of turn.
    #[error("the hold in front of CRIU said {got}, expected {expected}")]
    Unexpected {
        /// What came.
        got: String,
        /// What should have come.
        expected: &'static str,
    },
}

/// Listens for holds of one migration.
#[derive(Debug)]
pub struct HoldListener {
    listener: UnixListener,
    path: PathBuf,
}

impl HoldListener {
    /// Listens at `path`, which must be in a directory only root can enter.
    pub fn bind(path: &Path) -> Result<Self, HoldError> {
        let _ = std::fs::remove_file(path);
        let listener =
            UnixListener::bind(path).map_err(|source| HoldError::Listen { path: path.to_owned(), source })?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next hold that reaches its request.
    pub async fn accept(&self) -> Result<Held, HoldError> {
        let (stream, _) = self.listener.accept().await?;
        let mut held = Held { stream };
        let first = held.read().await?;
        if first.hello.is_none() {
            return Err(HoldError::Unexpected { got: format!("{first:?}"), expected: "hello" });
        }
        Ok(held)
    }
}

impl Drop for HoldListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What a held CRIU does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HoldEvent {
    /// It waits at this notification, and says the root task where it knows it.
    Waiting {
        /// The notification.
        script: String,
        /// The root task's pid, or 0.
        pid: i32,
    },
    /// It ended.
    Ended {
        /// Whether it did what was asked.
        success: bool,
        /// Its first error line.
        error: String,
    },
}

/// One CRIU, held.
#[derive(Debug)]
pub struct Held {
    stream: UnixStream,
}

impl Held {
    /// Starts CRIU, which then waits for [`go`](Self::go).
    pub async fn prepare(&mut self, prepare: Prepare) -> Result<(), HoldError> {
        self.write(ToHold { prepare: Some(prepare), ..ToHold::default() }).await
    }

    /// Sends the request to CRIU.
    pub async fn go(&mut self) -> Result<(), HoldError> {
        self.write(ToHold { go: true, ..ToHold::default() }).await
    }

    /// Fails the runtime's request; CRIU never sees it.
    pub async fn cancel(&mut self) -> Result<(), HoldError> {
        self.write(ToHold { cancel: true, ..ToHold::default() }).await
    }

    /// Lets CRIU go on, or fail, at the event it waits at.
    pub async fn verdict(&mut self, go_on: bool) -> Result<(), HoldError> {
        self.write(ToHold { verdict: Some(go_on), ..ToHold::default() }).await
    }

    /// Ends it wherever it is: before its request it is cancelled, at an event CRIU fails and takes back what it did.
    pub async fn refuse(&mut self) -> Result<(), HoldError> {
        self.write(ToHold { cancel: true, verdict: Some(false), ..ToHold::default() }).await
    }

    /// Waits for CRIU's next held moment or its end.
    pub async fn next(&mut self) -> Result<HoldEvent, HoldError> {
        let message = self.read().await?;
        if let Some(Event { script, pid }) = message.event {
            return Ok(HoldEvent::Waiting { script, pid });
        }
        if let Some(End { success, error }) = message.end {
            return Ok(HoldEvent::Ended { success, error });
        }
        Err(HoldError::Unexpected { got: format!("{message:?}"), expected: "an event or the end" })
    }

    async fn write(&mut self, message: ToHold) -> Result<(), HoldError> {
        let body = message.encode_to_vec();
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes();
        self.stream.write_all(&[length.as_slice(), &body].concat()).await?;
        Ok(())
    }

    async fn read(&mut self) -> Result<ToAgent, HoldError> {
        let length = self.stream.read_u32_le().await? as usize;
        if length > MAX_FRAME_BYTES {
            return Err(HoldError::Unexpected { got: format!("{length} bytes"), expected: "at most 1 MiB" });
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        Ok(ToAgent::decode(body.as_slice())?)
    }
}
