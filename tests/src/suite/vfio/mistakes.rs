//! What a user can get wrong, and what the IOMMU keeps a guest from.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{MESSAGE_LIMIT, OUTSIDE};
use crate::command;
use crate::ensure;
use crate::error::{Doing, LabError, Result};
use crate::harness::{
    Assigned, Device, Guest, Igb, KernelLog, NvmePf, Registers, Transfer, Vmm, dma_fault,
    edu_transfer,
};
use crate::site::Site;
use crate::suite::Test;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "vfio::host_memory_is_out_of_reach",
        seconds: 60,
        run: host_memory_is_out_of_reach,
    },
    Test {
        name: "vfio::mistakes_have_a_message",
        seconds: 120,
        run: mistakes_have_a_message,
    },
    Test {
        name: "vfio::token_opens_a_function",
        seconds: 90,
        run: token_opens_a_function,
    },
];

/// A page of this process, by the address that the memory controller knows it by.
struct HostPage {
    buffer: Vec<u8>,
    /// Where in the buffer the page starts.
    start: usize,
    address: u64,
}

const PAGE: usize = 4096;
const PATTERN: u8 = 0x5a;

impl HostPage {
    /// Finds one at or above `least`.
    fn above(least: u64) -> Result<Self> {
        /// From Linux, Documentation/admin-guide/mm/pagemap.rst: bit 63 is "present", bits 0 to 54 are the page frame number.
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let pagemap =
            File::open("/proc/self/pagemap").doing(|| "open /proc/self/pagemap".into())?;
        let buffer = vec![PATTERN; 1024 * PAGE];
        let base = buffer.as_ptr().addr();
        let first = base.next_multiple_of(PAGE);
        for page in (first..base + buffer.len() - PAGE).step_by(PAGE) {
            let mut entry = [0; 8];
            let at = u64::try_from(page / PAGE * 8).unwrap_or(u64::MAX);
            pagemap
                .read_exact_at(&mut entry, at)
                .doing(|| "read /proc/self/pagemap".into())?;
            let entry = u64::from_le_bytes(entry);
            let address = (entry & FRAME) * 4096;
            if entry & PRESENT != 0 && address >= least {
                return Ok(Self {
                    start: page - base,
                    buffer,
                    address,
                });
            }
        }
        Err(LabError::Check(format!(
            "none of this process's pages is above {least:#x}"
        )))
    }

    fn is_as_it_was(&self) -> bool {
        let page = self.buffer.get(self.start..self.start + PAGE);
        page.is_some_and(|page| page.iter().all(|byte| *byte == PATTERN))
    }
}

/// A guest tells its device to write to a page of the host, by the page's true address: the IOMMU knows no such address for this
/// device, the page stays as it was, and both the guest and its VMM live on.
fn host_memory_is_out_of_reach(site: &Site) -> Result<()> {
    let page = HostPage::above(OUTSIDE)?;
    let edu = Assigned::bind(site, Device::Edu)?;
    let mut log = KernelLog::follow()?;
    let mut guest = Guest::on(Vmm::Ringside)
        .diskless()
        .vfio(edu.address())
        .boot(site)?;
    let registers = Registers::take(&mut guest, Device::Edu.id())?;
    // In its own memory it may write: to the top of it, where nothing else is.
    edu_transfer(&mut guest, &registers, Transfer::Read, 0xf_0000)?;
    edu_transfer(&mut guest, &registers, Transfer::Write, page.address)?;
    let fault = dma_fault(edu.address(), Transfer::Write, page.address & !0xfff);
    let seen = log.wait_for(&fault, site.limit(MESSAGE_LIMIT))?;
    println!("{seen}");
    ensure!(
        page.is_as_it_was(),
        "the guest has written to the host's memory"
    );
    guest.run_ok("uname -a")?;
    let status = guest.shut_down()?;
    ensure!(status.success(), "ringside-vmm ended with {status}");
    Ok(())
}

/// Runs a program that has to fail with status 1 and these words.
fn refused(site: &Site, mut command: Command, words: &[&str]) -> Result<()> {
    let line = command::describe(&command);
    command.stdin(Stdio::null());
    let output = command::output(&mut command, site.limit(Duration::from_secs(10)))?;
    let status = output.status;
    let text = output.stderr;
    println!("{}", text.trim_end());
    ensure!(
        status.code() == Some(1) && words.iter().all(|word| text.contains(word)),
        "`{line}` ended with {} and not with {words:?}:\n{text}",
        status
    );
    Ok(())
}

/// A VMM that is to fail before its guest starts.
fn vmm(site: &Site, vfio: &str) -> Command {
    let mut vmm = site.program("ringside-vmm");
    vmm.arg("--kernel").arg(site.kernel());
    vmm.arg(format!("--vfio={vfio}"));
    vmm
}

fn mistakes_have_a_message(site: &Site) -> Result<()> {
    let igb = Igb::take(site)?;
    let pf = igb.address().to_owned();
    let vfio = |arguments: &[&str]| {
        let mut program = site.program("ringside-vfio");
        program.args(arguments);
        program
    };
    refused(site, vfio(&["create", &pf, "99"]), &[&pf, "7"])?;
    refused(
        site,
        vmm(site, "0000:7f:00.0"),
        &["no PCI device 0000:7f:00.0"],
    )?;
    refused(
        site,
        vmm(site, &pf),
        &["physical function", "ringside-vfio create"],
    )?;
    let functions = igb.create::<2>(&["--driver", "none"])?;
    let [first, second] = functions.addresses();
    refused(
        site,
        vfio(&["create", first, "1"]),
        &[first, "virtual function"],
    )?;
    refused(
        site,
        vmm(site, first),
        &["bound to no driver", "ringside-vfio bind"],
    )?;
    for function in [first, second] {
        command::run(
            &mut vfio(&["bind", function]),
            site.limit(Duration::from_secs(5)),
        )?;
    }
    refused(
        site,
        vmm(
            site,
            &format!("{first},vf-token=6eb7ba36-1b9a-4f8e-b4b6-0c6c4b6f5e0a"),
        ),
        &["takes no token"],
    )?;
    let mut iommufd = vmm(site, first);
    iommufd.arg("--vfio-interface=iommufd");
    refused(site, iommufd, &["/dev/iommu"])?;

    let guest = Guest::on(Vmm::Ringside).diskless().vfio(first).boot(site)?;
    refused(site, vmm(site, first), &[first, "in use"])?;
    refused(
        site,
        vfio(&["unbind", first]),
        &[first, &guest.vmm_pid().to_string()],
    )?;
    guest.shut_down()?;

    // As a user who may have KVM, but not the device; then one who may not lock memory.
    let group = fs::read_link(format!("/sys/bus/pci/devices/{first}/iommu_group"))
        .doing(|| format!("find the group of {first}"))?;
    let file = format!(
        "/dev/vfio/{}",
        group.file_name().unwrap_or_default().to_string_lossy()
    );
    let as_user = |device: &str| {
        let vmm = vmm(site, device);
        let mut user = Command::new("setpriv");
        user.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
        ]);
        user.args(["prlimit", "--memlock=65536:65536"]);
        user.arg(vmm.get_program()).args(vmm.get_args());
        user
    };
    let allow =
        |path: &str, mode: &str| command::run_line(&format!("chmod {mode} {path}")).map(drop);
    allow("/dev/kvm", "666")?;
    let denied = refused(site, as_user(first), &[&file, "may not"]);
    allow(&file, "666")?;
    let locked = refused(site, as_user(first), &["ulimit -l", "65536"]);
    allow(&file, "600")?;
    allow("/dev/kvm", "660")?;
    denied.and(locked)?;

    let limit = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    let before = fs::read_to_string(limit).doing(|| format!("read {limit}"))?;
    fs::write(limit, "0").doing(|| format!("write {limit}"))?;
    let full = refused(site, vmm(site, first), &["dma_entry_limit"]);
    fs::write(limit, before.trim()).doing(|| format!("write {limit}"))?;
    full?;
    functions.destroy()
}

/// A function whose physical function vfio-pci has, too, is for those who know the token.
fn token_opens_a_function(site: &Site) -> Result<()> {
    const TOKEN: &str = "6eb7ba36-1b9a-4f8e-b4b6-0c6c4b6f5e0a";
    const OTHER: &str = "00000000-0000-4000-8000-000000000000";
    let parameter = "/sys/module/vfio_pci/parameters/enable_sriov";
    let nvme = NvmePf::take(site)?;
    let pf = nvme.address().to_owned();
    command::run_line("modprobe vfio-pci")?;
    let enable = |value: &str| fs::write(parameter, value).doing(|| format!("write {parameter}"));
    enable("Y")?;
    let result = (|| {
        let run = |arguments: &[&str]| {
            let mut program = site.program("ringside-vfio");
            command::run(program.args(arguments), site.limit(Duration::from_secs(10)))
        };
        run(&["bind", &pf])?;
        let functions = nvme.create::<1>(&["--vf-token", TOKEN])?;
        let [function] = functions.addresses();
        refused(site, vmm(site, function), &["needs a token"])?;
        refused(
            site,
            vmm(site, &format!("{function},vf-token={OTHER}")),
            &["needs a token"],
        )?;
        let guest = Guest::on(Vmm::Ringside)
            .diskless()
            .vfio(&format!("{function},vf-token={TOKEN}"))
            .boot(site)?;
        guest.shut_down()?;
        functions.destroy()?;
        run(&["unbind", &pf]).map(drop)
    })();
    enable("N")?;
    result
}
