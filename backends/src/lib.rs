//! vhost-user device back-ends: a daemon shell that all of them share, and the devices themselves.
//!
//! May depend on `ringside-rings`, `ringside-control` and `ringside-sandbox` and on no other crate of the workspace: front-ends (a VMM)
//! are met over a Unix socket and shared memory only, whoever wrote them.
//!
//! The back-ends do not build on the `vhost-user-backend` daemon, but implement the message handler of
//! the `vhost` crate themselves: each queue has one event loop of its own choice in which kicks, completions
//! and commands all arrive (one io_uring for a disk), a ring is drained before it is given back, and
//! front-ends that enable rings before they acknowledge features (QEMU) are served.
#![deny(unsafe_code)]

pub mod blk;
pub mod net;
pub mod shell;
