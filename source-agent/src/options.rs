//! What the user asked for, as domain types.

use std::time::Duration;

use longhaul_proto::agent;

/// How a migration is to be done.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Rules for bind mounts, first match wins.
    pub volumes: Vec<VolumeRule>,
    /// Only find out.
    pub dry_run: bool,
    /// A log file that comes along and is written on where the container's output is a pipe.
    pub log: Option<String>,
    /// How long the move may take.
    pub timeout: Option<Duration>,
    /// What happens then, or when pre-copy does not converge.
    pub timeout_action: TimeoutAction,
    /// Bytes a second that memory may take while the container runs.
    pub bandwidth: Option<u64>,
    /// Connections for memory.
    pub streams: Option<u32>,
    /// The downtime wanted.
    pub max_downtime: Option<Duration>,
    /// The most rounds of pre-copy.
    pub max_rounds: Option<u32>,
    /// Fill in all memory before the container runs on the destination.
    pub eager: bool,
    /// Whether the container may run there before all of its memory has come.
    pub postcopy: PostCopy,
    /// Take processor time from it, if it writes faster than can be copied.
    pub auto_converge: bool,
}

/// What is changed of a migration under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tuning {
    /// The downtime wanted.
    pub max_downtime: Option<Duration>,
    /// Bytes a second that memory may take while the container runs; [`NO_LIMIT`](Self::NO_LIMIT) for as many as the link carries.
    pub bandwidth: Option<u64>,
    /// Whether processor time may be taken from it.
    pub auto_converge: Option<bool>,
}

impl Tuning {
    /// As a bandwidth: none.
    pub const NO_LIMIT: u64 = u64::MAX;

    /// Both, where the later counts.
    pub fn then(self, later: Self) -> Self {
        Self {
            max_downtime: later.max_downtime.or(self.max_downtime),
            bandwidth: later.bandwidth.or(self.bandwidth),
            auto_converge: later.auto_converge.or(self.auto_converge),
        }
    }
}

impl From<agent::TuneRequest> for Tuning {
    fn from(wire: agent::TuneRequest) -> Self {
        Self {
            max_downtime: (wire.max_downtime_ms > 0).then(|| Duration::from_millis(wire.max_downtime_ms)),
            bandwidth: (wire.bandwidth > 0).then_some(wire.bandwidth),
            auto_converge: wire.auto_converge,
        }
    }
}

impl Tuning {
    /// As it travels.
    pub fn request(self, which: String) -> agent::TuneRequest {
        agent::TuneRequest {
            which,
            max_downtime_ms: self.max_downtime.map_or(0, whole_millis),
            bandwidth: self.bandwidth.unwrap_or(0),
            auto_converge: self.auto_converge,
        }
    }
}

/// Whether a container may run on the destination before all of its memory has come. Until then each host has a part of it:
/// if either is lost, so is the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PostCopy {
    /// No.
    #[default]
    Never,
    /// If it writes faster than can be copied: then it fetches what could not be.
    Auto,
    /// It fetches all of its own memory, and nothing is copied beforehand but what tasks share.
    Now,
}

/// What happens when a move takes too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TimeoutAction {
    /// Give up, with the container untouched.
    #[default]
    Abort,
    /// Freeze it and go on, however long the downtime is.
    Freeze,
}

/// The downtime wanted, unless told otherwise (QEMU's `downtime-limit` is the same).
pub const DEFAULT_MAX_DOWNTIME: Duration = Duration::from_millis(300);
/// The most rounds, unless told otherwise.
pub const DEFAULT_MAX_ROUNDS: u32 = 30;

/// How the bind mount at one place is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRule {
    /// Its destination in the container, or `*`.
    pub mount: String,
    /// What to do.
    pub choice: VolumeChoice,
}

/// What to do with a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeChoice {
    /// Refuse the migration.
    Refuse,
    /// Copy its files.
    Copy,
    /// It is the same storage on both hosts.
    Shared,
}

impl std::str::FromStr for VolumeRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mount, word) = text.rsplit_once('=').unwrap_or(("*", text));
        let choice = match word {
            "refuse" => VolumeChoice::Refuse,
            "copy" => VolumeChoice::Copy,
            "shared" => VolumeChoice::Shared,
            _ => return Err(format!("{word:?} is not one of copy, shared, refuse (as in `copy` or `/data=copy`)")),
        };
        if mount != "*" && !mount.starts_with('/') {
            return Err(format!("{mount:?} is no absolute path in the container"));
        }
        Ok(Self { mount: mount.to_owned(), choice })
    }
}

impl Options {
    /// The rule for the mount at `destination`.
    pub fn volume(&self, destination: &str) -> VolumeChoice {
        let exact =
            self.volumes.iter().find(|rule| rule.mount.trim_end_matches('/') == destination.trim_end_matches('/'));
        let any = || self.volumes.iter().find(|rule| rule.mount == "*");
        exact.or_else(any).map_or(VolumeChoice::Refuse, |rule| rule.choice)
    }
}

impl From<agent::Options> for Options {
    fn from(wire: agent::Options) -> Self {
        let rule = |rule: agent::VolumeRule| VolumeRule {
            choice: match rule.mode() {
                agent::VolumeMode::Copy => VolumeChoice::Copy,
                agent::VolumeMode::Shared => VolumeChoice::Shared,
                agent::VolumeMode::Refuse | agent::VolumeMode::Unspecified => VolumeChoice::Refuse,
            },
            mount: rule.mount,
        };
        let postcopy = wire.postcopy();
        Self {
            volumes: wire.volumes.into_iter().map(rule).collect(),
            dry_run: wire.dry_run,
            log: (!wire.log.is_empty()).then_some(wire.log),
            timeout: (wire.timeout_ms > 0).then(|| Duration::from_millis(wire.timeout_ms)),
            timeout_action: if wire.freeze_at_timeout { TimeoutAction::Freeze } else { TimeoutAction::Abort },
            bandwidth: (wire.bandwidth > 0).then_some(wire.bandwidth),
            streams: (wire.streams > 0).then_some(wire.streams),
            max_downtime: (wire.max_downtime_ms > 0).then(|| Duration::from_millis(wire.max_downtime_ms)),
            max_rounds: (wire.max_rounds > 0).then_some(wire.max_rounds),
            eager: wire.eager,
            auto_converge: wire.auto_converge,
            postcopy: match postcopy {
                // Nothing can be owed of what must be in place before.
                _ if wire.eager => PostCopy::Never,
                agent::PostCopy::Unspecified => PostCopy::Never,
                agent::PostCopy::Auto => PostCopy::Auto,
                agent::PostCopy::Now => PostCopy::Now,
            },
        }
    }
}

impl From<Options> for agent::Options {
    fn from(options: Options) -> Self {
        let rule = |rule: VolumeRule| agent::VolumeRule {
            mount: rule.mount,
            mode: match rule.choice {
                VolumeChoice::Refuse => agent::VolumeMode::Refuse,
                VolumeChoice::Copy => agent::VolumeMode::Copy,
                VolumeChoice::Shared => agent::VolumeMode::Shared,
            }
            .into(),
        };
        Self {
            volumes: options.volumes.into_iter().map(rule).collect(),
            dry_run: options.dry_run,
            log: options.log.unwrap_or_default(),
            timeout_ms: options.timeout.map_or(0, whole_millis),
            freeze_at_timeout: options.timeout_action == TimeoutAction::Freeze,
            bandwidth: options.bandwidth.unwrap_or(0),
            streams: options.streams.unwrap_or(0),
            max_downtime_ms: options.max_downtime.map_or(0, whole_millis),
            max_rounds: options.max_rounds.unwrap_or(0),
            eager: options.eager,
            auto_converge: options.auto_converge,
            postcopy: match options.postcopy {
                PostCopy::Never => agent::PostCopy::Unspecified,
                PostCopy::Auto => agent::PostCopy::Auto,
                PostCopy::Now => agent::PostCopy::Now,
            }
            .into(),
        }
    }
}

/// At least 1: 0 means that nothing was said.
fn whole_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_rule_beats_the_general_one() {
        let rules = ["copy", "/data=shared"].map(|text| text.parse().expect("a rule"));
        let options = Options { volumes: rules.to_vec(), ..Options::default() };
        assert_eq!(options.volume("/data/"), VolumeChoice::Shared);
        assert_eq!(options.volume("/other"), VolumeChoice::Copy);
        assert_eq!(Options::default().volume("/data"), VolumeChoice::Refuse);
        "move".parse::<VolumeRule>().expect_err("no choice");
        "data=copy".parse::<VolumeRule>().expect_err("a relative path");
    }
}
