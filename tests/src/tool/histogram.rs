//! Latency percentiles in constant memory, however long a client runs.

/// Each power of two is split in this many buckets, so a percentile is off by at most 1/64.
const SUB_BITS: u32 = 6;

/// A log-linear histogram of microseconds.
#[derive(Default)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// Counts one value.
    pub(crate) fn record(&mut self, micros: u64) {
        let bucket = bucket_of(micros);
        if bucket >= self.counts.len() {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
    }

    /// The value below or at which `permille` of 1000 values lie; 0 if there are none.
    pub(crate) fn permille(&self, permille: u64) -> u64 {
        let wanted = (self.total * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return lowest_of(bucket);
            }
        }
        0
    }
}

fn bucket_of(value: u64) -> usize {
    let exponent = value.max(1).ilog2().saturating_sub(SUB_BITS);
    ((u64::from(exponent) << SUB_BITS) + (value >> exponent)) as usize
}

fn lowest_of(bucket: usize) -> u64 {
    let sub = 1 << SUB_BITS;
    let exponent = (bucket >> SUB_BITS).saturating_sub(1);
    if exponent == 0 { bucket as u64 } else { ((bucket - (exponent << SUB_BITS)) as u64).max(sub) << exponent }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_64th() {
        let mut histogram = Histogram::default();
        for value in 1..=100_000 {
            histogram.record(value);
        }
        for (permille, exact) in [(500, 50_000_u64), (990, 99_000), (999, 99_900), (1000, 100_000)] {
            let got = histogram.permille(permille);
            assert!(got <= exact && exact - got <= exact / 64 + 1, "{permille}: {got} for {exact}");
        }
    }

    #[test]
    fn buckets_are_consecutive_and_begin_where_they_say() {
        let mut last = 0;
        for value in 0..1_000_000 {
            let bucket = bucket_of(value);
            assert!(bucket == last || bucket == last + 1, "{value}");
            assert!(lowest_of(bucket) <= value && bucket_of(lowest_of(bucket)) == bucket, "{value}");
            last = bucket;
        }
    }
}
