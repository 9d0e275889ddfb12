//! What the benchmarks count and check that depends on no machine's speed. No guest: the load generator is the front-end.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use super::Test;
use crate::bench::idle::{self, Behind, Idle};
use crate::command;
use crate::ensure;
use crate::error::{Doing, Result};
use crate::harness::{Blk, Net, with_null_blk};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "bench::an_idle_disk_sleeps_and_is_small",
        seconds: 30,
        run: an_idle_disk_sleeps_and_is_small,
    },
    Test {
        name: "bench::an_idle_card_sleeps_and_is_small",
        seconds: 90,
        run: an_idle_card_sleeps_and_is_small,
    },
    Test {
        name: "bench::frames_move_in_all_rings",
        seconds: 30,
        run: frames_move_in_all_rings,
    },
    Test {
        name: "bench::load_finds_what_it_wrote",
        seconds: 60,
        run: load_finds_what_it_wrote,
    },
    Test {
        name: "bench::queues_of_the_storage_are_polled",
        seconds: 60,
        run: queues_of_the_storage_are_polled,
    },
];

/// What may be resident besides guest memory.
const MOST_RESIDENT: u64 = 8 << 20;

/// A back-end that has nothing to do is not woken, and is small besides guest memory.
fn an_idle_disk_sleeps_and_is_small(site: &Site) -> Result<()> {
    sleeps_and_is_small(&idle::of_ringside_blk(site, &site.scratch)?)
}

fn an_idle_card_sleeps_and_is_small(site: &Site) -> Result<()> {
    // Nothing of the host's own comes from it.
    for line in [
        "ip tuntap add dev idle0 mode tap vnet_hdr",
        "ip link set idle0 addrgenmode none up",
    ] {
        command::run_line(line)?;
    }
    for behind in [Behind::Nothing, Behind::Tap("idle0"), Behind::Ports(15)] {
        sleeps_and_is_small(&idle::of_ringside_net(site, &site.scratch, behind)?)?;
    }
    Ok(())
}

fn sleeps_and_is_small(idle: &Idle) -> Result<()> {
    println!("{idle}");
    ensure!(idle.wake_ups == 0.0, "{} wake-ups a second", idle.wake_ups);
    ensure!(
        idle.resident < MOST_RESIDENT,
        "{} bytes are resident",
        idle.resident
    );
    Ok(())
}

/// Each format of the rings, each way of noticing what was used, both ways at once.
fn frames_move_in_all_rings(site: &Site) -> Result<()> {
    let net = Net::link("generate:60").start(site)?;
    for options in [
        &["--direction", "both"][..],
        &["--direction", "both", "--packed"],
        &["--direction", "rx", "--completions", "eventfd"],
        &["--direction", "tx", "--completions", "eventfd", "--packed"],
        &["--direction", "tx", "--no-event-idx", "--frame", "1500"],
    ] {
        let mut load = site.program("ringside-load");
        load.args(["net", "--count", "20000", "--socket-path", net.socket()]);
        load.args(options);
        let text = command::run(&mut load, site.limit(Duration::from_secs(20)))?;
        println!("{options:?}: {text}");
    }
    net.stop(site)
}

/// Each way of putting a request into the ring; what was written is read back.
fn load_finds_what_it_wrote(site: &Site) -> Result<()> {
    let disk = site.scratch.join("disk.img");
    File::create(&disk)
        .and_then(|file| file.set_len(64 << 20))
        .doing(|| format!("create {}", disk.display()))?;
    let blk = Blk::on(&disk).queues(2).arg("--in-order=on").start(site)?;
    for options in [
        &["--shape", "randrw"][..],
        &["--shape", "randrw", "--no-indirect", "--block-size", "64K"],
        &["--shape", "write", "--no-event-idx"],
        &["--shape", "randrw", "--packed"],
        &["--shape", "randrw", "--packed", "--in-order"],
    ] {
        let mut load = site.program("ringside-load");
        load.args(["--socket-path", blk.socket(), "--queues", "2"]);
        load.args(["--verify", "--count", "4000"]);
        load.args(options);
        print!(
            "{}",
            command::run(&mut load, site.limit(Duration::from_secs(20)))?
        );
    }
    let mut load = site.program("ringside-load");
    load.args(["--socket-path", blk.socket(), "--queues", "2"]);
    load.args(["--front-end", "virtio-driver", "--count", "4000"]);
    print!(
        "{}",
        command::run(&mut load, site.limit(Duration::from_secs(20)))?
    );
    blk.stop(site)
}

/// Transfers through poll queues of the storage, and through its interrupts where it has none.
fn queues_of_the_storage_are_polled(site: &Site) -> Result<()> {
    for poll_queues in [1, 0] {
        with_null_blk(site, &format!("poll_queues={poll_queues}"), |device| {
            polled_load(site, device, poll_queues > 0)
        })?;
    }
    Ok(())
}

fn polled_load(site: &Site, device: &Path, has_queues: bool) -> Result<()> {
    let mut blk = Blk::on(device)
        .arg("--direct")
        .arg("--io-poll")
        .arg("--register-memory")
        .start(site)?;
    let mut load = site.program("ringside-load");
    load.args(["--socket-path", blk.socket()]);
    load.args(["--shape", "randrw", "--verify", "--count", "4000"]);
    command::run(&mut load, site.limit(Duration::from_secs(20)))?;
    let refused = blk.daemon().log().contains("cannot be polled");
    ensure!(
        refused != has_queues,
        "poll queues: {has_queues}, and yet ringside-blk found it so: {}",
        !refused
    );
    blk.stop(site)
}
