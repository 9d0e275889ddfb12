//! The lab VM ("L1"): QEMU in software emulation of a machine with AMD SVM, in which Linux has a real KVM.
//!
//! Its system is a read-only disk with the lab's Debian root; the programs under test and the files of this run come with its
//! initramfs. (A share over 9p would need neither, but under load Linux 6.12 sometimes reads wrong bytes through it.)
//! Requests and events go through a virtio-serial port on QEMU's standard input and output.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{Doing, LabError, Result};
use crate::initramfs;
use crate::link::Link;
use crate::setup::{Systems, remove_tree, sorted_names};
use crate::site::{QemuVersion, Site};

/// What the interactive shell of the lab VM says first.
const MOTD: &str = include_str!("../recipe/motd");
/// What runs in it after the initramfs.
const START: &str = include_str!("../recipe/l1-start.sh");
/// Size of the scratch file system, sparse on the machine.
const SCRATCH_SIZE: u64 = 12 << 30;
/// Size of the raw disk for tests, sparse on the machine.
const RAW_DISK_SIZE: u64 = 4 << 30;
/// Size of each namespace of the NVMe controller, sparse on the machine.
const NAMESPACE_SIZE: u64 = 1 << 30;
/// Size of the SATA disk, sparse on the machine.
const SATA_DISK_SIZE: u64 = 1 << 30;
/// Memory of a lab VM at most. The machine provides what is touched, no more.
const MEMORY_MIB: u64 = 10 * 1024;
/// For less than this there is no second lab VM: a guest of 6 GiB fits.
const ROOMY_MEMORY_MIB: u64 = 7 * 1024;
/// Less than this does not run the suite.
const LEAST_MEMORY_MIB: u64 = 3 * 1024;
/// From power-on to the first event; it takes 6 s when the machine has nothing else to do.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// Directory with the files of one lab of one run of `cargo lab`; removed when this goes.
#[derive(Debug)]
pub struct Run {
    directory: PathBuf,
}

impl Run {
    /// Creates the directory, with the guest's initramfs in it; `number` tells the labs of this process apart, which begin with 0.
    ///
    /// # Errors
    /// Fails if it cannot be written.
    pub fn create(systems: &Systems, number: usize) -> Result<Self> {
        let all = systems.path().join(format!("run-{}", std::process::id()));
        if number == 0 {
            // A process that was killed may have had this number before.
            remove_tree(&all)?;
        }
        let directory = all.join(number.to_string());
        fs::create_dir_all(directory.join("scratch"))
            .doing(|| format!("create {}", directory.display()))?;
        let run = Self { directory };
        initramfs::write_guest(&systems.root(), &run.path().join("guest.cpio"))?;
        Ok(run)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next run.
        let _ = remove_tree(&self.directory);
        // The last of the process's labs takes what they share with it.
        let _ = self.directory.parent().map(fs::remove_dir);
    }
}

/// Boots the lab VM for requests.
///
/// # Errors
/// Fails, with the console's tail, if it does not come up.
pub fn boot(systems: &Systems, run: &Run, programs: &Path, memory_mib: u64) -> Result<Link> {
    let console = run.path().join("l1-console.log");
    let mut qemu = machine(systems, run, programs, memory_mib, "quiet")?;
    qemu.args(["-display", "none", "-monitor", "none"]);
    qemu.arg("-serial")
        .arg(format!("file:{}", console.display()));
    // Signals from the terminal reach QEMU as part of the foreground process group, and are to end it.
    qemu.args(["-chardev", "stdio,id=channel,signal=on"]);
    qemu.args(["-device", "virtio-serial-pci"]);
    qemu.args(["-device", "virtserialport,chardev=channel,name=ringside"]);
    Link::start(
        "lab VM",
        qemu,
        &run.path().join("l1-qemu.log"),
        &[console],
        BOOT_LIMIT,
    )
}

/// Boots the lab VM with a shell on the terminal, and waits for its end.
///
/// # Errors
/// Fails if QEMU cannot be run, or ends with an error.
pub fn shell(systems: &Systems, run: &Run, programs: &Path) -> Result<()> {
    let (_, memory_mib) = shares(None, 1)?;
    let mut qemu = machine(systems, run, programs, memory_mib, "quiet lab.shell")?;
    qemu.args(["-display", "none", "-serial", "mon:stdio"]);
    let status = qemu.status().doing(|| "run the lab's QEMU".into())?;
    if status.success() {
        return Ok(());
    }
    Err(LabError::Ended {
        what: format!("the QEMU of the lab VM ended with {status}"),
        output: String::new(),
    })
}

fn machine(
    systems: &Systems,
    run: &Run,
    programs: &Path,
    memory_mib: u64,
    cmdline: &str,
) -> Result<Command> {
    let root = systems.root();
    let site = Site {
        root: root.clone(),
        ..Site::inside_lab()
    };
    let initrd = run.path().join("l1.cpio");
    initramfs::write_l1(&root, &files(run, programs)?, &initrd)?;

    let mut qemu = site.qemu(QemuVersion::V11);
    qemu.args([
        "-accel",
        "tcg,thread=multi",
        "-machine",
        "q35",
        "-cpu",
        // Five levels of page tables, of the guest and of the lab VM below it, would only make each walk longer.
        "max,la57=off",
        "-smp",
        "2",
    ]);
    qemu.args(["-run-with", "exit-with-parent=on"]);
    qemu.arg("-m").arg(format!("{memory_mib}M"));
    qemu.args(["-nodefaults", "-no-reboot"]);
    qemu.args(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
    add_assignable(&mut qemu, run)?;
    let read_only = |path: &Path| {
        format!(
            "if=virtio,format=raw,readonly=on,cache=unsafe,file={}",
            escaped(path)
        )
    };
    // In this order they are vda, vdb, vdc and vdd.
    qemu.arg("-drive").arg(read_only(&systems.guest_disk()));
    for (name, size) in [("scratch.img", SCRATCH_SIZE), ("disk.img", RAW_DISK_SIZE)] {
        let path = sparse_file(run, name, size)?;
        // The raw disk is as it was when the power comes back; nobody looks for anything on the other one. If this machine
        // has no room for them, there is an error, and not a machine that stands still.
        let cache = match name {
            "disk.img" => "writeback",
            _ => "unsafe",
        };
        qemu.arg("-drive").arg(format!(
            "if=virtio,format=raw,cache={cache},discard=unmap,werror=report,file={}",
            escaped(&path)
        ));
    }
    qemu.arg("-drive").arg(read_only(&systems.lab_disk()));
    qemu.arg("-kernel").arg(site.kernel());
    qemu.arg("-initrd").arg(initrd);
    // On a busy machine the emulated timer may not tick within the moment in which the kernel looks whether it does; and an
    // emulated processor does not speculate.
    qemu.arg("-append").arg(format!(
        "console=ttyS0 panic=-1 no_timer_check mitigations=off intel_iommu=on iommu=pt {cmdline}"
    ));
    Ok(qemu)
}

/// What the lab VM finds in `/lab`: start script, the guest's initramfs and all programs.
fn files(run: &Run, programs: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |path: &Path| fs::read(path).doing(|| format!("read {}", path.display()));
    let mut files = vec![
        ("lab/run/motd".to_owned(), MOTD.into()),
        ("lab/run/l1-start.sh".to_owned(), START.into()),
        (
            "lab/run/guest.cpio".to_owned(),
            read(&run.path().join("guest.cpio"))?,
        ),
    ];
    // Beside them are what cargo notes about them, and the objects that they were linked from.
    for name in sorted_names(programs)? {
        if !name.contains('.') && (name == "lab" || name.starts_with("ringside-")) {
            files.push((format!("lab/bin/{name}"), read(&programs.join(name))?));
        }
    }
    Ok(files)
}

/// What a guest can be given: each device behind a root port of its own, and so in an IOMMU group of its own.
fn add_assignable(qemu: &mut Command, run: &Run) -> Result<()> {
    // Two network cards at one cable, which leads nowhere else: one with SR-IOV; one without, which knows INTx, MSI and MSI-X.
    for (number, card) in [(1, "igb"), (2, "e1000e")] {
        root_port(qemu, number);
        qemu.arg("-netdev")
            .arg(format!("hubport,id=cable-{card},hubid=0"));
        qemu.arg("-device")
            .arg(format!("{card},bus=port{number},netdev=cable-{card}"));
    }
    // A disk with SR-IOV: eight queues and eight vectors to be shared out among its virtual functions, so that each can have
    // three I/O queues beside the admin queue; the physical function keeps two. The host has the first namespace; the second
    // is to be attached.
    root_port(qemu, 3);
    qemu.args(["-device", "nvme-subsys,id=subsystem"]);
    qemu.arg("-device").arg(
        "nvme,id=nvme,serial=lab,subsys=subsystem,bus=port3,sriov_max_vfs=2,sriov_vq_flexible=8,\
         sriov_vi_flexible=8,max_ioqpairs=10,msix_qsize=11",
    );
    for (number, sharing) in [(1, "shared=off,detached=off"), (2, "shared=on,detached=on")] {
        let path = sparse_file(run, &format!("namespace{number}.img"), NAMESPACE_SIZE)?;
        qemu.arg("-drive").arg(format!(
            "if=none,id=namespace{number},format=raw,cache=unsafe,discard=unmap,file={}",
            escaped(&path)
        ));
        qemu.arg("-device").arg(format!(
            "nvme-ns,bus=nvme,drive=namespace{number},nsid={number},{sharing}"
        ));
    }
    // A device that reads and writes memory wherever it is told to, and interrupts by MSI or INTx.
    root_port(qemu, 4);
    qemu.args(["-device", "edu,bus=port4,dma_mask=0xffffffffffffffff"]);
    // A disk controller that has MSI and no MSI-X, and registers in I/O space too.
    root_port(qemu, 5);
    let path = sparse_file(run, "sata.img", SATA_DISK_SIZE)?;
    qemu.args(["-device", "ich9-ahci,id=sata,bus=port5"]);
    qemu.arg("-drive").arg(format!(
        "if=none,id=sata-disk,format=raw,cache=unsafe,discard=unmap,file={}",
        escaped(&path)
    ));
    qemu.args(["-device", "ide-hd,bus=sata.0,drive=sata-disk"]);
    Ok(())
}

fn root_port(qemu: &mut Command, number: u32) {
    qemu.arg("-device")
        .arg(format!("pcie-root-port,id=port{number},slot={number}"));
}

/// Creates a file of this run for a disk, if this is the first time that the run boots; `size` in bytes.
fn sparse_file(run: &Run, name: &str, size: u64) -> Result<PathBuf> {
    let path = run.path().join(name);
    let doing = || format!("create {}", path.display());
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .doing(doing)?
        .set_len(size)
        .doing(doing)?;
    Ok(path)
}

/// A path as a value in QEMU's option syntax, where a comma is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// How many lab VMs there are, `most` at most, and how much memory each gets, in MiB: all it wants, or its share of three
/// quarters of what this machine has left. Without a wish it is one for each processor, as an emulated machine keeps one of its
/// two busy, if they have room.
///
/// # Errors
/// Fails if the memory is not enough.
pub fn shares(wanted: Option<usize>, most: usize) -> Result<(usize, u64)> {
    let info = fs::read_to_string("/proc/meminfo").doing(|| "read /proc/meminfo".into())?;
    let available = available_mib(&info).unwrap_or(MEMORY_MIB);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = wanted.map(|wanted| wanted.min(most));
    let (count, memory) = shared_out(available, wanted, processors.min(most));
    if memory < LEAST_MEMORY_MIB {
        return Err(LabError::Setup(format!(
            "{count} lab VM(s) need {LEAST_MEMORY_MIB} MiB each, and this machine has {available} MiB of memory left; \
             end other programs, or ask for fewer --jobs"
        )));
    }
    if memory < ROOMY_MEMORY_MIB {
        eprintln!(
            "lab: each lab VM gets {memory} MiB of memory; tests with a guest of 6 GiB want {ROOMY_MEMORY_MIB}"
        );
    }
    Ok((count, memory))
}

fn shared_out(available: u64, wanted: Option<usize>, processors: usize) -> (usize, u64) {
    let to_give = available / 4 * 3;
    let roomy = usize::try_from(to_give / ROOMY_MEMORY_MIB).unwrap_or(usize::MAX);
    let count = wanted.unwrap_or(processors.min(roomy)).max(1);
    (count, (to_give / count as u64).min(MEMORY_MIB))
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_found() {
        let text = "MemTotal: 100 kB\nMemAvailable:   2097152 kB\n";
        assert_eq!(available_mib(text), Some(2048));
        assert_eq!(available_mib("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn memory_is_shared_out() {
        assert_eq!(shared_out(22_000, None, 2), (2, 8250));
        assert_eq!(shared_out(64_000, None, 4), (4, MEMORY_MIB));
        assert_eq!(shared_out(12_000, None, 4), (1, 9000));
        assert_eq!(shared_out(12_000, Some(2), 4), (2, 4500));
        assert_eq!(shared_out(1000, None, 2), (1, 750));
    }

    #[test]
    fn commas_are_doubled() {
        assert_eq!(escaped(Path::new("/a,b")), "/a,,b");
    }
}
