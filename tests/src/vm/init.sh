#!/bin/sh
# PID 1, first half: runs on the read-only base image. As host_init.rs: the root is an overlay whose lower layer is
# the base image and whose upper layer lies on the machine's own disk; then pivot_root.
# Kernel command line: lab.name=host1 lab.number=1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
say() { read -r up _ </proc/uptime; echo "lab-init: [$up] $*" >/dev/console; }
say "base is up: $(uname -r)"
modprobe -a overlay virtio_pci virtio_blk || say "modules are missing"
mount -t sysfs sysfs /sys
for d in /sys/block/vd*; do case $(cat $d/serial) in disk) disk=/dev/${d##*/} ;; programs) programs=/dev/${d##*/} ;; esac; done
mount -t ext4 -o noatime "$disk" /lab || say "no disk"
mkdir -p /lab/upper /lab/work /lab/root
mount -t overlay overlay -o lowerdir=/,upperdir=/lab/upper,workdir=/lab/work /lab/root || say "no root overlay"
R=/lab/root
# An overlay can't hold another's upper layer: these lie on the disk itself.
for d in srv var/lib/longhaul var/lib/docker var/lib/containers; do
    mkdir -p /lab/real/$d $R/$d
    mount --bind /lab/real/$d $R/$d
done
mkdir -p $R/srv/image
mount --bind /lab-image $R/srv/image
mount -o remount,bind,ro $R/srv/image
mkdir -p $R/proc $R/sys $R/run $R/tmp $R/dev
mount -t proc -o nosuid,nodev,noexec proc $R/proc
mount -t sysfs -o nosuid,nodev,noexec sysfs $R/sys
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs $R/run
mount -t tmpfs -o mode=1777 tmpfs $R/tmp
mount -t devtmpfs -o nosuid dev $R/dev
mkdir -p $R/run/lock $R/dev/pts $R/dev/shm $R/dev/mqueue $R/dev/net
mount -t devpts -o nosuid,noexec,newinstance,ptmxmode=0666,mode=620 pts $R/dev/pts
mount -t tmpfs -o nosuid,noexec,mode=1777 shm $R/dev/shm
mount -t mqueue -o nosuid,noexec mqueue $R/dev/mqueue
[ -e $R/dev/fd ] || { ln -s /proc/self/fd $R/dev/fd; ln -s fd/0 $R/dev/stdin; ln -s fd/1 $R/dev/stdout; ln -s fd/2 $R/dev/stderr; }
[ -e $R/dev/fuse ] || mknod -m 666 $R/dev/fuse c 10 229
[ -e $R/dev/net/tun ] || mknod -m 666 $R/dev/net/tun c 10 200
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 $R/sys/fs/cgroup
# The programs come as a tar written raw on a third disk: no file system to make when they are rebuilt.
tar -xf "$programs" -C $R 2>/dev/null || say "no programs"
cd $R
pivot_root . mnt
exec chroot . /bin/sh /lab-init2 </dev/console >/dev/console 2>&1
