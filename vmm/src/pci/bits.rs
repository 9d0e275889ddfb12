//! Numbers of the PCI specifications.

/// Size of a function's configuration space in bytes (PCI Express 5.0, 7.2.1).
pub const CONFIG_SIZE: usize = 4096;
/// Size of the part that mechanism 1 and conventional capabilities reach.
pub const CONVENTIONAL_SIZE: usize = 256;
/// End of the type 0 header.
pub const HEADER_SIZE: usize = 0x40;

// Type 0 header (PCI Express 5.0, 7.5.1).

/// Vendor ID.
pub const VENDOR_ID: usize = 0x00;
/// Device ID.
pub const DEVICE_ID: usize = 0x02;
/// Command register.
pub const COMMAND: usize = 0x04;
/// Status register.
pub const STATUS: usize = 0x06;
/// Revision ID.
pub const REVISION_ID: usize = 0x08;
/// Class code: programming interface, sub-class, base class.
pub const CLASS_CODE: usize = 0x09;
/// Header type; 0 is that of a function that is no bridge.
pub const HEADER_TYPE: usize = 0x0e;
/// Header type: the device has more functions than function 0 (PCI Express 5.0, 7.5.1.1.9).
pub const HEADER_MULTI_FUNCTION: u8 = 1 << 7;
/// Header type: a bridge (type 1).
pub const HEADER_BRIDGE: u8 = 1;
/// First base address register.
pub const BAR0: usize = 0x10;
/// Number of base address registers of a type 0 header.
pub const BAR_COUNT: usize = 6;
/// Where the expansion ROM's register is counted among the BARs.
pub const ROM_BAR: usize = BAR_COUNT;
/// Number of registers that say where a function answers: the BARs and the expansion ROM's.
pub const DECODER_COUNT: usize = BAR_COUNT + 1;
/// Subsystem vendor ID.
pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
/// Subsystem ID.
pub const SUBSYSTEM_ID: usize = 0x2e;
/// Expansion ROM base address.
pub const ROM_ADDRESS: usize = 0x30;
/// Offset of the first capability.
pub const CAPABILITIES_POINTER: usize = 0x34;
/// Interrupt line, a scratch register for software.
pub const INTERRUPT_LINE: usize = 0x3c;

/// Interrupt pin: 0 for none, 1 to 4 for INTA to INTD (PCI Express 5.0, 7.5.1.1.13).
pub const INTERRUPT_PIN: usize = 0x3d;
/// Built-in self test.
pub const BIST: usize = 0x0f;

// Type 1 header (PCI Express 5.0, 7.5.1.3).

/// Primary, secondary and subordinate bus number.
pub const PRIMARY_BUS: usize = 0x18;
/// Base and limit of the memory window.
pub const MEMORY_BASE: usize = 0x20;
/// Base and limit of the prefetchable window; their upper halves follow.
pub const PREFETCHABLE_BASE: usize = 0x24;
/// The window's addresses have 64 bits.
pub const WINDOW_64_BIT: u16 = 1;
/// Bridge control.
pub const BRIDGE_CONTROL: usize = 0x3e;
/// Bridge control: the bus behind the bridge is held in reset (PCI Express 5.0, 7.5.1.3.13).
pub const BRIDGE_CONTROL_RESET: u16 = 1 << 6;
/// Bridge control bits that software can change: parity, SERR#, secondary bus reset.
pub const BRIDGE_CONTROL_WRITABLE: u16 = 0x0043;

/// Command: answers to I/O accesses (PCI Express 5.0, 7.5.1.1.3).
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: answers to memory accesses (PCI Express 5.0, 7.5.1.1.3).
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: may access memory and send interrupts itself.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command bits that software can change: I/O, memory, bus master, parity, SERR#, INTx disable.
pub const COMMAND_WRITABLE: u16 = 0x0547;
/// Status: there is a capability list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;

/// BAR: a 64-bit memory BAR, which takes up two registers (PCI Express 5.0, 7.5.1.2.1).
pub const BAR_MEMORY_64: u32 = 0b100;
/// Expansion ROM: it answers (PCI Express 5.0, 7.5.1.2.4).
pub const ROM_ENABLE: u32 = 1 << 0;
/// Expansion ROM: the bits that are address.
pub const ROM_ADDRESS_MASK: u32 = 0xffff_f800;
/// BAR: reads have no side effects.
pub const BAR_PREFETCHABLE: u32 = 1 << 3;
/// BAR: the bits of a memory BAR that are not address.
pub const BAR_MEMORY_FLAGS: u64 = 0xf;

/// Capability ID: power management (PCI Code and ID Assignment, 2).
pub const CAP_POWER_MANAGEMENT: u8 = 0x01;
/// Capability ID: vital product data.
pub const CAP_VITAL_PRODUCT_DATA: u8 = 0x03;
/// Capability ID: MSI.
pub const CAP_MSI: u8 = 0x05;
/// Capability ID: SATA index and data registers.
pub const CAP_SATA: u8 = 0x12;
/// Capability ID: advanced features of conventional PCI, such as function-level reset.
pub const CAP_ADVANCED_FEATURES: u8 = 0x13;
/// Capability ID: vendor-specific (PCI Code and ID Assignment, 2).
pub const CAP_VENDOR: u8 = 0x09;
/// Capability ID: PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;
/// Capability ID: MSI-X.
pub const CAP_MSIX: u8 = 0x11;

/// Power management capabilities: the version (PCI Express 5.0, 7.5.2.1).
pub const PM_CAP_VERSION: u16 = 0b111;
/// Power management control/status: the power state, D0 to D3hot (PCI Express 5.0, 7.5.2.2).
pub const PM_POWER_STATE: u16 = 0b11;
/// Power management control/status: going from D3hot to D0 resets nothing.
pub const PM_NO_SOFT_RESET: u16 = 1 << 3;

/// Message control of MSI: in use (PCI Express 5.0, 7.7.1.2).
pub const MSI_ENABLE: u16 = 1 << 0;
/// Message control of MSI: logarithm of the number of vectors that the function has.
pub const MSI_CAPABLE: u16 = 0b111 << 1;
/// Message control of MSI: logarithm of the number of vectors that it may use.
pub const MSI_ENABLED: u16 = 0b111 << 4;
/// Message control of MSI: addresses have 64 bits.
pub const MSI_64_BIT: u16 = 1 << 7;
/// Message control of MSI: vectors can be masked.
pub const MSI_MASKABLE: u16 = 1 << 8;
/// Logarithm of the number of vectors that MSI has at most.
pub const MSI_MAX_LOG: u16 = 5;

/// Start of the extended capabilities (PCI Express 5.0, 7.6.1).
pub const EXTENDED_START: usize = 0x100;
/// Extended capability ID: none; the rest of the header counts (PCI Express 5.0, 7.9.28).
pub const EXT_CAP_NULL: u16 = 0x0000;
/// Extended capability ID: advanced error reporting (PCI Code and ID Assignment, 3).
pub const EXT_CAP_AER: u16 = 0x0001;
/// Extended capability ID: virtual channels.
pub const EXT_CAP_VC: u16 = 0x0002;
/// Extended capability ID: device serial number.
pub const EXT_CAP_SERIAL_NUMBER: u16 = 0x0003;
/// Extended capability ID: power budgeting.
pub const EXT_CAP_POWER_BUDGETING: u16 = 0x0004;
/// Extended capability ID: vendor-specific.
pub const EXT_CAP_VENDOR: u16 = 0x000b;
/// Extended capability ID: designated vendor-specific.
pub const EXT_CAP_DESIGNATED_VENDOR: u16 = 0x0023;

/// Size of the PCI Express capability, version 2, with its ID and next pointer.
pub const EXPRESS_SIZE: usize = 0x3c;
/// PCI Express capabilities register: version 2 (PCI Express 5.0, 7.5.3.2).
pub const EXPRESS_VERSION: u16 = 2;
/// PCI Express capabilities register: root complex integrated endpoint.
pub const EXPRESS_INTEGRATED_ENDPOINT: u16 = 0b1001 << 4;
/// PCI Express capabilities register: root port.
pub const EXPRESS_ROOT_PORT: u16 = 0b0100 << 4;
/// PCI Express capabilities register: there is a slot.
pub const EXPRESS_SLOT_IMPLEMENTED: u16 = 1 << 8;

// Registers of the PCI Express capability, from its start (PCI Express 5.0, 7.5.3).

/// Link capabilities.
pub const LINK_CAPABILITIES: usize = 0x0c;
/// The link's speed: 16 GT/s. Nothing has such a speed here; drivers warn about slow links.
pub const LINK_SPEED: u16 = 4;
/// Link capabilities: 16 GT/s, 16 lanes.
pub const LINK_SPEED_AND_WIDTH: u32 = LINK_SPEED as u32 | 16 << 4;
/// Link capabilities: link status says whether the link is active.
pub const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
/// Link control.
pub const LINK_CONTROL: usize = 0x10;
/// Link control bits that software can change: ASPM, link disable, common clock, extended synch, clock power management.
pub const LINK_CONTROL_WRITABLE: u16 = 0x01d3;
/// Link control: the link is down for as long as this is set (PCI Express 5.0, 7.5.3.7).
pub const LINK_DISABLE: u16 = 1 << 4;
/// Link status.
pub const LINK_STATUS: usize = 0x12;
/// Link status: 16 GT/s, 16 lanes.
pub const LINK_STATUS_SPEED_AND_WIDTH: u16 = LINK_SPEED | 16 << 4;
/// Link status: the link is active.
pub const LINK_ACTIVE: u16 = 1 << 13;
/// Slot capabilities (PCI Express 5.0, 7.5.3.9).
pub const SLOT_CAPABILITIES: usize = 0x14;
/// Slot capabilities: attention button, power controller, attention and power indicators, surprise removal, hot-plug; no
/// command completed.
pub const SLOT_CAPABILITIES_FIXED: u32 =
    1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 18;
/// Slot control (PCI Express 5.0, 7.5.3.10).
pub const SLOT_CONTROL: usize = 0x18;
/// Slot control bits that software can change.
pub const SLOT_CONTROL_WRITABLE: u16 = 0x17ff;
/// Slot control: events interrupt.
pub const SLOT_INTERRUPT_ENABLE: u16 = 1 << 5;
/// Slot control: both indicators are off.
pub const SLOT_INDICATORS_OFF: u16 = 0b11 << 6 | SLOT_POWER_INDICATOR;
/// Slot control: the power indicator; all ones are off.
pub const SLOT_POWER_INDICATOR: u16 = 0b11 << 8;
/// Slot control: the power indicator is on.
pub const SLOT_POWER_INDICATOR_ON: u16 = 0b01 << 8;
/// Slot control: the power indicator blinks, which it does while the guest gets ready for a change (PCI Express 5.0, 6.7.1.1.2).
pub const SLOT_POWER_INDICATOR_BLINKS: u16 = 0b10 << 8;
/// Slot control: the power is off.
pub const SLOT_POWER_OFF: u16 = 1 << 10;
/// Slot control: a change of the link interrupts.
pub const SLOT_LINK_CHANGED_ENABLE: u16 = 1 << 12;
/// Slot status (PCI Express 5.0, 7.5.3.11).
pub const SLOT_STATUS: usize = 0x1a;
/// Slot status: the attention button was pushed.
pub const SLOT_BUTTON_PUSHED: u16 = 1 << 0;
/// Slot status: a device came or went.
pub const SLOT_PRESENCE_CHANGED: u16 = 1 << 3;
/// Slot status: there is a device.
pub const SLOT_PRESENT: u16 = 1 << 6;
/// Slot status: the link came up or went down.
pub const SLOT_LINK_CHANGED: u16 = 1 << 8;
/// Slot status: bits that are cleared by writing ones.
pub const SLOT_EVENTS: u16 = 0x011f;
/// Root control.
pub const ROOT_CONTROL: usize = 0x1c;
/// Link capabilities 2 (PCI Express 5.0, 7.5.3.18).
pub const LINK_CAPABILITIES_2: usize = 0x2c;
/// Link capabilities 2: all speeds up to [`LINK_SPEED`].
pub const LINK_SPEEDS: u32 = 0b1111 << 1;
/// Link control 2 (PCI Express 5.0, 7.5.3.19): the target speed.
pub const LINK_CONTROL_2: usize = 0x30;

/// Device capabilities: role-based error reporting, required (PCI Express 5.0, 7.5.3.3).
pub const EXPRESS_DEVCAP_RBER: u32 = 1 << 15;
/// Device control after reset: relaxed ordering, no snoop, 512-byte read requests
/// (PCI Express 5.0, 7.5.3.4).
pub const EXPRESS_DEVCTL_DEFAULT: u16 = 0x2810;

/// Message control: the function uses MSI-X (PCI Express 5.0, 7.7.2.2).
pub const MSIX_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const MSIX_FUNCTION_MASK: u16 = 1 << 14;
/// Limit of the number of vectors of a function.
pub const MSIX_MAX_VECTORS: u16 = 2048;
/// Size of a table entry in bytes (PCI Express 5.0, 7.7.2.5).
pub const MSIX_ENTRY_SIZE: u64 = 16;
/// Vector control: the vector is masked (PCI Express 5.0, 7.7.2.9).
pub const MSIX_VECTOR_MASKED: u32 = 1;
