//! Where a container's root filesystem is.

use std::path::{Path, PathBuf};

use longhaul_common::description::{Layer, OVERLAY_OPTIONS, Rootfs};
use longhaul_common::layers::LayerDigests;
use serde_json::Value;

use super::{InspectError, mount_lines, read_proc};

/// Finds the layers of an overlay, or the directory.
pub(super) fn find(oci: &Value, bundle: &Path, digests: &LayerDigests) -> Result<Rootfs, InspectError> {
    let path = oci["root"]["path"].as_str().unwrap_or("rootfs");
    let wrap = |why: String| InspectError::Rootfs { path: path.to_owned(), why };
    let root = bundle.join(path).canonicalize().map_err(|error| wrap(error.to_string()))?;
    let merged = root.to_str().ok_or_else(|| wrap("its path is not UTF-8".to_owned()))?.to_owned();
    let mounts = read_proc("/proc/self/mountinfo")?;
    let Some(mount) = mount_lines(&mounts).filter(|mount| mount.mount_point == merged).last() else {
        return Ok(Rootfs::Plain { path: merged });
    };
    if mount.fstype != "overlay" {
        return Ok(Rootfs::Plain { path: merged });
    }
    let overlay = Overlay::parse(mount.super_options);
    let (Some(upper), Some(work)) = (overlay.upper, overlay.work) else {
        return Err(wrap("its overlay has no upper layer: mount it with upperdir and workdir".to_owned()));
    };
    let lowers = overlay
        .lowers
        .into_iter()
        .map(|lower| {
            let real =
                Path::new(&lower).canonicalize().map_err(|error| wrap(format!("lower layer {lower}: {error}")))?;
            Ok(Layer { digest: digests.digest(&real)?, path: display(&real) })
        })
        .collect::<Result<Vec<_>, InspectError>>()?;
    Ok(Rootfs::Overlay { merged, lowers, upper, work, options: overlay.options })
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

/// The mount options of an overlay.
#[derive(Debug, Default, PartialEq, Eq)]
struct Overlay {
    lowers: Vec<String>,
    upper: Option<String>,
    work: Option<String>,
    options: Vec<String>,
}

impl Overlay {
    fn parse(super_options: &str) -> Self {
        let mut overlay = Self::default();
        for option in super_options.split(',') {
            match option.split_once('=') {
                Some(("lowerdir", dirs)) => overlay.lowers.extend(dirs.split(':').map(str::to_owned)),
                // The form of the new mount API, one layer each.
                Some(("lowerdir+", dir)) => overlay.lowers.push(dir.to_owned()),
                Some(("upperdir", dir)) => overlay.upper = Some(dir.to_owned()),
                Some(("workdir", dir)) => overlay.work = Some(dir.to_owned()),
                _ if OVERLAY_OPTIONS.contains(&option) => overlay.options.push(option.to_owned()),
                _ => {}
            }
        }
        overlay.lowers.retain(|lower| !PathBuf::from(lower).as_os_str().is_empty());
        overlay
    }
}

#[cfg(test)]
mod tests {
    use super::Overlay;

    #[test]
    fn both_forms_of_lower_layers_are_read() {
        let overlay = Overlay::parse("rw,lowerdir=/a:/b,upperdir=/u,workdir=/w,metacopy=on,uuid=on");
        assert_eq!(overlay.lowers, ["/a", "/b"]);
        assert_eq!(overlay.options, ["metacopy=on"]);
        assert_eq!(Overlay::parse("lowerdir+=/a,lowerdir+=/b").lowers, ["/a", "/b"]);
    }
}
