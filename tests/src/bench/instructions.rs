//! Instructions that `ringside-blk` executes for a request without data: a figure that depends on no machine and no moment.
//!
//! The program runs under callgrind with `--null`, and serves few requests, then many. What the many cost more, divided by how
//! many they are more, is what one costs; starting, connecting and ending cancel out. Busy waiting is off: how often it goes round
//! depends on the machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use super::contender::Contender;
use super::load::Shape;
use super::storage::Storage;
use crate::command;
use crate::error::{LabError, Result};
use crate::site::Site;

/// Requests of the two runs.
const FEW: u64 = 2000;
const MANY: u64 = 22_000;
/// Requests in flight.
const DEPTH: u16 = 32;
/// How long a run may take on plain hardware.
const RUN_LIMIT: Duration = Duration::from_secs(10);
/// callgrind below a system's root: the tool itself, so that one in another root can be run.
const TOOL: &str = "usr/libexec/valgrind/callgrind-amd64-linux";

/// User-space instructions per request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Instructions {
    /// For a read of 4 KiB.
    pub read: f64,
    /// For a write of 4 KiB.
    pub write: f64,
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

/// Counts them.
///
/// # Errors
/// [`LabError::Skipped`], with the reason, where there is no valgrind that can.
pub fn count(site: &Site, directory: &Path) -> Result<Instructions> {
    let tools: Vec<PathBuf> = [site.root.join(TOOL), Path::new("/").join(TOOL)]
        .into_iter()
        .filter(|tool| tool.exists())
        .collect();
    let mut why = String::from("there is no valgrind");
    for tool in tools {
        // One that cannot serve at all shows with few requests.
        match total(site, &tool, directory, Shape::Randread, FEW) {
            Ok(few) => {
                let each =
                    |few: u64, many: u64| many.saturating_sub(few) as f64 / (MANY - FEW) as f64;
                let run = |shape, requests| total(site, &tool, directory, shape, requests);
                return Ok(Instructions {
                    read: each(few, run(Shape::Randread, MANY)?),
                    write: each(run(Shape::Randwrite, FEW)?, run(Shape::Randwrite, MANY)?),
                });
            }
            // Old ones stop all threads while one waits for its io_uring.
            Err(error) => why = format!("{} cannot run ringside-blk: {error}", tool.display()),
        }
    }
    Err(LabError::Skipped(format!(
        "instructions are not counted: {why} (that of Debian trixie, 3.24, can)"
    )))
}

/// Instructions of one whole run.
fn total(site: &Site, tool: &Path, directory: &Path, shape: Shape, requests: u64) -> Result<u64> {
    let library = tool.parent().unwrap_or(tool);
    // Beside the program's calls valgrind makes its own.
    let line = format!(
        "env VALGRIND_LIB={library} VALGRIND_LAUNCHER={tool} {tool} --tool=callgrind --callgrind-out-file=/dev/null \
         {program} --socket-path {{socket}} --null 1G --poll 0 --sandbox off",
        library = command::quoted(&library.display().to_string()),
        tool = command::quoted(&tool.display().to_string()),
        program = command::quoted(&site.programs.join("ringside-blk").display().to_string()),
    );
    let process = Contender::line("callgrind", line).start(site, &Storage::null(), 1, directory)?;
    let mut load = site.program("ringside-load");
    load.arg("--socket-path").arg(&process.socket);
    load.args(["--shape", shape.name(), "--json"]);
    load.arg("--depth").arg(DEPTH.to_string());
    load.arg("--count").arg(requests.to_string());
    run(&mut load, site.limit(RUN_LIMIT))?;
    let text = process.end();
    text.lines()
        .find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
        .ok_or(LabError::Protocol {
            from: "valgrind",
            text,
        })
}

fn run(command: &mut Command, limit: Duration) -> Result<()> {
    command::run(command, limit).map(|_| ())
}
