//! `cargo lab bench`: figures side by side in one run, as ratios. Never part of the tests: machines are noisy.

mod blackout;
mod converge;
mod hard;
mod stop_and_copy;
mod subject;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::agents;
use crate::lab::{Host, Lab};

/// One measure, as `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub row: &'static str,
    /// The median of the samples.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it is compared with, measured in the same run.
    pub baseline: Option<f64>,
    /// Value divided by baseline.
    pub ratio: Option<f64>,
    /// What it should be.
    pub bar: &'static str,
    /// Whether it is.
    pub holds: bool,
    /// All samples.
    pub samples: Vec<f64>,
}

impl Row {
    /// A measure without a baseline.
    fn alone(row: &'static str, unit: &'static str, samples: Vec<f64>, bar: &'static str, most: f64) -> Self {
        let value = median(&samples);
        Self { row, value, unit, baseline: None, ratio: None, bar, holds: value <= most, samples }
    }

    /// A measure without a baseline that should be large.
    fn at_least(row: &'static str, unit: &'static str, samples: Vec<f64>, bar: &'static str, least: f64) -> Self {
        let row = Self::alone(row, unit, samples, bar, f64::INFINITY);
        Self { holds: row.value >= least, ..row }
    }

    /// A measure beside another; `holds` decides from value and ratio.
    fn beside(
        row: &'static str,
        unit: &'static str,
        samples: Vec<f64>,
        baselines: &[f64],
        bar: &'static str,
        holds: impl Fn(f64, f64) -> bool,
    ) -> Self {
        let (value, baseline) = (median(&samples), median(baselines));
        let ratio = value / baseline.max(f64::MIN_POSITIVE);
        let holds = holds(value, ratio);
        Self {
            row,
            value,
            unit,
            baseline: Some(round(baseline)),
            ratio: Some((ratio * 10_000.0).round() / 10_000.0),
            bar,
            holds,
            samples,
        }
    }
}

/// The middle of the samples; not a number if there are none.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    round(sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN))
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Three hosts for measuring.
struct Bench {
    lab: Lab,
    samples: usize,
}

impl Bench {
    fn hosts(&self) -> Result<(&Host, &Host, &Host)> {
        let [a, b, c] = self.lab.hosts.as_slice() else { bail!("three hosts are wanted") };
        Ok((a, b, c))
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// How long a container is away.
    Blackout,
    /// The same where memory is hard: shared, or much of it in files.
    Hard,
}

/// Measures the rows of a table whose name contains `only`; whether all hold.
pub fn run(table: Table, json: bool, only: &str, samples: usize) -> Result<bool> {
    let lab = Lab::up(&format!("bench-{}", std::process::id()), 3)?;
    agents::install(&lab)?;
    let bench = Bench { lab, samples: samples.max(1) };
    let mut all = true;
    if !json {
        println!("{:<44} {:>12} {:<8} {:>12} {:>8}  bar", "measure", "value", "unit", "baseline", "ratio");
    }
    let measures = match table {
        Table::Blackout => blackout::MEASURES,
        Table::Hard => hard::MEASURES,
    };
    for measure in measures {
        if !measure.name.contains(only) {
            continue;
        }
        eprintln!("measuring: {}", measure.name);
        let rows = (measure.run)(&bench).unwrap_or_else(|error| {
            // The others are worth having all the same.
            eprintln!("{} could not be measured: {error:#}", measure.name);
            all = false;
            Vec::new()
        });
        for row in rows {
            all &= row.holds;
            if json {
                println!("{}", serde_json::to_string(&row)?);
            } else {
                show(&row);
            }
        }
    }
    Ok(all)
}

fn show(row: &Row) {
    let optional = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    println!(
        "{:<44} {:>12.2} {:<8} {:>12} {:>8}  {} {}",
        row.row,
        row.value,
        row.unit,
        optional(row.baseline),
        row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
        row.bar,
        if row.holds { "holds" } else { "FALLS SHORT" }
    );
}
