//! Disks in other formats than raw, and on servers.

use std::path::Path;
use std::time::Duration;

use super::Test;
use super::blk::{arrived, exchange, random_file};
use crate::command;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{BackEnd, Blk, Ceph, Guest, Kind, Vmm, sha256};
use crate::programs::DYNAMIC_BLK;
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "formats::qcow2_with_a_backing_file",
        seconds: 120,
        run: qcow2,
    },
    Test {
        name: "formats::nbd",
        seconds: 120,
        run: nbd,
    },
    Test {
        name: "formats::nbdkit",
        seconds: 120,
        run: nbdkit,
    },
    Test {
        name: "formats::rbd",
        seconds: 240,
        run: rbd,
    },
];

/// For what takes no time.
const LIMIT: Duration = Duration::from_secs(60);

/// What the backing file holds the guest reads; what the guest writes the image holds, and QEMU finds no fault with it.
fn qcow2(site: &Site) -> Result<()> {
    let base = random_file(site, "base.img")?;
    let top = site.scratch.join("top.qcow2");
    let before = sha256(&base)?;
    qemu_img(
        site,
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b"],
        &[&base, &top],
    )?;
    let blk = Blk::on(&top).queues(2).arg("--format=qcow2").start(site)?;
    let seen = use_disk(site, &blk, &base)?;
    blk.stop(site)?;
    qemu_img(site, &["check", "-q"], &[&top])?;
    let flat = site.scratch.join("flat.img");
    qemu_img(site, &["convert", "-O", "raw"], &[&top, &flat])?;
    ensure!(sha256(&base)? == before, "the backing file was written");
    arrived(&flat, &seen)
}

/// The same on an export of QEMU's server.
fn nbd(site: &Site) -> Result<()> {
    let disk = random_file(site, "disk.img")?;
    let mut server = site.root_program("usr/bin/qemu-nbd");
    server.args(["--format=raw", "--export-name=disk", "--persistent"]);
    server.args(["--shared=4", "--discard=unmap"]);
    let socket = site.scratch.join("nbd.sock");
    server.arg("--socket").arg(&socket).arg(&disk);
    let server = BackEnd::foreign(site, Kind::Blk, 1, "nbd.sock", server)?;
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let blk = Blk::on(uri).queues(2).start(site)?;
    let seen = use_disk(site, &blk, &disk)?;
    blk.stop(site)?;
    drop(server);
    arrived(&disk, &seen)
}

/// nbdkit's, with delays, as another server has its own ways.
fn nbdkit(site: &Site) -> Result<()> {
    let disk = random_file(site, "disk.img")?;
    let mut server = site.root_program("usr/bin/nbdkit");
    // By their paths: below another root it does not find them.
    let part = |path: &str| site.root.join("usr/lib/x86_64-linux-gnu/nbdkit").join(path);
    server.args(["--foreground", "--unix", "nbdkit.sock", "--filter"]);
    server.arg(part("filters/nbdkit-delay-filter.so"));
    server.arg(part("plugins/nbdkit-file-plugin.so")).arg(&disk);
    server.args(["rdelay=1ms", "wdelay=1ms"]);
    let server = BackEnd::foreign(site, Kind::Blk, 1, "nbdkit.sock", server)?;
    let socket = site.scratch.join("nbdkit.sock");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let blk = Blk::on(uri).queues(2).start(site)?;
    let seen = use_disk(site, &blk, &disk)?;
    blk.stop(site)?;
    drop(server);
    arrived(&disk, &seen)
}

/// An image of a Ceph cluster: what QEMU's driver wrote the guest reads, and the other way round.
fn rbd(site: &Site) -> Result<()> {
    let mut blk = site.program(DYNAMIC_BLK);
    if let Err(error) = command::run(blk.arg("--version"), LIMIT) {
        return Err(LabError::Skipped(format!(
            "what this machine links dynamically does not run in the lab VM: {error}"
        )));
    }
    let ceph = Ceph::start(site)?;
    let disk = random_file(site, "disk.img")?;
    let image = ceph.path("disk");
    let convert = ["convert", "-f", "raw", "-O", "raw"];
    qemu_img(site, &convert, &[&disk, Path::new(&image)])?;
    let blk = Blk::on(&image).dynamic().queues(2).start(site)?;
    let seen = use_disk(site, &blk, &disk)?;
    blk.stop(site)?;
    qemu_img(site, &convert, &[Path::new(&image), &disk])?;
    arrived(&disk, &seen)
}

/// Contents both ways, then random writes on two queues that are read back. Gives the checksum of what the guest sees in the
/// end.
fn use_disk(site: &Site, blk: &BackEnd, holds: &Path) -> Result<String> {
    let mut guest = Guest::on(Vmm::Ringside).cpus(2).device(blk).boot(site)?;
    exchange(&mut guest, "/dev/vdb", holds)?;
    guest.run_ok_within(
        "fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=8 \
         --rw=randwrite --bsrange=4k-64k --numjobs=2 --size=4M --offset_increment=6M \
         --cpus_allowed=0-1 --cpus_allowed_policy=split \
         --verify=crc32c --verify_fatal=1 --do_verify=1",
        Duration::from_secs(60),
    )?;
    let seen = guest.run_ok(
        "d=/usr/sbin/blkdiscard; $d -o 4M -l 1M /dev/vdb && $d -z -o 5M -l 512K /dev/vdb && \
         sync && echo 3 >/proc/sys/vm/drop_caches && sha256sum </dev/vdb",
    )?;
    guest.shut_down()?;
    Ok(seen)
}

fn qemu_img(site: &Site, arguments: &[&str], files: &[&Path]) -> Result<()> {
    let mut command = site.root_program("usr/bin/qemu-img");
    command::run(command.args(arguments).args(files), LIMIT).map(drop)
}
