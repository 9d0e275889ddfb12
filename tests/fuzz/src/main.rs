//! A target under libFuzzer, which calls it with inputs that reach new branches. Which one, the environment says.
#![no_main]
#![allow(clippy::panic)] // without a target there is nothing to do

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use ringside_fuzz::{TARGETS, Target};

/// Names the target.
const TARGET: &str = "RINGSIDE_FUZZ_TARGET";

fn target() -> &'static Target {
    static CHOSEN: OnceLock<&'static Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = std::env::var(TARGET).unwrap_or_default();
        ringside_fuzz::target(&name).unwrap_or_else(|| {
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            panic!("{TARGET} names no target; there are {}", names.join(", "))
        })
    })
}

fuzz_target!(|data: &[u8]| (target().run)(data));
