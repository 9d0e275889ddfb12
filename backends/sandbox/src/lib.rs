//! Confinement of Ringside's programs: what a process gives up before it reads the first byte of a guest or a peer, so that
//! whoever takes it over finds nothing there. Depends on no other crate of the workspace; what a program has to keep is its
//! own business.
//!
//! A program describes what it needs from then on by a [`Profile`], opens what it can open, and enters it
//! from its main thread, best before it has others:
//!
//! ```text
//!  Profile::new("ringside-blk") ─ calls, files, ports ─▶ enter(mode)
//!      no new privileges, not dumpable, no core dumps     privileges
//!      namespaces of its own, as far as it has the right  privileges
//!      all capabilities dropped but those listed          privileges
//!      no files, sockets, ports and peers but those listed  files     (Landlock)
//!      no system calls but those listed                   filter    (seccomp, default deny, all threads)
//!  each thread, at its start: narrow(kind) ─▶ fewer system calls than the process
//! ```
//!
//! Threads inherit all of it. A system call that is not listed ends the process ([`Mode::On`]) or is logged by the kernel and
//! let pass ([`Mode::Log`]).
//!
//! | module | concern |
//! | --- | --- |
//! | [`profile`] | what a program keeps, and how it gives up the rest |
//! | [`calls`] | system calls in groups, each with its reason |
//! | `filter` | seccomp filters of the process and of kinds of threads |
//! | `files` | Landlock |
//! | `privileges` | capabilities, dumps, namespaces |
//! | [`memory`] | guest memory and dumps |
#![deny(unsafe_code)]

pub mod calls;
mod files;
mod filter;
pub mod memory;
mod privileges;
pub mod profile;

pub use calls::Call;
pub use caps::Capability;
pub use filter::{FilterError, ThreadKind, narrow};
pub use privileges::PrivilegeError;
pub use profile::{Mode, Profile, SandboxError, confined};
