# Runs once, inside the new lab root (a Debian trixie chroot), when `cargo lab` builds it.
# Argument: the space-separated kernel modules for the first and for the second initramfs.
set -eu
l1_modules=$1
guest_modules=$2

# The package indices in the chroot were made by mmdebstrap for its own run.
apt-get update
# QEMU of trixie (10.0) has a bug in its SR-IOV emulation; the lab's own VM needs 10.1 or later.
apt-get install -y --no-install-recommends -t trixie-backports \
    qemu-system-x86 qemu-utils qemu-block-extra passt ipxe-qemu seabios

# The older QEMU too, unpacked beside it: back-ends are tested under both.
work=$(mktemp -d)
cd "$work"
chmod 755 "$work"
version=$(apt-cache madison qemu-system-x86 | awk '$3 ~ /^1:10\./ && !/bpo/ { print $3; exit }')
apt-get download "qemu-system-x86=$version" "qemu-system-common=$version" "qemu-system-data=$version"
for package in ./*.deb; do
    dpkg-deb -x "$package" /opt/qemu-10
done
cd /
rm -rf "$work"

# DPDK's test program, a front-end and a back-end for benchmarks: it comes with all that is needed to build with DPDK, so it is
# taken out of there, and only the libraries it uses are installed, with the drivers of its two vhost-user ports.
work=$(mktemp -d)
cd "$work"
chmod 755 "$work"
apt-get download dpdk-dev
libraries=$(dpkg-deb -f ./dpdk-dev_*.deb Depends | tr ',' '\n' | sed 's/(.*//' | grep -v -e libdpdk-dev -e python3)
apt-get install -y --no-install-recommends $libraries librte-mempool-ring25 librte-net-vhost25 librte-net-virtio25
dpkg-deb --fsys-tarfile ./dpdk-dev_*.deb | tar -x -C / ./usr/bin/dpdk-testpmd
cd /
rm -rf "$work"

# Here this takes a second, in the emulated machine far longer.
kernel=$(ls /lib/modules)
depmod "$kernel"

# Modules in load order, unpacked, so that an initramfs needs only busybox's insmod.
unpack() {
    directory=$1
    shift
    mkdir -p "$directory"
    number=0
    for name in "$@"; do
        modprobe -S "$kernel" --show-depends "$name" | while read -r verb path _; do
            if [ "$verb" = insmod ]; then echo "$path"; fi
        done
    done | awk '!seen[$0]++' | while read -r path; do
        number=$((number + 1))
        file=$(basename "${path%.xz}")
        busybox xzcat "$path" > "$directory/$(printf %02d "$number")-$file"
    done
}
unpack /opt/lab/l1-modules $l1_modules
unpack /opt/lab/guest-modules $guest_modules

# Names that do not depend on the kernel's version.
cp "/boot/vmlinuz-$kernel" /opt/lab/vmlinuz
rm -f /boot/initrd.img* /initrd.img*

# The ELF kernel inside the bzImage, for VMMs that boot by PVH. The offsets are those of Linux's boot protocol
# (Documentation/arch/x86/boot.rst): setup_sects, payload_offset, payload_length. The payload ends with its
# uncompressed size in 4 bytes, which are not zstd's.
number() {
    od -An -j "$1" -N "$2" "-tu$2" /opt/lab/vmlinuz | tr -d ' '
}
start=$((($(number 0x1f1 1) + 1) * 512 + $(number 0x248 4)))
tail -c "+$((start + 1))" /opt/lab/vmlinuz | head -c "$(($(number 0x24c 4) - 4))" | zstd -dcq > /opt/lab/vmlinux
cp /usr/bin/busybox /opt/lab/busybox
