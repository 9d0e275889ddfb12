//! The kernel's null block device, in memory.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::command;
use crate::error::Result;
use crate::site::Site;

const DEVICE: &str = "/dev/nullb0";
/// How long the device may be in use after its last user, on plain hardware.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);
/// How often to try.
const INTERVAL: Duration = Duration::from_millis(100);

/// Runs a test on a null device of 1 GiB in blocks of 4 KiB that keeps what is written, with more module parameters.
///
/// # Errors
/// Fails if the test does, or if the device cannot be had or got rid of.
pub fn with_null_blk(
    site: &Site,
    parameters: &str,
    test: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    command::run_line(&format!(
        "modprobe null_blk nr_devices=1 gb=1 bs=4096 memory_backed=1 {parameters}"
    ))?;
    let result = test(Path::new(DEVICE));
    let start = Instant::now();
    // The kernel tears down the io_uring of a program some time after the program has ended.
    let removed = loop {
        let removed = command::run_line("modprobe -r null_blk");
        if removed.is_ok() || start.elapsed() > site.limit(REMOVAL_LIMIT) {
            break removed;
        }
        thread::sleep(INTERVAL);
    };
    result?;
    removed.map(drop)
}
