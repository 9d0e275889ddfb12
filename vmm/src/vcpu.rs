//! A thread for each virtual processor: enter the guest, look at why it left, answer, again.
//!
//! In steady state the loop makes no system call but KVM_RUN: ports and MMIO are answered from
//! memory, and what ends the machine is an atomic flag. To get a processor out of the guest its
//! thread is sent a real-time signal, whose handler sets `immediate_exit`, so that a signal that
//! arrives just before KVM_RUN is not lost.
#![allow(
    unsafe_code,
    reason = "the signal handler writes to kvm_run; unions in kvm_run are read"
)]

use std::cell::Cell;
use std::fmt::Write as _;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use ringside_control::Chain;
use ringside_sandbox::{ThreadKind, narrow};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::exit::{ExitHandle, ExitReason};
use crate::kvm::Vm;
use crate::pause::Gate;
use crate::pci::host::lock;

/// Why the processors cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No handler for the signal that stops a processor.
    #[error("cannot install the signal handler that stops processors")]
    Signal(#[source] io::Error),
    /// No thread.
    #[error("cannot start the thread of CPU {cpu}")]
    Thread {
        /// Which processor.
        cpu: u8,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// What a processor needs to answer its exits.
#[derive(Clone)]
pub struct Context {
    /// The VM, which has to outlive its processors: it holds the mapping of guest RAM.
    pub vm: Arc<Vm>,
    /// Ports.
    pub ports: Arc<Bus>,
    /// MMIO.
    pub mmio: Arc<Bus>,
    /// Ends the machine, and says that it has ended.
    pub exit: ExitHandle,
    /// Holds the processors while the machine is paused.
    pub gate: Gate,
}

/// The processors' threads. Stopped and joined when dropped.
pub struct Vcpus {
    gate: Gate,
    exit: ExitHandle,
}

impl Vcpus {
    /// Starts all processors.
    pub fn start(fds: Vec<SharedVcpu>, context: &Context) -> Result<Self, Error> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| Error::Signal(e.into()))?;
        let vcpus = Self {
            gate: context.gate.clone(),
            exit: context.exit.clone(),
        };
        for (cpu, fd) in (0u8..).zip(fds) {
            let vcpu = Vcpu {
                cpu,
                fd,
                context: context.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu {cpu}"))
                .spawn(move || match narrow(ThreadKind::Processor) {
                    Ok(()) => vcpu.run(),
                    Err(error) => vcpu.context.exit.end(ExitReason::Failure(format!(
                        "processor {cpu} cannot give up rights: {}",
                        Chain(&error)
                    ))),
                })
                .map_err(|source| Error::Thread { cpu, source })?;
            vcpus.gate.add(thread);
        }
        Ok(vcpus)
    }

    /// Gets all processors out of the guest and waits for their threads to end.
    fn stop(&mut self) {
        // Whoever gave the true reason came first; this one only makes the threads leave.
        self.exit.end(ExitReason::Requested("the end of the VMM"));
        for thread in self.gate.take() {
            // Once is enough for a thread in the guest. One that is blocked in a device's write to
            // a full pipe may need to be interrupted there, after it has got there.
            while !thread.is_finished() {
                if let Err(error) = thread.kill(SIGRTMIN()) {
                    tracing::debug!(%error, "a processor's thread is gone already");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.join().is_err() {
                tracing::error!("a processor's thread panicked");
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

thread_local! {
    /// The `kvm_run` of this thread's processor while it runs.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is that of this very thread's mapping, set and cleared by `Registered`
        // around its use.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: as above; volatile because the interrupted code may be about to enter the kernel.
        unsafe { flag.write_volatile(1) };
    }
}

/// Tells the signal handler about a processor's `kvm_run`, until it is dropped.
struct Registered;

impl Registered {
    fn new(run: &mut kvm_run) -> Self {
        KVM_RUN.set(std::ptr::from_mut(run));
        Self
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        KVM_RUN.set(std::ptr::null_mut());
    }
}

/// A processor. Its thread has the lock but while the machine is paused.
pub type SharedVcpu = Arc<Mutex<VcpuFd>>;

struct Vcpu {
    cpu: u8,
    fd: SharedVcpu,
    context: Context,
}

/// What is left of an exit when its borrow of `kvm_run` is over.
enum After {
    Continue,
    /// A port access; its details are in `kvm_run`.
    Port,
    End(ExitReason),
    /// End because of what is named here, with the processor's registers in the message.
    Crash(String),
    InternalError,
    /// It was told to leave, and has taken in what its last exit was answered with.
    Interrupted,
}

impl Vcpu {
    fn run(&self) {
        let mut fd = lock(&self.fd);
        let _registered = Registered::new(fd.get_kvm_run());
        let gate = &self.context.gate;
        while !self.context.exit.is_set() {
            if gate.is_closed() {
                // KVM takes in what an exit was answered with when it is entered next: before the processor's state is
                // complete, that has to be done.
                fd.set_kvm_immediate_exit(1);
            }
            let reason = match self.enter(&mut fd) {
                After::Continue => continue,
                After::Interrupted => {
                    if gate.is_closed() {
                        drop(fd);
                        gate.wait();
                        fd = lock(&self.fd);
                        self.tell_of_pause(&fd);
                    }
                    continue;
                }
                After::Port => {
                    self.port_access(&mut fd);
                    continue;
                }
                After::End(reason) => reason,
                After::Crash(what) => self.crash(&fd, &what),
                After::InternalError => {
                    let what = internal_error(fd.get_kvm_run());
                    self.crash(&fd, &what)
                }
            };
            self.context.exit.end(reason);
        }
    }

    /// Its watchdogs are not to take the pause for a hang. A guest that does not use this clock has none of it.
    fn tell_of_pause(&self, fd: &VcpuFd) {
        if let Err(error) = fd.kvmclock_ctrl() {
            tracing::debug!(cpu = self.cpu, %error, "the guest is not told of the pause");
        }
    }

    fn enter(&self, fd: &mut VcpuFd) -> After {
        let context = &self.context;
        match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                if !context.mmio.read(address, data) {
                    tracing::trace!(address, "MMIO read of nothing");
                }
                After::Continue
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                if !context.mmio.write(address, data) {
                    tracing::trace!(address, "MMIO write to nothing");
                }
                After::Continue
            }
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => After::Port,
            // A halted processor waits inside KVM, which has its interrupt controller; should one
            // come out, it waits there again.
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => After::Continue,
            // On AMD processors KVM has reset the processor by now, and the registers show that.
            Ok(VcpuExit::Shutdown) => After::Crash("triple fault".to_owned()),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                After::End(ExitReason::PowerOff)
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                After::End(ExitReason::Reset("KVM"))
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => After::End(ExitReason::Panic),
            Ok(VcpuExit::InternalError) => After::InternalError,
            Ok(VcpuExit::FailEntry(reason, cpu)) => After::Crash(format!(
                "the processor refuses to enter the guest (reason {reason:#x}, host CPU {cpu})"
            )),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                After::Crash(format!("no host memory behind guest address {gpa:#x}"))
            }
            Ok(exit) => After::Crash(format!("unexpected exit from the guest: {exit:?}")),
            Err(error) => match error.errno() {
                // EINTR: `exit` is looked at next. EAGAIN: a processor that got INIT.
                libc::EINTR | libc::EAGAIN => {
                    fd.set_kvm_immediate_exit(0);
                    After::Interrupted
                }
                _ => After::Crash(format!("KVM_RUN failed: {error}")),
            },
        }
    }

    /// Answers a port access. A string instruction comes as several accesses of the same width in
    /// one exit.
    fn port_access(&self, fd: &mut VcpuFd) {
        let run = fd.get_kvm_run();
        // SAFETY: called for KVM_EXIT_IO only, for which the kernel has filled in this variant.
        let io = unsafe { run.__bindgen_anon_1.io };
        let length = usize::from(io.size) * usize::try_from(io.count).unwrap_or(0);
        let offset = usize::try_from(io.data_offset).unwrap_or(0);
        // SAFETY: the kernel put the data at `data_offset` in the mapping that starts with
        // `kvm_run`, within its length (KVM_GET_VCPU_MMAP_SIZE), all of which kvm-ioctls has mapped.
        let start = unsafe { std::ptr::from_mut(run).cast::<u8>().add(offset) };
        // SAFETY: as above; `run` is borrowed mutably, and nobody else has the page.
        let data = unsafe { std::slice::from_raw_parts_mut(start, length) };
        let port = u64::from(io.port);
        for item in data.chunks_exact_mut(usize::from(io.size).max(1)) {
            let answered = if u32::from(io.direction) == KVM_EXIT_IO_IN {
                self.context.ports.read(port, item)
            } else {
                self.context.ports.write(port, item)
            };
            if !answered {
                tracing::trace!(port, "port without a device");
            }
        }
    }

    fn crash(&self, fd: &VcpuFd, what: &str) -> ExitReason {
        let mut message = format!("{what}, on CPU {}", self.cpu);
        match (fd.get_regs(), fd.get_sregs()) {
            (Ok(r), Ok(s)) => {
                let _ = write!(
                    message,
                    "\n  rip {:016x} rflags {:016x} cs {:04x} base {:x}\
                     \n  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\
                     \n  rsi {:016x} rdi {:016x} rsp {:016x} rbp {:016x}\
                     \n  r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}\
                     \n  r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}\
                     \n  cr0 {:016x} cr2 {:016x} cr3 {:016x} cr4 {:016x} efer {:x}",
                    r.rip,
                    r.rflags,
                    s.cs.selector,
                    s.cs.base,
                    r.rax,
                    r.rbx,
                    r.rcx,
                    r.rdx,
                    r.rsi,
                    r.rdi,
                    r.rsp,
                    r.rbp,
                    r.r8,
                    r.r9,
                    r.r10,
                    r.r11,
                    r.r12,
                    r.r13,
                    r.r14,
                    r.r15,
                    s.cr0,
                    s.cr2,
                    s.cr3,
                    s.cr4,
                    s.efer,
                );
            }
            _ => message.push_str(" (its registers cannot be read)"),
        }
        ExitReason::Crash(message)
    }
}

/// What KVM says about an error of its own.
fn internal_error(run: &mut kvm_run) -> String {
    // SAFETY: called for KVM_EXIT_INTERNAL_ERROR only, for which the kernel has filled in this
    // variant.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "it cannot emulate an instruction",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while it delivered an event",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an unexpected exit",
        _ => "unknown",
    };
    let mut text = format!("error inside KVM: {what} (suberror {})", internal.suberror);
    let count = usize::try_from(internal.ndata).unwrap_or(0);
    // For an emulation failure: flags, then the instruction's length and bytes if it was fetched.
    for word in internal.data.iter().take(count) {
        let _ = write!(text, " {word:016x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Entry;
    use crate::bus::BusDevice;
    use crate::cpu::{CpuTemplate, write_tables};
    use crate::layout;
    use crate::memory::{GuestRam, MIN_SIZE, Options, PageSize};
    use crate::pause;
    use crate::testing::has_kvm;
    use ringside_control::Size;
    use ringside_vfio::device::Mapping;
    use std::os::unix::fs::FileExt;
    use std::time::Instant;
    use vm_memory::{Bytes, GuestAddress};

    /// A machine with one processor that runs `code` at 1 MiB, in 64-bit mode.
    struct Guest {
        context: Context,
        ram: GuestRam,
        fds: Vec<SharedVcpu>,
    }

    const CODE: u64 = 0x10_0000;

    impl Guest {
        fn new(code: &[u8]) -> Self {
            let vm = Arc::new(Vm::new().unwrap());
            let size = Size(MIN_SIZE);
            let ram = GuestRam::new(Options {
                size,
                pages: PageSize::Normal,
                prefault: false,
            });
            let ram = ram.unwrap();
            vm.add_ram(ram.memory()).unwrap();
            ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
            let entry = Entry::Linux64 {
                address: CODE,
                zero_page: layout::boot::ZERO_PAGE,
            };
            write_tables(ram.memory(), &entry).unwrap();
            let fd = vm.fd().create_vcpu(0).unwrap();
            CpuTemplate::new(vm.kvm(), 1)
                .unwrap()
                .prepare(&fd, 0, Some(&entry))
                .unwrap();
            let context = Context {
                vm,
                ports: Arc::default(),
                mmio: Arc::default(),
                exit: ExitHandle::new().unwrap(),
                gate: Gate::default(),
            };
            Self {
                context,
                ram,
                fds: vec![Arc::new(Mutex::new(fd))],
            }
        }

        /// Runs until the guest ends.
        fn run(self) -> ExitReason {
            let exit = self.context.exit.clone();
            let vcpus = Vcpus::start(self.fds, &self.context).unwrap();
            let start = Instant::now();
            while !exit.is_set() {
                assert!(
                    start.elapsed() < Duration::from_secs(20),
                    "the guest does not end"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(vcpus);
            exit.reason().unwrap()
        }
    }

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);
    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset + 0x40).unwrap());
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn recorder() -> Arc<Mutex<Recorder>> {
        Arc::default()
    }

    /// `mov dx, 0x604; mov ax, 0x3400; out dx, ax`: enters S5.
    const POWER_OFF: [u8; 10] = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];

    fn with_power(guest: &Guest) {
        let pm = crate::devices::acpi_pm::AcpiPm::new(guest.context.exit.clone());
        let pm = Arc::new(Mutex::new(pm));
        guest
            .context
            .ports
            .insert(layout::ACPI_PM_PORT, 12, pm)
            .unwrap();
    }

    #[test]
    fn ports_are_read_and_written() {
        if !has_kvm("ports_are_read_and_written") {
            return;
        }
        let mut code = vec![
            0x66, 0xba, 0x02, 0x01, // mov dx, 0x102
            0xec, // in al, dx
            0x66, 0xba, 0x00, 0x01, // mov dx, 0x100
            0xee, // out dx, al
            0x66, 0xba, 0x00, 0x02, // mov dx, 0x200 (nobody)
            0xed, // in eax, dx
            0x66, 0xba, 0x04, 0x01, // mov dx, 0x104
            0xef, // out dx, eax
        ];
        code.extend(POWER_OFF);
        let guest = Guest::new(&code);
        let device = recorder();
        guest
            .context
            .ports
            .insert(0x100, 16, device.clone())
            .unwrap();
        with_power(&guest);
        assert_eq!(guest.run(), ExitReason::PowerOff);
        assert_eq!(
            device.lock().unwrap().0,
            [(0, vec![0x42]), (4, vec![0xff; 4])]
        );
    }

    #[test]
    fn a_string_instruction_is_several_accesses() {
        if !has_kvm("a_string_instruction_is_several_accesses") {
            return;
        }
        let mut code = vec![
            0xbe, 0x00, 0x00, 0x20, 0x00, // mov esi, 0x200000
            0xb9, 0x03, 0x00, 0x00, 0x00, // mov ecx, 3
            0x66, 0xba, 0x00, 0x01, // mov dx, 0x100
            0xf3, 0x66, 0x6f, // rep outsw
        ];
        code.extend(POWER_OFF);
        let guest = Guest::new(&code);
        guest
            .ram
            .memory()
            .write_slice(b"abcdef", GuestAddress(0x20_0000))
            .unwrap();
        let device = recorder();
        guest
            .context
            .ports
            .insert(0x100, 2, device.clone())
            .unwrap();
        with_power(&guest);
        assert_eq!(guest.run(), ExitReason::PowerOff);
        let expected = [b"ab", b"cd", b"ef"].map(|pair| (0, pair.to_vec()));
        assert_eq!(device.lock().unwrap().0, expected);
    }

    /// A BAR of which one page is mapped and the next one is not: only the latter is answered here.
    #[test]
    fn mapped_device_memory_does_not_leave_the_guest() {
        if !has_kvm("mapped_device_memory_does_not_leave_the_guest") {
            return;
        }
        let mut code = vec![
            0xb8, 0x00, 0x00, 0x00, 0xc0, // mov eax, 0xc0000000
            0x8b, 0x48, 0x08, // mov ecx, [rax + 8]
            0x89, 0x48, 0x10, // mov [rax + 16], ecx
            0x89, 0x88, 0x00, 0x10, 0x00, 0x00, // mov [rax + 0x1000], ecx
        ];
        code.extend(POWER_OFF);
        let guest = Guest::new(&code);
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        file.write_all_at(b"data", 8).unwrap();
        let mapping = Arc::new(Mapping::new(&file, 0, 4096).unwrap());
        guest.context.vm.map(0xc000_0000, &mapping).unwrap();
        let device = recorder();
        let bar = guest
            .context
            .mmio
            .insert(0xc000_0000, 0x2000, device.clone());
        bar.unwrap();
        with_power(&guest);
        assert_eq!(guest.run(), ExitReason::PowerOff);
        assert_eq!(device.lock().unwrap().0, [(0x1000, b"data".to_vec())]);
        let mut written = [0; 4];
        file.read_exact_at(&mut written, 16).unwrap();
        assert_eq!(&written, b"data");
    }

    #[test]
    fn mmio_is_read_and_written() {
        if !has_kvm("mmio_is_read_and_written") {
            return;
        }
        let mut code = vec![
            0xb8, 0x00, 0x00, 0x00, 0xc0, // mov eax, 0xc0000000
            0x8b, 0x48, 0x08, // mov ecx, [rax + 8]
            0x89, 0x08, // mov [rax], ecx
            0x66, 0x89, 0x48, 0x10, // mov [rax + 16], cx
        ];
        code.extend(POWER_OFF);
        let guest = Guest::new(&code);
        let device = recorder();
        guest
            .context
            .mmio
            .insert(0xc000_0000, 0x1000, device.clone())
            .unwrap();
        with_power(&guest);
        assert_eq!(guest.run(), ExitReason::PowerOff);
        assert_eq!(
            device.lock().unwrap().0,
            [(0, vec![0x48; 4]), (16, vec![0x48; 2])]
        );
    }

    #[test]
    fn a_triple_fault_ends_the_machine_with_the_registers() {
        if !has_kvm("a_triple_fault_ends_the_machine_with_the_registers") {
            return;
        }
        // lidt of an empty table, then an invalid instruction.
        let code = [
            0x48, 0xb8, 0, 0, 0x20, 0, 0, 0, 0, 0, 0x0f, 0x01, 0x18, 0x0f, 0x0b,
        ];
        let guest = Guest::new(&code);
        let ExitReason::Crash(message) = guest.run() else {
            panic!("not a crash")
        };
        assert!(message.contains("triple fault, on CPU 0"), "{message}");
        assert!(message.contains("rip 00000000001000"), "{message}");
    }

    #[test]
    fn an_error_inside_kvm_ends_the_machine_with_the_registers() {
        if !has_kvm("an_error_inside_kvm_ends_the_machine_with_the_registers") {
            return;
        }
        // mov eax, 0xc0000000; jmp rax: there is nothing to execute.
        let guest = Guest::new(&[0xb8, 0x00, 0x00, 0x00, 0xc0, 0xff, 0xe0]);
        let ExitReason::Crash(message) = guest.run() else {
            panic!("not a crash")
        };
        assert!(message.contains("error inside KVM"), "{message}");
        assert!(message.contains("rip 00000000c0000000"), "{message}");
    }

    #[test]
    fn a_halted_or_spinning_processor_can_be_stopped() {
        if !has_kvm("a_halted_or_spinning_processor_can_be_stopped") {
            return;
        }
        // cli; hlt and: jmp $
        for code in [&[0xfa, 0xf4][..], &[0xeb, 0xfe]] {
            let guest = Guest::new(code);
            let vcpus = Vcpus::start(guest.fds, &guest.context).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            guest.context.exit.end(ExitReason::Requested("test"));
            let start = Instant::now();
            drop(vcpus);
            assert!(start.elapsed() < Duration::from_secs(5));
        }
    }

    #[test]
    fn processors_are_held_while_the_machine_is_paused() {
        if !has_kvm("processors_are_held_while_the_machine_is_paused") {
            return;
        }
        // mov ebx, 0x200000; inc dword [rbx]; jmp to that
        let code = [0xbb, 0, 0, 0x20, 0, 0xff, 0x03, 0xeb, 0xfc];
        let guest = Guest::new(&code);
        let memory = guest.ram.memory().clone();
        let count = || memory.read_obj::<u32>(GuestAddress(0x20_0000)).unwrap();
        let runs = || {
            let (before, start) = (count(), Instant::now());
            while count() == before {
                assert!(start.elapsed() < Duration::from_secs(20), "it does not run");
            }
        };
        let gate = guest.context.gate.clone();
        assert_eq!(gate.resume(), Err(pause::Error::Running));
        let vcpus = Vcpus::start(guest.fds, &guest.context).unwrap();
        for _ in 0..3 {
            runs();
            gate.pause().unwrap();
            assert_eq!(gate.pause(), Err(pause::Error::Paused));
            let held = count();
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(count(), held);
            gate.resume().unwrap();
        }
        // One that is paused can be ended.
        gate.pause().unwrap();
        drop(vcpus);
    }

    #[test]
    fn a_doorbell_is_an_ioeventfd_and_makes_no_exit() {
        if !has_kvm("a_doorbell_is_an_ioeventfd_and_makes_no_exit") {
            return;
        }
        use kvm_ioctls::{IoEventAddress, NoDatamatch};
        use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
        let mut code = vec![
            0xb8, 0x00, 0x00, 0x00, 0xc0, // mov eax, 0xc0000000
            0x66, 0x89, 0x08, // mov [rax], cx
        ];
        code.extend(POWER_OFF);
        let guest = Guest::new(&code);
        let (device, doorbell) = (recorder(), EventFd::new(EFD_NONBLOCK).unwrap());
        guest
            .context
            .mmio
            .insert(0xc000_0000, 0x1000, device.clone())
            .unwrap();
        let address = IoEventAddress::Mmio(0xc000_0000);
        guest
            .context
            .vm
            .fd()
            .register_ioevent(&doorbell, &address, NoDatamatch)
            .unwrap();
        with_power(&guest);
        assert_eq!(guest.run(), ExitReason::PowerOff);
        assert_eq!(doorbell.read().unwrap(), 1);
        assert!(device.lock().unwrap().0.is_empty());
    }

    #[test]
    fn an_irqfd_wakes_a_halted_processor() {
        if !has_kvm("an_irqfd_wakes_a_halted_processor") {
            return;
        }
        use crate::irq::{GsiRouter, MsiMessage};
        use vmm_sys_util::eventfd::EventFd;
        // Enables the local APIC (spurious vector 0xff), sets an IDT, halts with interrupts on; the
        // handler for vector 0x30 is at 2 MiB and powers off.
        let code = [
            0xb8, 0xf0, 0x00, 0xe0, 0xfe, // mov eax, 0xfee000f0
            0xc7, 0x00, 0xff, 0x01, 0x00, 0x00, // mov dword [rax], 0x1ff
            0xb8, 0x00, 0x00, 0x30, 0x00, // mov eax, 0x300000
            0x0f, 0x01, 0x18, // lidt [rax]
            0xfb, 0xf4, // sti; hlt
            0xeb, 0xfd, // jmp to hlt
        ];
        let guest = Guest::new(&code);
        let memory = guest.ram.memory();
        memory
            .write_slice(&POWER_OFF, GuestAddress(0x20_0000))
            .unwrap();
        let table = 0x30_1000u64;
        memory.write_obj(0xfffu16, GuestAddress(0x30_0000)).unwrap();
        memory.write_obj(table, GuestAddress(0x30_0002)).unwrap();
        // 64-bit interrupt gate to 0x10:0x200000.
        memory
            .write_obj(0x0020_8e00_0010_0000u64, GuestAddress(table + 0x30 * 16))
            .unwrap();
        with_power(&guest);

        let router = GsiRouter::new(guest.context.vm.fd().clone()).unwrap();
        let (gsi, other) = (router.allocate().unwrap(), router.allocate().unwrap());
        assert_ne!(gsi, other);
        router.free(other);
        assert!(router.set_msi(other, MsiMessage::default()).is_err());
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x30,
        };
        assert!(router.set_msi(gsi, message).unwrap());
        assert!(!router.set_msi(gsi, message).unwrap());
        router.commit().unwrap();
        let event = EventFd::new(0).unwrap();
        router.register_irqfd(&event, gsi).unwrap();
        let exit = guest.context.exit.clone();
        let raiser = std::thread::spawn(move || {
            // Until the guest has its table: a message before that is lost, as on hardware.
            while !exit.is_set() {
                event.write(1).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        assert_eq!(guest.run(), ExitReason::PowerOff);
        raiser.join().unwrap();
    }
}
