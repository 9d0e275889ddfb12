//! Each target over all inputs that are kept, and a bounded number of others that are made of them.
#![allow(clippy::unwrap_used, clippy::panic)] // tests

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ringside_fuzz::mutate::Mutations;
use ringside_fuzz::target;

/// Others for each target.
const MUTATIONS: usize = 5000;
/// They end here at the latest, on a slow machine.
const LIMIT: Duration = Duration::from_secs(10);

/// Inputs of a target, in base64, one in a line: those that reach its branches, and those that once broke it, with a word about
/// each of them.
fn kept(name: &str) -> Vec<Vec<u8>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("inputs")
        .join(name);
    let text = fs::read_to_string(file.with_extension("txt")).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| STANDARD.decode(line).unwrap()).collect()
}

fn replay(name: &str) {
    let run = target(name).unwrap().run;
    let kept = kept(name);
    assert!(!kept.is_empty(), "{name} has no inputs");
    let start = Instant::now();
    let others = Mutations::new(&kept, 0x9e37_79b9_7f4a_7c15)
        .take(MUTATIONS)
        .take_while(|_| start.elapsed() < LIMIT);
    let mut count = 0_u32;
    for input in kept.iter().cloned().chain(others) {
        if catch_unwind(AssertUnwindSafe(|| run(&input))).is_err() {
            let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.input"));
            fs::write(&file, &input).unwrap();
            panic!("{name}: see above; the input is in {}", file.display());
        }
        count += 1;
    }
    println!("{name}: {count} inputs");
}

macro_rules! targets {
    ($($test:ident $name:literal)*) => {
        $(#[test]
        fn $test() {
            replay($name);
        })*

        #[test]
        fn none_is_left_out() {
            let names: Vec<&str> = ringside_fuzz::TARGETS.iter().map(|t| t.name).collect();
            assert_eq!(names, [$($name),*]);
        }
    };
}

targets! {
    split "split"
    packed "packed"
    blk_request "blk-request"
    net_control "net-control"
    net_frame "net-frame"
    vhost_user "vhost-user"
    virtio_pci "virtio-pci"
    vfio_config "vfio-config"
    boot "boot"
    snapshot "snapshot"
}
