//! Benchmarks of the back-ends, natively: no virtual machine, a front-end of our own or of others on the same machine.
//!
//! ```text
//! options ── cells       which requests, on which storage
//!    │         │
//!    │      storage      null, file, tmpfs, loop: made ready, removed again
//!    │         │
//!    └──── contender     the back-ends, ours and others', each by its command line
//!              │
//!           measure      one back-end, one load (ringside-load), one sample; fio on the storage itself
//!              │
//!           outcome ──── picture
//!                        medians and ratios: table, JSON, SVG
//! ```
//!
//! Those are the parts of the one for disks; that for network cards (`net`) shares the processes, the processors and the picture with it.
//!
//! Beside that: other people's front-ends (`others`), what an idle back-end costs (`idle`), and the instructions of a request or a frame
//! (`instructions`).

mod blk;
mod cells;
mod contender;
mod measure;
mod net;
mod notes;
mod others;
mod outcome;
mod picture;
mod storage;

pub mod idle;
mod instructions;
pub mod load;

pub use blk::{BlkBench, run as blk};
pub use net::{NetBench, run as net};
