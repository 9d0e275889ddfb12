#!/bin/busybox sh
# First process of the lab VM ("L1"): lays a writable layer over the disk with the Debian root and goes there.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod "$module"; done
mkdir -p /lower /over /new
mount -t ext4 -o ro,noload /dev/vdd /lower || exit 1
mount -t tmpfs tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work overlay /new || exit 1
cp -r /lab /new/ || exit 1
mkdir /new/lab/scratch
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs tmpfs /new/dev/shm
mount -t tmpfs tmpfs /new/tmp
mount -t tmpfs tmpfs /new/run
mount -t debugfs debugfs /new/sys/kernel/debug
mount -t tracefs tracefs /new/sys/kernel/tracing
exec switch_root /new /bin/sh /lab/run/l1-start.sh
