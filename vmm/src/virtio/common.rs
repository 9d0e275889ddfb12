//! The common configuration structure (VIRTIO 1.3, 4.1.4.3) without the PCI around it: what the
//! driver wrote, whether that is allowed, and what is to happen because of it.

use serde::{Deserialize, Serialize};

use super::Queue;
use super::bits::*;

/// What the transport must do after a register was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The configuration's interrupt goes to another vector. The register keeps the vector only if
    /// there is one.
    ConfigVector(u16),
    /// A queue's interrupt goes to another vector.
    QueueVector {
        /// The queue.
        queue: u16,
        /// The vector, or [`NO_VECTOR`].
        vector: u16,
    },
    /// The driver set DRIVER_OK; start the device.
    Activate,
    /// The driver wrote status 0; stop the device and call [`CommonConfig::reset`].
    Reset,
}

/// Registers whose content is somebody else's.
#[derive(Clone, Copy, Debug, Default)]
pub struct External {
    /// Status bits that the device set.
    pub status: u8,
    /// The configuration's generation.
    pub generation: u8,
    /// Vector of the configuration interrupt.
    pub config_vector: u16,
    /// Vector of the selected queue's interrupt.
    pub queue_vector: u16,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
struct QueueState {
    queue: Queue,
    enabled: bool,
    limit: u16,
}

/// What the driver changes and a reset forgets.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Negotiation {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueState>,
    /// The device ran, and was stopped from outside.
    stopped: bool,
}

/// The structure's registers.
#[derive(Clone, Debug)]
pub struct CommonConfig {
    offered: u64,
    limits: Vec<u16>,
    state: Negotiation,
}

/// Size of the structure in bytes: up to and including `queue_reset`.
pub const SIZE: u64 = 0x3c;

impl CommonConfig {
    /// A device that offers these features and queues.
    pub fn new(offered: u64, limits: Vec<u16>) -> Self {
        let mut config = Self {
            offered,
            limits,
            state: Negotiation::default(),
        };
        config.reset();
        config
    }

    /// Forgets all that the driver wrote.
    pub fn reset(&mut self) {
        let queue = |(index, limit): (usize, &u16)| QueueState {
            queue: Queue {
                index: u16::try_from(index).unwrap_or(u16::MAX),
                size: *limit,
                ..Default::default()
            },
            enabled: false,
            limit: *limit,
        };
        self.state = Negotiation {
            queues: self.limits.iter().enumerate().map(queue).collect(),
            ..Default::default()
        };
    }

    /// Takes DRIVER_OK back, and leaves the rest, when the device was stopped from outside.
    pub fn stop(&mut self) {
        self.state.status &= !STATUS_DRIVER_OK;
        self.state.stopped = true;
    }

    /// Whether that has happened since the last reset: what the queues hold is not new.
    pub fn was_stopped(&self) -> bool {
        self.state.stopped
    }

    /// The features that driver and device agreed on.
    pub fn features(&self) -> u64 {
        self.state.driver_features
    }

    /// The queues that the driver enabled.
    pub fn queues(&self) -> impl Iterator<Item = Queue> + '_ {
        let enabled = self.state.queues.iter().filter(|q| q.enabled);
        enabled.map(|q| q.queue)
    }

    /// What the driver wrote.
    pub fn negotiation(&self) -> &Negotiation {
        &self.state
    }

    /// Takes over what a driver wrote elsewhere. Returns whether it could have written that here.
    pub fn restore(&mut self, state: &Negotiation) -> bool {
        let agreed = state.status & STATUS_FEATURES_OK != 0;
        let packed = state.driver_features & F_RING_PACKED != 0;
        let possible = |(index, (ours, theirs)): (usize, (&u16, &QueueState))| {
            let size = theirs.queue.size;
            usize::from(theirs.queue.index) == index
                && theirs.limit == *ours
                && (1..=*ours).contains(&size)
                && (size.is_power_of_two() || packed)
        };
        let queues = state.queues.len() == self.limits.len()
            && (self.limits.iter().zip(&state.queues).enumerate()).all(possible);
        let features = !agreed
            || state.driver_features & !self.offered == 0
                && state.driver_features & F_VERSION_1 != 0;
        let status = state.status & STATUS_NEEDS_RESET == 0
            && (agreed || state.status & STATUS_DRIVER_OK == 0);
        let all = queues && features && status;
        if all {
            self.state = state.clone();
        }
        all
    }

    /// The queue that the per-queue registers show.
    pub fn selected(&self) -> u16 {
        self.state.queue_select
    }

    /// The device status, without the bits that the device sets itself.
    pub fn status(&self) -> u8 {
        self.state.status
    }

    /// Reads `data.len()` bytes. Each register is read as a whole or in parts; other accesses
    /// read as zero (4.1.3.1 lets a driver access a register by its own width only, 64-bit ones
    /// also by halves).
    pub fn read(&self, offset: u64, external: &External, data: &mut [u8]) {
        data.fill(0);
        let Some((register, first, width)) = register(offset) else {
            return;
        };
        if first + data.len() > width {
            return;
        }
        let value = self.value(register, external).to_le_bytes();
        for (place, byte) in data.iter_mut().zip(value.iter().skip(first)) {
            *place = *byte;
        }
    }

    fn value(&self, register: Register, external: &External) -> u64 {
        let state = &self.state;
        let queue = self.queue().copied();
        let of_queue = |f: fn(QueueState) -> u64| queue.map(f).unwrap_or(0);
        match register {
            Register::DeviceFeatureSelect => state.device_feature_select.into(),
            Register::DeviceFeature => half(self.offered, state.device_feature_select),
            Register::DriverFeatureSelect => state.driver_feature_select.into(),
            Register::DriverFeature => half(state.driver_features, state.driver_feature_select),
            Register::ConfigVector => external.config_vector.into(),
            Register::NumQueues => u64::try_from(self.limits.len()).unwrap_or(0),
            Register::Status => (state.status | external.status).into(),
            Register::Generation => external.generation.into(),
            Register::QueueSelect => state.queue_select.into(),
            // Zero says that there is no such queue (4.1.4.3.1).
            Register::QueueSize => of_queue(|q| q.queue.size.into()),
            Register::QueueVector => match queue {
                Some(_) => external.queue_vector.into(),
                None => NO_VECTOR.into(),
            },
            Register::QueueEnable => of_queue(|q| q.enabled.into()),
            // Each queue has a doorbell of its own.
            Register::QueueNotifyOffset => of_queue(|q| q.queue.index.into()),
            Register::QueueDescriptors => of_queue(|q| q.queue.descriptors),
            Register::QueueAvailable => of_queue(|q| q.queue.available),
            Register::QueueUsed => of_queue(|q| q.queue.used),
            // Without NOTIF_CONFIG_DATA and RING_RESET these do not exist.
            Register::QueueNotifyData | Register::QueueReset => 0,
        }
    }

    /// Writes `data`. Accesses that are not a register as a whole (or half a 64-bit one) are
    /// ignored, as is whatever a driver must not do.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let Some((register, first, width)) = register(offset) else {
            return Action::None;
        };
        let value = data
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte));
        let word = || u32::try_from(value).unwrap_or(0);
        let short = || u16::try_from(value).unwrap_or(0);
        let half = width == 8 && data.len() == 4 && first % 4 == 0;
        if (first != 0 || data.len() != width) && !half {
            return Action::None;
        }
        match register {
            Register::DeviceFeatureSelect => self.state.device_feature_select = word(),
            Register::DriverFeatureSelect => self.state.driver_feature_select = word(),
            Register::DriverFeature => self.choose_features(word()),
            Register::ConfigVector => return Action::ConfigVector(short()),
            Register::Status => return self.set_status(u8::try_from(value).unwrap_or(0)),
            Register::QueueSelect => self.state.queue_select = short(),
            Register::QueueVector if self.queue().is_some() => {
                return Action::QueueVector {
                    queue: self.state.queue_select,
                    vector: short(),
                };
            }
            _ => self.set_queue(register, first, data.len(), value),
        }
        Action::None
    }

    fn choose_features(&mut self, word: u32) {
        // Agreed is agreed (3.1.1).
        if self.state.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.state.driver_features;
        match self.state.driver_feature_select {
            0 => *features = (*features & !0xffff_ffff) | u64::from(word),
            1 => *features = (*features & 0xffff_ffff) | (u64::from(word) << 32),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        // A driver must not clear bits (2.1.1), and NEEDS_RESET is not its to set.
        let before = self.state.status;
        let mut added = value & !before & !STATUS_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 {
            let features = self.state.driver_features;
            // Without VERSION_1 this would be a legacy device, which we are not (6.1).
            if features & !self.offered != 0 || features & F_VERSION_1 == 0 {
                tracing::debug!(
                    features = format_args!("{features:#x}"),
                    offered = format_args!("{:#x}", self.offered),
                    "features are not accepted"
                );
                added &= !STATUS_FEATURES_OK;
            }
        }
        let agreed = (before | added) & STATUS_FEATURES_OK != 0;
        if added & STATUS_DRIVER_OK != 0 && !agreed {
            tracing::debug!("DRIVER_OK before FEATURES_OK is ignored");
            added &= !STATUS_DRIVER_OK;
        }
        self.state.status = before | added;
        if added & STATUS_DRIVER_OK != 0 {
            Action::Activate
        } else {
            Action::None
        }
    }

    fn queue(&self) -> Option<&QueueState> {
        self.state.queues.get(usize::from(self.state.queue_select))
    }

    fn set_queue(&mut self, register: Register, first: usize, len: usize, value: u64) {
        let running = self.state.status & STATUS_DRIVER_OK != 0;
        let packed = self.state.driver_features & F_RING_PACKED != 0;
        let select = usize::from(self.state.queue_select);
        let Some(state) = self.state.queues.get_mut(select) else {
            return;
        };
        // An enabled queue, and all queues of a running device, stay as they are until the next
        // reset (4.1.4.3.2).
        if state.enabled || running {
            return;
        }
        let QueueState {
            queue,
            enabled,
            limit,
        } = state;
        match register {
            // A packed queue has any size (4.1.4.3.2).
            Register::QueueSize => match u16::try_from(value) {
                Ok(size) if (size.is_power_of_two() || packed && size > 0) && size <= *limit => {
                    queue.size = size;
                }
                _ => tracing::debug!(value, "queue size is not accepted"),
            },
            Register::QueueEnable => *enabled = value == 1,
            Register::QueueDescriptors => merge(&mut queue.descriptors, first, len, value),
            Register::QueueAvailable => merge(&mut queue.available, first, len, value),
            Register::QueueUsed => merge(&mut queue.used, first, len, value),
            _ => {}
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    Status,
    Generation,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    QueueDescriptors,
    QueueAvailable,
    QueueUsed,
    QueueNotifyData,
    QueueReset,
}

/// Offset and width of each register in bytes, in order (4.1.4.3).
const REGISTERS: [(u64, usize, Register); 18] = [
    (0x00, 4, Register::DeviceFeatureSelect),
    (0x04, 4, Register::DeviceFeature),
    (0x08, 4, Register::DriverFeatureSelect),
    (0x0c, 4, Register::DriverFeature),
    (0x10, 2, Register::ConfigVector),
    (0x12, 2, Register::NumQueues),
    (0x14, 1, Register::Status),
    (0x15, 1, Register::Generation),
    (0x16, 2, Register::QueueSelect),
    (0x18, 2, Register::QueueSize),
    (0x1a, 2, Register::QueueVector),
    (0x1c, 2, Register::QueueEnable),
    (0x1e, 2, Register::QueueNotifyOffset),
    (0x20, 8, Register::QueueDescriptors),
    (0x28, 8, Register::QueueAvailable),
    (0x30, 8, Register::QueueUsed),
    (0x38, 2, Register::QueueNotifyData),
    (0x3a, 2, Register::QueueReset),
];

/// The register at `offset`, how far into it that is, and its width.
fn register(offset: u64) -> Option<(Register, usize, usize)> {
    let mut before = REGISTERS
        .iter()
        .rev()
        .skip_while(|(start, ..)| *start > offset);
    let (start, width, register) = before.next()?;
    let first = usize::try_from(offset - start).ok()?;
    (first < *width).then_some((*register, first, *width))
}

/// The lower or upper half of a set of features; there are no others.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

/// Replaces the `len` bytes from `first` of a 64-bit register.
fn merge(register: &mut u64, first: usize, len: usize, value: u64) {
    *register = match (first, len) {
        (0, 4) => (*register & !0xffff_ffff) | value,
        (4, 4) => (*register & 0xffff_ffff) | (value << 32),
        _ => value,
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OFFERED: u64 = F_VERSION_1 | F_EVENT_IDX | 0x44;

    fn config() -> CommonConfig {
        CommonConfig::new(OFFERED, vec![256, 128])
    }

    fn read(config: &CommonConfig, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        let external = External {
            status: 0,
            generation: 7,
            config_vector: 3,
            queue_vector: 4,
        };
        config.read(offset, &external, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn negotiate(config: &mut CommonConfig, features: u64) {
        for (select, word) in [
            (0u32, features & 0xffff_ffff),
            (1, features >> 32),
            (2, 0xffff_ffff),
        ] {
            config.write(0x08, &select.to_le_bytes());
            config.write(0x0c, &u32::try_from(word).unwrap().to_le_bytes());
        }
        config.write(0x14, &[1]);
        config.write(0x14, &[3]);
        config.write(0x14, &[11]);
    }

    #[test]
    fn features_are_offered_in_halves() {
        let mut config = config();
        assert_eq!(read(&config, 4, 4), OFFERED & 0xffff_ffff);
        config.write(0, &1u32.to_le_bytes());
        assert_eq!(read(&config, 4, 4), 1);
        config.write(0, &2u32.to_le_bytes());
        assert_eq!(read(&config, 4, 4), 0);
        assert_eq!(read(&config, 0x12, 2), 2);
        assert_eq!(read(&config, 0x15, 1), 7);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        for (features, accepted) in [
            (OFFERED, true),
            (F_VERSION_1, true),
            (OFFERED & !F_VERSION_1, false),
            (OFFERED | 8, false),
        ] {
            let mut config = config();
            negotiate(&mut config, features);
            let ok = config.status() & STATUS_FEATURES_OK != 0;
            assert_eq!(ok, accepted, "{features:#x}");
            assert_eq!(config.write(0x14, &[15]) == Action::Activate, accepted);
            if accepted {
                config.write(0x08, &[0; 4]);
                config.write(0x0c, &[0; 4]);
                assert_eq!(config.features(), features, "agreed is agreed");
            }
        }
    }

    #[test]
    fn queues_are_set_up_and_then_fixed() {
        let mut config = config();
        negotiate(&mut config, F_VERSION_1);
        config.write(0x16, &[1, 0]);
        assert_eq!(read(&config, 0x18, 2), 128);
        for size in [0u16, 3, 129, 256, 0xffff] {
            config.write(0x18, &size.to_le_bytes());
        }
        assert_eq!(read(&config, 0x18, 2), 128);
        config.write(0x18, &[64, 0]);
        config.write(0x20, &0x1000u32.to_le_bytes());
        config.write(0x24, &1u32.to_le_bytes());
        config.write(0x28, &0x2000u64.to_le_bytes());
        config.write(0x30, &0x3000u64.to_le_bytes());
        assert_eq!(read(&config, 0x1e, 2), 1);
        config.write(0x1c, &[1, 0]);
        config.write(0x20, &[0; 8]);
        config.write(0x1c, &[0, 0]);
        let queue = Queue {
            index: 1,
            size: 64,
            descriptors: 0x1_0000_1000,
            available: 0x2000,
            used: 0x3000,
        };
        assert_eq!(config.queues().collect::<Vec<_>>(), [queue]);
        assert_eq!(config.write(0x14, &[15]), Action::Activate);
        assert_eq!(config.write(0x14, &[15]), Action::None, "only once");
        config.write(0x16, &[0, 0]);
        config.write(0x1c, &[1, 0]);
        assert_eq!(config.queues().count(), 1, "too late");
    }

    #[test]
    fn packed_queues_have_any_size() {
        let offered = F_VERSION_1 | F_RING_PACKED;
        for (features, taken) in [(F_VERSION_1, 128), (offered, 100)] {
            let mut config = CommonConfig::new(offered, vec![128]);
            negotiate(&mut config, features);
            for size in [100u16, 0, 129] {
                config.write(0x18, &size.to_le_bytes());
            }
            assert_eq!(read(&config, 0x18, 2), taken);
        }
    }

    #[test]
    fn queues_that_do_not_exist() {
        let mut config = config();
        config.write(0x16, &[2, 0]);
        for (offset, width, value) in [
            (0x18, 2, 0),
            (0x1a, 2, u64::from(NO_VECTOR)),
            (0x1c, 2, 0),
            (0x20, 8, 0),
        ] {
            assert_eq!(
                config.write(offset, &[0xff, 1, 0, 0, 0, 0, 0, 0][..width]),
                Action::None
            );
            assert_eq!(read(&config, offset, width), value, "{offset:#x}");
        }
    }

    #[test]
    fn odd_accesses_have_no_effect() {
        let mut config = config();
        let before = config.state.clone();
        for (offset, data) in [
            (0x00, &[1u8, 0][..]),
            (0x01, &[1, 0, 0, 0]),
            (0x14, &[1, 1]),
            (0x16, &[1]),
            (0x16, &[1, 0, 0, 0]),
            (0x22, &[1, 0, 0, 0]),
            (0x20, &[1; 3]),
            (0x3c, &[1; 4]),
            (u64::MAX, &[1]),
            (0, &[]),
        ] {
            assert_eq!(config.write(offset, data), Action::None);
        }
        assert_eq!(config.state, before);
        assert_eq!(read(&config, 0x3c, 4), 0);
        assert_eq!(read(&config, 0x12, 4), 0);
    }

    #[test]
    fn status_zero_resets() {
        let mut config = config();
        negotiate(&mut config, F_VERSION_1);
        config.write(0x1c, &[1, 0]);
        assert_eq!(config.write(0x14, &[0]), Action::Reset);
        config.reset();
        assert_eq!(config.state, super::tests::config().state);
    }

    proptest! {
        #[test]
        fn hostile_drivers_get_nowhere(
            accesses in prop::collection::vec((0..0x48u64, prop::collection::vec(any::<u8>(), 0..9)), 0..200)
        ) {
            let mut config = config();
            for (offset, data) in accesses {
                match config.write(offset, &data) {
                    Action::Reset => config.reset(),
                    Action::QueueVector { queue, .. } => prop_assert!(queue < 2),
                    Action::Activate => {
                        prop_assert!(config.features() & !OFFERED == 0);
                        prop_assert!(config.features() & F_VERSION_1 != 0);
                    }
                    _ => {}
                }
                let mut back = data.clone();
                config.read(offset, &External::default(), &mut back);
                for queue in config.queues() {
                    prop_assert!(queue.size.is_power_of_two() && queue.size <= 256);
                }
            }
        }
    }
}
