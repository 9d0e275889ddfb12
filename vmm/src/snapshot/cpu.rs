//! What a processor's thread needs to go on elsewhere, and what KVM keeps for the whole machine.
#![allow(
    unsafe_code,
    reason = "KVM_SET_XSAVE reads as many bytes as the host's processor state has"
)]

use std::io;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_MSR_ENTRIES, Msrs,
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// Why KVM does not tell or take a state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("KVM cannot {action} of {owner}")]
    Kvm {
        /// "tell the registers", say.
        action: &'static str,
        /// Of which processor, or of the machine.
        owner: Owner,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// The host's time stamp counter has another rate, which it cannot imitate.
    #[error(
        "the guest's time stamp counter runs at {wanted} kHz, which this host's processors cannot do: restore it on the host it came from, or on one with TSC scaling"
    )]
    Tsc {
        /// The rate that the guest has.
        wanted: u32,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// It runs machines of its own, whose state would be lost.
    #[error(
        "the guest runs virtual machines of its own, whose state cannot be moved: end them first"
    )]
    Nested,
}

/// Whose state it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A processor's.
    Cpu(u8),
    /// The machine's.
    Machine,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu(cpu) => write!(f, "CPU {cpu}"),
            Self::Machine => write!(f, "the machine"),
        }
    }
}

fn kvm(action: &'static str, owner: Owner) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Kvm {
        action,
        owner,
        source: e.into(),
    }
}

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: the local APIC's timer, which has to be in its mode before.
const TSC_DEADLINE: u32 = 0x6e0;
/// CR4.VMXE, and EFER.SVME: the guest is about to run machines of its own.
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// A processor that is out of the guest.
#[derive(Debug, Deserialize, Serialize)]
pub struct CpuState {
    tsc_khz: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// By index.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    run: kvm_mp_state,
}

impl CpuState {
    /// Asks KVM. What an exit is answered with must have been taken in.
    ///
    /// # Errors
    /// [`Error`]
    pub fn save(kvm_fd: &Kvm, vcpu: &VcpuFd, cpu: u8) -> Result<Self, Error> {
        let owner = Owner::Cpu(cpu);
        let told = |action| kvm(action, owner);
        // First: KVM takes in pending INIT and SIPI then.
        let run = vcpu.get_mp_state().map_err(told("tell the run state"))?;
        let sregs = vcpu
            .get_sregs()
            .map_err(told("tell the system registers"))?;
        if sregs.efer & EFER_SVME != 0 || sregs.cr4 & CR4_VMXE != 0 {
            return Err(Error::Nested);
        }
        Ok(Self {
            tsc_khz: vcpu.get_tsc_khz().map_err(told("tell the TSC's rate"))?,
            regs: vcpu.get_regs().map_err(told("tell the registers"))?,
            sregs,
            xsave: vcpu.get_xsave().map_err(told("tell the extended state"))?,
            xcrs: vcpu.get_xcrs().map_err(told("tell the XCRs"))?,
            debug: vcpu
                .get_debug_regs()
                .map_err(told("tell the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(told("tell the local APIC"))?,
            msrs: read_msrs(kvm_fd, vcpu, owner)?,
            events: vcpu.get_vcpu_events().map_err(told("tell the events"))?,
            run,
        })
    }

    /// Puts it into a processor that was just created, and has its CPUID.
    ///
    /// # Errors
    /// [`Error`]
    pub fn restore(&self, vcpu: &VcpuFd, cpu: u8) -> Result<(), Error> {
        let owner = Owner::Cpu(cpu);
        let taken = |action| kvm(action, owner);
        if vcpu.get_tsc_khz().map_err(taken("tell the TSC's rate"))? != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(|e| Error::Tsc {
                wanted: self.tsc_khz,
                source: e.into(),
            })?;
        }
        vcpu.set_sregs(&self.sregs)
            .map_err(taken("set the system registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(taken("set the registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(taken("set the XCRs"))?;
        // SAFETY: more than this structure's 4096 bytes are read for a guest alone that was permitted features whose state is
        // larger (arch_prctl(2), ARCH_REQ_XCOMP_GUEST_PERM), which this process never asks for.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(taken("set the extended state"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(taken("set the debug registers"))?;
        // After the system registers, which have its base and mode.
        vcpu.set_lapic(&self.lapic)
            .map_err(taken("set the local APIC"))?;
        write_msrs(vcpu, &self.msrs, owner)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(taken("set the events"))?;
        vcpu.set_mp_state(self.run)
            .map_err(taken("set the run state"))
    }
}

/// All MSRs that KVM can tell.
fn read_msrs(kvm_fd: &Kvm, vcpu: &VcpuFd, owner: Owner) -> Result<Vec<(u32, u64)>, Error> {
    let list = kvm_fd
        .get_msr_index_list()
        .map_err(kvm("list the MSRs", owner))?;
    let mut left: &[u32] = list.as_slice();
    let mut read = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let entries: Vec<_> = left
            .iter()
            .take(KVM_MAX_MSR_ENTRIES)
            .map(|index| entry(*index, 0))
            .collect();
        let mut msrs = batch(&entries, owner)?;
        let count = vcpu
            .get_msrs(&mut msrs)
            .map_err(kvm("tell the MSRs", owner))?;
        let told = msrs.as_slice().iter().take(count);
        read.extend(told.map(|msr| (msr.index, msr.data)));
        // The one that it stops at is not there for this guest.
        let skipped = usize::from(count < entries.len());
        left = left.get(count + skipped..).unwrap_or_default();
    }
    Ok(read)
}

/// The time stamp counter comes first, the timer that waits for it last.
fn write_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)], owner: Owner) -> Result<(), Error> {
    let place = |index: u32| match index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    };
    let mut entries: Vec<_> = msrs.iter().map(|(i, data)| entry(*i, *data)).collect();
    entries.sort_by_key(|entry| place(entry.index));
    let mut left: &[kvm_msr_entry] = &entries;
    while !left.is_empty() {
        let some = left.get(..KVM_MAX_MSR_ENTRIES).unwrap_or(left);
        let count = vcpu
            .set_msrs(&batch(some, owner)?)
            .map_err(kvm("set the MSRs", owner))?;
        let refused = some.get(count);
        if let Some(refused) = refused {
            // One that can be read only, or that this host's processors do not have; what the guest was shown of them is
            // compared before.
            tracing::debug!(index = format_args!("{:#x}", refused.index), %owner, "an MSR is left alone");
        }
        left = left
            .get(count + usize::from(refused.is_some())..)
            .unwrap_or_default();
    }
    Ok(())
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn batch(entries: &[kvm_msr_entry], owner: Owner) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| Error::Kvm {
        action: "take so many MSRs",
        owner,
        source: io::ErrorKind::InvalidInput.into(),
    })
}

/// What KVM keeps for the whole machine: interrupt controllers, timer and clock.
#[derive(Debug, Deserialize, Serialize)]
pub struct ChipState {
    controllers: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl ChipState {
    /// Asks KVM.
    ///
    /// # Errors
    /// [`Error::Kvm`]
    pub fn save(vm: &VmFd) -> Result<Self, Error> {
        let told = |action| kvm(action, Owner::Machine);
        let mut controllers = Vec::new();
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut controller = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut controller)
                .map_err(told("tell the interrupt controllers"))?;
            controllers.push(controller);
        }
        Ok(Self {
            controllers,
            pit: vm.get_pit2().map_err(told("tell the interval timer"))?,
            clock: vm.get_clock().map_err(told("tell the clock"))?,
        })
    }

    /// Puts interrupt controllers and timer into a machine.
    ///
    /// # Errors
    /// [`Error::Kvm`]
    pub fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        let taken = |action| kvm(action, Owner::Machine);
        for controller in &self.controllers {
            vm.set_irqchip(controller)
                .map_err(taken("set the interrupt controllers"))?;
        }
        vm.set_pit2(&self.pit)
            .map_err(taken("set the interval timer"))
    }

    /// Sets the guest's clock (kvmclock) to where it stood. To be done last: it runs from then on.
    ///
    /// # Errors
    /// [`Error::Kvm`]
    pub fn start_clock(&self, vm: &VmFd) -> Result<(), Error> {
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock)
            .map_err(kvm("set the clock", Owner::Machine))
    }
}
