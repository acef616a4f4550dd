//! Large files that are read only where they may have changed.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use super::super::{UNIT, Watch, can_be_watched};
use super::*;

/// Counts what it is told to.
#[derive(Default)]
struct Told(Mutex<HashMap<u64, u64>>);

impl Told {
    fn changed(&self, unit: u64) {
        *self.0.lock().unwrap().entry(unit).or_default() += 1;
    }
}

impl Watch for Told {
    fn count(&self, _: u64, unit: u64) -> u64 {
        self.0.lock().unwrap().get(&unit).copied().unwrap_or(0)
    }
}

/// A file of four units and a half, on a filesystem that can be watched; nothing, where there is none.
fn watched() -> Option<(Pair, Arc<Told>)> {
    let mut pair = Pair::new(TreeKind::Plain);
    let told = Arc::new(Told::default());
    can_be_watched(fs::File::open(pair.source.path()).unwrap()).then(|| {
        fs::write(pair.path("table"), vec![7; (UNIT * 9 / 2) as usize]).unwrap();
        pair.scanner.watched_by(told.clone());
        settle(pair.source.path());
        pair.pass();
        (pair, told)
    })
}

fn write(pair: &Pair, at: u64) {
    OpenOptions::new().write(true).open(pair.path("table")).unwrap().write_all_at(b"new", at).unwrap();
}

#[test]
fn what_has_not_changed_is_not_read() {
    let Some((mut pair, told)) = watched() else { return };
    write(&pair, UNIT + 5);
    write(&pair, 3 * UNIT);
    told.changed(3);
    let stats = pair.last_pass();
    let copy = fs::read(pair.copied("table")).unwrap();
    // Nobody told of the other one.
    assert_eq!((stats.bytes_sent, &copy[3 * UNIT as usize..][..3]), (64 << 10, &b"new"[..]));
    assert_eq!(copy[UNIT as usize + 5], 7);
}

#[test]
fn what_was_read_while_frozen_is_read_again() {
    let Some((mut pair, told)) = watched() else { return };
    write(&pair, UNIT);
    told.changed(1);
    pair.last_pass();
    // Its page is dirty still: nobody tells of the next change.
    write(&pair, UNIT + 100);
    pair.last_pass();
    pair.assert_equal();
}

#[test]
fn a_unit_with_holes_and_a_tail_that_grew_are_read() {
    let Some((mut pair, _)) = watched() else { return };
    OpenOptions::new().write(true).open(pair.path("table")).unwrap().set_len(UNIT * 6).unwrap();
    settle(pair.source.path());
    pair.pass();
    write(&pair, UNIT * 6 - 100);
    write(&pair, UNIT * 9 / 2 - 1);
    pair.last_pass();
    pair.assert_equal();
}
