#!/bin/busybox sh
# First process of a test's guest ("L2"): finds its root, if it has one, and starts the command agent.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod "$module"; done
root=
writable=
for word in $(cat /proc/cmdline); do
    case "$word" in
    lab.root=*) root=${word#lab.root=} ;;
    lab.rw) writable=1 ;;
    esac
done
if [ -z "$root" ]; then
    mkdir -p /run /tmp
    exec sh /agent.sh
fi
tries=0
while [ ! -b "$root" ] && [ $tries -lt 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
mkdir -p /new
if [ -n "$writable" ]; then
    mount -t ext4 "$root" /new || echo "@@ringside no-root $root"
else
    mkdir -p /lower /over
    mount -t ext4 -o ro,noload "$root" /lower || echo "@@ringside no-root $root"
    mount -t tmpfs tmpfs /over
    mkdir /over/upper /over/work
    mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work overlay /new
fi
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs tmpfs /new/dev/shm
mount -t tmpfs tmpfs /new/tmp
mount -t tmpfs tmpfs /new/run
cp /agent.sh /new/run/agent.sh
cp /bin/busybox /new/run/busybox
exec switch_root /new /run/busybox sh /run/agent.sh
