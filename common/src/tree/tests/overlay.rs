//! A real overlay: changes made through it, its upper layer copied, and both merged trees compared.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Mounts an overlay of `lower` and `upper` in the calling thread's mount namespace.
fn mount_overlay(lower: &Path, upper: &Path, at: &Path) -> nix::Result<TempDir> {
    let work = tempfile::tempdir_in(upper.parent().unwrap()).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={},redirect_dir=on,metacopy=off",
        lower.display(),
        upper.display(),
        work.path().display()
    );
    mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
    Ok(work)
}

fn lower_layer(lower: &Path) {
    fs::create_dir_all(lower.join("etc/conf.d")).unwrap();
    fs::create_dir_all(lower.join("usr/share/doc")).unwrap();
    for name in ["etc/passwd", "etc/conf.d/one", "etc/conf.d/two", "usr/share/doc/readme", "usr/tool"] {
        fs::write(lower.join(name), format!("lower {name}")).unwrap();
    }
}

fn first_changes(merged: &Path) {
    fs::write(merged.join("etc/passwd"), "changed").unwrap();
    fs::remove_file(merged.join("etc/conf.d/one")).unwrap();
    fs::set_permissions(merged.join("usr/tool"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::write(merged.join("new"), "new").unwrap();
    fs::hard_link(merged.join("new"), merged.join("usr/new link")).unwrap();
}

fn later_changes(merged: &Path) {
    fs::remove_dir_all(merged.join("etc/conf.d")).unwrap();
    fs::create_dir(merged.join("etc/conf.d")).unwrap();
    fs::write(merged.join("etc/conf.d/three"), "above an opaque directory").unwrap();
    fs::rename(merged.join("usr/share"), merged.join("usr/moved")).unwrap();
    fs::write(merged.join("usr/moved/doc/more"), "more").unwrap();
    fs::remove_file(merged.join("etc/passwd")).unwrap();
    symlink("conf.d/three", merged.join("etc/passwd")).unwrap();
    fs::write(merged.join("new"), "changed through one name").unwrap();
}

#[test]
fn a_copied_upper_layer_shows_the_same_merged_tree() {
    // A thread can have a mount namespace of its own; it ends with its mounts.
    let run = std::thread::spawn(|| {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
            println!("not tested: this user may not make a mount namespace: {error}");
            return;
        }
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let mut pair = Pair::new(TreeKind::Upper);
        let (lower, merged, merged_copy) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        lower_layer(lower.path());
        let _work = match mount_overlay(lower.path(), pair.source.path(), merged.path()) {
            Ok(work) => work,
            Err(error) => {
                println!("not tested: no overlay can be mounted in {}: {error}", merged.path().display());
                return;
            }
        };
        first_changes(merged.path());
        pair.pass();
        later_changes(merged.path());
        pair.last_pass();
        pair.assert_equal();
        let redirect = xattr::get(pair.copied("usr/moved"), "trusted.overlay.redirect").unwrap();
        assert!(redirect.is_some(), "the layer has a renamed directory");
        let opaque = xattr::get(pair.copied("etc/conf.d"), "trusted.overlay.opaque").unwrap();
        assert_eq!(opaque.as_deref(), Some(&b"y"[..]));
        let _work_of_copy = mount_overlay(lower.path(), pair.copy.path(), merged_copy.path()).unwrap();
        let source = snapshot(merged.path(), TreeKind::Plain);
        assert_same(&source, &snapshot(merged_copy.path(), TreeKind::Plain));
        assert!(source.contains_key(Path::new("usr/moved/doc/readme")));
        assert!(!source.contains_key(Path::new("etc/conf.d/two")));
        for mounted in [&merged, &merged_copy] {
            nix::mount::umount2(mounted.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    });
    run.join().unwrap();
}

#[test]
fn a_mount_in_the_tree_is_recorded_empty() {
    let run = std::thread::spawn(|| {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
            println!("not tested: this user may not make a mount namespace: {error}");
            return;
        }
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("secret"), "of the host").unwrap();
        let mut pair = Pair::new(TreeKind::Plain);
        fs::create_dir(pair.path("volume")).unwrap();
        fs::write(pair.path("file"), "").unwrap();
        let bind = |from: &Path, to: &Path| {
            mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        };
        bind(elsewhere.path(), &pair.path("volume"));
        bind(&elsewhere.path().join("secret"), &pair.path("file"));
        let stats = pair.pass();
        assert_eq!((stats.mounts_skipped, stats.bytes_sent), (2, 0));
        assert_eq!(pair.pass().mounts_skipped, 2);
        assert!(pair.copied("volume").is_dir());
        assert!(!pair.copied("volume/secret").exists());
        assert_eq!(fs::metadata(pair.copied("file")).unwrap().len(), 0);
        for mounted in ["volume", "file"] {
            nix::mount::umount2(&pair.path(mounted), nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    });
    run.join().unwrap();
}
