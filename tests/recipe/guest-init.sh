#!/bin/busybox sh
# First process of a test's guest ("L2"): finds its root, if it has one, and starts the command agent, or for people
# (lab.shell on the kernel's command line) a shell.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# Drivers of hardware, passed through or emulated, take time, and look for devices of QEMU: lab.drivers asks for them.
case " $(cat /proc/cmdline) " in
*" lab.drivers "*) wanted=all ;;
*) wanted= ;;
esac
# A parameter of a module is given as modprobe takes it: MODULE.NAME=VALUE on the kernel's command line.
for module in /modules/*.ko; do
    name=${module#/modules/*-}
    case "$wanted$name" in
    nvme* | igbvf* | e1000e* | scsi_* | libata* | libahci* | ahci* | sd_mod*) continue ;;
    esac
    parameters=
    for word in $(cat /proc/cmdline); do
        case "$word" in
        "${name%.ko}".*) parameters="$parameters ${word#*.}" ;;
        esac
    done
    insmod "$module" $parameters
done
root=
start='exec sh /run/agent.sh'
for word in $(cat /proc/cmdline); do
    case "$word" in
    lab.root=*) root=${word#lab.root=} ;;
    lab.shell) start='setsid -c sh </dev/ttyS0 >/dev/ttyS0 2>&1; poweroff -f' ;;
    esac
done
if [ -z "$root" ]; then
    mkdir -p /run /tmp
    cp /agent.sh /run/agent.sh
    export PATH=/bin
    exec sh -c "$start"
fi
tries=0
while [ ! -b "$root" ] && [ $tries -lt 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
mkdir -p /new /lower /over
mount -t ext4 -o ro,noload "$root" /lower || echo "@@ringside no-root $root"
mount -t tmpfs tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work overlay /new
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
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec switch_root /new /run/busybox sh -c "$start"
