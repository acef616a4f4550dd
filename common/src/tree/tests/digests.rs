//! What changes a layer's digest, and what does not.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::time::UNIX_EPOCH;

use super::super::digest;
use super::*;

fn layer() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/f"), vec![5; 600_000]).unwrap();
    symlink("f", dir.path().join("d/link")).unwrap();
    dir
}

#[test]
fn equal_trees_have_equal_digests_whenever_they_were_made() {
    let (one, other) = (layer(), layer());
    File::open(other.path().join("d/f")).unwrap().set_modified(UNIX_EPOCH).unwrap();
    xattr::set(other.path().join("d"), "trusted.overlay.origin", b"handle").unwrap();
    assert_eq!(digest(one.path()).unwrap(), digest(other.path()).unwrap());
    assert_eq!(digest(one.path()).unwrap().to_string().len(), 64);
}

#[test]
fn every_other_difference_changes_the_digest() {
    let changes: [fn(&Path); 8] = [
        |dir| fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).unwrap(),
        |dir| fs::set_permissions(dir.join("d/f"), fs::Permissions::from_mode(0o4755)).unwrap(),
        |dir| chown(dir.join("d"), Some(1), None).unwrap(),
        |dir| chown(dir.join("d/f"), None, Some(1)).unwrap(),
        |dir| fs::write(dir.join("d/f"), vec![6; 600_000]).unwrap(),
        |dir| fs::rename(dir.join("d/f"), dir.join("d/g")).unwrap(),
        |dir| xattr::set(dir.join("d"), "trusted.overlay.opaque", b"y").unwrap(),
        |dir| {
            fs::remove_file(dir.join("d/link")).unwrap();
            symlink("g", dir.join("d/link")).unwrap();
        },
    ];
    let mut digests = vec![digest(layer().path()).unwrap()];
    for change in changes {
        let changed = layer();
        change(changed.path());
        let changed = digest(changed.path()).unwrap();
        assert!(!digests.contains(&changed));
        digests.push(changed);
    }
}

#[test]
fn a_copied_tree_has_the_digest_of_its_source() {
    let mut pair = Pair::new(TreeKind::Upper);
    fs::create_dir_all(pair.path("x/y")).unwrap();
    fs::write(pair.path("x/y/z"), "z").unwrap();
    fs::hard_link(pair.path("x/y/z"), pair.path("w")).unwrap();
    pair.last_pass();
    assert_eq!(digest(pair.source.path()).unwrap(), digest(pair.copy.path()).unwrap());
}
