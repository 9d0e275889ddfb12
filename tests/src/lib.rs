//! The lab, the end-to-end tests and the benchmarks. May depend on every Ringside crate; so far it uses the driver side of
//! the rings, the sizes of the control plane and the lists of the confinement, and meets the others as programs only.
//!
//! ```text
//! cargo lab ──── app ──── setup     Debian systems in the user's cache
//!   on the machine │ ───── testing   what `cargo lab test` runs, in several labs at a time
//!                  │ ───── lab       a connected lab; programs: static builds of what is tested
//!                  │ ───── l1        the lab VM, unless the machine's own KVM serves (probe)
//!                  │ link: requests, events (protocol)
//!                inside              in the lab VM, or on the machine: beside KVM
//!                  │ ───── suite     each test in a process and namespaces of its own
//!                  │ ───── demo, power_cut
//!                harness             back-ends, guests, networks, counters: what tests are written with
//!
//! cargo lab bench ─── bench          back-ends beside others' on the machine itself, no guest
//! cargo lab fuzz ──── fuzz           the targets of `ringside-fuzz` under libFuzzer
//! cargo lab calls ─── calls          system calls of confined programs, beside their lists
//! ```
#![deny(unsafe_code)]

pub mod app;
pub mod bench;
pub mod calls;
pub mod command;
pub mod cpio;
pub mod demo;
pub mod error;
pub mod fuzz;
pub mod harness;
pub mod initramfs;
pub mod inside;
pub mod l1;
pub mod lab;
pub mod link;
pub mod native;
pub mod power_cut;
pub mod probe;
pub mod programs;
pub mod protocol;
pub mod setup;
pub mod site;
pub mod suite;
pub mod testing;
