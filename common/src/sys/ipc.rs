//! System V shared memory (sysvipc(7)), of the calling thread's IPC namespace.

use std::fs::File;
use std::io;

use nix::libc;

/// The permissions of a segment.
///
/// # Errors
/// `EINVAL`, `EIDRM`: there is none of this number; `EACCES`.
pub fn mode_of_segment(id: i32) -> io::Result<u32> {
    let mut about = std::mem::MaybeUninit::<libc::shmid_ds>::zeroed();
    // SAFETY: a place for what is told, which outlives the call.
    if unsafe { libc::shmctl(id, libc::IPC_STAT, about.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroes are a value of this type, whatever of it was written.
    let about = unsafe { about.assume_init() };
    /// The others say how it goes with the segment (`SHM_DEST`, `SHM_LOCKED`).
    const PERMISSIONS: u32 = 0o777;
    Ok(u32::from(about.shm_perm.mode) & PERMISSIONS)
}

/// Removes a segment.
///
/// # Errors
/// `EINVAL`, `EIDRM`: there is none of this number; `EPERM`.
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: no pointer is looked at.
    if unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a segment with a number of the caller's choice, and opens its memory as a file, which stays what the segment has.
///
/// # Errors
/// `EEXIST`: there is one with this key. Other kinds: the number is taken, or the kernel allows no choice of numbers
/// (`/proc/sys/kernel/shm_next_id`, `CAP_CHECKPOINT_RESTORE`).
pub fn create_segment(id: i32, key: i32, size: u64, mode: u32) -> io::Result<File> {
    std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string())?;
    let size = usize::try_from(size).map_err(io::Error::other)?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode.cast_signed();
    // SAFETY: takes no pointer.
    let got = unsafe { libc::shmget(key, size, flags) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    if got != id {
        return Err(io::Error::other(format!("segment {id} became number {got}")));
    }
    // SAFETY: attached at a place of the kernel's choice.
    let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if address.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    let end = address.addr() + size.next_multiple_of(super::memory::PAGE as usize);
    let file =
        File::options().read(true).write(true).open(format!("/proc/self/map_files/{:x}-{end:x}", address.addr()));
    // SAFETY: attached above, and nobody else knows of it.
    unsafe { libc::shmdt(address) };
    file
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// In a namespace of its own, which takes root.
    #[test]
    fn a_segment_has_the_number_and_the_memory_it_was_given() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWIPC).expect("a namespace");
            let file = create_segment(77, 0x1234, 5000, 0o640).expect("is made");
            file.write_all_at(b"here", 4096).expect("is written");
            assert_eq!(mode_of_segment(77).expect("is there"), 0o640);
            mode_of_segment(78).expect_err("is not there");
            create_segment(77, 0, 4096, 0o600).expect_err("is taken");
            // SAFETY: attached for reading at a place of the kernel's choice; it has two pages.
            let text = unsafe {
                let address = libc::shmat(77, std::ptr::null(), libc::SHM_RDONLY);
                std::slice::from_raw_parts(address.cast::<u8>().add(4096), 4)
            };
            assert_eq!(text, b"here");
        });
        made.join().expect("no panic");
    }
}
