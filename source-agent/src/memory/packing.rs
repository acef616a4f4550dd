//! Whether content is packed: when the link is the bottleneck, and then only while that makes it faster.

use std::time::{Duration, Instant};

/// Frames over which it is measured.
const MEASURED: u32 = 16;
/// From this share of time spent waiting for the link, the link sets the pace.
const LINK_BOUND: f64 = 0.5;
/// So many frames on their way, beyond those that the queues hold anyway: the link does not keep up.
const BEHIND: usize = 12;
/// Packing that saves less than this is not worth its time.
const WORTH_PACKING: f64 = 0.9;
/// After packing that was not worth it: frames until it is tried again. Doubled each time.
const PACK_AGAIN: u32 = 64;
/// The longest such pause.
const PACK_AGAIN_MOST: u32 = 4096;
/// The fastest of zstd's ordinary levels: 0.46 GiB/s on one core.
const LEVEL: i32 = 1;

/// See the module.
#[derive(Debug)]
pub(super) struct Packing {
    /// From the first frame on: on a slow link those that are on their way before it is known cannot be taken back.
    on: bool,
    never: bool,
    frames: u32,
    bytes: usize,
    waited: Duration,
    since: Option<Instant>,
    pause: u32,
    next_pause: u32,
    /// Bytes a second without packing, when the link set the pace.
    plain_pace: Option<f64>,
}

impl Packing {
    pub(super) fn new(may_pack: bool) -> Self {
        Self {
            on: may_pack,
            never: !may_pack,
            frames: 0,
            bytes: 0,
            waited: Duration::ZERO,
            since: None,
            pause: 0,
            next_pause: PACK_AGAIN,
            plain_pace: None,
        }
    }

    /// Takes the measure of one more frame: its bytes before packing, how long the link was waited for, and how many frames are on
    /// their way now.
    pub(super) fn note(&mut self, bytes: usize, waited: Duration, in_flight: usize) {
        self.waited += waited;
        self.bytes += bytes;
        self.frames += 1;
        let since = *self.since.get_or_insert_with(Instant::now);
        self.pause = self.pause.saturating_sub(1);
        if self.frames >= MEASURED {
            self.decide(since.elapsed(), in_flight);
            (self.frames, self.bytes, self.waited, self.since) = (0, 0, Duration::ZERO, Some(Instant::now()));
        }
    }

    fn decide(&mut self, took: Duration, in_flight: usize) {
        let seconds = took.as_secs_f64().max(1e-9);
        let pace = self.bytes as f64 / seconds;
        let share = self.waited.as_secs_f64() / seconds;
        let behind = in_flight > BEHIND || share > LINK_BOUND;
        if self.on {
            if self.plain_pace.is_some_and(|plain| pace < plain) {
                self.give_up();
            } else {
                // Packed frames are made more slowly than sent on all but slow links.
                self.on = behind || share > LINK_BOUND / 10.0;
            }
        } else if behind && self.pause == 0 {
            // What the first frames say of the pace is how fast the queues fill.
            self.plain_pace = (share > LINK_BOUND).then_some(pace);
            self.on = true;
        }
    }

    fn give_up(&mut self) {
        self.on = false;
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(PACK_AGAIN_MOST);
    }

    /// The content packed, if it is to travel so.
    pub(super) fn pack(&mut self, raw: &[u8]) -> Option<Vec<u8>> {
        if !self.on || self.never || raw.is_empty() {
            return None;
        }
        let packed = zstd::bulk::compress(raw, LEVEL).ok()?;
        if packed.len() as f64 > raw.len() as f64 * WORTH_PACKING {
            self.give_up();
            return None;
        }
        Some(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_link_that_keeps_up_gets_content_as_it_is() {
        let mut packing = Packing::new(true);
        assert!(packing.pack(&[7; 4096]).is_some());
        packing.frames = MEASURED;
        packing.decide(16 * MS, 4);
        assert!(packing.pack(&[7; 4096]).is_none());
    }

    #[test]
    fn a_link_that_falls_behind_gets_it_packed() {
        let mut packing = Packing::new(true);
        packing.decide(16 * MS, 40);
        assert!(packing.on);
        packing.decide(16 * MS, 4);
        assert!(!packing.on);
        packing.decide(16 * MS, 40);
        assert!(packing.on);
        let mut never = Packing::new(false);
        never.decide(16 * MS, 40);
        assert!(never.pack(&[7; 4096]).is_none());
    }

    #[test]
    fn packing_that_is_slower_or_saves_nothing_is_given_up_for_longer_and_longer() {
        let mut packing = Packing::new(true);
        packing.on = false;
        (packing.bytes, packing.waited) = (16 << 20, 15 * MS);
        packing.decide(16 * MS, 4);
        assert!(packing.on && packing.plain_pace.is_some());
        packing.decide(32 * MS, 40);
        assert_eq!((packing.on, packing.pause), (false, PACK_AGAIN));
        packing.on = true;
        let noise: Vec<u8> = (0..4096u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        let random: Vec<u8> = noise
            .iter()
            .scan(1u64, |state, byte| {
                *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(*byte) | 1);
                Some((*state >> 33) as u8)
            })
            .collect();
        assert!(packing.pack(&random).is_none());
        assert_eq!((packing.on, packing.pause), (false, 2 * PACK_AGAIN));
    }
}
