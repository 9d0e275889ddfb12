//! A limit on log messages that a guest or a peer can provoke: they must not fill the disk.

use std::sync::atomic::{AtomicU8, Ordering};

/// Counts the messages about one device.
#[derive(Debug, Default)]
pub struct Complaints(AtomicU8);

impl Complaints {
    /// Whether to log another one.
    pub fn may_complain(&self) -> bool {
        const LIMIT: u8 = 20;
        let next = |n: u8| (n < LIMIT).then_some(n + 1);
        self.0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, next)
            .is_ok()
    }
}
