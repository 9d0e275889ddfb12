//! Four guests with a disk each, joined by one switch, busy for a long time while what they use is killed, unplugged, upgraded,
//! enlarged and limited: nothing goes wrong, and nothing grows.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::Test;
use super::upgrade::{pause, upgrade};
use crate::ensure;
use crate::error::{LabError, Result};
use crate::harness::{BackEnd, Blk, Control, Guest, Held, Switch, Vmm, disk_file};
use crate::site::Site;

pub(super) const TESTS: &[Test] = &[Test {
    name: "soak::four_guests_and_nothing_grows",
    seconds: 180,
    run: four_guests_and_nothing_grows,
}];

const MIB: u64 = 1 << 20;
/// The guests, by the names of their ports. The first two send to each other, and so do the last two.
const GUESTS: [&str; 4] = ["a", "b", "c", "d"];
/// The guest whose disk's back-end is killed, and no other; the others' have to last from the first look on.
const KILLED: usize = 3;
/// How many things happen in turn.
const EVENTS: usize = 5;
/// How long what happens is given to have its effect.
const STEP: Duration = Duration::from_secs(1);
/// How much memory of its own a process may have gained, in KiB: pages of its heap and stacks that were not touched before.
const GAIN: u64 = 1024;
/// For what ends when it is told to, on plain hardware.
const END_LIMIT: Duration = Duration::from_secs(30);

/// The back-ends, and the guests that use them.
struct Load<'a> {
    site: &'a Site,
    guests: Vec<Guest>,
    disks: Vec<BackEnd>,
    switch: Switch,
}

fn control<'a>(site: &'a Site, kind: &str, number: usize) -> Control<'a> {
    Control::new(site, &format!("{kind}{number}.ctl"))
}

/// Why there is a back-end.
#[derive(Clone, Copy)]
enum Comes<'a> {
    First,
    /// This one is gone.
    After(&'a BackEnd),
    /// This one is to go.
    InPlaceOf(&'a BackEnd),
}

fn disk(site: &Site, number: usize, comes: Comes<'_>) -> Result<BackEnd> {
    let name = format!("disk{number}.img");
    let path = match comes {
        Comes::First => disk_file(site, &name, 64 * MIB)?,
        Comes::After(_) | Comes::InPlaceOf(_) => site.scratch.join(&name),
    };
    let socket = control(site, "blk", number);
    let blk = Blk::on(path)
        .queues(2)
        .arg(&format!("--control-socket={}", socket.socket().display()));
    match comes {
        Comes::First => blk.start(site),
        Comes::After(gone) => blk.in_place_of(gone).start(site),
        Comes::InPlaceOf(old) => blk
            .arg(&format!("--take-over={}", socket.socket().display()))
            .in_place_of(old)
            .start(site),
    }
}

impl<'a> Load<'a> {
    fn start(site: &'a Site) -> Result<Self> {
        let switch = Switch::start(site, &GUESTS.map(|name| (name, "")), &[])?;
        let mut load = Self {
            site,
            guests: Vec::new(),
            disks: Vec::new(),
            switch,
        };
        for (number, port) in GUESTS.iter().enumerate() {
            let disk = disk(site, number, Comes::First)?;
            let api = control(site, "vmm", number);
            let mut guest = Guest::on(Vmm::Ringside)
                .cpus(2)
                .memory("256M,max=512M")
                .kernel_argument("memhp_default_state=online")
                .device(&disk)
                .arg(&Switch::net(port))
                .arg(&format!("--api-socket={}", api.socket().display()))
                .boot(site)?;
            guest.network_up(&format!("10.77.0.{}/24", number + 1))?;
            load.guests.push(guest);
            load.disks.push(disk);
        }
        // Who serves comes before who asks.
        for (number, guest) in load.guests.iter_mut().enumerate().rev() {
            busy(guest, number)?;
            // Once for each guest, and what it costs the back-ends is no growth.
            control(site, "vmm", number).ask(&["memory-add", "128M"])?;
        }
        Ok(load)
    }

    /// What each process holds: the switch, the disks, then the VMMs.
    fn held(&mut self) -> Result<Vec<Held>> {
        let disks = self.disks.iter_mut().map(|disk| disk.daemon().pid());
        let pids: Vec<u32> = [self.switch.pid()].into_iter().chain(disks).collect();
        let vmms = self.guests.iter().map(Guest::vmm_pid);
        pids.into_iter().chain(vmms).map(Held::by).collect()
    }

    /// Does one of the things that happen to guests; gives what.
    fn happen(&mut self, step: usize) -> Result<&'static str> {
        let round = step / EVENTS;
        // One guest after the other has its turn.
        let number = round % GUESTS.len();
        let disk_control = control(self.site, "blk", number);
        let port = GUESTS.get(number).copied().unwrap_or("a");
        match step % EVENTS {
            0 => {
                let disks = self.disks.get_mut(KILLED);
                let Some(killed) = disks else {
                    return Ok("nothing");
                };
                killed.daemon().signal(Signal::SIGKILL)?;
                killed
                    .daemon()
                    .wait(self.site.limit(Duration::from_secs(5)))?;
                *killed = disk(self.site, KILLED, Comes::After(killed))?;
                Ok("kills")
            }
            1 => {
                disk_control.ask(&["limits", "iops=50,iops-burst=5"])?;
                Ok("limits of disks")
            }
            2 => {
                self.switch.control(self.site).ask(&["port-remove", port])?;
                self.switch.add(self.site, port, "")?;
                Ok("ports unplugged")
            }
            3 => {
                disk_control.ask(&["limits", "iops=0"])?;
                let size = format!("{}M", 65 + round);
                disk_control.ask(&["resize", &size])?;
                Ok("disks enlarged")
            }
            _ => {
                let limits = if round.is_multiple_of(2) {
                    "tx-bytes=1M"
                } else {
                    "tx-bytes=0"
                };
                self.switch
                    .control(self.site)
                    .ask(&["port-limits", port, limits])?;
                Ok("limits of ports")
            }
        }
    }

    /// Has other programs take the place of all back-ends.
    fn upgrade(&mut self) -> Result<()> {
        let mut next = self.switch.successor(self.site)?;
        pause(self.site, self.switch.daemon(), next.daemon())?;
        self.switch = next;
        for (number, old) in std::mem::take(&mut self.disks).into_iter().enumerate() {
            let start = |old: &BackEnd| disk(self.site, number, Comes::InPlaceOf(old));
            let (new, _) = upgrade(self.site, old, start)?;
            self.disks.push(new);
        }
        Ok(())
    }

    /// Waits until a front-end is at each port, and at each disk.
    fn settle(&self) -> Result<()> {
        let limit = self.site.limit(Duration::from_secs(5));
        let start = Instant::now();
        loop {
            let ports = self.switch.control(self.site).ask(&["port-list"])?;
            let mut away = ports.contains("front-end=none");
            for number in 0..GUESTS.len() {
                let status = control(self.site, "blk", number).ask_json(&["status"])?;
                away |= status.get("front-end").is_none_or(Value::is_null);
            }
            if !away {
                // The thread that has answered ends in its own time.
                sleep(STEP);
                return Ok(());
            }
            if start.elapsed() > limit {
                return Err(LabError::TimedOut {
                    what: "the return of all front-ends".into(),
                    limit,
                    output: ports,
                });
            }
            sleep(Duration::from_millis(100));
        }
    }
}

/// Has a guest write its disk and compare what it holds, and send to its partner.
fn busy(guest: &mut Guest, number: usize) -> Result<()> {
    guest.run_ok(
        "(while [ ! -e /run/enough ]; do \
         fio --name=load --filename=/dev/vdb --direct=1 --ioengine=libaio --rw=randrw --bsrange=4k-64k --iodepth=8 --numjobs=2 \
         --size=2M --offset_increment=16M --verify=crc32c --verify_fatal=1 --randrepeat=0 --eta=never >/run/fio.log 2>&1 \
         || { touch /run/failed; break; }; echo round >>/run/rounds; done; touch /run/done) </dev/null >/dev/null 2>&1 &",
    )?;
    // The second of each pair serves. What is sent is limited: the latency of others is to be seen besides.
    let partner = (number ^ 1) + 1;
    let traffic = match number % 2 {
        1 => "iperf3 --server --daemon".to_owned(),
        _ => format!(
            "(iperf3 --client 10.77.0.{partner} --time 80000 --bitrate 20M --bidir >/run/iperf.log 2>&1) \
             </dev/null >/dev/null 2>&1 & \
             ping -i 0.2 10.77.0.{partner} >/run/ping.log 2>&1 </dev/null &"
        ),
    };
    guest.run_ok(&traffic).map(drop)
}

/// Ends the work of a guest, and looks for errors; gives what there is to say.
fn finish(guest: &mut Guest, number: usize) -> Result<String> {
    let rounds = guest.run_ok_within(
        "touch /run/enough; while [ ! -e /run/done ]; do sleep 0.1; done; \
         [ ! -e /run/failed ] || { cat /run/fio.log; exit 1; }; wc -l </run/rounds",
        END_LIMIT,
    )?;
    let mut text = format!("{} rounds of fio without an error", rounds.trim());
    if number.is_multiple_of(2) {
        let log = guest
            .run_ok("pgrep iperf3 >/dev/null && ! grep -i error /run/iperf.log; status=$?; cat /run/iperf.log | tail -5; exit $status")?;
        ensure!(!log.contains("error"), "iperf3 has given up:\n{log}");
        // What ping says at its end: sent and received, and the times between.
        let ping = guest.run_ok("pkill -INT ping; sleep 0.5; tail -n 2 /run/ping.log")?;
        text.push_str("; ping: ");
        text.push_str(&ping.trim().replace('\n', ", "));
    }
    let errors = guest.run_ok(
        "dmesg | grep -e 'I/O error' -e 'BUG:' -e 'WARNING:' -e 'rcu.*stall' -e 'blocked for more than' | head -5 || true",
    )?;
    ensure!(errors.is_empty(), "the guest's kernel says:\n{errors}");
    Ok(text)
}

/// Within how many microseconds 50, 99 and 99.9 % of a disk's reads and writes were answered, by its statistics: bounds of their
/// histograms.
fn tail(control: &Control<'_>) -> Result<String> {
    let stats = control.ask_json(&["stats"])?;
    let queues = stats.get("queues").and_then(Value::as_array);
    let queues: Vec<&Value> = queues.into_iter().flatten().collect();
    let kinds = ["read", "write"].map(|kind| {
        let mut counts = std::collections::BTreeMap::new();
        for queue in &queues {
            let path = format!("/latency/{kind}/up-to-microseconds");
            let buckets = queue.pointer(&path).and_then(Value::as_array);
            for bucket in buckets.into_iter().flatten() {
                let number = |at: usize| bucket.get(at).and_then(Value::as_u64);
                *counts.entry(number(0).unwrap_or(u64::MAX)).or_insert(0) += number(1).unwrap_or(0);
            }
        }
        let all = counts.values().copied().max().unwrap_or(0);
        let bounds = [500, 990, 999].map(|share| {
            let bound = counts
                .iter()
                .find(|(_, count)| **count * 1000 >= all * share);
            bound.map_or(0, |(bound, _)| *bound)
        });
        format!("{all} {kind}s, µs {bounds:?}")
    });
    Ok(kinds.join("; "))
}

fn four_guests_and_nothing_grows(site: &Site) -> Result<()> {
    if site.effort.soak_seconds == 0 {
        let why = "it takes minutes, more than are asked for: --soak-seconds";
        return Err(LabError::Skipped(why.into()));
    }
    let mut load = Load::start(site)?;
    let whole = Duration::from_secs(site.effort.soak_seconds.into());
    let mut counts = std::collections::BTreeMap::new();
    let mut step = 0;
    // What is done for the first time may cost something that lasts: one round of everything comes before the first look.
    let mut go_on = |load: &mut Load<'_>, time: Duration| -> Result<Vec<Held>> {
        let start = Instant::now();
        while start.elapsed() < time || step % EVENTS != 0 {
            *counts.entry(load.happen(step)?).or_insert(0_u32) += 1;
            step += 1;
            sleep(STEP);
        }
        load.settle()?;
        load.held()
    };
    // Between the looks all but one are the same processes.
    load.upgrade()?;
    let looks = [
        go_on(&mut load, whole / 3)?,
        go_on(&mut load, whole / 3)?,
        go_on(&mut load, whole / 3)?,
    ];
    println!("{counts:?}");
    let [first, middle, last] = &looks;
    let names = [
        "switch",
        "disk a",
        "disk b",
        "disk c",
        "disk d (killed)",
        "VMM a",
        "VMM b",
        "VMM c",
        "VMM d",
    ];
    let mut grown = Vec::new();
    for (((name, first), middle), last) in names.iter().zip(first).zip(middle).zip(last) {
        println!("{name}: {first}; {middle}; {last}");
        let grew = last.memory > middle.memory.max(first.memory) + GAIN
            || last.descriptors > first.descriptors
            || last.threads > first.threads;
        if grew {
            grown.push(*name);
        }
    }
    ensure!(grown.is_empty(), "these have grown: {grown:?}");
    load.upgrade()?;
    println!("all back-ends were upgraded before and behind this");
    for (number, guest) in load.guests.iter_mut().enumerate() {
        let text = finish(guest, number)?;
        let port = GUESTS.get(number).copied().unwrap_or_default();
        println!("guest {port}: {text}");
        println!("its disk: {}", tail(&control(site, "blk", number))?);
    }
    for guest in load.guests {
        guest.shut_down()?;
    }
    for disk in load.disks {
        disk.stop(site)?;
    }
    load.switch.stop(site)
}
