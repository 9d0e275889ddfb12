//! MSI-X (PCI Express 5.0, 6.1.4 and 7.7.2): the table a driver programs, and where a device's
//! interrupts go because of it.
//!
//! A *source* is something in the device that interrupts: a queue, or the configuration. Each has
//! an eventfd that whoever serves it signals, and is assigned to a vector by the driver. Several
//! sources may share a vector.
//!
//! ```text
//!              MSI-X on, function and vector not masked
//!   detached ───────────────────────────────────────────▶ attached
//!   signals stay in the eventfd:   ◀─────────────────     irqfd: the kernel takes each signal
//!   the vector is pending             otherwise           and sends the vector's message
//! ```
//!
//! No signal is lost on either way: an irqfd that is attached to a readable eventfd fires at once,
//! and detaching waits for interrupts under way. A message is changed in the kernel before the
//! source is attached. Nothing here runs while interrupts flow; the kernel delivers them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::bits::*;
use super::config::{self, ConfigSpace};
use crate::irq::{self, GsiRouter, MsiMessage};

/// What MSI-X needs from KVM, narrow enough to be played by a test.
pub trait InterruptRouting: Send + Sync {
    /// Hands out a GSI for one vector.
    fn allocate(&self) -> Result<u32, irq::Error>;
    /// Takes a GSI back.
    fn free(&self, gsi: u32);
    /// Makes `gsi` send `message`, from when this returns.
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), irq::Error>;
    /// Attaches `event` to `gsi`; raises it at once if `event` was already signalled.
    fn attach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error>;
    /// Detaches `event` from `gsi`. Later signals stay in `event`.
    fn detach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error>;
}

impl InterruptRouting for GsiRouter {
    fn allocate(&self) -> Result<u32, irq::Error> {
        GsiRouter::allocate(self)
    }
    fn free(&self, gsi: u32) {
        GsiRouter::free(self, gsi);
    }
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), irq::Error> {
        if self.set_msi(gsi, message)? {
            self.commit()?;
        }
        Ok(())
    }
    fn attach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        self.register_irqfd(event, gsi)
    }
    fn detach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
        self.unregister_irqfd(event, gsi)
    }
}

/// Why a device cannot have its interrupts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More vectors than the specification has room for.
    #[error("{vectors} MSI-X vectors are not between 1 and 2048")]
    Vectors {
        /// The number asked for.
        vectors: u16,
    },
    /// The process has no file descriptor left.
    #[error("cannot create an eventfd for an interrupt")]
    Event(#[source] io::Error),
    /// No GSI left.
    #[error("cannot reserve an interrupt")]
    Irq(#[from] irq::Error),
    /// No room for the capability.
    #[error("cannot add the MSI-X capability")]
    Config(#[from] config::Error),
}

/// Vectors and sources, for another process.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    control: u16,
    /// Address, data, and whether it is masked.
    vectors: Vec<(u64, u32, bool)>,
    /// Its vector, and whether it is pending.
    sources: Vec<(Option<u16>, bool)>,
}

struct Vector {
    message: MsiMessage,
    control: u32,
    gsi: u32,
}

impl Vector {
    fn masked(&self) -> bool {
        self.control & MSIX_VECTOR_MASKED != 0
    }
}

struct Source {
    event: EventFd,
    vector: Option<u16>,
    /// The GSI that `event` is attached to.
    attached: Option<u32>,
}

/// MSI-X of one function.
pub struct Msix {
    routing: Arc<dyn InterruptRouting>,
    /// Message control, the bits that software can change.
    control: u16,
    vectors: Vec<Vector>,
    sources: Vec<Source>,
}

/// A new eventfd for an interrupt or a doorbell.
pub fn new_event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

impl Msix {
    /// `vectors` vectors, all masked, and `sources` sources, none of which has a vector.
    pub fn new(
        routing: Arc<dyn InterruptRouting>,
        vectors: u16,
        sources: usize,
    ) -> Result<Self, Error> {
        if vectors == 0 || vectors > MSIX_MAX_VECTORS {
            return Err(Error::Vectors { vectors });
        }
        let mut msix = Self {
            routing,
            control: 0,
            vectors: Vec::with_capacity(vectors.into()),
            sources: Vec::with_capacity(sources),
        };
        for _ in 0..vectors {
            let gsi = msix.routing.allocate()?;
            msix.vectors.push(Vector {
                message: MsiMessage::default(),
                control: MSIX_VECTOR_MASKED,
                gsi,
            });
        }
        for _ in 0..sources {
            msix.sources.push(Source {
                event: new_event().map_err(Error::Event)?,
                vector: None,
                attached: None,
            });
        }
        Ok(msix)
    }

    /// What a driver and interrupts that wait have made of it.
    pub fn save(&self) -> MsixState {
        let entry = |v: &Vector| (v.message.address, v.message.data, v.masked());
        let source = |s: &Source| (s.vector, s.attached.is_none() && is_signalled(&s.event));
        MsixState {
            control: self.control,
            vectors: self.vectors.iter().map(entry).collect(),
            sources: self.sources.iter().map(source).collect(),
        }
    }

    /// Takes over what was saved elsewhere. Returns whether it has as many vectors and sources.
    pub fn restore(&mut self, state: &MsixState) -> bool {
        let count = self.vector_count();
        let possible = state.vectors.len() == self.vectors.len()
            && state.sources.len() == self.sources.len()
            && (state.sources.iter()).all(|(vector, _)| vector.is_none_or(|v| v < count));
        if !possible {
            return false;
        }
        for (vector, (address, data, masked)) in (0..).zip(&state.vectors) {
            // The two lowest address bits are zero (PCI Express 5.0, 7.7.2.6).
            let message = MsiMessage {
                address: address & !3,
                data: *data,
            };
            self.program(vector, message, *masked);
        }
        for (source, (vector, signalled)) in state.sources.iter().enumerate() {
            if let Some(event) = self.event(source).filter(|_| *signalled)
                && let Err(error) = event.write(1)
            {
                tracing::debug!(%error, "an interrupt is pending already");
            }
            self.assign(source, *vector);
        }
        self.set_control(state.control);
        true
    }

    /// Adds the capability with the table and the pending bits in `bar`. Returns its offset.
    pub fn add_capability(
        &self,
        space: &mut ConfigSpace,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<usize, Error> {
        let mut body = Vec::with_capacity(10);
        // The table's size is encoded as one less (PCI Express 5.0, 7.7.2.2).
        body.extend(self.vector_count().saturating_sub(1).to_le_bytes());
        body.extend((table | u32::from(bar)).to_le_bytes());
        body.extend((pending | u32::from(bar)).to_le_bytes());
        let writable = (MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes();
        Ok(space.add_capability(CAP_MSIX, &body, &writable)?)
    }

    /// Number of vectors.
    pub fn vector_count(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(MSIX_MAX_VECTORS)
    }

    /// The eventfd that raises a source's interrupt.
    pub fn event(&self, source: usize) -> Option<&EventFd> {
        self.sources.get(source).map(|s| &s.event)
    }

    /// The eventfds of all sources, in order.
    pub fn events(&self) -> Vec<&EventFd> {
        self.sources.iter().map(|source| &source.event).collect()
    }

    /// Assigns a source to a vector, or to none. Returns whether there is such a vector.
    pub fn assign(&mut self, source: usize, vector: Option<u16>) -> bool {
        if vector.is_some_and(|v| v >= self.vector_count()) {
            return false;
        }
        if let Some(s) = self.sources.get_mut(source) {
            s.vector = vector;
            self.update(source);
        }
        true
    }

    /// The vector of a source.
    pub fn assigned(&self, source: usize) -> Option<u16> {
        self.sources.get(source)?.vector
    }

    /// Takes all sources' vectors away and gives them new eventfds: whoever still holds the old
    /// ones can no longer interrupt the guest. The table stays (VIRTIO 1.3, 4.1.4.3.1: a device
    /// reset is not a function reset).
    pub fn reset_sources(&mut self) {
        for source in 0..self.sources.len() {
            self.assign(source, None);
            match (new_event(), self.sources.get_mut(source)) {
                (Ok(event), Some(s)) => s.event = event,
                (Err(error), _) => {
                    tracing::warn!(%error, "an interrupt keeps its eventfd over a device reset");
                }
                _ => {}
            }
        }
    }

    /// Sets a vector's message and mask, as writes to the table would.
    pub fn program(&mut self, vector: u16, message: MsiMessage, masked: bool) {
        if let Some(entry) = self.vectors.get_mut(usize::from(vector)) {
            entry.message = message;
            entry.control = if masked { MSIX_VECTOR_MASKED } else { 0 };
            self.update_vector(vector.into());
        }
    }

    /// To be called when software may have written message control.
    pub fn set_control(&mut self, control: u16) {
        let control = control & (MSIX_ENABLE | MSIX_FUNCTION_MASK);
        if control != self.control {
            self.control = control;
            self.update_all();
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((vector, at)) = self.entry(offset)
            && let Some(entry) = self.vectors.get(vector)
        {
            let mut bytes = [0; 16];
            let words = entry.message.address.to_le_bytes().into_iter();
            let words = words.chain(entry.message.data.to_le_bytes());
            for (place, byte) in bytes
                .iter_mut()
                .zip(words.chain(entry.control.to_le_bytes()))
            {
                *place = byte;
            }
            for (place, byte) in data.iter_mut().zip(bytes.iter().skip(at)) {
                *place = *byte;
            }
        }
    }

    /// Writes the table. Only aligned accesses of 4 or 8 bytes have an effect (PCI Express 5.0,
    /// 6.1.4.2).
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Some((vector, at)) = self.entry(offset) else {
            return;
        };
        match *data {
            [a, b, c, d] if at % 4 == 0 => {
                self.write_word(vector, at, u32::from_le_bytes([a, b, c, d]));
            }
            [a, b, c, d, e, f, g, h] if at % 8 == 0 => {
                self.write_word(vector, at, u32::from_le_bytes([a, b, c, d]));
                self.write_word(vector, at + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {
                tracing::debug!(
                    offset,
                    width = data.len(),
                    "MSI-X table write of an odd width is ignored"
                );
                return;
            }
        }
        self.update_vector(vector);
    }

    fn update_vector(&mut self, vector: usize) {
        for source in 0..self.sources.len() {
            if self.assigned(source).map(usize::from) == Some(vector) {
                self.update(source);
            }
        }
    }

    fn entry(&self, offset: u64) -> Option<(usize, usize)> {
        let vector = usize::try_from(offset / MSIX_ENTRY_SIZE).ok()?;
        let at = usize::try_from(offset % MSIX_ENTRY_SIZE).ok()?;
        (vector < self.vectors.len()).then_some((vector, at))
    }

    fn write_word(&mut self, vector: usize, at: usize, word: u32) {
        let Some(entry) = self.vectors.get_mut(vector) else {
            return;
        };
        let message = &mut entry.message;
        match at {
            // The two lowest address bits are zero (PCI Express 5.0, 7.7.2.6).
            0 => message.address = (message.address & !0xffff_ffff) | u64::from(word & !3),
            4 => message.address = (message.address & 0xffff_ffff) | (u64::from(word) << 32),
            8 => message.data = word,
            _ => entry.control = word & MSIX_VECTOR_MASKED,
        }
    }

    /// Reads the pending bits: a vector is pending if a source of it was signalled while it could
    /// not be delivered.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for source in &self.sources {
            let Some(vector) = source.vector else {
                continue;
            };
            let Some(at) = u64::from(vector / 8).checked_sub(offset) else {
                continue;
            };
            let byte = usize::try_from(at).ok().and_then(|at| data.get_mut(at));
            if let Some(byte) = byte
                && source.attached.is_none()
                && is_signalled(&source.event)
            {
                *byte |= 1 << (vector % 8);
            }
        }
    }

    fn update_all(&mut self) {
        for source in 0..self.sources.len() {
            self.update(source);
        }
    }

    /// Attaches or detaches a source as its vector's state wants it.
    fn update(&mut self, source: usize) {
        let deliver = self.control & (MSIX_ENABLE | MSIX_FUNCTION_MASK) == MSIX_ENABLE;
        let Some(source) = self.sources.get_mut(source) else {
            return;
        };
        let vector = source
            .vector
            .and_then(|v| self.vectors.get(usize::from(v)))
            .filter(|v| deliver && !v.masked());
        if let Some(gsi) = source.attached
            && vector.map(|v| v.gsi) != Some(gsi)
        {
            if let Err(error) = self.routing.detach(&source.event, gsi) {
                tracing::error!(%error, gsi, "cannot mask an interrupt");
            }
            source.attached = None;
        }
        let Some(vector) = vector else { return };
        // A message that changes while the vector is not masked takes effect at once.
        if let Err(error) = self.routing.route(vector.gsi, vector.message) {
            tracing::error!(%error, gsi = vector.gsi, "cannot route an interrupt");
            return;
        }
        if source.attached.is_none() {
            match self.routing.attach(&source.event, vector.gsi) {
                Ok(()) => source.attached = Some(vector.gsi),
                Err(error) => {
                    tracing::error!(%error, gsi = vector.gsi, "cannot unmask an interrupt");
                }
            }
        }
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for source in 0..self.sources.len() {
            self.assign(source, None);
        }
        for vector in &self.vectors {
            self.routing.free(vector.gsi);
        }
    }
}

/// Whether an eventfd's counter is not zero, without changing it.
fn is_signalled(event: &EventFd) -> bool {
    // An EventFd does not implement AsFd; nix has only safe constructors from types that do.
    let mut fds = [PollFd::new(borrow(event), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

#[allow(
    unsafe_code,
    reason = "vmm-sys-util's EventFd gives its descriptor only as a number"
)]
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` lives, which outlives the result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::has_kvm;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, HashMap};
    use std::sync::Mutex;

    /// Plays KVM: irqfds consume signals and count messages.
    #[derive(Default)]
    pub(crate) struct FakeKvm {
        state: Mutex<Fake>,
    }

    #[derive(Default)]
    struct Fake {
        allocated: u32,
        routes: BTreeMap<u32, MsiMessage>,
        attached: HashMap<i32, u32>,
        sent: Vec<MsiMessage>,
    }

    impl FakeKvm {
        /// What a back-end's write to an eventfd does.
        pub(crate) fn signal(&self, event: &EventFd) {
            let mut state = self.state.lock().unwrap();
            match state.attached.get(&event.as_raw_fd()).copied() {
                Some(gsi) => {
                    let message = state.routes[&gsi];
                    state.sent.push(message);
                }
                None => event.write(1).unwrap(),
            }
        }

        pub(crate) fn take_sent(&self) -> Vec<MsiMessage> {
            std::mem::take(&mut self.state.lock().unwrap().sent)
        }

        pub(crate) fn allocated(&self) -> u32 {
            self.state.lock().unwrap().allocated
        }
    }

    impl InterruptRouting for FakeKvm {
        fn allocate(&self) -> Result<u32, irq::Error> {
            let mut state = self.state.lock().unwrap();
            state.allocated += 1;
            Ok(23 + state.allocated)
        }
        fn free(&self, _: u32) {
            self.state.lock().unwrap().allocated -= 1;
        }
        fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), irq::Error> {
            self.state.lock().unwrap().routes.insert(gsi, message);
            Ok(())
        }
        fn attach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
            let mut state = self.state.lock().unwrap();
            assert_eq!(state.attached.insert(event.as_raw_fd(), gsi), None);
            // As in the kernel: it fires, and the counter keeps its value until it is detached.
            if is_signalled(event) {
                let message = state.routes[&gsi];
                state.sent.push(message);
            }
            Ok(())
        }
        fn detach(&self, event: &EventFd, gsi: u32) -> Result<(), irq::Error> {
            let mut state = self.state.lock().unwrap();
            assert_eq!(state.attached.remove(&event.as_raw_fd()), Some(gsi));
            let _ = event.read();
            Ok(())
        }
    }

    pub(crate) fn program(msix: &mut Msix, vector: u64, data: u32) {
        msix.write_table(vector * 16, &0xfee0_1000_u32.to_le_bytes());
        msix.write_table(vector * 16 + 4, &0u32.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
    }

    fn mask(msix: &mut Msix, vector: u64, masked: bool) {
        msix.write_table(vector * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    }

    #[test]
    fn a_masked_interrupt_is_pending_and_then_delivered_once() {
        let kvm = Arc::new(FakeKvm::default());
        let mut msix = Msix::new(kvm.clone(), 3, 2).unwrap();
        program(&mut msix, 2, 0x42);
        assert!(msix.assign(0, Some(2)));
        msix.set_control(MSIX_ENABLE);
        kvm.signal(msix.event(0).unwrap());
        assert_eq!(pending(&msix), 0b100);
        assert!(kvm.take_sent().is_empty());
        mask(&mut msix, 2, false);
        let message = MsiMessage {
            address: 0xfee0_1000,
            data: 0x42,
        };
        assert_eq!(kvm.take_sent(), [message]);
        assert_eq!(pending(&msix), 0);
        kvm.signal(msix.event(0).unwrap());
        assert_eq!(kvm.take_sent(), [message]);
        msix.set_control(MSIX_ENABLE | MSIX_FUNCTION_MASK);
        assert_eq!(pending(&msix), 0, "it was delivered");
        kvm.signal(msix.event(0).unwrap());
        assert_eq!(pending(&msix), 0b100);
        msix.set_control(MSIX_ENABLE);
        assert_eq!(kvm.take_sent(), [message]);
    }

    #[test]
    fn a_message_changes_without_masking() {
        let kvm = Arc::new(FakeKvm::default());
        let mut msix = Msix::new(kvm.clone(), 1, 1).unwrap();
        msix.set_control(MSIX_ENABLE);
        msix.assign(0, Some(0));
        program(&mut msix, 0, 1);
        mask(&mut msix, 0, false);
        program(&mut msix, 0, 2);
        kvm.signal(msix.event(0).unwrap());
        assert_eq!(kvm.take_sent()[0].data, 2);
        // The same in one access of 8 bytes, as the specification allows.
        msix.write_table(8, &[3, 0, 0, 0, 0, 0, 0, 0]);
        kvm.signal(msix.event(0).unwrap());
        assert_eq!(kvm.take_sent()[0].data, 3);
    }

    #[test]
    fn the_table_reads_back_and_odd_accesses_do_nothing() {
        let mut msix = Msix::new(Arc::new(FakeKvm::default()), 2, 1).unwrap();
        program(&mut msix, 1, 0x1234);
        let mut entry = [0; 16];
        msix.read_table(16, &mut entry);
        assert_eq!(entry[..4], 0xfee0_1000_u32.to_le_bytes());
        assert_eq!(entry[8..], [0x34, 0x12, 0, 0, 1, 0, 0, 0]);
        for (offset, data) in [
            (17, &[0xff; 4][..]),
            (16, &[0xff]),
            (16, &[0xff; 2]),
            (20, &[0xff; 8]),
            (32, &[0xff; 8]),
            (u64::MAX, &[0xff; 4]),
            (16, &[]),
        ] {
            msix.write_table(offset, data);
        }
        let mut after = [0; 16];
        msix.read_table(16, &mut after);
        assert_eq!(after, entry);
        msix.read_table(u64::MAX, &mut after);
        msix.read_pending(u64::MAX, &mut after);
        assert_eq!(after, [0; 16]);
    }

    #[test]
    fn vectors_beyond_the_table_are_refused() {
        let mut msix = Msix::new(Arc::new(FakeKvm::default()), 2, 1).unwrap();
        assert!(!msix.assign(0, Some(2)));
        assert!(msix.assign(9, Some(1)));
        assert_eq!(msix.assigned(0), None);
        assert_eq!(msix.assigned(9), None);
        for vectors in [0, 2049] {
            assert!(Msix::new(Arc::new(FakeKvm::default()), vectors, 1).is_err());
        }
    }

    #[test]
    fn everything_is_given_back() {
        let kvm = Arc::new(FakeKvm::default());
        let mut msix = Msix::new(kvm.clone(), 4, 3).unwrap();
        msix.set_control(MSIX_ENABLE);
        for vector in 0..3 {
            mask(&mut msix, vector, false);
            msix.assign(usize::try_from(vector).unwrap(), Some(0));
        }
        assert_eq!(kvm.state.lock().unwrap().attached.len(), 3);
        drop(msix);
        assert_eq!(kvm.allocated(), 0);
        assert!(kvm.state.lock().unwrap().attached.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Mask(u64, bool),
        Control(u16),
        Assign(usize, u16),
        Message(u64, u32),
        Signal(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3u64, any::<bool>()).prop_map(|(v, m)| Step::Mask(v, m)),
            (0..4u16).prop_map(|bits| Step::Control(bits << 14)),
            (0..4usize, 0..3u16).prop_map(|(s, v)| Step::Assign(s, v)),
            (0..3u64, any::<u32>()).prop_map(|(v, d)| Step::Message(v, d)),
            (0..4usize).prop_map(Step::Signal),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        /// Whatever a driver does, each signal is delivered or pending, and once everything is
        /// unmasked it was delivered.
        #[test]
        fn no_interrupt_is_lost(steps in prop::collection::vec(step(), 0..80)) {
            let kvm = Arc::new(FakeKvm::default());
            let mut msix = Msix::new(kvm.clone(), 3, 4).unwrap();
            for source in 0..4 {
                msix.assign(source, Some(0));
            }
            let mut owed = [false; 4];
            for step in steps {
                match step {
                    Step::Mask(v, masked) => mask(&mut msix, v, masked),
                    Step::Control(control) => msix.set_control(control),
                    Step::Assign(s, v) => prop_assert!(msix.assign(s, Some(v))),
                    Step::Message(v, data) => program(&mut msix, v, data),
                    Step::Signal(s) => {
                        let before = kvm.state.lock().unwrap().sent.len();
                        kvm.signal(msix.event(s).unwrap());
                        owed[s] |= kvm.state.lock().unwrap().sent.len() == before;
                    }
                }
                for (s, owed) in owed.iter_mut().enumerate() {
                    // Attached sources have nothing left to deliver.
                    *owed &= msix.sources[s].attached.is_none();
                    if *owed {
                        let vector = msix.assigned(s).unwrap();
                        prop_assert!(pending(&msix) & (1 << vector) != 0);
                    }
                }
            }
            kvm.take_sent();
            let mut expected = owed.iter().filter(|o| **o).count();
            for v in 0..3 {
                mask(&mut msix, v, false);
            }
            msix.set_control(MSIX_ENABLE);
            expected -= kvm.take_sent().len();
            prop_assert_eq!(expected, 0);
            prop_assert_eq!(pending(&msix), 0);
        }
    }

    /// The kernel does what [`FakeKvm`] plays: an attached eventfd's signals are taken, a detached
    /// one's are kept, and nothing stays behind that would look pending later.
    #[test]
    fn the_kernel_takes_and_keeps_signals() {
        if !has_kvm("the_kernel_takes_and_keeps_signals") {
            return;
        }
        let vm = crate::kvm::Vm::new().unwrap();
        let router = Arc::new(GsiRouter::new(Arc::clone(vm.fd())).unwrap());
        let mut msix = Msix::new(router, 2, 3).unwrap();
        for vector in 0..2 {
            program(&mut msix, vector, 0x40);
            mask(&mut msix, vector, false);
        }
        msix.set_control(MSIX_ENABLE);
        for (source, vector) in [(0, 0), (1, 1), (2, 1)] {
            assert!(msix.assign(source, Some(vector)));
        }
        for source in &msix.sources {
            assert!(source.attached.is_some());
            source.event.write(1).unwrap();
            assert!(!is_signalled(&source.event), "the kernel has taken it");
        }
        assert_eq!(pending(&msix), 0);
        for round in 0..20 {
            mask(&mut msix, 1, true);
            assert_eq!(pending(&msix), 0, "round {round}");
            msix.event(2).unwrap().write(1).unwrap();
            assert_eq!(pending(&msix), 0b10, "round {round}");
            msix.set_control(MSIX_ENABLE | MSIX_FUNCTION_MASK);
            mask(&mut msix, 1, false);
            assert_eq!(pending(&msix), 0b10, "round {round}");
            msix.set_control(MSIX_ENABLE);
            assert_eq!(pending(&msix), 0, "round {round}");
        }
    }

    /// Signals come from another thread while the vector is masked and unmasked; the last one
    /// always arrives.
    #[test]
    fn masking_races_with_signalling() {
        let kvm = Arc::new(FakeKvm::default());
        let mut msix = Msix::new(kvm.clone(), 1, 1).unwrap();
        msix.assign(0, Some(0));
        program(&mut msix, 0, 7);
        msix.set_control(MSIX_ENABLE);
        let event = msix.event(0).unwrap();
        // The signaller uses the number of the source's own descriptor, as the fake keys on it.
        let alias = Arc::new(Mutex::new(event.try_clone().unwrap()));
        let number = event.as_raw_fd();
        let signaller = {
            let (kvm, alias) = (kvm.clone(), alias.clone());
            std::thread::spawn(move || {
                for _ in 0..2000 {
                    let mut state = kvm.state.lock().unwrap();
                    match state.attached.get(&number).copied() {
                        Some(gsi) => {
                            let message = state.routes[&gsi];
                            state.sent.push(message);
                        }
                        None => alias.lock().unwrap().write(1).unwrap(),
                    }
                }
            })
        };
        while !signaller.is_finished() {
            mask(&mut msix, 0, false);
            mask(&mut msix, 0, true);
        }
        signaller.join().unwrap();
        kvm.take_sent();
        alias.lock().unwrap().write(1).unwrap();
        assert_eq!(pending(&msix), 1);
        mask(&mut msix, 0, false);
        assert_eq!(kvm.take_sent().len(), 1);
    }
}
