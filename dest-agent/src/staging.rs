//! Every path, mount and interface made for an arriving container, and taking them away again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use longhaul_common::config::Paths;
use longhaul_common::description::{Description, Network, Rootfs, TMPFS_FLAGS, Tmpfs, TreeRole};
use longhaul_common::moved::Moved;
use longhaul_common::net::{self, BuiltNamespace, NetError, Port};
use longhaul_common::tree::TreeKind;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::preflight::{Findings, written_paths};

/// Where layers that were sent are kept, by digest.
pub fn layer_store(paths: &Paths) -> PathBuf {
    paths.state.join("layers")
}

/// A step of staging that failed.
#[derive(Debug, Error)]
pub enum StagingError {
    /// A path.
    #[error("can't {operation} {path}")]
    Path {
        /// What was tried.
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The network.
    #[error("can't rebuild the container's network")]
    Network(#[from] NetError),
}

fn path_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StagingError {
    let path = path.to_owned();
    move |source| StagingError::Path { operation, path, source }
}

/// Where a tree that is pushed goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The directory it is written beneath.
    pub root: PathBuf,
    /// How it is written.
    pub kind: TreeKind,
    /// The one name that may be written, where the tree is a single file.
    pub only: Option<Vec<u8>>,
    /// The digest it must have in the end, where it is a layer.
    pub digest: Option<String>,
}

/// What was made, in the order it was made: enough to take it away after the agent was killed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Made {
    /// Directories and files to remove.
    pub paths: Vec<PathBuf>,
    /// Mounts to undo, before the paths.
    pub mounts: Vec<PathBuf>,
    /// The memory directory of images and sockets.
    pub run: PathBuf,
}

/// One arrival's paths.
#[derive(Debug)]
pub struct Staging {
    /// What will have to be taken away if it does not stay.
    pub made: Made,
    /// Where the trees go, by their number; nothing for a layer that is here already.
    pub targets: Vec<Option<Target>>,
    /// The rebuilt network.
    pub network: Option<BuiltNamespace>,
    /// Where layers are here, topmost first.
    layers: Vec<PathBuf>,
}

impl Staging {
    /// Plans an arrival: nothing is touched yet.
    pub fn plan(paths: &Paths, migration: &str, container: &Description, findings: &Findings) -> Self {
        let store = layer_store(paths);
        let run = paths.run.join("dest").join(migration);
        let mut layers = Vec::new();
        let targets = container
            .trees()
            .into_iter()
            .map(|tree| {
                let root = PathBuf::from(&tree.path);
                match tree.role {
                    TreeRole::Upper => Some(Target { root, kind: TreeKind::Upper, only: None, digest: None }),
                    TreeRole::Plain | TreeRole::Volume => {
                        Some(Target { root, kind: TreeKind::Plain, only: None, digest: None })
                    }
                    TreeRole::Tmpfs(index) => {
                        let root = tmpfs_path(&run, index);
                        Some(Target { root, kind: TreeKind::Plain, only: None, digest: None })
                    }
                    TreeRole::File => {
                        let only = root.file_name().map(|name| std::os::unix::ffi::OsStrExt::as_bytes(name).to_vec());
                        let root = root.parent().unwrap_or(Path::new("/")).to_owned();
                        Some(Target { root, kind: TreeKind::Plain, only, digest: None })
                    }
                    TreeRole::Layer(index) => {
                        let digest = lower_digest(container, index);
                        if let Some(here) = findings.layers.get(&digest) {
                            layers.push(here.clone());
                            return None;
                        }
                        layers.push(store.join(&digest));
                        let root = store.join(format!("{digest}.{migration}.partial"));
                        // A lower layer may hold whiteouts of those below it.
                        Some(Target { root, kind: TreeKind::Upper, only: None, digest: Some(digest) })
                    }
                }
            })
            .collect();
        let made = Made { run, ..Made::default() };
        Self { made, targets, network: None, layers }
    }

    /// What will be made, for the journal, before it is made.
    pub fn intent(&self, container: &Description) -> Made {
        let mut made = self.made.clone();
        made.paths = written_paths(container).into_iter().map(PathBuf::from).collect();
        let partials = self.targets.iter().flatten().filter(|target| target.digest.is_some());
        made.paths.extend(partials.map(|target| target.root.clone()));
        made.mounts.extend(self.mount_point(container));
        made.mounts.extend((0..container.tmpfs.len()).map(|index| self.tmpfs(index)));
        made
    }

    fn mount_point(&self, container: &Description) -> Option<PathBuf> {
        match &container.rootfs {
            Rootfs::Overlay { merged, .. } => Some(PathBuf::from(merged)),
            Rootfs::Plain { .. } => Some(self.root_bind()),
        }
    }

    /// Makes directories, the bundle and the quiet network. The stale copy of an earlier stay gives way.
    pub fn prepare(&mut self, container: &Description, bridges: &BTreeMap<String, String>) -> Result<(), StagingError> {
        if let Some(stale) = Moved::read(Path::new(&container.bundle)) {
            // The bundle itself, named first, goes last: while it stands, so does the mark that says what may be replaced.
            for path in written_paths(container).iter().rev().map(Path::new) {
                if stale.covers(&container.id, path) {
                    remove_path(path);
                }
            }
        }
        for path in written_paths(container) {
            self.made.paths.push(path.into());
        }
        self.make_dir(Path::new(&container.bundle), 0o711)?;
        if let Rootfs::Overlay { merged, upper, work, .. } = &container.rootfs {
            for dir in [merged, upper, work] {
                self.make_dir(Path::new(dir), 0o755)?;
            }
        }
        let roots: Vec<PathBuf> = self.targets.iter().flatten().map(|target| target.root.clone()).collect();
        for root in roots {
            self.make_dir(&root, 0o755)?;
        }
        for target in self.targets.iter().flatten().filter(|target| target.digest.is_some()) {
            self.made.paths.push(target.root.clone());
        }
        for (index, tmpfs) in container.tmpfs.iter().enumerate() {
            self.mount_tmpfs(index, tmpfs)?;
        }
        let config = Path::new(&container.bundle).join("config.json");
        fs::write(&config, &container.config).map_err(path_error("write", &config))?;
        let images = self.images();
        fs::create_dir_all(&images).map_err(path_error("create", &images))?;
        fs::create_dir_all(self.work()).map_err(path_error("create", &self.work()))?;
        if let Network::Own { path, namespace } = &container.network {
            // Tracked during an earlier stay, with windows of that time.
            net::forget_connections(container.addresses());
            let built = net::build(namespace, bridges)?;
            if let Some(path) = path {
                self.pin(&built, Path::new(path))?;
            }
            self.network = Some(built);
        }
        Ok(())
    }

    fn mount_tmpfs(&mut self, index: usize, tmpfs: &Tmpfs) -> Result<(), StagingError> {
        let path = self.tmpfs(index);
        let flags = TMPFS_FLAGS.iter().filter(|(name, _)| tmpfs.flags.iter().any(|flag| flag == name));
        let flags = flags.fold(MsFlags::empty(), |flags, (_, flag)| flags | *flag);
        mount(Some(tmpfs.source.as_str()), &path, Some("tmpfs"), flags, Some(tmpfs.options.join(",").as_str()))
            .map_err(|errno| path_error("mount a memory filesystem on", &path)(errno.into()))?;
        self.made.mounts.push(path);
        Ok(())
    }

    /// Where a memory filesystem of the container's is made.
    pub fn tmpfs(&self, index: usize) -> PathBuf {
        tmpfs_path(&self.made.run, index)
    }

    /// Keeps a namespace under the name the container's configuration gives it.
    fn pin(&mut self, built: &BuiltNamespace, path: &Path) -> Result<(), StagingError> {
        use std::os::fd::{AsFd, AsRawFd};
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(path_error("create", dir))?;
        }
        fs::File::create(path).map_err(path_error("create", path))?;
        self.made.paths.push(path.to_owned());
        let source = format!("/proc/self/fd/{}", built.netns.as_fd().as_raw_fd());
        mount(Some(source.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|errno| path_error("pin the network namespace at", path)(errno.into()))?;
        self.made.mounts.push(path.to_owned());
        Ok(())
    }

    fn make_dir(&mut self, path: &Path, mode: u32) -> Result<(), StagingError> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(path_error("create", path))
    }

    /// Puts a memory filesystem where an overlay will be: the runtime, started early, makes its mount points there.
    pub fn mount_placeholder(&mut self, container: &Description) -> Result<(), StagingError> {
        let Rootfs::Overlay { merged, .. } = &container.rootfs else { return Ok(()) };
        mount(Some("tmpfs"), merged.as_str(), Some("tmpfs"), MsFlags::empty(), Some("size=1m,mode=755"))
            .map_err(|errno| path_error("mount a placeholder on", Path::new(merged))(errno.into()))?;
        self.made.mounts.push(merged.into());
        Ok(())
    }

    /// Mounts the root filesystem, complete now, and returns the mount CRIU makes the container's root of.
    pub fn mount_root(&mut self, container: &Description) -> Result<PathBuf, StagingError> {
        match &container.rootfs {
            Rootfs::Overlay { merged, upper, work, options, .. } => {
                unmount(Path::new(merged));
                let lowers: Vec<String> = self.layers.iter().map(|layer| layer.display().to_string()).collect();
                let mut data = format!("lowerdir={},upperdir={upper},workdir={work}", lowers.join(":"));
                for option in options {
                    data.push(',');
                    data.push_str(option);
                }
                mount(Some("overlay"), merged.as_str(), Some("overlay"), MsFlags::empty(), Some(data.as_str()))
                    .map_err(|errno| path_error("mount the overlay on", Path::new(merged))(errno.into()))?;
                Ok(merged.into())
            }
            Rootfs::Plain { path } => {
                // CRIU wants a mount point.
                let bind = self.root_bind();
                fs::create_dir_all(&bind).map_err(path_error("create", &bind))?;
                mount(Some(path.as_str()), &bind, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
                    .map_err(|errno| path_error("bind", &bind)(errno.into()))?;
                self.made.mounts.push(bind.clone());
                Ok(bind)
            }
        }
    }

    /// Where CRIU will find the root, before it is mounted.
    pub fn root(&self, container: &Description) -> PathBuf {
        match &container.rootfs {
            Rootfs::Overlay { merged, .. } => merged.into(),
            Rootfs::Plain { .. } => self.root_bind(),
        }
    }

    /// The directories that make up the root filesystem, topmost first.
    pub fn trees(&self, container: &Description) -> Vec<PathBuf> {
        match &container.rootfs {
            Rootfs::Overlay { upper, .. } => [PathBuf::from(upper)].into_iter().chain(self.layers.clone()).collect(),
            Rootfs::Plain { path } => vec![path.into()],
        }
    }

    fn root_bind(&self) -> PathBuf {
        self.made.run.join("root")
    }

    /// CRIU's images.
    pub fn images(&self) -> PathBuf {
        self.made.run.join("images")
    }

    /// CRIU's work directory: its log.
    pub fn work(&self) -> PathBuf {
        self.made.run.join("work")
    }

    /// The page store.
    pub fn pages(&self) -> PathBuf {
        pages_path(&self.made)
    }

    /// The host's ends of the container's interfaces.
    pub fn ports(&self) -> &[Port] {
        self.network.as_ref().map(|network| network.ports.as_slice()).unwrap_or_default()
    }

    /// Takes everything away.
    pub fn undo(mut self) {
        // By name: a namespace that ends takes its interfaces along only some time later.
        self.ports().iter().for_each(Port::remove_if_there);
        self.network = None;
        undo(&self.made);
    }

    /// The container stays: only what was needed for the way goes. The memory directory is left for [`clear_run`].
    pub fn settle(mut self, container: &Description) {
        if matches!(container.rootfs, Rootfs::Plain { .. }) {
            unmount(&self.root_bind());
        }
        // They live on in the container.
        (0..container.tmpfs.len()).for_each(|index| unmount(&self.tmpfs(index)));
        Moved::clear(Path::new(&container.bundle));
        // The namespace lives on in the container's tasks.
        if let Some(network) = self.network.take()
            && let Err(error) = network.settle()
        {
            tracing::warn!(%error, "the container asks for neighbours faster than usual");
        }
    }
}

fn lower_digest(container: &Description, index: usize) -> String {
    match &container.rootfs {
        Rootfs::Overlay { lowers, .. } => lowers.get(index).map(|layer| layer.digest.clone()).unwrap_or_default(),
        Rootfs::Plain { .. } => String::new(),
    }
}

/// Where the page store of an arrival is.
pub fn pages_path(made: &Made) -> PathBuf {
    made.run.join("pages")
}

/// Takes away what a record says was made. What is not there is fine.
pub fn undo(made: &Made) {
    for path in made.mounts.iter().rev() {
        unmount(path);
    }
    // A directory that the container's owner made, empty, for a volume or a log goes too: nothing of ours stays.
    for path in made.paths.iter().rev() {
        remove_path(path);
    }
    remove_run(&made.run);
}

/// Clears what the way of a container that stays needed, after its agent was killed.
pub fn settle_run(made: &Made) {
    unmount(&made.run.join("root"));
    made.mounts.iter().filter(|path| path.starts_with(&made.run)).for_each(|path| unmount(path));
    remove_run(&made.run);
    if let Some(bundle) = made.paths.first() {
        Moved::clear(bundle);
    }
}

/// Removes the memory directory, once nothing in it is needed.
pub fn clear_run(made: &Made) {
    remove_run(&made.run);
}

/// Removes the memory directory, but never through a mount that would not go: behind it is what the container has.
fn remove_run(run: &Path) {
    let entries = fs::read_dir(run).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_mount_point = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name == "root" || name.to_string_lossy().starts_with(TMPFS))
    };
    for path in entries.filter(is_mount_point) {
        if let Err(error) = fs::remove_dir(&path) {
            tracing::warn!(path = %path.display(), %error, "still mounted; left in place");
            return;
        }
    }
    remove_path(run);
}

/// What the mount points of memory filesystems are called, before their number.
const TMPFS: &str = "tmpfs-";

fn tmpfs_path(run: &Path, index: usize) -> PathBuf {
    run.join(format!("{TMPFS}{index}"))
}

fn unmount(path: &Path) {
    while umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
}

/// Removes a file or a tree, never what another filesystem mounted below holds.
fn remove_path(path: &Path) {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "can't remove what an arrival left");
    }
}
