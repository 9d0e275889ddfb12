# Runs in the lab VM on the Debian root: loads what tests need, then serves requests or a shell.
export PATH=/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
hostname lab
for module in kvm_amd tun vhost_net loop; do modprobe "$module"; done
ip link set lo up
# By this name a test in a namespace of its own fetches a network card from here.
ip netns attach lab $$
# A guest whose memory is in large pages faults less, which an emulated machine feels most.
echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled
# A CPU that polls for a guest that sleeps takes the machine's time from the other lab VMs.
echo 0 >/sys/module/kvm/parameters/halt_poll_ns
# /dev/vdb is as empty as on its first day at each boot.
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 /dev/vdb &&
    mount -o noatime,discard /dev/vdb /lab/scratch
case " $(cat /proc/cmdline) " in
*" lab.shell "*)
    cat /lab/run/motd
    cd /lab/scratch
    setsid -c bash -l </dev/ttyS0 >/dev/ttyS0 2>&1
    ;;
*)
    for port in /sys/class/virtio-ports/*; do
        if [ "$(cat "$port/name")" = ringside ]; then
            /lab/bin/lab inside --port "/dev/${port##*/}"
            echo "lab inside ended with status $?"
        fi
    done
    ;;
esac
busybox poweroff -f
