//! `cargo lab fuzz`: the targets of `ringside-fuzz` under libFuzzer.
//!
//! Inputs that are kept are lines of base64 in `tests/fuzz/inputs`, a file for each target.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::command::{self, Output};
use crate::error::{Doing, LabError, Result, last_lines};
use crate::programs::{BUILD_LIMIT, cargo, workspace};
use crate::protocol::Tally;

/// Build scripts are built without what counts branches if the target is named.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What counts branches, and tells libFuzzer of comparisons (LLVM, SanitizerCoverage). No option of it is unstable.
const COVERAGE: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";
const SANITIZER: &str = " -Zsanitizer=address";

/// Longest input, in bytes.
const MAX_LEN: u32 = 4096;
/// An input that takes so many seconds hangs.
const HANG: u32 = 10;
/// How long libFuzzer may take beyond the time that it is given: it first reads all inputs that are kept.
const GRACE: Duration = Duration::from_secs(120);

/// Searches for `seconds` in each of the targets that are named, or in all of them.
///
/// # Errors
/// Fails if there is no such target, if the build fails, or if a search finds something; the others are searched first.
pub fn run(targets: &[String], seconds: u32, sanitize: bool) -> Result<()> {
    let searched = search(targets, seconds, sanitize)?;
    let broken = searched.into_iter().filter(|(_, held)| !held);
    let broken: Vec<String> = broken.map(|(name, _)| name).collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(LabError::Check(format!(
        "inputs were found that break {}: mend it, and keep them in tests/fuzz/inputs (`base64 -w 0`)",
        broken.join(", ")
    )))
}

/// Searches for `seconds` in each target, each of which counts as a test.
///
/// # Errors
/// Fails if the build does, or a search does not end.
pub fn test(seconds: u32) -> Result<Tally> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    if let Err(error) = Command::new(&compiler).arg("--version").output() {
        let compiler = compiler.to_string_lossy();
        println!("fuzz: skipped: no C++ compiler `{compiler}` (package g++): {error}");
        return Ok(Tally {
            skipped: 1,
            ..Tally::default()
        });
    }
    Ok(count(&search(&[], seconds, false)?))
}

fn count(searched: &[(String, bool)]) -> Tally {
    let mut tally = Tally::default();
    for (_, held) in searched {
        tally.passed += u64::from(*held);
        tally.failed += u64::from(!held);
    }
    tally
}

/// Searches, and says of each target whether it held.
fn search(targets: &[String], seconds: u32, sanitize: bool) -> Result<Vec<(String, bool)>> {
    let kept = workspace().join("tests").join("fuzz").join("inputs");
    let known = names(&kept)?;
    if let Some(unknown) = targets.iter().find(|name| !known.contains(name)) {
        return Err(LabError::Setup(format!(
            "there is no fuzz target `{unknown}`, but {}",
            known.join(", ")
        )));
    }
    let targets = if targets.is_empty() { &known } else { targets };
    let build = workspace().join("target").join("fuzz");
    let program = build_program(&build, sanitize)?;
    let mut searched = Vec::new();
    for name in targets {
        let corpus = build.join("corpus").join(name);
        let findings = build.join("findings").join(name);
        for dir in [&corpus, &findings] {
            fs::create_dir_all(dir).doing(|| format!("make {}", dir.display()))?;
        }
        unpack(&kept.join(name).with_extension("txt"), &corpus)?;
        let mut command = Command::new(&program);
        command
            .env("RINGSIDE_FUZZ_TARGET", name)
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-max_len={MAX_LEN}"))
            .arg(format!("-timeout={HANG}"))
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .arg("-print_final_stats=1")
            .arg(&corpus);
        let output = command::output(&mut command, Duration::from_secs(seconds.into()) + GRACE)?;
        println!("fuzz {name}: {}", summary(&output.stderr));
        let held = output.status.success();
        if !held {
            report(&output, &findings);
        }
        searched.push((name.clone(), held));
    }
    Ok(searched)
}

/// Each target has a file of inputs.
fn names(inputs: &Path) -> Result<Vec<String>> {
    let doing = || format!("list {}", inputs.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(inputs).doing(doing)? {
        let path = entry.doing(doing)?.path();
        names.extend(
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned()),
        );
    }
    names.sort();
    Ok(names)
}

/// Writes each input to a file of its own, as libFuzzer reads them.
fn unpack(inputs: &Path, to: &Path) -> Result<()> {
    let text = fs::read_to_string(inputs).doing(|| format!("read {}", inputs.display()))?;
    let lines = text.lines().enumerate();
    for (number, line) in lines.filter(|(_, line)| !line.starts_with('#')) {
        let number = number + 1;
        let input = STANDARD.decode(line).map_err(|error| {
            LabError::Setup(format!("{} line {number}: {error}", inputs.display()))
        })?;
        let file = to.join(format!("kept-{number}"));
        fs::write(&file, input).doing(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

fn build_program(to: &Path, sanitize: bool) -> Result<PathBuf> {
    let mut command = cargo();
    let mut flags = COVERAGE.to_owned();
    if sanitize {
        flags.push_str(SANITIZER);
        // The program of that name which rustup puts in the path: the present one is stable's own.
        command = Command::new("cargo");
        command
            .current_dir(workspace())
            .env("RUSTUP_TOOLCHAIN", "nightly")
            .env_remove("RUSTC");
    }
    let build = to.join(if sanitize { "sanitized" } else { "plain" });
    command
        .args(["build", "--locked", "--profile", "fuzz", "--target", TARGET])
        .args(["--package", "ringside-fuzz", "--features", "libfuzzer"])
        .arg("--target-dir")
        .arg(&build)
        .env("RUSTFLAGS", flags)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    eprintln!("lab: building the fuzz targets");
    command::succeed(&mut command, BUILD_LIMIT)?;
    Ok(build.join(TARGET).join("fuzz").join("ringside-fuzz"))
}

/// How many runs, how many branches.
fn summary(log: &str) -> String {
    let runs = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .map_or("?", str::trim);
    let covered = log.lines().rev().find_map(|line| {
        let (_, after) = line.split_once(" cov: ")?;
        after.split(' ').next()
    });
    format!("{runs} runs, {} branches", covered.unwrap_or("?"))
}

fn report(output: &Output, findings: &Path) {
    for line in last_lines(&output.stderr, 60) {
        eprintln!("    {line}");
    }
    eprintln!("lab: the input is in {}", findings.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_found() {
        let log = "#2\tINITED cov: 17 ft: 20\n#9\tDONE   cov: 40 ft: 44 corp: 3/1b\nDone 9 runs in 1 second(s)\n\
            stat::number_of_executed_units: 9\nstat::peak_rss_mb: 30\n";
        assert_eq!(summary(log), "9 runs, 40 branches");
        assert_eq!(summary(""), "? runs, ? branches");
    }

    #[test]
    fn each_target_is_a_test() {
        let searched = [("a", true), ("b", false), ("c", true)];
        let searched = searched.map(|(name, held)| (name.to_owned(), held));
        assert_eq!(
            count(&searched).to_string(),
            "2 passed, 1 failed, 0 skipped"
        );
    }
}
