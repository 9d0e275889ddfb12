//! A processor before its first instruction: CPUID, MSRs, local APIC, registers.

use std::io;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2,
    kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::boot::Entry;
use crate::layout::boot;
use crate::snapshot;

/// Why a processor cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refuses a step.
    #[error("KVM cannot {action} of CPU {cpu}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// Which processor.
        cpu: u8,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// The list of CPUID entries is too long for KVM's interface.
    #[error("the CPUID table of CPU {0} is too long")]
    CpuidTooLong(u8),
    /// Not all of the MSRs were taken.
    #[error("KVM does not know MSR {index:#x} of CPU {cpu}")]
    Msr {
        /// The first one that was refused.
        index: u32,
        /// Which processor.
        cpu: u8,
    },
    /// Guest RAM is not where it should be.
    #[error("cannot write the boot page tables into guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
}

fn kvm(action: &'static str, cpu: u8) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Kvm {
        action,
        cpu,
        source: e.into(),
    }
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Leaves of CPUID whose bits are features that a guest may have found and uses (Intel SDM, CPUID; AMD APM volume 3, appendix
/// E), and KVM's own.
const FEATURES: [(u32, &[Register]); 7] = [
    (0x1, &[Register::Ecx, Register::Edx]),
    (0x7, &[Register::Ebx, Register::Ecx, Register::Edx]),
    (0xd, &[Register::Eax]),
    (0x8000_0001, &[Register::Ecx, Register::Edx]),
    (0x8000_0008, &[Register::Ebx]),
    (0x8000_0021, &[Register::Eax]),
    (0x4000_0001, &[Register::Eax]),
];

/// The host's CPUID as KVM can show it to a guest, and what of it we need to know.
pub struct CpuTemplate {
    entries: CpuId,
    tsc_deadline: bool,
    cpus: u8,
}

impl CpuTemplate {
    /// Asks KVM. `cpus` is the number of processors of the guest.
    pub fn new(kvm_fd: &Kvm, cpus: u8) -> Result<Self, Error> {
        let entries = kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("tell the supported CPUID", 0))?;
        Ok(Self {
            entries,
            tsc_deadline: kvm_fd.check_extension(Cap::TscDeadlineTimer),
            cpus,
        })
    }

    /// What a guest was shown elsewhere, if this host's processors have all of it.
    ///
    /// # Errors
    /// [`snapshot::Error::Cpuid`]
    pub fn shown_before(
        self,
        entries: &[kvm_cpuid_entry2],
        tsc_deadline: bool,
    ) -> Result<Self, snapshot::Error> {
        for shown in entries {
            let Some((_, registers)) = FEATURES.iter().find(|(leaf, _)| *leaf == shown.function)
            else {
                continue;
            };
            let ours = self.entries.as_slice().iter();
            let ours = ours
                .copied()
                .find(|e| (e.function, e.index) == (shown.function, shown.index))
                .unwrap_or_default();
            for register in *registers {
                let (name, of): (_, fn(&kvm_cpuid_entry2) -> u32) = match register {
                    Register::Eax => ("EAX", |e| e.eax),
                    Register::Ebx => ("EBX", |e| e.ebx),
                    Register::Ecx => ("ECX", |e| e.ecx),
                    Register::Edx => ("EDX", |e| e.edx),
                };
                let missing = of(shown) & !of(&ours);
                if missing != 0 {
                    return Err(snapshot::Error::Cpuid {
                        function: shown.function,
                        register: name,
                        missing,
                    });
                }
            }
        }
        let entries = CpuId::from_entries(entries).map_err(|_| snapshot::Error::Damaged)?;
        Ok(Self {
            entries,
            tsc_deadline: tsc_deadline && self.tsc_deadline,
            cpus: self.cpus,
        })
    }

    /// What all processors are shown, before what tells them apart.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        self.entries.as_slice()
    }

    /// Whether their local APICs' timers can wait for a value of the time stamp counter.
    pub fn has_tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }

    /// Number of bits of a guest-physical address.
    pub fn physical_bits(&self) -> u32 {
        // Processors without the leaf have 36 (Intel SDM, 4.1.4).
        let leaf = self
            .entries
            .as_slice()
            .iter()
            .find(|e| e.function == 0x8000_0008);
        leaf.map_or(36, |e| e.eax & 0xff)
    }

    /// CPUID of processor `cpu`: one socket, one core for each processor, one thread each.
    fn for_cpu(&self, cpu: u8) -> Result<CpuId, Error> {
        let mut entries = self.entries.as_slice().to_vec();
        // KVM may leave these leaves empty, with fewer levels than they need.
        for function in [0xb, 0x1f] {
            if entries.iter().any(|e| e.function == function) {
                entries.retain(|e| e.function != function);
                entries.extend(self.extended_topology(function, cpu));
            }
        }
        let id = u32::from(cpu);
        let count = u32::from(self.cpus);
        let core_bits = self.core_bits();
        for e in &mut entries {
            match e.function {
                0x1 => {
                    const HTT: u32 = 1 << 28;
                    const TSC_DEADLINE: u32 = 1 << 24;
                    const HYPERVISOR: u32 = 1 << 31;
                    // Initial APIC ID, logical processors of the socket, CLFLUSH line (8 × 8).
                    let logical = if count > 1 { 1 << core_bits } else { 1 };
                    e.ebx = e.ebx & 0xff | id << 24 | (logical.min(255)) << 16 | 8 << 8;
                    e.ecx |= HYPERVISOR;
                    if self.tsc_deadline {
                        e.ecx |= TSC_DEADLINE;
                    }
                    e.edx = if count > 1 { e.edx | HTT } else { e.edx & !HTT };
                }
                // Intel, deterministic cache parameters: the first two levels belong to a core,
                // the third to the socket.
                0x4 if e.eax & 0x1f != 0 => {
                    let sharing = if (e.eax >> 5) & 7 >= 3 {
                        (1 << core_bits) - 1
                    } else {
                        0
                    };
                    e.eax = e.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
                }
                // AMD: cores of the socket, and the bits that number them.
                0x8000_0008 => e.ecx = e.ecx & !0xf0ff | core_bits << 12 | (count - 1),
                // AMD, cache topology, as leaf 4.
                0x8000_001d if e.eax & 0x1f != 0 => {
                    let sharing = if (e.eax >> 5) & 7 >= 3 { count - 1 } else { 0 };
                    e.eax = e.eax & 0x3fff | sharing << 14;
                }
                // AMD: extended APIC ID; core ID and threads for each core; one node.
                0x8000_001e => (e.eax, e.ebx, e.ecx) = (id, id & 0xff, 0),
                // AMD's newer topology leaf would contradict what KVM took from the host.
                0x8000_0026 => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
                _ => {}
            }
        }
        CpuId::from_entries(&entries).map_err(|_| Error::CpuidTooLong(cpu))
    }

    /// Bits that number the cores within the socket.
    fn core_bits(&self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }

    /// The levels of an extended topology leaf: threads, cores, end of the list.
    fn extended_topology(&self, function: u32, cpu: u8) -> [kvm_cpuid_entry2; 3] {
        const THREADS: u32 = 1 << 8;
        const CORES: u32 = 2 << 8;
        [
            (0, 1, THREADS),
            (self.core_bits(), u32::from(self.cpus), CORES | 1),
            (0, 0, 2),
        ]
        .map(|(shift, count, level)| kvm_cpuid_entry2 {
            function,
            // The low byte of ECX echoes the index.
            index: level & 0xff,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: level,
            edx: u32::from(cpu),
            ..Default::default()
        })
    }

    /// Prepares processor `cpu`. Those that do not boot (all but the first) wait for INIT and SIPI
    /// inside KVM.
    pub fn prepare(&self, vcpu: &VcpuFd, cpu: u8, entry: Option<&Entry>) -> Result<(), Error> {
        vcpu.set_cpuid2(&self.for_cpu(cpu)?)
            .map_err(kvm("set the CPUID", cpu))?;
        set_msrs(vcpu, cpu)?;
        set_lapic(vcpu, cpu)?;
        if let Some(entry) = entry {
            let mut sregs = vcpu.get_sregs().map_err(kvm("tell the registers", cpu))?;
            let regs = registers(entry, &mut sregs);
            vcpu.set_sregs(&sregs)
                .map_err(kvm("set the system registers", cpu))?;
            vcpu.set_regs(&regs)
                .map_err(kvm("set the registers", cpu))?;
            // As after FNINIT, and MXCSR's reset value.
            let fpu = kvm_fpu {
                fcw: 0x37f,
                mxcsr: 0x1f80,
                ..Default::default()
            };
            vcpu.set_fpu(&fpu)
                .map_err(kvm("set the floating-point registers", cpu))?;
        }
        Ok(())
    }
}

fn set_msrs(vcpu: &VcpuFd, cpu: u8) -> Result<(), Error> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    /// MTRRs on, memory is write-back unless one of them says otherwise; none does.
    const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(IA32_MISC_ENABLE, FAST_STRINGS),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::CpuidTooLong(cpu))?;
    let taken = vcpu.set_msrs(&msrs).map_err(kvm("set the MSRs", cpu))?;
    match entries.get(taken) {
        Some(refused) => Err(Error::Msr {
            index: refused.index,
            cpu,
        }),
        None => Ok(()),
    }
}

/// LINT0 takes the PICs' interrupts, LINT1 is the NMI, as the MADT says.
fn set_lapic(vcpu: &VcpuFd, cpu: u8) -> Result<(), Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVERY_NMI: u8 = 4;
    const DELIVERY_EXTINT: u8 = 7;

    let mut lapic = vcpu.get_lapic().map_err(kvm("tell the local APIC", cpu))?;
    for (at, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        // The delivery mode is in bits 8 to 10.
        if let Some(byte) = lapic.regs.get_mut(at + 1) {
            let [value] = byte.to_ne_bytes();
            *byte = libc::c_char::from_ne_bytes([value & !7 | mode]);
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(kvm("set the local APIC", cpu))
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always 1.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Selectors that Linux's 64-bit boot protocol names; PVH leaves them open.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// Sets `sregs` and returns the general registers for `entry`.
fn registers(entry: &Entry, sregs: &mut kvm_sregs) -> kvm_regs {
    let long = matches!(entry, Entry::Linux64 { .. });
    let segment = |selector, type_| kvm_segment {
        selector,
        type_,
        limit: u32::MAX,
        g: 1,
        present: 1,
        s: 1,
        ..Default::default()
    };
    // Execute/read, accessed: 64-bit, or 32-bit.
    sregs.cs = kvm_segment {
        l: u8::from(long),
        db: u8::from(!long),
        ..segment(CODE_SELECTOR, 0xb)
    };
    // Read/write, accessed.
    let data = kvm_segment {
        db: 1,
        ..segment(DATA_SELECTOR, 0x3)
    };
    for place in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *place = data;
    }
    // A busy 32- or 64-bit task state segment.
    sregs.tr = kvm_segment {
        s: 0,
        g: 0,
        limit: 0x67,
        ..segment(TSS_SELECTOR, 0xb)
    };
    sregs.gdt = kvm_dtable {
        base: boot::GDT,
        limit: 5 * 8 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: boot::IDT,
        limit: 7,
        ..Default::default()
    };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    let regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match *entry {
        Entry::Linux64 { address, zero_page } => {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = boot::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            kvm_regs {
                rip: address,
                rsi: zero_page,
                rsp: boot::STACK,
                rbp: boot::STACK,
                ..regs
            }
        }
        Entry::Pvh {
            address,
            start_info,
        } => kvm_regs {
            rip: address,
            rbx: start_info,
            ..regs
        },
    }
}

/// Writes what the first processor's registers refer to: descriptor table and page tables.
pub fn write_tables(memory: &GuestMemoryMmap, entry: &Entry) -> Result<(), Error> {
    // Flat segments; kernels load their own tables soon, but may reload these selectors first.
    let code: u64 = match entry {
        Entry::Linux64 { .. } => 0x00af_9b00_0000_ffff,
        Entry::Pvh { .. } => 0x00cf_9b00_0000_ffff,
    };
    let tables = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    for (i, descriptor) in (0u64..).zip(tables) {
        memory.write_obj(descriptor, GuestAddress(boot::GDT + 8 * i))?;
    }
    memory.write_obj(0u64, GuestAddress(boot::IDT))?;

    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 4096;
    let pdpt = boot::PAGE_TABLES + PAGE;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(boot::PAGE_TABLES))?;
    for gib in 0..4 {
        let directory = pdpt + PAGE * (gib + 1);
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + 8 * gib))?;
        for i in 0..512 {
            let page = gib << 30 | i << 21;
            memory.write_obj(
                page | PRESENT_WRITABLE | LARGE,
                GuestAddress(directory + 8 * i),
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .copied()
    }

    fn template(cpus: u8) -> CpuTemplate {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0x1f,
            ..Default::default()
        };
        let entries: Vec<_> = [
            (1, 0),
            (4, 0),
            (0xb, 0),
            (0xb, 1),
            (0xb, 2),
            (0x8000_0008, 0),
        ]
        .iter()
        .map(|(f, i)| entry(*f, *i))
        .collect();
        CpuTemplate {
            entries: CpuId::from_entries(&entries).unwrap(),
            tsc_deadline: true,
            cpus,
        }
    }

    #[test]
    fn the_topology_is_one_socket_of_single_threaded_cores() {
        let cpuid = template(6).for_cpu(5).unwrap();
        let basic = leaf(&cpuid, 1, 0).unwrap();
        assert_eq!((basic.ebx >> 24, (basic.ebx >> 16) & 0xff), (5, 8));
        assert_eq!(
            (basic.ecx >> 31, basic.ecx >> 24 & 1, basic.edx >> 28 & 1),
            (1, 1, 1)
        );
        let threads = leaf(&cpuid, 0xb, 0).unwrap();
        assert_eq!(
            (threads.eax, threads.ebx, threads.ecx, threads.edx),
            (0, 1, 0x100, 5)
        );
        let cores = leaf(&cpuid, 0xb, 1).unwrap();
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (3, 6, 0x201, 5)
        );
        assert_eq!(leaf(&cpuid, 0xb, 2).unwrap().ebx, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).unwrap().ecx, 3 << 12 | 5);
    }

    #[test]
    fn a_single_processor_has_no_siblings() {
        let cpuid = template(1).for_cpu(0).unwrap();
        let basic = leaf(&cpuid, 1, 0).unwrap();
        assert_eq!(((basic.ebx >> 16) & 0xff, basic.edx >> 28 & 1), (1, 0));
        assert_eq!(leaf(&cpuid, 0xb, 1).unwrap().ebx, 1);
    }

    #[test]
    fn every_processor_count_has_a_topology() {
        for cpus in 1..=254 {
            template(cpus).for_cpu(cpus - 1).unwrap();
        }
    }

    #[test]
    fn page_tables_map_4_gib_one_to_one() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let entry = Entry::Linux64 {
            address: 0x10_0200,
            zero_page: boot::ZERO_PAGE,
        };
        write_tables(&memory, &entry).unwrap();
        let read = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        for address in [0u64, 0x1234_5678, 0x8000_0000, 0xffff_ffff] {
            let pdpt = read(boot::PAGE_TABLES) & !0xfff;
            let directory = read(pdpt + 8 * (address >> 30)) & !0xfff;
            let page = read(directory + 8 * (address >> 21 & 511));
            assert_eq!(page, address >> 21 << 21 | 0x83, "{address:#x}");
        }
    }

    #[test]
    fn entries_start_in_the_right_mode() {
        let mut sregs = kvm_sregs::default();
        let regs = registers(
            &Entry::Linux64 {
                address: 7,
                zero_page: 9,
            },
            &mut sregs,
        );
        assert_eq!(
            (regs.rip, regs.rsi, sregs.cs.l, sregs.efer),
            (7, 9, 1, EFER_LME | EFER_LMA)
        );
        let regs = registers(
            &Entry::Pvh {
                address: 7,
                start_info: 9,
            },
            &mut sregs,
        );
        assert_eq!((regs.rip, regs.rbx, sregs.cs.l, sregs.cs.db), (7, 9, 0, 1));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (CR0_PE | CR0_ET, 0, 0));
    }
}
