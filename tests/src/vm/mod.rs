//! `cargo lab vm`: true second kernels. Two machines under QEMU's software emulation, which needs no KVM and is some twelve times
//! slower than the machine itself, with Debian's stock cloud kernels and the lab's root filesystem; containers are moved between
//! them, with each tracker and in both directions. Not a part of `cargo lab test`.
//!
//! Everything lies in one directory that is removed at the end. The machines are joined by a socket of QEMU's own; nothing of
//! this machine's network is touched.

mod kernel;
mod machine;
mod moves;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use self::kernel::Kernel;
use self::machine::Machine;
use crate::image::Image;

/// The series of kernels: Debian 12's, which has no asynchronous write protection, and Debian 13's, which has.
const OLD: &str = "6.1";
const NEW: &str = "6.12";

/// What is under way: removed with this value.
struct Site {
    dir: PathBuf,
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("lab: can't remove {}: {error}", self.dir.display());
        }
    }
}

/// Moves containers between two kernels; whether all went well. Of pairs and containers those whose names have `only` and
/// `container`.
pub fn run(moves: usize, only: &str, container: &str) -> Result<bool> {
    ensure!(moves::PLANS.iter().any(|plan| plan.name.contains(only)), "no pair of machines has `{only}` in its name");
    let containers = moves::containers(container)?;
    need_qemu()?;
    let image = Image::ensure()?;
    let kernels = [Kernel::ensure(OLD)?, Kernel::ensure(NEW)?];
    let site = Site { dir: PathBuf::from(format!("/var/lib/longhaul-lab/vm-{}", std::process::id())) };
    std::fs::create_dir_all(&site.dir)?;
    let base = base_image(&site.dir, &image, &kernels)?;
    let programs = programs(&site.dir)?;
    let (mut passed, mut failed) = (0, 0);
    for plan in moves::PLANS.iter().filter(|plan| plan.name.contains(only)) {
        let start = std::time::Instant::now();
        let kernel = |series: &str| kernels.iter().find(|kernel| kernel.series == series).context("no such kernel");
        let tried = (|| {
            let disks = [base.as_path(), programs.as_path()];
            let first = Machine::boot(&site.dir, 1, kernel(plan.kernels[0])?, disks)?;
            let second = Machine::boot(&site.dir, 2, kernel(plan.kernels[1])?, disks)?;
            moves::run(plan, &first, &second, &containers, moves)
        })();
        let seconds = start.elapsed().as_secs_f64();
        match tried {
            Ok(figures) => {
                passed += 1;
                println!("ok      {} ({seconds:.0} s): {figures}", plan.name);
            }
            Err(error) => {
                failed += 1;
                println!("FAILED  {} ({seconds:.0} s)\n        {error:#}", plan.name);
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

fn need_qemu() -> Result<()> {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_ok() {
        return Ok(());
    }
    eprintln!("lab: installing qemu-system-x86");
    let install = ["install", "--yes", "--no-install-recommends", "qemu-system-x86"];
    quiet(Command::new("apt-get").args(install).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Runs a command; its errors are the error.
fn quiet(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("start {:?}", command.get_program()))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// The lab's root filesystem with the kernels' modules, as an image that both machines read.
fn base_image(dir: &Path, image: &Image, kernels: &[Kernel]) -> Result<PathBuf> {
    let path = dir.join("base.img");
    for part in ["upper", "work", "merged"] {
        std::fs::create_dir_all(dir.join(part))?;
    }
    let modules: Vec<String> = kernels.iter().map(|kernel| kernel.modules().display().to_string()).collect();
    // In a mount namespace of its own, which takes the overlay along when it ends.
    let script = format!(
        "mount --make-rprivate /
         mount -t overlay overlay -o lowerdir={root},upperdir={dir}/upper,workdir={dir}/work {dir}/merged
         mkdir -p {dir}/merged/usr/lib/modules {dir}/merged/lab
         for modules in {modules}; do
             cp -a $modules/. {dir}/merged/usr/lib/modules/
             for version in $(ls $modules); do chroot {dir}/merged depmod $version; done
         done
         chroot {dir}/merged sh -euc \"$SMALL\"
         printf '%s' \"$INIT\" > {dir}/merged/lab-init
         printf '%s' \"$SECOND\" > {dir}/merged/lab-init2
         chmod 755 {dir}/merged/lab-init {dir}/merged/lab-init2
         size=$(($(du -sm {dir}/merged | cut -f1) * 115 / 100 + 64))
         mke2fs -q -t ext4 -O ^has_journal -m 0 -E lazy_itable_init=1,root_owner=0:0 -d {dir}/merged {path} ${{size}}M",
        root = image.root.display(),
        dir = dir.display(),
        path = path.display(),
        modules = modules.join(" "),
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-euc", &script]);
    command.env("INIT", include_str!("init.sh")).env("SECOND", include_str!("init2.sh")).env("SMALL", SMALL_IMAGE);
    quiet(&mut command).context("make the machines' root filesystem")?;
    Ok(path)
}

/// Makes the lower layer of containers, below `/lab-image`: an emulated machine would take half a minute to read the whole
/// image for its digest. Of hard links, which take no room.
const SMALL_IMAGE: &str = "
    cd /
    for directory in proc sys dev tmp root var/lib var/log run; do mkdir -p lab-image/$directory; done
    for link in bin sbin lib lib64; do cp -a $link lab-image/; done
    for program in sh dash sleep cat env ls redis-server redis-check-rdb; do [ ! -e usr/bin/$program ] || echo usr/bin/$program; done >tmp/list
    for program in $(cat tmp/list); do ldd $program 2>/dev/null | grep -o '/[^ ]*' || true; done | sort -u >tmp/libraries
    echo /lib/x86_64-linux-gnu/libgcc_s.so.1 >>tmp/libraries
    while read -r library; do real=$(realpath $library); echo ${real#/}; echo $library | sed 's,^/lib,usr/lib,'; done <tmp/libraries >>tmp/list
    printf 'etc/passwd\\netc/group\\netc/nsswitch.conf\\n' >>tmp/list
    cp -al --parents $(sort -u tmp/list) lab-image/
    rm tmp/list tmp/libraries";

/// The programs under test, as an archive on a disk: no file system has to be made when they are built anew.
fn programs(dir: &Path) -> Result<PathBuf> {
    let stage = dir.join("stage");
    crate::agents::stage_programs(&stage)?;
    let path = dir.join("programs.tar");
    quiet(Command::new("tar").arg("-C").arg(&stage).args(["--owner=0", "--group=0", "-cf"]).arg(&path).arg("usr"))?;
    let length = std::fs::metadata(&path)?.len().next_multiple_of(512);
    std::fs::OpenOptions::new().write(true).open(&path)?.set_len(length)?;
    if !stage.join("usr/local/bin/migrate").exists() {
        bail!("the programs are not built: `cargo lab` builds them");
    }
    Ok(path)
}
