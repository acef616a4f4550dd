//! A list of named checks, each built once and verified again and again.

use std::fmt::Debug;

use anyhow::{Context, bail};

type Check = Box<dyn FnMut() -> anyhow::Result<()>>;

/// Named checks. Building one sets kernel state up; its closure verifies the state and leaves it as it was, apart from
/// a generation that it remembers.
pub(super) struct Suite {
    without: Vec<String>,
    checks: Vec<(String, Check)>,
}

impl Suite {
    /// An empty suite that will skip the checks named in `without`.
    pub(super) fn new(without: &[String]) -> Self {
        Self { without: without.to_vec(), checks: Vec::new() }
    }

    /// Builds a check, unless it is to be skipped.
    pub(super) fn add<C>(&mut self, name: &str, build: impl FnOnce() -> anyhow::Result<C>) -> anyhow::Result<()>
    where
        C: FnMut() -> anyhow::Result<()> + 'static,
    {
        if !self.without.iter().any(|skipped| skipped == name) {
            let check = build().with_context(|| format!("set up {name}"))?;
            self.checks.push((name.to_owned(), Box::new(check)));
        }
        Ok(())
    }

    /// Takes over all checks of another suite.
    pub(super) fn append(&mut self, mut other: Suite) {
        self.checks.append(&mut other.checks);
    }

    /// The checks to skip, for the suites of child processes.
    pub(super) fn without(&self) -> &[String] {
        &self.without
    }

    /// How many checks there are.
    pub(super) fn len(&self) -> usize {
        self.checks.len()
    }

    /// Verifies everything once; the result is one line for each failure.
    pub(super) fn verify(&mut self) -> Vec<String> {
        let verify = |(name, check): &mut (String, Check)| check().err().map(|error| format!("{name}: {error:#}"));
        self.checks.iter_mut().filter_map(verify).collect()
    }
}

/// Fails unless `got` is what was set up.
pub(super) fn same<T: PartialEq + Debug>(what: &str, got: &T, wanted: &T) -> anyhow::Result<()> {
    if got != wanted {
        bail!("{what} is {got:?}, it was {wanted:?}");
    }
    Ok(())
}

/// Fails unless two long contents are equal; tells where they differ.
pub(super) fn same_content<T: PartialEq>(what: &str, got: &[T], wanted: &[T]) -> anyhow::Result<()> {
    if got.len() != wanted.len() {
        bail!("{what} has {} elements, it had {}", got.len(), wanted.len());
    }
    match got.iter().zip(wanted).position(|(got, wanted)| got != wanted) {
        Some(index) => bail!("{what} differs from element {index} of {} on", got.len()),
        None => Ok(()),
    }
}
