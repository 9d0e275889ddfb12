//! A minimal KVM virtual machine monitor. Depends on `ringside-rings` and `ringside-vfio`, never
//! on the back-ends: it meets them over a Unix socket.
//!
//! One file per concern:
//!
//! | module | concern |
//! | --- | --- |
//! | [`config`] | command line and configuration file, merged and checked |
//! | [`layout`] | where everything is in the guest's address spaces |
//! | [`kvm`] | the VM: its memory slots, in-kernel interrupt controllers and timer |
//! | [`memory`] | guest RAM, one sealed memfd that peers can map |
//! | [`bus`] | which device answers a port or MMIO access |
//! | [`irq`] | GSIs, MSI routes and irqfds |
//! | [`event_loop`] | the control thread: signals, and whatever devices wait for |
//! | [`devices`] | serial port, RTC, power, reset, panic |
//! | [`console`], [`terminal`] | the host's end of the serial port |
//! | [`pci`] | host bridge, configuration space, BARs, MSI-X |
//! | [`virtio`] | the virtio PCI transport |
//! | [`vhost_user`] | virtio devices that another process serves |
//! | [`exit`] | why the virtual machine ends |
#![deny(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod config;
pub mod console;
pub mod cpu;
pub mod devices;
pub mod event_loop;
pub mod exit;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod terminal;
pub mod vcpu;
pub mod vhost_user;
pub mod virtio;
