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
//!           outcome      medians and ratios: table, JSON, picture
//! ```

mod blk;
mod cells;
mod contender;
mod measure;
mod outcome;
mod storage;

pub mod load;

pub use blk::{BlkBench, run};
