//! Front-ends that this project did not write, on `ringside-blk` and `qemu-storage-daemon` without data: the crate
//! `virtio-driver`, and libblkio as `qemu-img` and `qemu-io` use it.

use std::fmt;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use super::cells::Cell;
use super::contender::{Contender, Family, Process};
use super::load::{Completions, Shape};
use super::measure::Bench;
use super::outcome::Spread;
use super::storage::{Kind, Storage};
use crate::command;
use crate::error::{LabError, Result};

/// Depths that are measured, and how many requests qemu-img does at each.
const DEPTHS: [(u16, u32); 3] = [(1, 30_000), (32, 600_000), (128, 600_000)];
/// How long one run of a program may take.
const LIMIT: Duration = Duration::from_secs(60);
/// What qemu-io does and checks.
const CHECKS: [&str; 8] = [
    "write -P 0xa5 0 1M",
    "write -P 0x3c 1M 64k",
    "read -P 0xa5 0 1M",
    "read -P 0x3c 1M 64k",
    "write -z 4k 8k",
    "read -P 0 4k 8k",
    "discard 0 64k",
    "flush",
];
/// Size of the disk that qemu-io works on.
const CHECKED_SIZE: u64 = 64 << 20;

/// A front-end and a depth: requests per second on both back-ends.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Other {
    pub(super) front_end: &'static str,
    pub(super) depth: u16,
    pub(super) ringside: Spread,
    pub(super) qsd: Spread,
    /// Of one to the other in the same round.
    pub(super) ratio: Spread,
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spread { median, min, max } = self.ratio;
        write!(
            f,
            "{:<26} {:>9.0} on ringside, {:>9.0} on qsd: {median:.2} ({min:.2}..{max:.2})",
            format!("{} d{}", self.front_end, self.depth),
            self.ringside.median,
            self.qsd.median
        )
    }
}

/// Measures both front-ends on both back-ends.
pub(super) fn measure(
    bench: &Bench<'_>,
    contenders: &[Contender],
    rounds: usize,
) -> Result<Vec<Other>> {
    let of = |family| contenders.iter().find(|one| one.family == family);
    let (Some(ours), Some(qsd)) = (of(Family::Ringside), of(Family::Qemu)) else {
        return Ok(Vec::new());
    };
    let storage = Storage::null();
    let mut found = Vec::new();
    type FrontEnd = fn(&Bench<'_>, &Process, u16, u32) -> Result<f64>;
    let front_ends: [(&str, FrontEnd); 2] = [
        ("virtio-driver", virtio_driver),
        ("libblkio (qemu-img)", qemu_img),
    ];
    for (front_end, run) in front_ends {
        for (depth, requests) in DEPTHS {
            let mut both = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                for (contender, samples) in [ours, qsd].into_iter().zip(&mut both) {
                    let process = bench.start(contender, &storage, 1)?;
                    samples.push(run(bench, &process, depth, requests)?);
                }
            }
            let [ringside, qsd] = both;
            let ratios = ringside.iter().zip(&qsd).map(|(ours, qsd)| ours / qsd);
            let ratio = Spread::of(ratios.collect::<Vec<_>>());
            if let (Some(ringside), Some(qsd), Some(ratio)) =
                (Spread::of(ringside), Spread::of(qsd), ratio)
            {
                let other = Other {
                    front_end,
                    depth,
                    ringside,
                    qsd,
                    ratio,
                };
                println!("{other}");
                found.push(other);
            }
        }
    }
    Ok(found)
}

fn virtio_driver(bench: &Bench<'_>, process: &Process, depth: u16, _requests: u32) -> Result<f64> {
    let cell = Cell {
        storage: Kind::Null,
        shape: Shape::Randread,
        block_size: 4096,
        depth,
        queues: 1,
        completions: Completions::Eventfd,
    };
    let report = bench.report(process, &cell, &["--front-end", "virtio-driver"])?;
    Ok(report.iops)
}

/// A program of QEMU's with the modules of the lab's root.
fn qemu_tool(bench: &Bench<'_>, name: &str) -> Command {
    let mut command = bench.site.root_program(&format!("usr/bin/{name}"));
    let modules = bench.site.root.join("usr/lib/x86_64-linux-gnu/qemu");
    command.env("QEMU_MODULE_DIR", modules);
    command
}

fn image_options(process: &Process) -> String {
    format!(
        "driver=virtio-blk-vhost-user,path={},cache.direct=on",
        process.socket.display()
    )
}

fn qemu_img(bench: &Bench<'_>, process: &Process, depth: u16, requests: u32) -> Result<f64> {
    let mut qemu = qemu_tool(bench, "qemu-img");
    qemu.arg("bench").arg("-c").arg(requests.to_string());
    qemu.arg("-d").arg(depth.to_string());
    qemu.args(["-s", "4096", "-t", "none", "--image-opts"]);
    qemu.arg(image_options(process));
    let text = bench.on_front(1, || command::run(&mut qemu, LIMIT))?;
    let seconds = text.lines().find_map(|line| {
        let rest = line.strip_prefix("Run completed in ")?;
        rest.split(' ').next()?.parse::<f64>().ok()
    });
    match seconds {
        Some(seconds) if seconds > 0.0 => Ok(f64::from(requests) / seconds),
        _ => Err(LabError::Protocol {
            from: "qemu-img",
            text,
        }),
    }
}

/// Writes, reads back, zeroes, discards and flushes by libblkio, and says what was checked.
pub(super) fn check(
    bench: &Bench<'_>,
    contenders: &[Contender],
    storage: &Storage,
) -> Result<String> {
    let Some(ours) = contenders.iter().find(|one| one.family == Family::Ringside) else {
        return Ok("libblkio (qemu-io): not run, there is no ringside-blk".into());
    };
    let process = bench.start(ours, storage, 1)?;
    let mut qemu = qemu_tool(bench, "qemu-io");
    for check in CHECKS {
        qemu.args(["-c", check]);
    }
    qemu.arg("--image-opts").arg(image_options(&process));
    let output = command::output(&mut qemu, LIMIT)?;
    let text = format!("{}{}", output.stdout, output.stderr);
    // qemu-io goes on after a failed command, and most often exits with 0 all the same.
    let wrong = ["failed", "error", "Pattern", "not supported", "Invalid"];
    if !output.status.success() || wrong.iter().any(|word| text.contains(word)) {
        return Err(LabError::Check(format!("qemu-io on ringside-blk: {text}")));
    }
    Ok(format!(
        "libblkio (qemu-io) on ringside-blk: {}: all right",
        CHECKS.join("; ")
    ))
}

/// A disk for it.
pub(super) fn checked_disk(bench: &Bench<'_>, directory: &std::path::Path) -> Result<Storage> {
    Storage::prepare(Kind::File, bench.site, directory, CHECKED_SIZE)
}

/// Whether the fio at hand could do the same.
pub(super) fn fio_engine(bench: &Bench<'_>) -> Result<String> {
    let mut fio = bench.site.root_program("usr/bin/fio");
    let engines = command::run(fio.arg("--enghelp"), LIMIT)?;
    Ok(if engines.contains("libblkio") {
        "fio has the engine libblkio; it was not used".into()
    } else {
        "fio: the one at hand has no engine libblkio".into()
    })
}
