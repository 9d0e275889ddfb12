//! Virtio over PCI, modern devices only (VIRTIO 1.3, 4.1): a function with one BAR that holds all
//! of the transport's structures, and MSI-X. There is no INTx: a driver must use MSI-X.
//!
//! ```text
//! BAR 0   0x0000  common configuration
//!         0x1000  interrupt status
//!         0x2000  device configuration
//!         0x3000  doorbells, one 32-bit register for each queue
//!         0x4000  MSI-X pending bits
//!         0x8000  MSI-X table
//! ```
//!
//! A doorbell is an ioeventfd: the guest's write ends in the kernel, which signals the eventfd
//! that the device got with the queue. Interrupts are irqfds, see [`crate::pci::msix`].

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::bits::*;
use super::common::{self, Action, CommonConfig, External};
use super::{Activation, ActiveQueue, Notifier, VirtioDevice};
use crate::pci::bits::{CAP_VENDOR, COMMAND, COMMAND_BUS_MASTER, CONFIG_SIZE};
use crate::pci::config::{self, BarKind, ConfigSpace, Identity};
use crate::pci::msix::{self, Msix, new_event};
use crate::pci::{FunctionKind, FunctionState, InterruptRouting, PciFunction, VirtioState};
use crate::snapshot::dirty::DirtyLog;

const BAR: usize = 0;
const BAR_SIZE: u64 = 0x1_0000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_END: u64 = 0x3000;
const DOORBELLS: u64 = 0x3000;
const DOORBELLS_END: u64 = 0x4000;
const DOORBELL_SIZE: u32 = 4;
const PENDING: u64 = 0x4000;
const PENDING_END: u64 = 0x4100;
const TABLE: u64 = 0x8000;

/// What the transport needs from KVM to route doorbells.
pub trait Doorbells: Send + Sync {
    /// From now on a write of any width to guest-physical `address` signals `event`, nothing else.
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes [`Doorbells::attach`].
    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

impl Doorbells for VmFd {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

/// Why a device cannot be a PCI function.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The doorbells would not fit the BAR.
    #[error("a device of {queues} queues is too large: the limit is 1024")]
    Queues {
        /// Number of queues.
        queues: usize,
    },
    /// The process has no file descriptor left.
    #[error("cannot create an eventfd for a doorbell")]
    Event(#[source] io::Error),
    /// Capabilities or BARs do not fit.
    #[error("cannot lay out the PCI configuration space")]
    Config(#[from] config::Error),
    /// No interrupts.
    #[error("cannot set up MSI-X")]
    Msix(#[from] msix::Error),
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    notifier: Arc<Notifier>,
    doorbells: Arc<dyn Doorbells>,
    config: ConfigSpace,
    common: CommonConfig,
    msix: Msix,
    /// Offsets of capabilities in the configuration space.
    msix_capability: usize,
    access_capability: usize,
    kicks: Vec<EventFd>,
    /// Where BAR 0 answers.
    mapped: Option<u64>,
}

impl VirtioPci {
    /// Wraps `device`. It gets one interrupt vector for each queue and one for the configuration.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        routing: Arc<dyn InterruptRouting>,
        doorbells: Arc<dyn Doorbells>,
    ) -> Result<Self, Error> {
        let features = device.features();
        Self::offering(features, device, routing, doorbells)
    }

    /// The same with some of the device's features alone: those that the guest was offered elsewhere.
    pub fn offering(
        features: u64,
        device: Box<dyn VirtioDevice>,
        routing: Arc<dyn InterruptRouting>,
        doorbells: Arc<dyn Doorbells>,
    ) -> Result<Self, Error> {
        let sizes = device.queue_sizes();
        let queues = sizes.len();
        if queues > MAX_QUEUES {
            return Err(Error::Queues { queues });
        }
        let vectors = u16::try_from(queues + 1).map_err(|_| Error::Queues { queues })?;
        let kicks: Result<Vec<_>, _> = (0..queues).map(|_| new_event()).collect();
        let kicks = kicks.map_err(Error::Event)?;

        let kind = device.device_type();
        let mut config = ConfigSpace::new(Identity {
            vendor: PCI_VENDOR,
            // Config has checked the type; no valid one comes near an overflow.
            device: PCI_DEVICE_BASE.saturating_add(kind),
            // 4.1.2.1: a non-transitional device has revision 1 or higher and a subsystem ID of
            // 0x40 or higher.
            revision: 1,
            class: class(kind),
            subsystem_vendor: PCI_VENDOR,
            subsystem: 0x40u16.saturating_add(kind),
        });
        config.add_bar(BAR, BAR_SIZE, BarKind::Memory64 { prefetchable: true })?;
        config.add_express_capability()?;
        let msix = Msix::new(routing, vectors, queues + 1)?;
        let msix_capability =
            msix.add_capability(&mut config, 0, offset(TABLE), offset(PENDING))?;
        for (kind, start, end, tail) in [
            (CAP_COMMON, COMMON, COMMON + common::SIZE, None),
            (CAP_ISR, ISR, ISR + 1, None),
            (CAP_DEVICE, DEVICE, DEVICE_END, None),
            (
                CAP_NOTIFY,
                DOORBELLS,
                DOORBELLS_END,
                Some(DOORBELL_SIZE.to_le_bytes()),
            ),
        ] {
            let body = structure(kind, start, end - start, tail);
            config.add_capability(CAP_VENDOR, &body, &[])?;
        }
        let body = structure(CAP_PCI, 0, 0, Some([0; 4]));
        let mut writable = structure(0, u64::from(u32::MAX), u64::from(u32::MAX), Some([0xff; 4]));
        for (place, mask) in writable.iter_mut().zip([0, 0, 0xff]) {
            *place = mask;
        }
        let access_capability = config.add_capability(CAP_VENDOR, &body, &writable)?;

        let pci = Self {
            common: CommonConfig::new(features, sizes),
            notifier: device.notifier(),
            device,
            doorbells,
            config,
            msix,
            msix_capability,
            access_capability,
            kicks,
            mapped: None,
        };
        pci.connect_notifier();
        Ok(pci)
    }

    /// The features that the driver chose, for a device that runs.
    pub fn driver_features(&self) -> u64 {
        if self.is_running() {
            self.common.features()
        } else {
            0
        }
    }

    /// The source of configuration interrupts comes after those of the queues.
    fn config_source(&self) -> usize {
        self.kicks.len()
    }

    fn connect_notifier(&self) {
        let event = self.msix.event(self.config_source());
        let event = event.map(EventFd::try_clone).transpose();
        if let Err(error) = &event {
            tracing::error!(%error, "the device cannot interrupt for configuration changes");
        }
        self.notifier.clear(event.ok().flatten());
    }

    fn external(&self) -> External {
        let vector = |source| self.msix.assigned(source).unwrap_or(NO_VECTOR);
        External {
            status: self.notifier.status(),
            generation: self.notifier.generation(),
            config_vector: vector(self.config_source()),
            queue_vector: vector(self.common.selected().into()),
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::None => {}
            Action::ConfigVector(vector) => self.assign(self.config_source(), vector),
            Action::QueueVector { queue, vector } => self.assign(queue.into(), vector),
            Action::Activate => self.activate(),
            Action::Reset => {
                self.device.reset();
                self.common.reset();
                self.msix.reset_sources();
                self.connect_notifier();
            }
        }
    }

    /// A vector that does not exist reads back as no vector (4.1.5.1.2.1).
    fn assign(&mut self, source: usize, vector: u16) {
        let wanted = Some(vector).filter(|v| *v != NO_VECTOR);
        if !self.msix.assign(source, wanted) {
            self.msix.assign(source, None);
        }
    }

    fn activate(&mut self) {
        let result = self
            .activation()
            .map_err(Into::into)
            .and_then(|activation| self.device.activate(activation));
        if let Err(error) = result {
            if self.notifier.may_complain() {
                tracing::error!(error = &*error, "a virtio device does not start");
            }
            self.notifier.needs_reset();
        }
    }

    fn activation(&self) -> io::Result<Activation> {
        let mut queues = Vec::new();
        for queue in self.common.queues() {
            let index = usize::from(queue.index);
            if let (Some(kick), Some(call)) = (self.kicks.get(index), self.msix.event(index)) {
                queues.push(ActiveQueue {
                    queue,
                    kick: kick.try_clone()?,
                    call: call.try_clone()?,
                });
            }
        }
        Ok(Activation {
            features: self.common.features(),
            queues,
            again: self.common.was_stopped(),
        })
    }

    fn is_bus_master(&self) -> bool {
        self.config.u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// A function that is no bus master must leave memory alone (PCI Express 5.0, 7.5.1.1.3). A
    /// kernel that starts another one (kexec) does no more than this with a device in use, and the
    /// new kernel has other plans for the memory behind the queues. The driver may set DRIVER_OK
    /// again.
    fn stop(&mut self) {
        if self.is_running() {
            tracing::debug!("a virtio device is no bus master any more");
            self.device.reset();
            self.common.stop();
        }
    }

    fn is_running(&self) -> bool {
        self.common.status() & STATUS_DRIVER_OK != 0
    }

    /// What the access capability points at, if that is allowed (4.1.4.9.1): an aligned register
    /// of 1, 2 or 4 bytes inside the BAR.
    fn window(&self) -> Option<(u64, usize)> {
        let bar = self.config.u32(self.access_capability + 4) & 0xff;
        let offset = u64::from(self.config.u32(self.access_capability + 8));
        let length = self.config.u32(self.access_capability + 12);
        let allowed = bar == 0
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length.into())
            && offset < BAR_SIZE;
        (allowed).then_some((offset, usize::try_from(length).ok()?))
    }

    fn window_data(&self) -> usize {
        self.access_capability + 16
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.window_data()
            && let Some((at, length)) = self.window()
        {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..length) {
                self.read_bar(BAR, at, value);
            }
            self.config.set(offset, &value);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let was_master = self.is_bus_master();
        self.config.write(offset, data);
        if was_master && !self.is_bus_master() {
            self.stop();
        }
        if offset == self.window_data()
            && let Some((at, length)) = self.window()
            && let Some(value) = data.get(..length)
        {
            self.write_bar(BAR, at, value);
        }
        // Message control is in the capability's second half-word.
        let end = offset.saturating_add(data.len()).min(CONFIG_SIZE);
        if offset < self.msix_capability + 4 && end > self.msix_capability + 2 {
            let control = self.config.u16(self.msix_capability + 2);
            self.msix.set_control(control);
        }
    }

    fn read_bar(&mut self, _: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => self.common.read(offset - COMMON, &self.external(), data),
            ISR => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.notifier.take_isr();
                }
            }
            DEVICE..DEVICE_END => self.device.read_config(offset - DEVICE, data),
            PENDING..PENDING_END => self.msix.read_pending(offset - PENDING, data),
            TABLE.. => self.msix.read_table(offset - TABLE, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, _: usize, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                let action = self.common.write(offset - COMMON, data);
                self.perform(action);
            }
            // 3.1.1: a driver writes the configuration only after it has agreed on features.
            DEVICE..DEVICE_END => self.device.write_config(offset - DEVICE, data),
            // Comes here only through the access capability, or if KVM has no room for another
            // ioeventfd.
            DOORBELLS..DOORBELLS_END => {
                let queue = usize::try_from((offset - DOORBELLS) / u64::from(DOORBELL_SIZE));
                let kick = queue.ok().and_then(|q| self.kicks.get(q));
                if let Some(Err(error)) = kick.map(|k| k.write(1)) {
                    tracing::debug!(%error, "doorbell is already ringing");
                }
            }
            TABLE.. => self.msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }

    fn suspend(&mut self) -> Result<FunctionState, Box<dyn StdError + Send + Sync>> {
        // First: its last interrupts are part of the state.
        let device = self.device.suspend()?;
        Ok(FunctionState {
            config: self.config.registers().to_vec(),
            kind: FunctionKind::Virtio(VirtioState {
                negotiation: self.common.negotiation().clone(),
                told: self.notifier.told(),
                msix: self.msix.save(),
                device,
            }),
        })
    }

    fn resume(&mut self) {
        self.device.resume();
    }

    fn track(
        &mut self,
        log: Option<&Arc<DirtyLog>>,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        self.device.track(log)
    }

    fn restore(&mut self, state: &FunctionState) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let FunctionKind::Virtio(virtio) = &state.kind else {
            return Err("it is no virtio device there".into());
        };
        if !self.config.restore(&state.config) {
            return Err("it is of another type there".into());
        }
        if !self.common.restore(&virtio.negotiation) {
            return Err("it has other features or queues there".into());
        }
        if !self.msix.restore(&virtio.msix) {
            return Err("it has other interrupts there".into());
        }
        self.connect_notifier();
        self.notifier.tell_again(virtio.told);
        let activation = self.is_running().then(|| self.activation()).transpose()?;
        self.device.restore(activation, &virtio.device)
    }

    fn bar_moved(&mut self, _: usize, from: Option<u64>, to: Option<u64>) {
        let addresses = |bar: u64| (bar + DOORBELLS..).step_by(4);
        if let Some(bar) = from {
            for (address, kick) in addresses(bar).zip(&self.kicks) {
                if let Err(error) = self.doorbells.detach(address, kick) {
                    tracing::debug!(%error, "a doorbell was not attached");
                }
            }
        }
        if let Some(bar) = to {
            for (address, kick) in addresses(bar).zip(&self.kicks) {
                if let Err(error) = self.doorbells.attach(address, kick)
                    && self.notifier.may_complain()
                {
                    tracing::warn!(%error, "a doorbell is slow: KVM cannot take it");
                }
            }
        }
        self.mapped = to;
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.bar_moved(BAR, self.mapped, None);
    }
}

fn offset(at: u64) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// `virtio_pci_cap` after its first two bytes (4.1.4).
fn structure(kind: u8, start: u64, length: u64, tail: Option<[u8; 4]>) -> Vec<u8> {
    let size = if tail.is_some() { 20 } else { 16 };
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend(offset(start).to_le_bytes());
    body.extend(offset(length).to_le_bytes());
    body.extend(tail.into_iter().flatten());
    body
}

/// The PCI class that fits a device type best; drivers do not look at it.
fn class(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_00_00,
        2 | 8 => 0x01_00_00,
        3 => 0x07_80_00,
        16 => 0x03_80_00,
        18 => 0x09_80_00,
        19 => 0x02_80_00,
        20 => 0x10_80_00,
        25 => 0x04_01_00,
        26 => 0x01_80_00,
        _ => 0xff_00_00,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::bits::{BAR0, MSIX_ENABLE};
    use crate::pci::msix::tests::FakeKvm;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    #[derive(Default)]
    struct FakeBoard(Mutex<BTreeMap<u64, usize>>);

    impl Doorbells for FakeBoard {
        fn attach(&self, address: u64, _: &EventFd) -> io::Result<()> {
            *self.0.lock().unwrap().entry(address).or_default() += 1;
            Ok(())
        }
        fn detach(&self, address: u64, _: &EventFd) -> io::Result<()> {
            self.0.lock().unwrap().remove(&address).unwrap();
            Ok(())
        }
    }

    #[derive(Default)]
    struct State {
        active: Option<Activation>,
        resets: u32,
        config: [u8; 16],
        fail: bool,
    }

    struct Fake(Arc<Mutex<State>>, Arc<Notifier>);

    impl VirtioDevice for Fake {
        fn device_type(&self) -> u16 {
            2
        }
        fn features(&self) -> u64 {
            F_VERSION_1 | 0x40
        }
        fn queue_sizes(&self) -> Vec<u16> {
            vec![256, 256]
        }
        fn notifier(&self) -> Arc<Notifier> {
            self.1.clone()
        }
        fn read_config(&mut self, offset: u64, data: &mut [u8]) {
            let state = self.0.lock().unwrap();
            let at = usize::try_from(offset).unwrap();
            for (place, byte) in data.iter_mut().zip(state.config.iter().skip(at)) {
                *place = *byte;
            }
        }
        fn write_config(&mut self, offset: u64, data: &[u8]) {
            let at = usize::try_from(offset).unwrap();
            let mut state = self.0.lock().unwrap();
            for (place, byte) in state.config.iter_mut().skip(at).zip(data) {
                *place = *byte;
            }
        }
        fn activate(&mut self, a: Activation) -> Result<(), Box<dyn StdError + Send + Sync>> {
            let mut state = self.0.lock().unwrap();
            if state.fail {
                return Err("told to fail".into());
            }
            assert!(state.active.replace(a).is_none());
            Ok(())
        }
        fn reset(&mut self) {
            let mut state = self.0.lock().unwrap();
            state.active = None;
            state.resets += 1;
        }
    }

    struct Setup {
        pci: VirtioPci,
        kvm: Arc<FakeKvm>,
        board: Arc<FakeBoard>,
        state: Arc<Mutex<State>>,
        notifier: Arc<Notifier>,
    }

    fn setup() -> Setup {
        let (kvm, board) = (Arc::new(FakeKvm::default()), Arc::new(FakeBoard::default()));
        let state = Arc::new(Mutex::new(State::default()));
        let notifier = Arc::new(Notifier::default());
        let device = Box::new(Fake(state.clone(), notifier.clone()));
        let pci = VirtioPci::new(device, kvm.clone(), board.clone()).unwrap();
        Setup {
            pci,
            kvm,
            board,
            state,
            notifier,
        }
    }

    impl Setup {
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.pci.write_bar(BAR, offset, data);
        }
        fn read(&mut self, offset: u64, width: usize) -> u64 {
            let mut data = [0; 8];
            self.pci.read_bar(BAR, offset, &mut data[..width]);
            u64::from_le_bytes(data)
        }
        /// What a driver does up to DRIVER_OK, with queue 1 on vector 1 and the configuration on
        /// vector 0.
        fn start(&mut self) {
            for vector in 0..3 {
                self.write(TABLE + 16 * vector, &0xfee0_0000u32.to_le_bytes());
                self.write(
                    TABLE + 16 * vector + 8,
                    &[u8::try_from(vector).unwrap(), 0, 0, 0],
                );
                self.write(TABLE + 16 * vector + 12, &[0; 4]);
            }
            let control = self.pci.msix_capability + 2;
            self.pci.write_config(control, &MSIX_ENABLE.to_le_bytes());
            self.write(0x14, &[3]);
            self.write(0x08, &[1, 0, 0, 0]);
            self.write(0x0c, &[1, 0, 0, 0]);
            self.write(0x14, &[11]);
            self.write(0x10, &[0, 0]);
            self.write(0x16, &[1, 0]);
            self.write(0x1a, &[1, 0]);
            self.write(0x20, &0x1000u64.to_le_bytes());
            self.write(0x1c, &[1, 0]);
            self.write(0x14, &[15]);
        }
    }

    /// The driver's walk through the capabilities finds all structures in the BAR.
    #[test]
    fn capabilities_lead_to_the_structures() {
        let mut s = setup();
        let mut found = BTreeMap::new();
        let mut at = usize::from(s.pci.config.u16(0x34) & 0xff);
        while at != 0 {
            let head = s.pci.config.u32(at);
            if head & 0xff == u32::from(CAP_VENDOR) {
                let (start, length) = (s.pci.config.u32(at + 8), s.pci.config.u32(at + 12));
                found.insert(head >> 24, (start, length, head >> 16 & 0xff));
            }
            at = usize::try_from(head >> 8 & 0xff).unwrap();
        }
        let expected = [
            (1, (0, 0x3c, 16)),
            (2, (0x3000, 0x1000, 20)),
            (3, (0x1000, 1, 16)),
            (4, (0x2000, 0x1000, 16)),
            (5, (0, 0, 20)),
        ];
        assert_eq!(found, BTreeMap::from(expected));
        assert_eq!(s.pci.config.u32(0), 0x1042_1af4);
        s.pci.write_config(BAR0, &[0xff; 4]);
        assert_eq!(s.pci.config.u32(BAR0), 0xffff_000c);
    }

    #[test]
    fn a_driver_starts_and_resets_the_device() {
        let mut s = setup();
        s.start();
        assert_eq!(s.read(0x14, 1), 15);
        let (call, kick) = {
            let mut state = s.state.lock().unwrap();
            let active = state.active.as_mut().unwrap();
            assert_eq!(active.features, F_VERSION_1);
            assert_eq!(active.queues.len(), 1);
            let queue = active.queues.pop().unwrap();
            assert_eq!((queue.queue.index, queue.queue.descriptors), (1, 0x1000));
            (queue.call, queue.kick)
        };
        s.write(DOORBELLS + 4, &[1, 0]);
        assert_eq!(kick.read().unwrap(), 1);
        s.kvm.signal(s.pci.msix.event(1).unwrap());
        assert_eq!(s.kvm.take_sent()[0].data, 1);

        let before = s.pci.msix.event(1).unwrap().try_clone().unwrap();
        s.write(0x14, &[0]);
        assert_eq!(s.read(0x14, 1), 0);
        assert_eq!(s.state.lock().unwrap().resets, 1);
        assert_eq!(s.read(0x10, 2), u64::from(NO_VECTOR));
        // Whoever kept the old eventfd interrupts nobody any more.
        call.write(1).unwrap();
        before.write(1).unwrap();
        s.start();
        assert!(s.kvm.take_sent().is_empty());
    }

    #[test]
    fn a_device_that_does_not_start_needs_a_reset() {
        let mut s = setup();
        s.state.lock().unwrap().fail = true;
        s.start();
        assert_eq!(s.read(0x14, 1), 15 | u64::from(STATUS_NEEDS_RESET));
        assert_eq!(s.read(ISR, 1), u64::from(ISR_CONFIG));
        assert_eq!(s.read(ISR, 1), 0);
        s.write(0x14, &[0]);
        assert_eq!(s.read(0x14, 1), 0);
    }

    #[test]
    fn a_device_that_is_no_bus_master_any_more_is_stopped() {
        let mut s = setup();
        let master = |s: &mut Setup, on: bool| {
            let value = if on { COMMAND_BUS_MASTER } else { 0 };
            s.pci.write_config(COMMAND, &value.to_le_bytes());
        };
        // A driver that never was a bus master is served: nobody has taken that away from it.
        master(&mut s, false);
        s.start();
        master(&mut s, true);
        assert_eq!(s.state.lock().unwrap().resets, 0);
        master(&mut s, false);
        assert_eq!(s.state.lock().unwrap().resets, 1);
        assert_eq!(s.read(0x14, 1), 11, "all but DRIVER_OK");
        master(&mut s, true);
        assert!(s.state.lock().unwrap().active.is_none());
        s.write(0x14, &[15]);
        let queues = s
            .state
            .lock()
            .unwrap()
            .active
            .as_ref()
            .unwrap()
            .queues
            .len();
        assert_eq!(queues, 1, "as it was set up before");
        s.write(0x14, &[0]);
        master(&mut s, false);
        assert_eq!(
            s.state.lock().unwrap().resets,
            2,
            "only one that runs is stopped"
        );
    }

    #[test]
    fn configuration_changes_raise_the_generation_and_the_interrupt() {
        let mut s = setup();
        s.start();
        s.write(DEVICE + 3, &[9]);
        assert_eq!(s.read(DEVICE, 4), 0x0900_0000);
        assert_eq!(s.read(DEVICE + 0xff8, 8), 0);
        let generation = s.read(0x15, 1);
        // Mask the vector, so that the fake kernel's eventfd keeps the signal.
        s.write(TABLE + 12, &[1, 0, 0, 0]);
        s.notifier.config_changed();
        assert_ne!(s.read(0x15, 1), generation);
        assert_eq!(s.read(PENDING, 1), 1);
        s.write(TABLE + 12, &[0, 0, 0, 0]);
        assert_eq!(s.kvm.take_sent()[0].data, 0);
        assert_eq!(s.read(ISR, 1), u64::from(ISR_CONFIG));
    }

    #[test]
    fn vectors_that_do_not_exist_read_back_as_none() {
        let mut s = setup();
        for vector in [3u16, 0xfffe, NO_VECTOR] {
            s.write(0x10, &vector.to_le_bytes());
            s.write(0x1a, &vector.to_le_bytes());
            assert_eq!(s.read(0x10, 2), u64::from(NO_VECTOR));
            assert_eq!(s.read(0x1a, 2), u64::from(NO_VECTOR));
        }
        s.write(0x1a, &[2, 0]);
        assert_eq!(s.read(0x1a, 2), 2);
    }

    #[test]
    fn doorbells_move_with_the_bar() {
        let mut s = setup();
        s.pci.bar_moved(BAR, None, Some(0x1_0000));
        let attached = |s: &Setup| {
            s.board
                .0
                .lock()
                .unwrap()
                .keys()
                .copied()
                .collect::<Vec<_>>()
        };
        assert_eq!(attached(&s), [0x1_3000, 0x1_3004]);
        s.pci.bar_moved(BAR, Some(0x1_0000), Some(0x8_0000));
        assert_eq!(attached(&s), [0x8_3000, 0x8_3004]);
        let board = s.board.clone();
        drop(s);
        assert!(board.0.lock().unwrap().is_empty());
    }

    #[test]
    fn the_bar_is_reachable_through_configuration_space() {
        let mut s = setup();
        let at = s.pci.access_capability;
        s.pci.write_config(at + 8, &0x12u32.to_le_bytes());
        s.pci.write_config(at + 12, &2u32.to_le_bytes());
        let mut data = [0; 4];
        s.pci.read_config(at + 16, &mut data);
        assert_eq!(data, [2, 0, 0, 0], "number of queues");
        s.pci.write_config(at + 8, &0x14u32.to_le_bytes());
        s.pci.write_config(at + 12, &1u32.to_le_bytes());
        s.pci.write_config(at + 16, &[3, 0, 0, 0]);
        assert_eq!(s.read(0x14, 1), 3);
        for (bar, offset, length) in [
            (1, 0x14, 1),
            (0, 0x15, 2),
            (0, 0x14, 8),
            (0, 0x14, 0),
            (0, 0xffff_fffc, 4),
        ] {
            s.pci.write_config(at + 4, &[bar]);
            s.pci.write_config(at + 8, &u32::to_le_bytes(offset));
            s.pci.write_config(at + 12, &u32::to_le_bytes(length));
            s.pci.write_config(at + 16, &[0; 4]);
            s.pci.read_config(at + 16, &mut data);
            assert_eq!(s.read(0x14, 1), 3, "nothing was written");
        }
    }

    #[test]
    fn too_many_queues_are_refused() {
        struct Wide(Fake);
        impl VirtioDevice for Wide {
            fn device_type(&self) -> u16 {
                2
            }
            fn features(&self) -> u64 {
                F_VERSION_1
            }
            fn queue_sizes(&self) -> Vec<u16> {
                vec![16; 1025]
            }
            fn notifier(&self) -> Arc<Notifier> {
                self.0.notifier()
            }
            fn read_config(&mut self, _: u64, _: &mut [u8]) {}
            fn write_config(&mut self, _: u64, _: &[u8]) {}
            fn activate(&mut self, _: Activation) -> Result<(), Box<dyn StdError + Send + Sync>> {
                Ok(())
            }
            fn reset(&mut self) {}
        }
        let fake = Fake(Arc::default(), Arc::default());
        let result = VirtioPci::new(
            Box::new(Wide(fake)),
            Arc::new(FakeKvm::default()),
            Arc::new(FakeBoard::default()),
        );
        assert!(matches!(result, Err(Error::Queues { queues: 1025 })));
    }

    proptest! {
        #[test]
        fn hostile_accesses_get_nowhere(
            accesses in prop::collection::vec(
                (any::<bool>(), prop_oneof![0..0x40u64, 0..0x1_0000u64, 0x8000..0x8040u64],
                 prop::collection::vec(any::<u8>(), 0..9)), 0..200)
        ) {
            let mut s = setup();
            for (in_bar, offset, data) in accesses {
                let mut back = data.clone();
                if in_bar {
                    s.pci.write_bar(BAR, offset, &data);
                    s.pci.read_bar(BAR, offset, &mut back);
                } else {
                    let offset = usize::try_from(offset & 0xfff).unwrap();
                    s.pci.write_config(offset, &data);
                    s.pci.read_config(offset, &mut back);
                }
            }
            prop_assert_eq!(s.kvm.allocated(), 3);
            s.pci.write_bar(BAR, 0x14, &[0]);
            prop_assert_eq!(s.read(0x14, 1), 0);
        }
    }
}
