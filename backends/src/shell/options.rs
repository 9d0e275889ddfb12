//! The command line that all back-ends share, after QEMU's conventions for back-end programs
//! (docs/interop/vhost-user.rst, "Backend program conventions").

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use ringside_control::Peers;
use ringside_sandbox::Mode;
use serde::Serialize;

use super::handover::{Parts, Predecessor, Serves, TakeOverError, same};
use super::log;
use super::placement::{Placement, parse_cpus};

/// What a back-end program is, for `--print-capabilities` and for its log.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Program {
    /// Name of the program.
    #[serde(skip)]
    pub name: &'static str,
    /// Device type as in QEMU's `vhost-user.json`, such as `block` or `net`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Features of that type that the program's options can switch on.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub features: &'static [&'static str],
    /// What SIGHUP does, for `--help`: see [`Device::refresh`](super::Device::refresh).
    #[serde(skip)]
    pub hangup: &'static str,
}

impl Program {
    /// The end of `--help`: signals and exit statuses.
    #[must_use]
    pub fn after_help(&self) -> String {
        let hangup = self.hangup;
        format!(
            "Signals:
  SIGTERM, SIGINT  finish requests in flight and end
  SIGHUP           {hangup}

{EXIT_STATUS_HELP}"
        )
    }

    /// Prints the capabilities and says so, if the command line asks for them. All other options are then
    /// ignored, right or wrong, as the convention demands; so this comes before any parsing.
    ///
    /// # Errors
    /// If standard output cannot be written.
    pub(super) fn print_capabilities_if_asked(&self) -> io::Result<bool> {
        let asked = std::env::args_os()
            .skip(1)
            .take_while(|arg| arg != OsStr::new("--"))
            .any(|arg| arg == OsStr::new("--print-capabilities"));
        if asked {
            let mut out = io::stdout().lock();
            serde_json::to_writer_pretty(&mut out, self)?;
            writeln!(out)?;
        }
        Ok(asked)
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text for each event.
    Text,
    /// One JSON object for each event.
    Json,
}

/// Whether something is done or offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// It is.
    On,
    /// It is not.
    Off,
}

/// Options of every back-end.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection and logs")]
pub struct ShellArgs {
    /// Unix socket to listen on for a front-end (with --client: to connect to)
    ///
    /// The socket file is created with mode 0600 and removed at exit. A file left behind by a program that
    /// is gone is replaced; a socket that somebody serves, or a file that is no socket, is not.
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"], conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Inherited socket to use, by number: listening, or already connected to a front-end
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(RawFd).range(0..))]
    pub fd: Option<RawFd>,

    /// Connect to a front-end that listens on --socket-path, and try again until it does
    #[arg(long, requires = "socket_path", conflicts_with = "fd")]
    pub client: bool,

    /// End when the front-end leaves; without it, a new one can connect
    #[arg(long)]
    pub exit_on_disconnect: bool,

    /// Processors to run the queues' threads on, in turn: a list such as 2,3 or 4-7
    #[arg(help_heading = "Performance", long, value_name = "LIST", value_parser = Cpus::parse, conflicts_with = "numa_node")]
    pub worker_cpus: Option<Cpus>,

    /// NUMA node to run the queues' threads on: best that of the guest's memory and of the storage or network card
    #[arg(help_heading = "Performance", long, value_name = "NUMBER")]
    pub numa_node: Option<u32>,

    /// Unix socket to listen on for ringside-ctl and for collectors of metrics
    ///
    /// Created with mode 0600 and removed at exit, as the front-end's. `ringside-ctl --help` tells what can be asked.
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Take the place of the program whose control socket this is, while its guest goes on
    ///
    /// For an upgrade: start the new program with the options of the old one, and this. It gets from the old one the sockets, the
    /// front-end's connection, and what the disk or network card is made of; the guest waits for some milliseconds, and loses
    /// nothing. Then the old one ends, with success. If the new one cannot take over, it says why, and the old one goes on. Its
    /// own control socket is the same. RBD images, AF_XDP sockets, and links and ports with a capture file cannot go over.
    #[arg(long, value_name = "CONTROL_SOCKET", conflicts_with = "fd")]
    pub take_over: Option<PathBuf>,

    /// The program that it is.
    #[arg(skip)]
    pub(super) predecessor: Option<Arc<Predecessor>>,

    /// Let this user connect, too, by number; can be given several times. Root and this program's own user always may
    ///
    /// Also to the control socket. The sockets are made with mode 0600: give the user a right to write to the file, for
    /// example by setfacl -m u:1000:rw.
    #[arg(long, value_name = "UID")]
    pub allow_uid: Vec<u32>,

    /// Give up all rights that are not needed any more before the first byte of a guest is read
    ///
    /// System calls, files, network, capabilities: what the program does not need for the disk or network card that it serves. One
    /// that makes another system call than those is ended by the kernel, whose log (dmesg, audit type 1326) has
    /// the number of the call. What the kernel, or a container, does not have of all this is said in the log, and done without; with
    /// `strict` the program does not start then. `log` has a call logged, and done: to find out what is missing. `off` is for
    /// debuggers.
    #[arg(
        long,
        value_enum,
        default_value = "on",
        value_name = "on|strict|log|off",
        hide_possible_values = true
    )]
    pub sandbox: Mode,

    /// Print what this program can do as JSON (QEMU's vhost-user.json), and end
    #[arg(long)]
    pub print_capabilities: bool,

    /// What to log: error, warn, info, debug, trace, or a filter such as ringside_backends::shell=debug
    ///
    /// The environment variable RINGSIDE_LOG says the same when this option is not given. Default: info.
    #[arg(long, value_name = "FILTER", value_parser = log::check)]
    pub log_level: Option<String>,

    /// How log lines look; they go to standard error
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// A list of processors, not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpus(Vec<usize>);

impl Cpus {
    fn parse(text: &str) -> Result<Self, String> {
        parse_cpus(text).map(Self)
    }
}

impl ShellArgs {
    /// Whose connections are taken.
    pub(super) fn peers(&self) -> Peers {
        Peers::allowing(&self.allow_uid)
    }

    /// Where clients are met, if they are.
    pub(super) fn control_path(&self) -> Option<&Path> {
        let path = self.control_socket.as_ref().or(self.take_over.as_ref());
        path.map(PathBuf::as_path)
    }

    /// Meets the program whose place is to be taken, if one is. Returns what its device is made of, by which the same one is
    /// to be opened.
    ///
    /// # Errors
    /// [`TakeOverError`]
    pub fn meet_predecessor(&mut self, program: &Program) -> Result<Option<Parts>, TakeOverError> {
        let predecessor = self.meet(program, Serves::OneDevice)?;
        predecessor
            .map(|predecessor| predecessor.port()?.parts())
            .transpose()
    }

    /// The same for a program with several ports. Returns what those have in common.
    ///
    /// # Errors
    /// [`TakeOverError`]
    pub fn meet_ports(&mut self, program: &Program) -> Result<Option<Parts>, TakeOverError> {
        let predecessor = self.meet(program, Serves::Ports)?;
        predecessor
            .map(|predecessor| predecessor.parts())
            .transpose()
    }

    fn meet(
        &mut self,
        program: &Program,
        serves: Serves,
    ) -> Result<Option<Arc<Predecessor>>, TakeOverError> {
        let Some(path) = &self.take_over else {
            return Ok(None);
        };
        same(
            "a control socket",
            path,
            self.control_socket.as_ref().unwrap_or(path),
        )?;
        let predecessor = Arc::new(Predecessor::meet(path, program, serves, &self.peers())?);
        self.predecessor = Some(Arc::clone(&predecessor));
        Ok(Some(predecessor))
    }

    /// Where workers are to run.
    pub(super) fn placement(&self) -> Placement {
        match (&self.worker_cpus, self.numa_node) {
            (Some(Cpus(cpus)), _) => Placement::Cpus(cpus.clone()),
            (None, Some(node)) => Placement::Node(node),
            (None, None) => Placement::Anywhere,
        }
    }
}

/// What all back-ends' `--help` ends with.
const EXIT_STATUS_HELP: &str = "Exit status:
  0  ended by SIGTERM, SIGINT or `ringside-ctl quit`, or the front-end left
     (--exit-on-disconnect)
  1  something failed; the message says what
  2  the command line is wrong";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        shell: ShellArgs,
    }

    #[test]
    fn a_socket_is_needed_and_only_one() {
        assert!(Cli::try_parse_from(["x"]).is_err());
        assert!(Cli::try_parse_from(["x", "--socket-path", "a", "--fd", "3"]).is_err());
        assert!(Cli::try_parse_from(["x", "--fd", "-1"]).is_err());
        assert!(Cli::try_parse_from(["x", "--fd", "3", "--client"]).is_err());
        let cli = Cli::try_parse_from(["x", "--socket-path", "a", "--client"]).unwrap();
        assert!(cli.shell.client);
        assert_eq!(
            Cli::try_parse_from(["x", "--fd", "3"]).unwrap().shell.fd,
            Some(3)
        );
    }

    #[test]
    fn capabilities_are_as_qemu_reads_them() {
        let program = Program {
            name: "p",
            kind: "block",
            features: &["read-only"],
            hangup: "",
        };
        assert_eq!(
            serde_json::to_string(&program).unwrap(),
            r#"{"type":"block","features":["read-only"]}"#
        );
        let program = Program {
            features: &[],
            ..program
        };
        assert_eq!(
            serde_json::to_string(&program).unwrap(),
            r#"{"type":"block"}"#
        );
    }
}
