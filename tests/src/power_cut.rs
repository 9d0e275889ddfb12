//! The power of the lab VM is cut while a guest writes: what the guest was told is on its disks, is there when the power comes back.
//!
//! ```text
//! on the machine          in the lab VM
//! boot, ask ────────────► Half::Write: file system on the raw disk, ringside-blk on two images in it, a guest that writes
//!           ◄──────────── numbered records, each flushed, and says the number of each
//! kill QEMU               the memory of the lab VM is gone, with all that was in a cache there
//! boot, ask ────────────► Half::Read: the file system again, and what the images hold
//!           ◄──────────── the last record of each from which none is missing
//! compare
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::command;
use crate::ensure;
use crate::error::{Doing, LabError, Result};
use crate::harness::{Blk, Guest, Vmm};
use crate::link::Link;
use crate::protocol::{Event, Half, Request};
use crate::site::Site;

/// Size of each image.
const SIZE: &str = "64M";
/// Bytes of a record.
const RECORD: usize = 4096;
/// After how many records, over all disks, the power is cut.
const ENOUGH: usize = 60;
/// The guest's disks, and the formats of their images.
const DISKS: [(&str, &str); 2] = [("vdb", "raw"), ("vdc", "qcow2")];
/// Begins a line with a record that is on its disk, or was found there: the disk, the number.
const MARK: &str = "@@record ";
/// Longer than the guest's boot, or a look at the images, takes.
const SILENCE_LIMIT: Duration = Duration::from_secs(600);
/// For a command beside KVM.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// The last record of each disk.
pub type Last = BTreeMap<String, u32>;

/// Has a guest write in the lab VM, until it has told enough; gives the last record that it told of each disk.
///
/// # Errors
/// Fails if it does not come to write, or stops.
pub fn wait_for_writes(link: &mut Link) -> Result<Last> {
    let mut text = String::new();
    let request = Request::PowerCut { half: Half::Write };
    let status = link.request_until(&request, SILENCE_LIMIT, |event| {
        if let Event::Output { text: more } = event {
            text.push_str(more);
        }
        match text.matches(MARK).count() {
            ENOUGH.. => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    })?;
    ensure!(status.is_none(), "nothing writes:\n{text}");
    Ok(last_records(&text))
}

/// Looks for the records in the lab VM that has been booted again; gives what there is to say.
///
/// # Errors
/// Fails if one is missing.
pub fn compare(told: &Last, link: &mut Link) -> Result<String> {
    let mut text = String::new();
    let request = Request::PowerCut { half: Half::Read };
    let status = link.request(&request, SILENCE_LIMIT, |event| {
        if let Event::Output { text: more } = event {
            text.push_str(more);
        }
    })?;
    ensure!(status == 0, "{text}");
    let found = last_records(&text);
    let mut lines = Vec::new();
    for (disk, format) in DISKS {
        let (told, found) = (told.get(disk), found.get(disk));
        let line = format!(
            "{format}: {} records were flushed when the power was cut, and {} are there",
            told.map_or(0, |last| last + 1),
            found.map_or(0, |last| last + 1)
        );
        ensure!(told.is_some() && found >= told, "{line}");
        lines.push(line);
    }
    Ok(lines.join("\n"))
}

/// The last record of each disk in whole lines of a text.
fn last_records(text: &str) -> Last {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let records = whole.lines().filter_map(|line| {
        let (_, record) = line.split_once(MARK)?;
        let (disk, number) = record.trim_end().split_once(' ')?;
        Some((disk.to_owned(), number.parse().ok()?))
    });
    records.collect()
}

/// Does one half, beside KVM.
///
/// # Errors
/// Fails if a step does; to write never ends otherwise.
pub fn run(site: &Site, half: Half) -> Result<()> {
    match half {
        Half::Write => write(site),
        Half::Read => read(site),
    }
}

/// Mounts the raw disk, which has a file system by then.
fn mounted(site: &Site, device: &Path) -> Result<PathBuf> {
    let directory = site.scratch.join("images");
    fs::create_dir_all(&directory).doing(|| format!("create {}", directory.display()))?;
    let mut mount = Command::new("mount");
    command::run(mount.arg(device).arg(&directory), COMMAND_LIMIT)?;
    Ok(directory)
}

fn device(site: &Site) -> Result<&Path> {
    site.block_device
        .as_deref()
        .ok_or_else(|| LabError::Skipped("this machine's power is not cut".into()))
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(line.as_bytes())
        .and_then(|()| out.flush())
        .doing(|| "tell a record".into())
}

fn write(site: &Site) -> Result<()> {
    let device = device(site)?;
    let mut mkfs = Command::new("mkfs.ext4");
    command::run(mkfs.args(["-q", "-F"]).arg(device), COMMAND_LIMIT)?;
    let directory = mounted(site, device)?;
    let mut back_ends = Vec::new();
    for (disk, format) in DISKS {
        let image = directory.join(disk);
        let mut create = site.root_program("usr/bin/qemu-img");
        create
            .args(["create", "-q", "-f", format])
            .arg(&image)
            .arg(SIZE);
        command::run(&mut create, COMMAND_LIMIT)?;
        let blk = Blk::on(image).arg(&format!("--format={format}"));
        back_ends.push(blk.start(site)?);
    }
    // The images are part of the file system from now on; all that follows is the back-ends' to see to.
    command::run_line("sync")?;
    let mut guest = Guest::on(Vmm::Ringside).cpus(2);
    for back_end in &back_ends {
        guest = guest.device(back_end);
    }
    let mut guest = guest.boot(site)?;
    let loops = DISKS.map(|(disk, _)| {
        format!(
            "(n=0; while printf '%{RECORD}d' $n | dd of=/dev/{disk} bs={RECORD} seek=$n count=1 iflag=fullblock conv=notrunc,fsync; \
             do echo '{MARK}{disk}' $n >/dev/ttyS0; n=$((n + 1)); done) </dev/null >/dev/null 2>&1 & "
        )
    });
    guest.run_for_good(&format!("{}wait; sleep infinity", loops.concat()))?;
    let mut told = 0;
    loop {
        thread::sleep(Duration::from_millis(20));
        let console = guest.console();
        let whole = console.rfind('\n').map_or(0, |end| end + 1);
        if let Some(new) = console.get(told..whole) {
            say(new)?;
        }
        told = whole;
    }
}

fn read(site: &Site) -> Result<()> {
    let directory = mounted(site, device(site)?)?;
    for (disk, format) in DISKS {
        let image = directory.join(disk);
        let raw = site.scratch.join(disk);
        let mut convert = site.root_program("usr/bin/qemu-img");
        convert
            .args(["convert", "-f", format, "-O", "raw"])
            .args([&image, &raw]);
        command::run(&mut convert, COMMAND_LIMIT)?;
        if let Some(last) = last_of(&raw)? {
            say(&format!("{MARK}{disk} {last}\n"))?;
        }
        if format == "qcow2" {
            let mut check = site.root_program("usr/bin/qemu-img");
            let output = command::output(
                check.args(["check", "-f", format]).arg(&image),
                COMMAND_LIMIT,
            )?;
            // 3: clusters that nothing refers to, and no other fault (qemu-img(1)).
            ensure!(
                matches!(output.status.code(), Some(0 | 3)),
                "qemu-img check: {}{}",
                output.stdout,
                output.stderr
            );
        }
    }
    Ok(())
}

/// The last record of an image from the first of which none is missing.
fn last_of(image: &Path) -> Result<Option<u32>> {
    let doing = || format!("read {}", image.display());
    let mut file = File::open(image).doing(doing)?;
    let mut record = [0; RECORD];
    let mut last = None;
    for number in 0_u32.. {
        file.read_exact(&mut record).doing(doing)?;
        if record != format!("{number:RECORD$}").as_bytes() {
            break;
        }
        last = Some(number);
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_once_their_line_is_whole() {
        let text = "boot\n@@record vdb 0\r\n@@record vdb 1\r\n@@record vdc 0\r\n@@record vdb 2";
        let last = last_records(text);
        assert_eq!((last["vdb"], last["vdc"]), (1, 0));
        assert!(last_records("@@record vdb 7").is_empty());
    }

    #[test]
    fn records_are_found_up_to_the_first_that_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let record = |number: u32| format!("{number:RECORD$}");
        let text = [record(0), record(1), record(3), record(3)].concat();
        fs::write(&image, text).unwrap();
        assert_eq!(last_of(&image).unwrap(), Some(1));
        fs::write(&image, vec![0; RECORD]).unwrap();
        assert_eq!(last_of(&image).unwrap(), None);
    }
}
