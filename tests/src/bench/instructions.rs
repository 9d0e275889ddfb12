//! Instructions that `ringside-blk` executes for a request without data, and `ringside-net` for a short frame: figures that depend
//! on no machine and no moment.
//!
//! The program runs under callgrind, and serves few requests, then many. What the many cost more, divided by how
//! many they are more, is what one costs; starting, connecting and ending cancel out. Busy waiting is off: how often it goes round
//! depends on the machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::contender::{Contender, socket_in};
use super::load::Shape;
use super::net::second_socket;
use super::storage::Storage;
use crate::command;
use crate::error::{LabError, Result};
use crate::site::Site;

/// Requests of the two runs.
const FEW: u64 = 2000;
const MANY: u64 = 22_000;
/// The same of frames.
const FEW_FRAMES: u64 = 1000;
const MANY_FRAMES: u64 = 6000;
/// Bytes of a frame.
const FRAME: u32 = 64;
/// Requests in flight.
const DEPTH: u16 = 32;
/// How long a run may take on plain hardware.
const RUN_LIMIT: Duration = Duration::from_secs(10);
/// callgrind below a system's root: the tool itself, so that one in another root can be run.
const TOOL: &str = "usr/libexec/valgrind/callgrind-amd64-linux";

/// User-space instructions per request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Instructions {
    /// For a read of 4 KiB.
    pub(super) read: f64,
    /// For a write of 4 KiB.
    pub(super) write: f64,
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "instructions of ringside-blk for each request of 4 KiB, {DEPTH} deep, no data moved: {:.0} read, {:.0} write",
            self.read, self.write
        )
    }
}

/// User-space instructions per frame of 64 bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct FrameInstructions(Vec<(&'static str, f64)>);

impl fmt::Display for FrameInstructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "instructions of ringside-net for each frame of {FRAME} bytes:"
        )?;
        for (index, (what, count)) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma} {count:.0} {what}")?;
        }
        Ok(())
    }
}

/// Counts them.
///
/// # Errors
/// [`LabError::Skipped`], with the reason, where there is no valgrind that can.
pub(super) fn count(site: &Site, directory: &Path) -> Result<Instructions> {
    let each = |callgrind: &Callgrind<'_>, shape: Shape| {
        let back_end = "ringside-blk --socket-path {socket} --null 1G --poll 0";
        let depth = DEPTH.to_string();
        let load = ["--shape", shape.name(), "--depth", &depth];
        callgrind.each([FEW, MANY], back_end, &load)
    };
    let (callgrind, read) = Callgrind::first(site, directory, |callgrind| {
        each(callgrind, Shape::Randread)
    })?;
    let write = each(&callgrind, Shape::Randwrite)?;
    Ok(Instructions { read, write })
}

/// Counts those of `ringside-net` for frames: nothing behind the card, each way and each format of rings; from one guest to
/// another; and a TAP of this name, which has to be up, if there is one.
///
/// # Errors
/// As [`count`].
pub(super) fn of_frames(
    site: &Site,
    directory: &Path,
    tap: Option<&str>,
) -> Result<FrameInstructions> {
    let card = |link: &str| format!("ringside-net --poll 0 --socket-path {{socket}} {link}");
    let null = card("--link null");
    let source = card(&format!("--link generate:{FRAME}"));
    let tap = tap.map(|tap| card(&format!("--tap {tap}")));
    let other = second_socket(&socket_in(directory)).display().to_string();
    let port = command::quoted(&format!("socket={other}"));
    let switch = format!("ringside-net --poll 0 --port {port} --port socket={{socket}}");
    let joined = ["--to", other.as_str()];
    let mut ways: Vec<(_, &str, &[&str])> = vec![
        ("from a guest to nothing", &null, &["--direction", "tx"]),
        (
            "from a guest to nothing in packed rings",
            &null,
            &["--direction", "tx", "--packed"],
        ),
        ("from nothing to a guest", &source, &["--direction", "rx"]),
        (
            "from nothing to a guest in packed rings",
            &source,
            &["--direction", "rx", "--packed"],
        ),
        ("from a guest to another", &switch, &joined),
    ];
    if let Some(tap) = &tap {
        ways.push(("from a guest to a TAP", tap, &["--direction", "tx"]));
    }
    let frame = FRAME.to_string();
    let each = |callgrind: &Callgrind<'_>, back_end: &str, options: &[&str]| {
        let load = [&["net", "--frame", &frame], options].concat();
        callgrind.each([FEW_FRAMES, MANY_FRAMES], back_end, &load)
    };
    let count = |callgrind: &Callgrind<'_>| {
        let counts = ways.iter().map(|(what, back_end, options)| {
            let count = each(callgrind, back_end, options)?;
            Ok((*what, count))
        });
        counts.collect()
    };
    let (_, counts) = Callgrind::first(site, directory, count)?;
    Ok(FrameInstructions(counts))
}

/// A callgrind that can be used here.
struct Callgrind<'a> {
    site: &'a Site,
    directory: &'a Path,
    tool: PathBuf,
}

impl<'a> Callgrind<'a> {
    /// The first one that can do some work, and what came of that. Old ones stop all threads while one waits for its io_uring.
    fn first<T>(
        site: &'a Site,
        directory: &'a Path,
        work: impl Fn(&Self) -> Result<T>,
    ) -> Result<(Self, T)> {
        let mut why = String::from("there is no valgrind");
        for tool in [site.root.join(TOOL), Path::new("/").join(TOOL)] {
            if !tool.exists() {
                continue;
            }
            let this = Self {
                site,
                directory,
                tool,
            };
            match work(&this) {
                Ok(done) => return Ok((this, done)),
                Err(error) => why = format!("{} cannot do it: {error}", this.tool.display()),
            }
        }
        Err(LabError::Skipped(format!(
            "instructions are not counted: {why} (that of Debian trixie, 3.24, can)"
        )))
    }

    /// What each request or frame costs of those that the second of two runs has more.
    fn each(&self, runs: [u64; 2], back_end: &str, load: &[&str]) -> Result<f64> {
        let [few, many] = runs;
        let least = self.total(back_end, load, few)?;
        let more = self.total(back_end, load, many)?.saturating_sub(least);
        Ok(more as f64 / many.saturating_sub(few).max(1) as f64)
    }

    /// Instructions of one whole run of a back-end, whose command line has {socket}, under a load.
    fn total(&self, back_end: &str, load: &[&str], count: u64) -> Result<u64> {
        let quoted = |path: &Path| command::quoted(&path.display().to_string());
        // Beside the program's calls valgrind makes its own.
        let line = format!(
            "env VALGRIND_LIB={library} VALGRIND_LAUNCHER={tool} {tool} --tool=callgrind --callgrind-out-file=/dev/null \
             {programs}/{back_end} --sandbox off",
            library = quoted(self.tool.parent().unwrap_or(&self.tool)),
            tool = quoted(&self.tool),
            programs = quoted(&self.site.programs),
        );
        let contender = Contender::line("callgrind", line);
        let process = contender.start(self.site, &Storage::null(), 1, self.directory)?;
        let mut command = self.site.program("ringside-load");
        command.args(load).arg("--socket-path").arg(&process.socket);
        command.arg("--json").arg("--count").arg(count.to_string());
        command::run(&mut command, self.site.limit(RUN_LIMIT))?;
        let text = process.end();
        text.lines()
            .find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
            .ok_or(LabError::Protocol {
                from: "valgrind",
                text,
            })
    }
}
