//! `ringside-blk`: serves a disk to a virtual machine over vhost-user.

use std::process::ExitCode;

use clap::Parser;
use ringside_backends::blk::{ArgsError, Blk, BlkArgs};
use ringside_backends::shell::{self, Program, ShellArgs};

const PROGRAM: Program = Program {
    name: "ringside-blk",
    kind: "block",
    features: &["read-only", "blk-file"],
    hangup: "look at the disk's size again, and tell the guest",
};

// Lines of 78 characters at most: wrapped commands cannot be copied.
const EXAMPLES: &str = "Examples:
  Serve an image to one virtual machine after the other, with four queues:
    ringside-blk --socket-path /run/vm1-disk.sock --path disk.img --queues 4

  Serve a qcow2 image, an NBD export, or an RBD image of a Ceph cluster:
    ringside-blk --socket-path /run/vm1-disk.sock --format qcow2 \\
      --path disk.qcow2
    ringside-blk --socket-path /run/vm1-disk.sock --path nbd://server/disk
    ringside-blk --socket-path /run/vm1-disk.sock --path rbd:rbd/disk:id=vm1

  Upgrade it under a running guest, which notices nothing but a pause:
    ringside-blk --socket-path /run/vm1-disk.sock --path disk.img \\
      --control-socket /run/vm1-disk.ctl ...
    ringside-blk (the same) --take-over /run/vm1-disk.ctl

  Attach it to ringside-vmm:
    ringside-vmm --kernel vmlinuz --blk socket=/run/vm1-disk.sock ...

  Attach it to QEMU, whose guest memory must be shared:
    qemu-system-x86_64 -m 1G -machine q35,memory-backend=mem \\
      -object memory-backend-memfd,id=mem,size=1G,share=on \\
      -chardev socket,id=c0,path=/run/vm1-disk.sock \\
      -device vhost-user-blk-pci,chardev=c0,num-queues=4 ...

  Attach it to cloud-hypervisor (queue_size=128 or larger):
    cloud-hypervisor --memory size=1G,shared=on --disk \\
      vhost_user=true,socket=/run/vm1-disk.sock,num_queues=4,queue_size=128 ...

  Measure the path without a disk, read by QEMU's own front-end:
    ringside-blk --socket-path /tmp/null.sock --null 1G
    qemu-img bench -c 100000 -d 32 -s 4096 -t none --image-opts \\
      driver=virtio-blk-vhost-user,path=/tmp/null.sock,cache.direct=on
";

/// Serves a disk image, a block device, an NBD export or an RBD image to a virtual machine over vhost-user.
///
/// The virtual machine monitor connects to a Unix socket and shares its guest's memory; requests are then taken from
/// the guest's virtqueues and handed to the kernel by io_uring, without copying their data.
#[derive(Parser)]
#[command(name = PROGRAM.name, version, after_help = PROGRAM.after_help(), after_long_help = format!("{EXAMPLES}\n{}", PROGRAM.after_help()))]
struct Cli {
    #[command(flatten)]
    blk: BlkArgs,
    #[command(flatten)]
    shell: ShellArgs,
}

fn main() -> ExitCode {
    shell::main(&PROGRAM, |cli: Cli| {
        let Cli { blk, mut shell } = cli;
        let parts = shell.meet_predecessor(&PROGRAM).map_err(ArgsError::from);
        let opened = parts.and_then(|parts| blk.open_as(parts));
        (opened.map(Blk::new), shell)
    })
}
