//! The `lab` command line and what its commands do.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};

use crate::bench::{self, BlkBench, NetBench};
use crate::calls;
use crate::command::quoted;
use crate::demo;
use crate::error::{Doing, LabError, Result};
use crate::fuzz;
use crate::inside;
use crate::l1::{self, Run};
use crate::lab::{Lab, Where, build_programs};
use crate::native;
use crate::power_cut;
use crate::probe;
use crate::protocol::{Half, Request, Tally};
use crate::setup::{Cache, Systems, Wishes};
use crate::site::{Effort, Site};
use crate::suite;
use crate::testing::{self, Plan, show};

/// Longer than the demonstration, or a command, may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(3600);

const EXAMPLES: &str = "\
Examples:
  cargo lab demo               a guest with disk and network from our back-ends
  cargo lab test               all tests; the last line counts them
  cargo lab test --fuzz-seconds 0                without a search in the fuzz targets
  cargo lab test boot:: blk::  the tests whose names contain one of these
  cargo lab test crash:: --kills 50              back-ends killed 50 times in each
  cargo lab test soak:: --soak-seconds 900       four guests busy for 15 minutes
  cargo lab test --list        their names
  cargo lab shell              a shell in the lab VM, programs in /lab/bin
  cargo lab shell -- uname -a  one command where guests run
  cargo lab shell -- 'ls | wc' one line for the shell there
  cargo lab bench blk          back-ends of disks, ours and QEMU's, measured here
  cargo lab bench net          back-ends of network cards, ours and DPDK's, measured here
  cargo lab calls              system calls of confined programs: what is superfluous
  cargo lab check              format, lints, native tests: before each commit
  cargo lab fuzz --seconds 600 what guests, peers and files can send, ten minutes each
  cargo lab clean              removes the lab from the cache directory

Options of demo, test, shell and setup:
  --where auto|host|lab        where guests run; see below
  --yes                        agree to what setup downloads and installs
  --mirror URL                 Debian mirror, in place of that of apt
  --verbose                    show everything that tests write

Where guests run (--where):
  They need a KVM that boots Linux. Where this machine has one (tried by
  booting a small guest) and you are root, they run on it, in network
  namespaces of their own. Elsewhere they run in the lab VM: an emulated
  machine in which Linux has a real KVM. It is slower by 10 to 20 times, and
  needs no privileges at all.

Exit status: 0 all went well, 1 something failed, 2 wrong usage.";

/// Ringside's lab: real guests on real KVM, on any x86-64 Linux machine.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Action,
}

/// Options of the commands that need the lab.
#[derive(Debug, Args)]
struct Common {
    /// Agree to what setup installs and downloads, without being asked
    #[arg(long, short)]
    yes: bool,
    /// Where guests run
    #[arg(long = "where", value_enum, default_value_t = Where::Auto)]
    place: Where,
    /// Debian mirror (the directory that has dists/trixie) [default: that of apt's configuration]
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Show everything that tests write
    #[arg(long, short)]
    verbose: bool,
}

/// What is measured.
#[derive(Debug, Subcommand)]
enum Bench {
    /// ringside-blk and qemu-storage-daemon, by requests from a vhost-user front-end of our own
    ///
    /// Each back-end is started afresh for each measurement; front-end and back-end have processors of their own where there
    /// are enough. Figures of one run compare with each other; those of a machine with other work on it compare with nothing.
    Blk {
        /// Agree to what setup installs and downloads, without being asked
        #[arg(long, short)]
        yes: bool,
        /// Debian mirror (the directory that has dists/trixie) [default: that of apt's configuration]
        #[arg(long, value_name = "URL")]
        mirror: Option<String>,
        #[command(flatten)]
        options: BlkBench,
    },
    /// ringside-net, DPDK's vhost ports and passt, by frames and TCP from vhost-user front-ends, and a bare loop on a TAP
    ///
    /// Front-ends are two of our own and DPDK's virtio-user. What takes the frames of a row, or gives them, is the same for
    /// all back-ends of it. Rows with a TAP, and those of TCP, need root, for network namespaces; the others do without.
    Net {
        /// Agree to what setup installs and downloads, without being asked
        #[arg(long, short)]
        yes: bool,
        /// Debian mirror (the directory that has dists/trixie) [default: that of apt's configuration]
        #[arg(long, value_name = "URL")]
        mirror: Option<String>,
        #[command(flatten)]
        options: NetBench,
    },
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Boot a guest with its disk and network from our back-ends, and measure both in it
    Demo {
        #[command(flatten)]
        common: Common,
    },
    /// Run the native tests, search in the fuzz targets for a moment, then run the end-to-end tests with guests
    Test {
        #[command(flatten)]
        common: Common,
        /// Only tests whose name contains one of these (native tests are then left out)
        filters: Vec<String>,
        /// Print the names of the end-to-end tests and do nothing
        #[arg(long)]
        list: bool,
        /// How many lab VMs run tests at the same time [default: one for each processor, if there is memory for them]
        ///
        /// Ratios that a test prints are steadiest with one. On this machine's own KVM tests run one after the other.
        #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
        jobs: Option<u16>,
        /// How often a failed end-to-end test is run again; what failed, be it once, is said at the end
        ///
        /// It counts as passed if it passes in the end: the lab VM's emulator loses a guest now and then.
        #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u16).range(..=10))]
        retries: u16,
        /// Begin no end-to-end test later than this; those that are left then are skipped, which is said of each
        ///
        /// Long ones come first. One that has begun takes its time.
        #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u16).range(1..))]
        within: Option<u16>,
        /// How long to search in each fuzz target after the native tests; 0 for not at all
        ///
        /// Needs a C++ compiler, for libFuzzer; without one it is skipped. `cargo lab fuzz` searches for longer.
        #[arg(long, default_value_t = 5, value_name = "N")]
        fuzz_seconds: u32,
        #[command(flatten)]
        effort: Effort,
    },
    /// Check format, lints and native tests of the whole workspace: for before each commit
    Check {
        /// Leave the native tests out
        #[arg(long)]
        no_tests: bool,
    },
    /// Search for inputs that break what guests, peers and files reach, guided by the branches that they take
    ///
    /// Needs a C++ compiler, for libFuzzer. What is found beyond the inputs in tests/fuzz/inputs is kept under target/fuzz and
    /// gone on with the next time. `cargo test -p ringside-fuzz` runs the same targets over those inputs, without a search.
    Fuzz {
        /// Targets, by name; all of them if none is given
        #[arg(value_name = "TARGET")]
        targets: Vec<String>,
        /// How long to search, for each target
        #[arg(long, default_value_t = 60, value_name = "N")]
        seconds: u32,
        /// Find accesses outside allocated memory, too (AddressSanitizer; needs the nightly toolchain)
        #[arg(long)]
        sanitize: bool,
    },
    /// Trace the native tests, and compare the system calls of confined programs with the lists that they are held to
    ///
    /// Needs strace, and root for most of the tests. Fails if a list has a call that no test needs and that it does not say to be rare.
    Calls,
    /// Open a shell in the lab VM, or run one command where guests run
    Shell {
        #[command(flatten)]
        common: Common,
        /// The command, after `--`: a program and its arguments, or one word with a line for the shell
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Measure a back-end on this machine, without a guest, beside others' back-ends
    #[command(subcommand)]
    Bench(Bench),
    /// Build the lab's systems if they are not there, and nothing else
    Setup {
        #[command(flatten)]
        common: Common,
    },
    /// Remove everything the lab keeps outside of this directory
    Clean,
    /// The side where KVM is
    #[command(hide = true)]
    Inside {
        /// Character device to serve requests on, instead of standard input and output
        #[arg(long)]
        port: Option<PathBuf>,
    },
    /// The demonstration, in a process of its own
    #[command(hide = true)]
    RunDemo,
    /// Half of the power cut, in a process of its own
    #[command(hide = true)]
    RunPowerCut {
        /// Which
        #[arg(value_enum)]
        half: Half,
    },
    /// The probe of this machine's KVM, in a process of its own
    #[command(hide = true)]
    RunProbe,
    /// One test, in a process of its own
    #[command(hide = true)]
    RunTest {
        /// Its name
        name: String,
    },
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Demo { common } => {
            let mut lab = Lab::start(systems(&common)?, common.place)?;
            let status = lab.request(&Request::Demo, SILENCE_LIMIT, |event| show(event, true))?;
            Ok(exit_code(status))
        }
        Action::Test {
            filters,
            list: true,
            ..
        } => {
            for name in testing::names(&filters) {
                println!("{name}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Action::Test {
            common,
            filters,
            list: false,
            jobs,
            retries,
            within,
            fuzz_seconds,
            effort,
        } => Ok(test(
            &common,
            &Plan {
                filters: &filters,
                effort,
                fuzz_seconds,
                jobs: jobs.map(usize::from),
                retries,
                within: within.map(|minutes| Duration::from_secs(60 * u64::from(minutes))),
                start: Instant::now(),
                verbose: common.verbose,
            },
        )),
        Action::Check { no_tests } => check(no_tests),
        Action::Fuzz {
            targets,
            seconds,
            sanitize,
        } => fuzz::run(&targets, seconds, sanitize).map(|()| ExitCode::SUCCESS),
        Action::Calls => compare_calls(),
        Action::Shell { common, command } => shell(&common, &command),
        Action::Bench(Bench::Blk {
            yes,
            mirror,
            options,
        }) => {
            let systems = Cache::find()?.ensure(&Wishes { yes, mirror })?;
            bench::blk(&systems, &options)?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Bench(Bench::Net {
            yes,
            mirror,
            options,
        }) => {
            let systems = Cache::find()?.ensure(&Wishes { yes, mirror })?;
            bench::net(&systems, &options)?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Setup { common } => {
            systems(&common)?;
            println!("lab: ready");
            Ok(ExitCode::SUCCESS)
        }
        Action::Clean => {
            let cache = Cache::find()?;
            let path = cache.path().display().to_string();
            cache.remove()?;
            println!("lab: removed {path}");
            Ok(ExitCode::SUCCESS)
        }
        Action::Inside { port: Some(port) } => {
            inside::serve_port(&port, &Site::inside_lab())?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Inside { port: None } => {
            // The program that started this one may be ended in the middle of a request.
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
                .doing(|| "bind this process to the one that started it".into())?;
            inside::serve(
                std::io::stdin(),
                Box::new(std::io::stdout()),
                &Site::current()?,
            )?;
            Ok(ExitCode::SUCCESS)
        }
        Action::RunDemo => demo::run(&Site::current()?).map(|()| ExitCode::SUCCESS),
        Action::RunPowerCut { half } => {
            power_cut::run(&Site::current()?, half).map(|()| ExitCode::SUCCESS)
        }
        Action::RunProbe => Ok(match probe::boot(&Site::current()?) {
            None => ExitCode::SUCCESS,
            Some(obstacle) => {
                println!("{obstacle}");
                ExitCode::FAILURE
            }
        }),
        Action::RunTest { name } => suite::run_test(&name).map(exit_code),
    }
}

fn exit_code(status: i32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(1))
}

/// The lab's systems, built if they are not there; asks first.
fn systems(common: &Common) -> Result<Systems> {
    Cache::find()?.ensure(&Wishes {
        yes: common.yes,
        mirror: common.mirror.clone(),
    })
}

fn shell(common: &Common, command: &[String]) -> Result<ExitCode> {
    if command.is_empty() && common.place != Where::Host {
        let systems = systems(common)?;
        let programs = build_programs()?;
        let run = Run::create(&systems, 0)?;
        l1::shell(&systems, &run, &programs)?;
        return Ok(ExitCode::SUCCESS);
    }
    if command.is_empty() {
        return Err(LabError::Setup(
            "a shell opens in the lab VM only: this machine needs no lab for one; \
             give a command after `--`, or leave --where host out"
                .into(),
        ));
    }
    let mut lab = Lab::start(systems(common)?, common.place)?;
    let request = Request::Shell {
        command: script(command),
    };
    let status = lab.request(&request, SILENCE_LIMIT, |event| show(event, true))?;
    Ok(exit_code(status))
}

/// The shell command that is meant: a single word is one already, several are a program and its arguments.
fn script(words: &[String]) -> String {
    match words {
        [script] => script.clone(),
        words => words
            .iter()
            .map(|word| quoted(word))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

fn check(no_tests: bool) -> Result<ExitCode> {
    native::check()?;
    if no_tests {
        return Ok(ExitCode::SUCCESS);
    }
    let tally = native::test(false)?;
    println!("{tally}");
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn compare_calls() -> Result<ExitCode> {
    let found = calls::find()?;
    let mut wrong = 0;
    for line in &found.missing {
        println!("on no list: {line}");
        wrong += 1;
    }
    for (group, call) in found.superfluous() {
        println!(
            "superfluous: {group}: call {}, {:?}: {}",
            call.number, call.only, call.why
        );
        wrong += 1;
    }
    println!(
        "{} threads of confined programs, {wrong} calls that are on no list or superfluous",
        found.threads
    );
    Ok(if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn test(common: &Common, plan: &Plan) -> ExitCode {
    let mut tally = Tally::default();
    if let Err(error) = testing::run(plan, common.place, || systems(common), &mut tally) {
        // What could not even be run has failed.
        eprintln!("lab: {error}");
        tally.failed += 1;
    }
    println!("{tally}");
    match tally.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn shell_takes_a_command_after_dashes() {
        let cli = Cli::try_parse_from(["lab", "shell", "--yes", "--", "ls", "-l"]).unwrap();
        let Action::Shell { command, common } = cli.command else {
            panic!("not a shell")
        };
        assert_eq!(command, ["ls", "-l"]);
        assert!(common.yes);
    }

    #[test]
    fn tests_search_in_the_fuzz_targets_unless_told_not_to() {
        for (options, expected) in [(&[][..], 5), (&["--fuzz-seconds", "0"], 0)] {
            let cli = Cli::try_parse_from([&["lab", "test"], options].concat()).unwrap();
            let Action::Test { fuzz_seconds, .. } = cli.command else {
                panic!("no tests")
            };
            assert_eq!(fuzz_seconds, expected);
        }
    }

    #[test]
    fn several_words_stay_what_they_are() {
        let script =
            |words: &[&str]| script(&words.iter().map(|w| (*w).into()).collect::<Vec<_>>());
        assert_eq!(script(&["ls | wc"]), "ls | wc");
        assert_eq!(
            script(&["echo", "a  b", "it's"]),
            r"'echo' 'a  b' 'it'\''s'"
        );
    }

    #[test]
    fn help_names_the_options_of_the_commands() {
        let help = Cli::command().render_help().to_string();
        let command = Cli::command();
        let demo = command.find_subcommand("demo").unwrap();
        for option in demo
            .get_arguments()
            .filter_map(|argument| argument.get_long())
        {
            assert!(help.contains(&format!("--{option}")), "{option}");
        }
    }
}
