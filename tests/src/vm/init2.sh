#!/bin/sh
# PID 1, second half: in the overlay.
say() { read -r up _ </proc/uptime; echo "lab-init: [$up] $*"; }
umount -l /mnt
mount --make-rshared /
for word in $(cat /proc/cmdline); do case $word in lab.name=*) name=${word#*=} ;; lab.number=*) n=${word#*=} ;; esac; done
hostname "$name" 2>/dev/null || echo "$name" >/proc/sys/kernel/hostname
echo "$name" >/etc/hostname
printf '127.0.0.1 localhost\n::1 localhost\n10.77.0.1 host1\n10.77.0.2 host2\n' >/etc/hosts
# cgroup v2: no task may stay in a cgroup that gives controllers to its children, so all go to /init.
mkdir -p /sys/fs/cgroup/init
for pid in $(cat /sys/fs/cgroup/cgroup.procs); do echo "$pid" >/sys/fs/cgroup/init/cgroup.procs 2>/dev/null; done
for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || say "controller $c stays off"; done
# The rest of the modules is loaded by the kernel's own requests.
modprobe -a virtio_console virtio_net bridge veth unix_diag inet_diag tcp_diag udp_diag raw_diag af_packet_diag netlink_diag || say "modprobe failed"
say "modules in: $(lsmod | cut -d' ' -f1 | tail -n +2 | tr '\n' ' ')"
eth=$(basename /sys/class/net/e*)
ip link set "$eth" name eth0 2>/dev/null
ip link set lo up
ip link add br0 address "$(printf '02:77:01:00:00:%02x' "$n")" type bridge
ip link set eth0 master br0 up
ip link set br0 up
ip address add "10.77.0.$n/24" dev br0
ip -6 address add "fd77::$n/64" dev br0 nodad
for port in /sys/class/virtio-ports/*; do
    lab-tool vm-agent /dev/${port##*/} &
done
say "up"
# dash's wait reaps orphans as well.
while :; do wait; sleep 1; done
