//! Progress on standard error: a bar for a person, lines for a log, objects for a program.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use longhaul_proto::agent::event::Event;

use super::args::ProgressMode;

/// How often the bar moves.
const TICK: Duration = Duration::from_millis(100);

/// Shows a migration's events.
pub(super) enum Progress {
    /// A bar.
    Bar(ProgressBar),
    /// A line a step.
    Plain,
    /// An object a step.
    Json,
    /// Nothing.
    Hidden,
}

impl Progress {
    /// What the user chose; by itself a bar on a terminal, lines elsewhere.
    pub(super) fn new(mode: ProgressMode, quiet: bool) -> Self {
        let mode = if quiet { ProgressMode::None } else { mode };
        match mode {
            ProgressMode::None => Self::Hidden,
            ProgressMode::Json => Self::Json,
            ProgressMode::Auto if std::io::stderr().is_terminal() => {
                let bar = ProgressBar::new_spinner();
                if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed_precise} {prefix:14} {msg}") {
                    bar.set_style(style);
                }
                bar.enable_steady_tick(TICK);
                Self::Bar(bar)
            }
            ProgressMode::Auto | ProgressMode::Plain => Self::Plain,
        }
    }

    /// Shows one event.
    pub(super) fn show(&self, event: &Event) {
        let (phase, what, bytes) = match event {
            Event::Phase(phase) => (phase.name.as_str(), "", None),
            Event::Progress(progress) => (progress.phase.as_str(), progress.what.as_str(), Some(progress.done_bytes)),
            Event::Started(_) | Event::Finished(_) => return,
        };
        let amount = bytes.map(|bytes| indicatif::HumanBytes(bytes).to_string()).unwrap_or_default();
        match self {
            Self::Bar(bar) => {
                bar.set_prefix(phase.to_owned());
                bar.set_message(format!("{what} {amount}"));
            }
            Self::Plain => eprintln!("{}", [phase, what, &amount].join(" ").trim_end()),
            Self::Json => {
                eprintln!("{}", serde_json::json!({ "phase": phase, "what": what, "bytes": bytes }));
            }
            Self::Hidden => {}
        }
    }

    /// Says something that is no step.
    pub(super) fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.println(text),
            Self::Plain => eprintln!("{text}"),
            Self::Json | Self::Hidden => {}
        }
    }

    /// Clears the bar.
    pub(super) fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
