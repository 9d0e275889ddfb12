//! Back-ends that are killed under load, again and again: the guest sees nothing but requests and packets that take longer. And
//! VMMs that are killed: the next one is served.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::Test;
use crate::command;
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{
    BackEnd, Blk, Control, Guest, Held, Net, Vmm, disk_file, iperf3_server, packets, threads,
};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "crash::disk_survives_kills",
        seconds: 120,
        run: |site| disk_survives_kills(site, Vmm::Ringside, false),
    },
    Test {
        name: "crash::disk_survives_kills_on_qemu",
        seconds: 120,
        run: |site| disk_survives_kills(site, Vmm::Qemu11, false),
    },
    Test {
        name: "crash::disk_survives_kills_on_qemu_packed",
        seconds: 120,
        run: |site| disk_survives_kills(site, Vmm::Qemu11, true),
    },
    Test {
        name: "crash::card_survives_kills",
        seconds: 120,
        run: |site| card_survives_kills(site, Vmm::Ringside),
    },
    Test {
        name: "crash::card_survives_kills_on_qemu",
        seconds: 120,
        run: |site| card_survives_kills(site, Vmm::Qemu11),
    },
    Test {
        name: "crash::killed_vmms_leave_back_ends_ready",
        seconds: 120,
        run: killed_vmms_leave_back_ends_ready,
    },
];

/// Queues of a disk, and CPUs of its guest. More CPUs would mostly wait for each other in the lab VM, which gives them one.
const QUEUES: u16 = 2;
/// How many requests a back-end answers before it is killed, at least.
const REQUESTS: u64 = 50;
/// How long that may take on plain hardware.
const WORK_LIMIT: Duration = Duration::from_secs(20);
const CONTROL: &str = "blk.ctl";
const MIB: u64 = 1 << 20;

fn start(site: &Site, gone: Option<&BackEnd>) -> Result<BackEnd> {
    let disk = match gone {
        Some(_) => site.scratch.join("disk.img"),
        None => disk_file(site, "disk.img", 64 * MIB)?,
    };
    let control = Control::new(site, CONTROL);
    let blk = Blk::on(disk)
        .queues(QUEUES)
        .arg(&format!("--control-socket={}", control.socket().display()));
    match gone {
        Some(gone) => blk.in_place_of(gone).start(site),
        None => blk.start(site),
    }
}

/// Waits until the back-end has work.
fn works(site: &Site) -> Result<()> {
    let (start, limit) = (Instant::now(), site.limit(WORK_LIMIT));
    let control = Control::new(site, CONTROL);
    loop {
        // One that has just been started cannot be asked yet.
        let stats = control.ask_json(&["stats"]).unwrap_or_default();
        let queues = stats
            .get("queues")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        let requests = |queue: &Value| {
            let of = |kind| queue.pointer(kind).and_then(Value::as_u64).unwrap_or(0);
            of("/requests/read") + of("/requests/write")
        };
        if queues.map(requests).sum::<u64>() >= REQUESTS {
            return Ok(());
        }
        if start.elapsed() > limit {
            return Err(LabError::TimedOut {
                what: format!("{REQUESTS} requests of a disk under load"),
                limit,
                output: stats.to_string(),
            });
        }
        sleep(Duration::from_millis(50));
    }
}

/// So long that a back-end is killed with its work at any place: up to a fifth of a second.
fn any_moment() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Duration::from_nanos(u64::from(
        now.unwrap_or_default().subsec_nanos() % 200_000_000,
    ))
}

fn disk_survives_kills(site: &Site, vmm: Vmm, packed: bool) -> Result<()> {
    let mut blk = start(site, None)?;
    let mut guest = Guest::on(vmm).cpus(QUEUES.into()).reconnects().device(&blk);
    if packed {
        guest = guest.packed();
    }
    let mut guest = guest.boot(site)?;
    // What was written is read again and compared, once 16 blocks are written and in the end.
    guest.run_ok(&format!(
        "(while [ ! -e /run/enough ]; do \
         fio --name=load --filename=/dev/vdb --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=8 \
         --numjobs={QUEUES} --size=4M --offset_increment=16M --cpus_allowed=0-{} --cpus_allowed_policy=split \
         --verify=crc32c --verify_backlog=16 --verify_fatal=1 --randrepeat=0 --eta=never >/run/fio.log 2>&1 \
         || {{ touch /run/failed; break; }}; done; touch /run/done) </dev/null >/dev/null 2>&1 &",
        QUEUES - 1
    ))?;
    let mut held = Vec::new();
    for number in 0..site.effort.kills {
        if number.is_multiple_of((site.effort.kills / 4).max(1)) {
            held.push(Held::by(guest.vmm_pid())?.to_string());
        }
        if let Err(error) = works(site) {
            let log = guest.run_ok("cat /run/fio.log; dmesg | tail -20");
            return Err(LabError::Ended {
                what: error.to_string(),
                output: log.unwrap_or_default(),
            });
        }
        sleep(any_moment());
        blk.daemon().signal(Signal::SIGKILL)?;
        blk.daemon().wait(site.limit(Duration::from_secs(5)))?;
        blk = start(site, Some(&blk))?;
    }
    guest.run_ok(
        "touch /run/enough; while [ ! -e /run/done ]; do sleep 0.1; done; \
         [ ! -e /run/failed ] || { cat /run/fio.log; exit 1; }",
    )?;
    let errors = guest.run_ok("dmesg | grep -ci -e 'i/o error' -e 'blk_update_request' || true")?;
    ensure!(
        errors.trim() == "0",
        "the guest saw errors:\n{}",
        guest.run_ok("dmesg | tail -20")?
    );
    held.push(Held::by(guest.vmm_pid())?.to_string());
    println!(
        "{} kills; the VMM held meanwhile: {}",
        site.effort.kills,
        held.join("; ")
    );
    guest.shut_down()?;
    Ok(())
}

const TAP: &str = "tap0";
const HOST: &str = "10.77.0.1";
/// How many packets of the guest have to come for its traffic to have resumed.
const PACKETS: u64 = 20;

/// Waits until packets come from the guest; gives how long that took.
fn flows(site: &Site) -> Result<Duration> {
    let (start, limit) = (Instant::now(), site.limit(WORK_LIMIT));
    let before = packets(TAP)?.received;
    while packets(TAP)?.received < before + PACKETS {
        if start.elapsed() > limit {
            return Err(LabError::TimedOut {
                what: format!("{PACKETS} packets of a card under load"),
                limit,
                output: command::run_line("ss -tni")?,
            });
        }
        sleep(Duration::from_millis(10));
    }
    Ok(start.elapsed())
}

/// A TCP connection outlives the back-end that it goes through, as often as that is killed; in the end all queues work. The TAP
/// stays, as one does that an administrator has made.
fn card_survives_kills(site: &Site, vmm: Vmm) -> Result<()> {
    for line in [
        format!("ip tuntap add dev {TAP} mode tap multi_queue vnet_hdr"),
        format!("ip address add {HOST}/24 dev {TAP}"),
        format!("ip link set {TAP} up"),
    ] {
        command::run_line(&line)?;
    }
    let mut net = Net::tap(TAP).queue_pairs(2).start(site)?;
    let _server = iperf3_server(site, None)?;
    let mut guest = Guest::on(vmm)
        .cpus(2)
        .reconnects()
        .device(&net)
        .boot(site)?;
    guest.network_up("10.77.0.2/24")?;
    guest.run_ok(&format!(
        "ping -c 2 -W 5 {HOST} && \
         (iperf3 --client {HOST} --time 80000 --parallel 2 >/run/iperf.log 2>&1 & echo $! >/run/iperf.pid) </dev/null"
    ))?;
    flows(site)?;
    let mut pauses = Vec::new();
    for _ in 0..site.effort.kills {
        sleep(any_moment());
        let start = Instant::now();
        net.daemon().signal(Signal::SIGKILL)?;
        net.daemon().wait(site.limit(Duration::from_secs(5)))?;
        net = Net::tap(TAP).queue_pairs(2).in_place_of(&net).start(site)?;
        let started = start.elapsed();
        flows(site)?;
        pauses.push((start.elapsed(), started));
    }
    pauses.sort_unstable();
    let text = |pause: Option<&(Duration, Duration)>| {
        pause.map_or_else(String::new, |(whole, started)| {
            format!("{} ({}) ms", whole.as_millis(), started.as_millis())
        })
    };
    println!(
        "{} kills; until {PACKETS} packets had come (of that, until a back-end listened): {} in the middle, {} at most",
        pauses.len(),
        text(pauses.get(pauses.len() / 2)),
        text(pauses.last())
    );
    guest.run_ok("kill -0 $(cat /run/iperf.pid) || { cat /run/iperf.log; exit 1; }; kill $(cat /run/iperf.pid)")?;
    // The server takes one client at a time, and has to see the last one go.
    guest.run_ok(&format!(
        "for i in $(seq 30); do iperf3 --client {HOST} --time 1 --parallel 4 --bidir >/run/iperf.log 2>&1 && exit 0; sleep 1; done; \
         cat /run/iperf.log; exit 1"
    ))?;
    guest.run_ok(&format!("ping -c 3 -i 0.2 -W 5 {HOST}"))?;
    guest.shut_down()?;
    net.stop(site)
}

/// VMMs are killed while their guests write and send; the back-ends serve the next one, which finds what was written and flushed.
fn killed_vmms_leave_back_ends_ready(site: &Site) -> Result<()> {
    let disk = disk_file(site, "disk.img", 64 * MIB)?;
    let mut blk = Blk::on(&disk).queues(2).start(site)?;
    let mut net = Net::tap(TAP)
        .queue_pairs(2)
        .address(&format!("{HOST}/24"))
        .start(site)?;
    let mut held = Vec::new();
    for (number, vmm) in (1..).zip([Vmm::Ringside, Vmm::Qemu11, Vmm::Ringside]) {
        let mut guest = Guest::on(vmm)
            .diskless()
            .cpus(2)
            .device(&blk)
            .device(&net)
            .boot(site)?;
        guest.network_up("10.77.0.2/24")?;
        let count = guest.run_ok(&format!(
            "count=$(head -c 512 /dev/vda | tr -dc 0-9); echo $((count + 1)) | tee /tmp/count && \
             dd if=/tmp/count of=/dev/vda conv=notrunc,fsync 2>/dev/null && ping -c 2 -W 5 {HOST} >/dev/null"
        ))?;
        ensure!(
            count.trim() == number.to_string(),
            "VMM {number} counted {}",
            count.trim()
        );
        guest.run_ok(&format!(
            "for part in 8 24; do (while :; do dd if=/dev/zero of=/dev/vda bs=64k seek=$((part * 16)) count=200 oflag=direct; \
             done) </dev/null >/dev/null 2>&1 & done; (ping -i 0.01 -s 8000 {HOST}) </dev/null >/dev/null 2>&1 &"
        ))?;
        sleep(Duration::from_millis(500));
        guest.end_by_signal(Signal::SIGKILL)?;
        held.push((threads(blk.daemon().pid())?, threads(net.daemon().pid())?));
    }
    println!("threads of the disk and of the card after each of 3 VMMs: {held:?}");
    blk.stop(site)?;
    net.stop(site)
}
