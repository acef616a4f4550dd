//! What stays of a container that has moved: its files, unmounted and marked as stale.

use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_common::description::{Description, Network, Rootfs, VolumeMode};
use longhaul_common::moved::Moved;
use longhaul_common::net::forget_connections;
use longhaul_common::runtime::Runtime;
use nix::mount::{MntFlags, umount2};

/// Clears the source after a commit. Nothing here can fail the migration: what can't be done is logged.
pub async fn retire(runtime: &Runtime, container: &Description, migration: &str, to: &str) {
    // CRIU and the runtime have done this, unless one of them was killed meanwhile.
    if runtime.state(&container.id).await.is_ok()
        && let Err(error) = runtime.delete(&container.id).await
    {
        tracing::warn!(%error, "the runtime still lists the container that moved");
    }
    forget_connections(container.addresses());
    if let Network::Own { path: Some(path), .. } = &container.network {
        unmount(Path::new(path));
        let _ = std::fs::remove_file(path);
    }
    let mut paths = vec![PathBuf::from(&container.bundle)];
    match &container.rootfs {
        Rootfs::Overlay { merged, upper, work, .. } => {
            unmount(Path::new(merged));
            paths.extend([merged, upper, work].map(PathBuf::from));
        }
        Rootfs::Plain { path } => paths.push(path.into()),
    }
    let copied = container.volumes.iter().filter(|volume| volume.mode == VolumeMode::Copy);
    paths.extend(copied.map(|volume| PathBuf::from(&volume.source)));
    paths.extend(container.copied_files().into_iter().map(PathBuf::from));
    let moved = Moved { container: container.id.clone(), migration: migration.to_owned(), to: to.to_owned(), paths };
    if let Err(error) = moved.write(Path::new(&container.bundle)) {
        tracing::warn!(%error, bundle = container.bundle, "can't mark the stale copy: a return of the container will be refused");
    }
}

/// Removes a container's cgroups. The runtime does, unless the container's last task takes longer than 150 ms to be gone (runc 1.1,
/// `RemovePaths`).
pub async fn remove_cgroups(mut dirs: Vec<PathBuf>) {
    const TRIES: usize = 100;
    for _ in 0..TRIES {
        dirs.retain(|dir| std::fs::remove_dir(dir).is_err_and(|error| error.kind() != std::io::ErrorKind::NotFound));
        if dirs.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tracing::warn!(?dirs, "cgroups of the container that moved are still in use");
}

fn unmount(path: &Path) {
    if let Err(errno) = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        tracing::debug!(path = %path.display(), %errno, "nothing to unmount");
    }
}
