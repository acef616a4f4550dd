//! Threads with names, thread-local state, signal masks and registers of their own.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};

use super::pattern;
use super::signals::{self, numbers};
use super::suite::same;
use crate::tool::sys::cpu::{self, Registers, Vector};
use crate::tool::sys::{process, signal};

/// How many threads there are besides the main one and the one with the registers.
const THREADS: u64 = 4;
/// A thread answers in microseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the registers hold their pattern at a time: long, so that a freeze comes within.
const HOLD_NANOSECONDS: i64 = 20_000_000;

thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
}

struct Member {
    ask: Sender<()>,
    answer: Receiver<anyhow::Result<()>>,
}

/// Four threads; each verifies itself when asked.
pub(super) fn team() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut members = Vec::new();
    for index in 0..THREADS {
        let (ask, asked) = channel();
        let (reply, answer) = channel();
        let builder = thread::Builder::new().name(format!("sc-thread-{index}"));
        builder.spawn(move || live(index, &asked, &reply))?;
        let member = Member { ask, answer };
        member.answer.recv_timeout(ANSWER_TIMEOUT).context("start a thread")??;
        members.push(member);
    }
    Ok(move || {
        for (index, member) in members.iter().enumerate() {
            member.ask.send(()).with_context(|| format!("thread {index} has ended"))?;
            // A freeze may last as long: then the thread has not had its time yet.
            let wait = || member.answer.recv_timeout(ANSWER_TIMEOUT);
            let answer = wait().or_else(|_| wait());
            answer
                .with_context(|| format!("thread {index} does not answer"))?
                .with_context(|| format!("thread {index}"))?;
        }
        Ok(())
    })
}

fn live(index: u64, asked: &Receiver<()>, reply: &Sender<anyhow::Result<()>>) {
    let mut verify = match set_up(index) {
        Ok(verify) => verify,
        Err(error) => return drop(reply.send(Err(error))),
    };
    let mut answer = Ok(());
    // The main thread ends both channels.
    while reply.send(answer).is_ok() && asked.recv().is_ok() {
        answer = verify();
    }
}

fn set_up(index: u64) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    const STACK: usize = 32 << 10;
    LOCAL.set(index << 32);
    let alternate = signal::set_alternate_stack(STACK)?;
    if index == 0 {
        signal::block(&[numbers::extra()])?;
    }
    let mut pending = signals::for_thread()?;
    let mut rounds = 0;
    let thread_id = nix::unistd::gettid();
    // Asked for by system call: CRIU restores no descriptor of a file below /proc/<pid>/task, and the freeze may come while it is open.
    let facts = || -> anyhow::Result<_> { Ok((process::name()?, signal::blocked()?)) };
    let mut first = None;
    Ok(move || {
        same("the thread-local counter", &LOCAL.get(), &((index << 32) + rounds))?;
        same("the thread id", &nix::unistd::gettid(), &thread_id)?;
        same("the alternate stack", &signal::alternate_stack()?, &(alternate, STACK))?;
        pending()?;
        let now = facts()?;
        same("name and blocked signals", &now, first.get_or_insert(now))?;
        rounds += 1;
        LOCAL.set(LOCAL.get() + 1);
        Ok(())
    })
}

#[derive(Default)]
struct Held {
    rounds: u64,
    failure: Option<String>,
}

/// A thread that holds a pattern in its registers nearly all the time.
pub(super) fn registers() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let held = Arc::new((Mutex::new(Held::default()), Condvar::new()));
    thread::Builder::new().name("sc-registers".into()).spawn({
        let held = Arc::clone(&held);
        move || hold_registers(&held)
    })?;
    Ok(move || {
        let (state, turned) = &*held;
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.rounds;
        let waited = turned.wait_timeout_while(state, ANSWER_TIMEOUT, |state| state.rounds == before);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        match &state.failure {
            Some(failure) => bail!("{failure}"),
            None if timeout.timed_out() => bail!("the thread stands still"),
            None => Ok(()),
        }
    })
}

fn hold_registers(held: &(Mutex<Held>, Condvar)) {
    for generation in 0.. {
        let wanted = wanted_registers(generation);
        let got = cpu::hold(&wanted, HOLD_NANOSECONDS);
        let (state, turned) = held;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.rounds += 1;
        if let Err(error) = same("the register file", &got, &wanted) {
            state.failure.get_or_insert(format!("{error:#}"));
        }
        turned.notify_all();
    }
}

fn wanted_registers(generation: u64) -> Registers {
    let words = pattern::words(90, generation, 16 * 8 + 4);
    let width = cpu::vector_words();
    let word = |register: usize, index: usize| if index < width { words[register * 8 + index] } else { 0 };
    /// All exceptions masked, rounding down: not what any program starts with.
    const ROUND_DOWN: u32 = 0x3f80;
    Registers {
        vectors: std::array::from_fn(|register| Vector(std::array::from_fn(|index| word(register, index)))),
        general: std::array::from_fn(|index| words[16 * 8 + index]),
        x87: generation as f64 / 3.0,
        mxcsr: ROUND_DOWN,
    }
}
