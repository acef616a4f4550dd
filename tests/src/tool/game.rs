//! A small game server: a 60 Hz world over UDP whose state a client can verify.
//!
//! Client → server: `input` (u64 LE), the number of the client's input, 0 to join. Server → client at each tick:
//! tick, inputs applied, highest input, position (u64 LE each). The position is the sum of all input numbers applied.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::gap::{Events, GapMeter};
use super::pace::RunTime;
use super::report::{self, StatusFile};

/// 60 ticks a second, as first-person games have.
const TICK: Duration = Duration::from_nanos(16_666_667);
/// Inputs a second: one each two ticks.
const INPUT_INTERVAL: Duration = Duration::from_millis(33);
/// A silent client leaves the game after this many ticks (20 s): longer than any downtime the lab accepts.
const LEAVE_AFTER_TICKS: u64 = 1200;

#[derive(Args, Debug)]
pub(crate) struct ServerOptions {
    /// The address to serve
    #[arg(long)]
    listen: SocketAddr,
    #[command(flatten)]
    run_time: RunTime,
}

#[derive(Args, Debug)]
pub(crate) struct ClientOptions {
    /// The server
    #[arg(long)]
    addr: SocketAddr,
    /// Rewritten every 100 ms with {snapshots, tick}
    #[arg(long)]
    status_file: Option<PathBuf>,
    #[command(flatten)]
    events: Events,
    #[command(flatten)]
    run_time: RunTime,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Player {
    applied: u64,
    highest: u64,
    position: u64,
    heard_at_tick: u64,
}

impl Player {
    fn apply(&mut self, input: u64, tick: u64) {
        self.heard_at_tick = tick;
        if input > self.highest {
            self.highest = input;
            self.applied += 1;
            self.position = self.position.wrapping_add(input);
        }
    }
}

/// Runs the world until the run is over.
pub(crate) fn serve(options: &ServerOptions) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let socket = UdpSocket::bind(options.listen).with_context(|| format!("listen on {}", options.listen))?;
    let mut players: HashMap<SocketAddr, Player> = HashMap::new();
    let mut tick = 0_u64;
    while !deadline.is_over() {
        tick += 1;
        gather_inputs(&socket, &mut players, tick)?;
        players.retain(|_, player| tick - player.heard_at_tick < LEAVE_AFTER_TICKS);
        for (peer, player) in &players {
            let snapshot = [tick, player.applied, player.highest, player.position].map(u64::to_le_bytes).concat();
            // A client that went away is no reason to stop the world.
            let _ = socket.send_to(&snapshot, peer);
        }
    }
    report::publish(&json!({"ticks": tick, "players": players.len()}), None)?;
    Ok(true)
}

fn gather_inputs(socket: &UdpSocket, players: &mut HashMap<SocketAddr, Player>, tick: u64) -> anyhow::Result<()> {
    let until = Instant::now() + TICK;
    let mut datagram = [0; 8];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        socket.set_read_timeout(Some(left))?;
        if let Ok((8, peer)) = socket.recv_from(&mut datagram) {
            players.entry(peer).or_default().apply(u64::from_le_bytes(datagram), tick);
        }
    }
}

/// What a client concludes from its snapshots.
#[derive(Default)]
struct View {
    snapshots: u64,
    tick: u64,
    highest: u64,
    applied: u64,
    ticks_back: u64,
    state_lost: u64,
}

impl View {
    /// Ticks may be skipped (lost datagrams), and what the server has applied must not shrink. Without loss the
    /// position is a closed formula.
    fn take(&mut self, [tick, applied, highest, position]: [u64; 4]) {
        self.snapshots += 1;
        if tick <= self.tick {
            self.ticks_back += 1;
        }
        let complete = applied == highest;
        let wrong_position = complete && position != highest * (highest + 1) / 2;
        if applied < self.applied || highest < self.highest || wrong_position {
            self.state_lost += 1;
        }
        (self.tick, self.highest, self.applied) = (tick, highest, applied);
    }
}

/// Plays until the run is over; healthy means that ticks only went forward and no state was lost.
pub(crate) fn play(options: &ClientOptions) -> anyhow::Result<bool> {
    let deadline = options.run_time.start()?;
    let any = if options.addr.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(options.addr).with_context(|| format!("connect to {}", options.addr))?;
    let (snapshots, tick) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let status = StatusFile::start(options.status_file.as_deref(), {
        let (snapshots, tick) = (Arc::clone(&snapshots), Arc::clone(&tick));
        move || json!({"snapshots": snapshots.load(Ordering::Relaxed), "tick": tick.load(Ordering::Relaxed)})
    })?;
    let mut view = View::default();
    let mut gap = GapMeter::new(options.events);
    let mut input = 0_u64;
    let mut next_input = Instant::now();
    let mut datagram = [0; 64];
    while !deadline.is_over() {
        let left = next_input.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // Lost inputs are part of the game.
            let _ = socket.send(&input.to_le_bytes());
            input += 1;
            next_input = Instant::now() + INPUT_INTERVAL;
            continue;
        }
        socket.set_read_timeout(Some(left))?;
        let Ok(length) = socket.recv(&mut datagram) else { continue };
        if let (&[tick_now, applied, highest, position], []) = datagram[..length].as_chunks::<8>() {
            gap.mark();
            view.take([tick_now, applied, highest, position].map(u64::from_le_bytes));
            snapshots.store(view.snapshots, Ordering::Relaxed);
            tick.store(view.tick, Ordering::Relaxed);
        }
    }
    drop(status);
    gap.finish();
    let value = json!({
        "inputs_sent": input,
        "inputs_applied": view.applied,
        "snapshots": view.snapshots,
        "last_tick": view.tick,
        "ticks_back": view.ticks_back,
        "state_lost": view.state_lost,
        "longest_gap_ms": gap.longest_ms(),
        "gap_at_unix_ms": gap.at_unix_ms(),
    });
    report::publish(&value, None)?;
    Ok(view.snapshots > 0 && view.ticks_back == 0 && view.state_lost == 0)
}

#[cfg(test)]
mod tests {
    use super::{Player, View};

    #[test]
    fn a_player_applies_each_input_once() {
        let mut player = Player::default();
        for input in [0, 1, 2, 2, 3] {
            player.apply(input, 9);
        }
        assert_eq!(player, Player { applied: 3, highest: 3, position: 6, heard_at_tick: 9 });
    }

    #[test]
    fn a_server_that_forgot_is_noticed() {
        let mut view = View::default();
        view.take([10, 2, 2, 3]);
        view.take([12, 3, 3, 6]);
        assert_eq!((view.ticks_back, view.state_lost), (0, 0));
        view.take([11, 1, 1, 1]);
        assert_eq!((view.ticks_back, view.state_lost), (1, 1));
    }
}
