//! Numbers of VIRTIO 1.3 that a transport needs.

/// Device status: the driver is ready (2.1).
pub const STATUS_DRIVER_OK: u8 = 4;
/// Device status: features are agreed.
pub const STATUS_FEATURES_OK: u8 = 8;
/// Device status: the device cannot go on without a reset.
pub const STATUS_NEEDS_RESET: u8 = 64;

/// Feature bit 28: indirect descriptors (6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit 29: used and available event indexes.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature bit 32: not a legacy device.
pub const F_VERSION_1: u64 = 1 << 32;
/// Feature bit 34: packed virtqueues.
pub const F_RING_PACKED: u64 = 1 << 34;
/// Feature bit 35: buffers are used in the order they were made available.
pub const F_IN_ORDER: u64 = 1 << 35;
/// Feature bit 62 of a network card: it stands in for another one with the same address (5.1.3).
pub const NET_F_STANDBY: u64 = 1 << 62;
/// Bits 0 to 23 and 50 to 63 belong to the device type (2.2).
pub const F_DEVICE_SPECIFIC: u64 = 0xfffc_0000_00ff_ffff;

/// Vendor ID of all virtio PCI devices (4.1.2).
pub const PCI_VENDOR: u16 = 0x1af4;
/// The PCI device ID of device type 0; others follow (4.1.2).
pub const PCI_DEVICE_BASE: u16 = 0x1040;

/// No interrupt vector (4.1.5.1.2.1).
pub const NO_VECTOR: u16 = 0xffff;

/// Interrupt status: the configuration changed (4.1.4.5).
pub const ISR_CONFIG: u8 = 2;

/// Capability type: common configuration (4.1.4).
pub const CAP_COMMON: u8 = 1;
/// Capability type: notifications.
pub const CAP_NOTIFY: u8 = 2;
/// Capability type: interrupt status.
pub const CAP_ISR: u8 = 3;
/// Capability type: device configuration.
pub const CAP_DEVICE: u8 = 4;
/// Capability type: access to BARs through configuration space.
pub const CAP_PCI: u8 = 5;

/// Queues of one device at most. The specification's limit is 65535; this many doorbells and
/// vectors fit the BAR.
pub const MAX_QUEUES: usize = 1024;
