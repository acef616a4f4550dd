//! Results for a person.

use console::style;
use indicatif::HumanBytes;

use crate::report::{Doubt, Findings, Outcome, Report};

/// A migration's end.
pub(super) fn report(report: &Report) -> String {
    let mut lines = Vec::new();
    let name = format!("{} → {}", report.container, report.to);
    match report.outcome {
        Outcome::Moved => {
            let downtime = report.downtime_ms.map(|ms| format!("{ms:.0} ms")).unwrap_or_else(|| "?".to_owned());
            lines.push(format!("{} {name}", style("moved").green().bold()));
            lines.push(format!(
                "  downtime {downtime}, total {:.0} ms, {} of memory, {} sent",
                report.total_ms,
                HumanBytes(report.memory_bytes),
                HumanBytes(report.bytes_on_wire)
            ));
            let phases: Vec<String> = report.phases.iter().map(|(phase, ms)| format!("{phase} {ms:.0}")).collect();
            lines.push(format!("  ms by phase: {}", phases.join(", ")));
        }
        Outcome::WouldMove => lines.push(format!("{} {name}: nothing is in the way", style("ok").green().bold())),
        outcome => {
            let word = match outcome {
                Outcome::Refused => "refused",
                Outcome::Cancelled => "cancelled",
                Outcome::InDoubt => "in doubt",
                Outcome::Kept => "kept here",
                Outcome::Disowned => "ended here",
                _ => "failed",
            };
            lines.push(format!("{} {name}", style(word).red().bold()));
        }
    }
    if let Some(error) = &report.error {
        lines.push(format!("  in {}: {error}", report.phase));
    }
    lines.extend(report.obstacles.iter().map(|obstacle| format!("- {obstacle}")));
    lines.join("\n")
}

/// What a check found.
pub(super) fn findings(findings: &Findings) -> String {
    let passed = findings.passed.iter().map(|text| format!("{} {text}", style("ok").green()));
    let obstacles = findings.obstacles.iter().map(|obstacle| format!("{} {obstacle}", style("!!").red()));
    passed.chain(obstacles).collect::<Vec<_>>().join("\n")
}

/// A migration in doubt, and what each choice risks.
pub(super) fn doubt(doubt: &Doubt) -> String {
    let Doubt { container, to, .. } = doubt;
    let head = |word: &str, rest: &str| format!("{} {container} → {to}: {rest}", style(word).red().bold());
    let mut lines = Vec::new();
    match doubt.outcome {
        Outcome::InDoubt if doubt.phase == "post-copy" => {
            lines.push(head(
                "in doubt",
                &format!("{to} runs it, and a part of its memory is still here; there is no connection"),
            ));
            lines.push(format!("  here: {} tasks, frozen as they were when {to} took over", doubt.tasks_here));
            lines.extend(doubt.error.iter().map(|error| format!("  last: {error}")));
            lines.push(format!("Both hosts wait, and go on by themselves as soon as they reach each other. Only if {to} can't come back, decide:"));
            lines.push(format!(
                "  migrate recover {container} --keep-here   it goes on here as it was then: what it did on {to} since is lost. If {to} still runs it,\n\
                 {:38}it runs twice until the two hosts talk again; {to} then stops its copy",
                ""
            ));
            lines.push(format!(
                "  migrate recover {container} --gone        it is ended here. Tasks on {to} that want what is missing there wait for ever"
            ));
        }
        Outcome::InDoubt => {
            lines.push(head("in doubt", &format!("it is not known whether {to} took the container")));
            lines.push(format!("  here: {} tasks, frozen; none of them runs until this is settled", doubt.tasks_here));
            lines.extend(doubt.error.iter().map(|error| format!("  last: {error}")));
            lines.push(format!("This host goes on asking {to} and settles it by itself as soon as {to} answers. Only if {to} can't come back,"));
            lines.push("or you know what it did, decide:".to_owned());
            lines.push(format!(
                "  migrate recover {container} --keep-here   it goes on here. If {to} did take it and still runs it, it runs twice until the two\n\
                 {:38}hosts talk again; {to} then stops its copy, and what that did meanwhile is lost",
                ""
            ));
            lines.push(format!(
                "  migrate recover {container} --gone        it is ended here. If {to} did not take it, it is lost"
            ));
        }
        Outcome::Kept => lines.push(format!(
            "{} {container} runs here; {to} is told as soon as it answers, and stops its copy if it has one",
            style("kept").green().bold()
        )),
        _ => lines.push(format!("{} {container} was ended here", style("gone").yellow().bold())),
    }
    lines.join("\n")
}

/// All migrations.
pub(super) fn status(reports: &[Report]) -> String {
    if reports.is_empty() {
        return "no migrations".to_owned();
    }
    let mut lines = vec![format!(
        "{:<36} {:<20} {:<16} {:<10} {:<14} {:>10}",
        "MIGRATION", "CONTAINER", "TO", "OUTCOME", "PHASE", "DOWNTIME"
    )];
    for report in reports {
        let outcome = serde_json::to_value(report.outcome).ok().and_then(|value| value.as_str().map(str::to_owned));
        let downtime = report.downtime_ms.map(|ms| format!("{ms:.0} ms")).unwrap_or_default();
        lines.push(format!(
            "{:<36} {:<20} {:<16} {:<10} {:<14} {downtime:>10}",
            report.migration,
            report.container,
            report.to,
            outcome.unwrap_or_default(),
            report.phase,
        ));
    }
    lines.join("\n")
}
