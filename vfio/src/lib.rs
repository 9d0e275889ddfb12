//! SR-IOV virtual functions and VFIO devices. Depends on no other Ringside crate.
//!
//! [`host`] is the only way to sysfs and to the id database, rooted at a directory so that tests
//! bring a tree of their own. [`inventory`] reads what devices there are, [`viability`] says which
//! of them a guest can be given, [`report`] prints it. [`device`] opens one for a guest.
#![deny(unsafe_code)]

pub mod address;
pub mod cli;
pub mod device;
pub mod host;
pub mod ids;
pub mod inventory;
pub mod report;
pub mod viability;
