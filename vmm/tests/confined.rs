//! What somebody finds who has taken the VMM over: a process confines itself as the program does, and then does what an intruder
//! would.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)] // a test

#[path = "../../backends/sandbox/tests/intruder/mod.rs"]
mod intruder;

use clap::Parser;
use intruder::{Attempt, ENDED, REFUSED, call, ends, fails, intrude, landlock};
use ringside_sandbox::ThreadKind;
use ringside_vmm::config::{Cli, Config, FileOptions};
use ringside_vmm::confine::confine;

/// Besides, on the thread of a processor.
const ENDED_ON_PROCESSORS: &[(&str, Attempt)] = &[
    ("listen to clients", || call(libc::SYS_accept4, [0, 0, 0])),
    ("share memory", || call(libc::SYS_memfd_create, [0, 0, 0])),
    ("resize a file", || call(libc::SYS_ftruncate, [0, 0, 0])),
];

fn confine_profile(profile: &str) {
    let mut args = vec!["x", "--kernel", "/dev/null", "--blk", "socket=/run/none"];
    if profile == "vfio" {
        args.extend(["--vfio", "0000:00:01.0", "--api-socket", "/tmp/none"]);
    }
    let config = Config::new(Cli::parse_from(args), FileOptions::default()).unwrap();
    confine(&config).unwrap();
}

/// The other side of [`intruder::attempt`].
#[test]
fn intruder() {
    let kinds = [("processor", ThreadKind::Processor)];
    intrude(confine_profile, &kinds, ENDED_ON_PROCESSORS);
}

#[test]
fn who_takes_the_vmm_over_gets_nowhere() {
    for profile in ["plain", "vfio"] {
        for thread in ["control", "processor"] {
            ends(profile, thread, ENDED);
            // It opens files when it is confined already, and Landlock says which.
            if landlock() {
                fails(profile, thread, REFUSED);
            }
        }
        ends(profile, "processor", ENDED_ON_PROCESSORS);
    }
}
