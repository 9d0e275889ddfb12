//! Storage that fails below ringside-blk: the guest is told the truth of each request, and goes on when the storage does.

use std::fs::File;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Test;
use super::blk::block_device;
use crate::ensure;
use crate::error::{Doing, LabError, Result};
use crate::harness::{Blk, Control, Guest, Mapped, Vmm, disk_file};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "faults::storage_that_fails",
        seconds: 120,
        run: storage_that_fails,
    },
    Test {
        name: "faults::storage_that_hangs",
        seconds: 120,
        run: storage_that_hangs,
    },
];

const MIB: u64 = 1 << 20;
/// Size of a mapped disk, in the 512-byte sectors of its table.
const SECTORS: u64 = 64 * MIB / 512;
/// How long the storage hangs, in seconds.
const HANG: u64 = 30;
/// For loops of many small requests, on plain hardware.
const LOOP_LIMIT: Duration = Duration::from_secs(40);
/// What a guest says of a request that failed.
const FAILED: &str = "Input/output error";

/// Parts of a block device, by number, in the ways that the device mapper has them (Documentation/admin-guide/device-mapper).
struct Part<'a> {
    device: &'a Path,
    start: u64,
}

impl<'a> Part<'a> {
    fn new(device: &'a Path, number: u64) -> Self {
        Self {
            device,
            start: number * SECTORS,
        }
    }

    fn table(&self, target: &str, before: &str, after: &str) -> String {
        format!(
            "0 {SECTORS} {target} {before}{} {}{after}",
            self.device.display(),
            self.start
        )
    }

    /// As it is.
    fn linear(&self) -> String {
        self.table("linear", "", "")
    }

    /// No request succeeds.
    fn error(&self) -> String {
        format!("0 {SECTORS} error")
    }

    /// Works for so many seconds and then fails for so many, in turn; of a part that fails only writes do if `reads` is not set.
    fn flakey(&self, up: u32, down: u32, reads: bool) -> String {
        let features = if reads { "" } else { " 1 error_writes" };
        self.table("flakey", "", &format!(" {up} {down}{features}"))
    }

    /// Takes so many milliseconds for each request.
    fn delay(&self, milliseconds: u32) -> String {
        self.table("delay", "", &format!(" {milliseconds}"))
    }
}

/// Writes a block with a number, past all caches, and says why if that fails.
fn write(disk: &str, number: &str) -> String {
    format!(
        "printf '%4096d' {number} | LC_ALL=C dd of=/dev/{disk} bs=4096 seek={number} count=1 iflag=fullblock \
         oflag=direct conv=notrunc 2>/run/why"
    )
}

/// Compares a block with what was written.
fn compare(disk: &str, number: &str) -> String {
    format!(
        "printf '%4096d' {number} >/run/expected; \
         dd if=/dev/{disk} bs=4096 skip={number} count=1 iflag=direct 2>/dev/null | cmp - /run/expected"
    )
}

/// Counters of the back-end, summed over its queues.
fn counted<const N: usize>(control: &Control, counters: [&str; N]) -> Result<[u64; N]> {
    let stats = control.ask_json(&["stats"])?;
    let queues = stats.get("queues").and_then(Value::as_array);
    let sum = |counter: &str| {
        let of = |queue: &Value| queue.pointer(counter).and_then(Value::as_u64);
        queues.into_iter().flatten().map(of).sum::<Option<u64>>()
    };
    let counts = counters.map(sum);
    if counts.contains(&None) {
        return Err(LabError::Protocol {
            from: "ringside-ctl",
            text: stats.to_string(),
        });
    }
    Ok(counts.map(Option::unwrap_or_default))
}

/// How many requests the back-end has answered with an error of its storage.
fn errors(control: &Control) -> Result<u64> {
    counted(control, ["/errors/io"]).map(|[errors]| errors)
}

/// How many writes and reads it has answered, and how many requests it has not answered yet.
fn requests(control: &Control) -> Result<[u64; 3]> {
    counted(control, ["/requests/write", "/requests/read", "/in-flight"])
}

/// Waits until it has answered so many writes more.
fn wait_for_writes(site: &Site, control: &Control, count: u64) -> Result<()> {
    let (start, limit) = (Instant::now(), site.limit(LOOP_LIMIT));
    let [before, ..] = requests(control)?;
    loop {
        let [written, ..] = requests(control)?;
        if written >= before + count {
            return Ok(());
        }
        ensure!(
            start.elapsed() < limit,
            "{} writes in {} s",
            written - before,
            limit.as_secs()
        );
        sleep(Duration::from_millis(50));
    }
}

/// Starts to write another disk and to compare what it holds, until [`steady`].
fn keep_writing(guest: &mut Guest, disk: &str) -> Result<()> {
    guest
        .run_ok(&format!(
            "(while [ ! -e /run/enough ]; do \
             fio --name=other --filename=/dev/{disk} --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=2 \
             --size=1M --thinktime=5000 --verify=crc32c --verify_fatal=1 --eta=never >/run/fio.log 2>&1 \
             || {{ touch /run/failed; break; }}; echo round >>/run/rounds; done; touch /run/done) </dev/null >/dev/null 2>&1 &"
        ))
        .map(drop)
}

/// Ends what [`keep_writing`] has started, which must not have met an error; gives how often it wrote and compared all.
fn steady(guest: &mut Guest) -> Result<usize> {
    let rounds = guest.run_ok_within(
        "touch /run/enough; while [ ! -e /run/done ]; do sleep 0.1; done; \
         [ ! -e /run/failed ] || { cat /run/fio.log; exit 1; }; cat /run/rounds",
        LOOP_LIMIT,
    )?;
    Ok(rounds.lines().count())
}

/// Requests fail, all of them, only writes, or now and then; a flush fails after a write that was in the cache only; a file ends too
/// early. What the guest was told is written is there, each error is one of the back-end's statistics, another disk knows nothing of
/// it, and all works when the storage does.
fn storage_that_fails(site: &Site) -> Result<()> {
    let device = block_device(site)?;
    let parts = [Part::new(device, 0), Part::new(device, 1)];
    let [direct_part, cached_part] = &parts;
    let direct = Mapped::create("ringside-direct", &direct_part.linear())?;
    let cached = Mapped::create("ringside-cached", &cached_part.linear())?;
    let cut = disk_file(site, "cut.img", 16 * MIB)?;
    let control = Control::new(site, "blk.ctl");
    let disks = [
        Blk::on(direct.path())
            .queues(2)
            .arg("--direct")
            .arg(&format!("--control-socket={}", control.socket().display()))
            .start(site)?,
        Blk::on(cached.path()).start(site)?,
        Blk::on(&cut).start(site)?,
        Blk::on(disk_file(site, "other.img", 16 * MIB)?).start(site)?,
    ];
    let mut guest = Guest::on(Vmm::Ringside);
    for disk in &disks {
        guest = guest.device(disk);
    }
    let mut guest = guest.boot(site)?;
    keep_writing(&mut guest, "vde")?;

    // Nothing works.
    guest.run_ok(&write("vdb", "1"))?;
    let before = errors(&control)?;
    direct.load(&direct_part.error())?;
    for request in [
        write("vdb", "2"),
        "LC_ALL=C dd if=/dev/vdb of=/dev/null bs=4096 count=1 iflag=direct 2>/run/why".into(),
    ] {
        fails(&mut guest, &request)?;
    }
    ensure!(
        errors(&control)? == before + 2,
        "{} errors were counted for two requests that failed",
        errors(&control)? - before
    );
    // Writes fail, and reads do not.
    direct.load(&direct_part.flakey(0, 3600, false))?;
    fails(&mut guest, &write("vdb", "3"))?;
    guest.run_ok(&compare("vdb", "1"))?;

    // Now it works and now it does not.
    let before = errors(&control)?;
    direct.load(&direct_part.flakey(1, 1, true))?;
    let text = guest.run_ok_within(
        &format!(
            "written=0 failed=0 n=10; while [ $written -lt 20 ] || [ $failed -lt 20 ]; do n=$((n + 1)); \
             [ $n -lt 10000 ] || exit 1; \
             if {}; then written=$((written + 1)); echo $n >>/run/written; \
             else grep -q '{FAILED}' /run/why || exit 1; failed=$((failed + 1)); fi; done; echo $written $failed",
            write("vdb", "$n")
        ),
        LOOP_LIMIT,
    )?;
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(written)), Some(Ok(failed))) = (numbers.next(), numbers.next()) else {
        return Err(LabError::Protocol {
            from: "guest agent",
            text,
        });
    };
    let counted = errors(&control)? - before;
    ensure!(
        counted == failed,
        "the guest saw {failed} writes fail, ringside-blk {counted}"
    );
    direct.load(&direct_part.linear())?;
    guest.run_ok(&write("vdb", "2"))?;
    guest.run_ok_within(
        &format!(
            "for n in 1 2 $(cat /run/written); do {} || exit 1; done",
            compare("vdb", "$n")
        ),
        LOOP_LIMIT,
    )?;
    println!(
        "storage that comes and goes: {written} writes succeeded, and are there; {failed} failed"
    );

    // What is in the host's cache is written by a flush at the latest, and it is the flush that fails then.
    let flushed =
        "dd if=/dev/urandom of=/dev/vdc bs=64k count=4 conv=notrunc,fsync 2>/run/why".to_owned();
    guest.run_ok(&flushed)?;
    cached.load(&cached_part.flakey(0, 3600, false))?;
    fails(&mut guest, &flushed)?;
    cached.load(&cached_part.linear())?;
    guest.run_ok(&flushed)?;

    // There is less than there was: reads end before they should.
    let size = |size| -> Result<()> {
        let doing = || format!("change the size of {}", cut.display());
        let file = File::options().write(true).open(&cut).doing(doing)?;
        file.set_len(size).doing(doing)
    };
    let read = |block: u32| {
        format!("dd if=/dev/vdd of=/dev/null bs=8k count=1 skip={block} iflag=direct 2>/run/why")
    };
    // In the middle of the block before the last.
    size(16 * MIB - 12288)?;
    guest.run_ok(&read(2045))?;
    for block in [2046, 2047] {
        fails(&mut guest, &read(block))?;
    }
    size(16 * MIB)?;
    guest.run_ok(&read(2047))?;

    let rounds = steady(&mut guest)?;
    println!("another disk was written and compared {rounds} times meanwhile");
    guest.shut_down()?;
    disks.into_iter().try_for_each(|disk| disk.stop(site))
}

/// A request of the guest fails, by an error of the disk.
fn fails(guest: &mut Guest, request: &str) -> Result<()> {
    let output = guest.run(&format!("{request}; status=$?; cat /run/why; exit $status"))?;
    ensure!(
        output.status != 0 && output.text.contains(FAILED),
        "`{request}` ended with {}: {}",
        output.status,
        output.text
    );
    Ok(())
}

/// Storage that is slow, and then does not answer at all for a while: the guest waits and goes on, contents are right, another disk
/// of the guest and the back-end's control socket work meanwhile.
fn storage_that_hangs(site: &Site) -> Result<()> {
    let device = block_device(site)?;
    let part = Part::new(device, 2);
    let slow = Mapped::create("ringside-slow", &part.linear())?;
    let control = Control::new(site, "blk.ctl");
    let blk = Blk::on(slow.path())
        .queues(2)
        .arg("--direct")
        .arg(&format!("--control-socket={}", control.socket().display()))
        .start(site)?;
    let other = Blk::on(disk_file(site, "other.img", 16 * MIB)?).start(site)?;
    let mut guest = Guest::on(Vmm::Ringside)
        .device(&blk)
        .device(&other)
        .boot(site)?;
    keep_writing(&mut guest, "vdc")?;
    guest.run_ok(
        "(fio --name=x --filename=/dev/vdb --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=8 --numjobs=2 \
         --size=4M --offset_increment=16M --time_based --runtime=20 --verify=crc32c --verify_backlog=64 --verify_fatal=1 \
         --eta=never >/run/slow.log 2>&1; echo $? >/run/part; mv /run/part /run/status) </dev/null >/dev/null 2>&1 &",
    )?;
    wait_for_writes(site, &control, 100)?;
    slow.load(&part.delay(200))?;
    wait_for_writes(site, &control, 50)?;
    slow.suspend()?;
    let completed = || -> Result<u64> {
        let [written, read, under_way] = requests(&control)?;
        ensure!(under_way > 0, "nothing is under way");
        Ok(written + read)
    };
    // What the kernel had finished by then is taken note of.
    sleep(Duration::from_millis(500));
    let before = completed()?;
    let rounds = |guest: &mut Guest| guest.run_ok("cat /run/rounds 2>/dev/null | wc -l");
    let rounds_before = rounds(&mut guest)?;
    sleep(Duration::from_secs(HANG));
    let after = completed()?;
    ensure!(
        after == before,
        "{} requests of storage that hangs were completed",
        after - before
    );
    guest.run_ok("dd if=/dev/urandom of=/dev/vdc bs=4k seek=3000 count=64 oflag=direct conv=notrunc,fsync 2>/dev/null")?;
    println!(
        "while the storage hung, for {HANG} s, the other disk was written and compared {} to {} times",
        rounds_before.trim(),
        rounds(&mut guest)?.trim()
    );
    slow.resume()?;
    slow.load(&part.linear())?;
    let status = guest.run_ok_within(
        "while [ ! -e /run/status ]; do sleep 0.2; done; cat /run/status /run/slow.log",
        LOOP_LIMIT,
    )?;
    ensure!(status.starts_with("0\n"), "fio ended with {status}");
    steady(&mut guest)?;
    guest.shut_down()?;
    blk.stop(site)?;
    other.stop(site)
}
