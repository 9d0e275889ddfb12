//! A minimal KVM virtual machine monitor. Of the workspace's crates it may depend on `ringside-rings`
//! (which it does not need so far), `ringside-vfio`, `ringside-control` and `ringside-sandbox`; never on the back-ends: it meets
//! them over a Unix socket.
//!
//! One file, or one folder, for each concern; each row builds on those above it:
//!
//! | module | concern |
//! | --- | --- |
//! | [`config`] | command line and configuration file, merged and checked |
//! | [`layout`] | where everything is in the guest's address spaces |
//! | [`exit`] | why the virtual machine ends |
//! | [`complaints`] | a limit on what a guest can make us log |
//! | [`event_loop`] | the control thread: signals, and whatever devices wait for |
//! | [`memory`] | guest RAM, sealed memfds that peers can map |
//! | [`kvm`] | the VM: its memory slots, in-kernel interrupt controllers and timer |
//! | [`irq`] | GSIs, MSI routes and irqfds |
//! | [`bus`] | which device answers a port or MMIO access |
//! | [`memory_hotplug`] | memory that is added while the guest runs, and who has to know of it |
//! | [`devices`] | serial port, RTC, power, reset, panic |
//! | [`api`] | what can be asked on the control socket |
//! | [`console`], [`terminal`] | the host's end of the serial port |
//! | [`pci`] | host bridge, configuration space, BARs, MSI-X |
//! | [`virtio`] | the virtio PCI transport |
//! | [`vhost_user`] | the front-end of the vhost-user protocol: devices served by other processes |
//! | [`vfio`] | functions of the host's PCI bus in the hands of the guest |
//! | [`acpi`], [`boot`] | what the guest finds in its memory when it starts |
//! | [`cpu`], [`vcpu`], [`pause`] | processors: their first state, their threads and exits, what holds them |
//! | [`snapshot`] | machines that go on elsewhere |
//! | [`confine`] | the rights that the process keeps |
//! | [`machine`] | all of it put together |
#![deny(unsafe_code)]

pub mod acpi;
pub mod api;
pub mod boot;
pub mod bus;
pub mod complaints;
pub mod config;
pub mod confine;
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
pub mod memory_hotplug;
pub mod pause;
pub mod pci;
pub mod snapshot;
#[cfg(test)]
mod stranger;
pub mod terminal;
#[cfg(test)]
mod testing;
pub mod vcpu;
pub mod vfio;
pub mod vhost_user;
pub mod virtio;
