//! Whether content is packed: where the link is slower than packing is.

/// Frames before it is known how fast the link is. On a slow one those that are on their way by then cannot be taken back, so they are
/// packed.
const UNKNOWN: u32 = 16;
/// A link that carries less than this is worth packing for, in bytes a second and stream: zstd's level 1 packs 460 MiB/s on one core,
/// which encryption and reading need as well.
const SLOW: f64 = 150.0 * (1 << 20) as f64;
/// Packing that saves less than this is not worth its time.
const WORTH_PACKING: f64 = 0.9;
/// After packing that was not worth it: frames until it is tried again. Doubled each time.
const PACK_AGAIN: u32 = 16;
/// The longest such pause.
const PACK_AGAIN_MOST: u32 = 512;
/// The fastest of zstd's ordinary levels.
const LEVEL: i32 = 1;

/// See the module.
#[derive(Debug)]
pub(super) struct Packing {
    may_pack: bool,
    link_bound: bool,
    frames: u32,
    pause: u32,
    next_pause: u32,
}

impl Packing {
    pub(super) fn new(may_pack: bool) -> Self {
        Self { may_pack, link_bound: may_pack, frames: 0, pause: 0, next_pause: PACK_AGAIN }
    }

    /// One more frame was made. `pace` is what the link carries, in bytes a second, as far as it has ever been the bottleneck.
    pub(super) fn note(&mut self, pace: Option<f64>) {
        self.frames = self.frames.saturating_add(1);
        self.pause = self.pause.saturating_sub(1);
        self.link_bound = self.may_pack && pace.map_or(self.frames < UNKNOWN, |pace| pace < SLOW);
    }

    /// Whether what saves bytes saves time.
    pub(super) fn is_link_bound(&self) -> bool {
        self.link_bound
    }

    /// Packs what is known to pack well, whatever the content before it did.
    pub(super) fn pack_differences(&self, raw: &[u8]) -> Option<Vec<u8>> {
        zstd::bulk::compress(raw, LEVEL).ok().filter(|packed| packed.len() < raw.len())
    }

    /// The content packed, if it is to travel so.
    pub(super) fn pack(&mut self, raw: &[u8]) -> Option<Vec<u8>> {
        if !self.link_bound || self.pause > 0 || raw.is_empty() {
            return None;
        }
        let packed = zstd::bulk::compress(raw, LEVEL).ok()?;
        if packed.len() as f64 > raw.len() as f64 * WORTH_PACKING {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(PACK_AGAIN_MOST);
            return None;
        }
        self.next_pause = PACK_AGAIN;
        Some(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: [u8; 4096] = [7; 4096];

    #[test]
    fn a_fast_link_gets_content_as_it_is_and_a_slow_one_packed() {
        let mut packing = Packing::new(true);
        assert!(packing.pack(&TEXT).is_some(), "what is sent before it is known");
        packing.note(Some(SLOW * 2.0));
        assert!(packing.pack(&TEXT).is_none() && !packing.is_link_bound());
        packing.note(Some(SLOW / 2.0));
        assert!(packing.pack(&TEXT).is_some() && packing.is_link_bound());
        // A link that was never the bottleneck is a fast one.
        (0..UNKNOWN).for_each(|_| packing.note(None));
        assert!(packing.pack(&TEXT).is_none());
        let mut never = Packing::new(false);
        never.note(Some(SLOW / 2.0));
        assert!(never.pack(&TEXT).is_none() && !never.is_link_bound());
    }

    #[test]
    fn content_that_does_not_pack_is_left_alone_for_longer_and_longer() {
        let mut packing = Packing::new(true);
        let mut state = 1u64;
        let random: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as u8
            })
            .collect();
        for pause in [PACK_AGAIN, 2 * PACK_AGAIN] {
            assert!(packing.pack(&random).is_none());
            assert_eq!(packing.pause, pause);
            assert!(packing.pack(&TEXT).is_none(), "not tried again at once");
            (0..pause).for_each(|_| packing.note(Some(SLOW / 2.0)));
        }
        assert!(packing.pack(&TEXT).is_some());
        assert_eq!(packing.next_pause, PACK_AGAIN);
    }
}
