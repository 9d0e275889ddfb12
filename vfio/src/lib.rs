//! SR-IOV virtual functions and VFIO devices. Depends on no other Ringside crate.
//!
//! [`host`] is the only way to the host's files, rooted at a directory so that tests bring a tree of their
//! own, and [`kernel`] the only way to change them, so that tests play the kernel.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`inventory`] | reads what devices there are; [`viability`] says which of them a guest can be given, [`report`] prints it |
//! | [`occupancy`] | finds what the host needs a device for, and which processes use it |
//! | [`binding`] | gives devices to a driver and puts them back; [`state`] keeps what is needed for that |
//! | [`functions`] | makes and removes virtual functions |
//! | [`mod@check`] | says what could keep a guest from using a device |
//! | [`network`] | settings of virtual functions that are network cards |
//! | [`nvme`] | queues, interrupts and namespaces of virtual functions that are NVMe controllers |
//! | [`device`] | opens a device for a guest |
//! | [`token`] | sets the VF tokens of physical functions |
#![deny(unsafe_code)]

pub mod address;
pub mod binding;
pub mod check;
pub mod cli;
pub mod device;
pub mod functions;
pub mod host;
pub mod ids;
pub mod inventory;
pub mod kernel;
pub mod network;
pub mod nvme;
pub mod occupancy;
pub mod report;
pub mod state;
pub mod token;
pub mod vf;
pub mod viability;
