//! Who is measured.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::load::Direction;
use super::cells::{Behind, Cell};
use crate::command::bound;
use crate::harness::testpmd;
use crate::site::Site;

/// A TAP whose frames go to nobody.
pub(super) const LONE_TAP: &str = "vm0";
/// A TAP in whose queue frames wait, and how many.
pub(super) const FULL_TAP: &str = "vm1";
pub(super) const BACKLOG: u32 = 200_000;
/// The TAP of this side of a TCP stream, and its address.
pub(super) const TCP_TAP: &str = "vm2";
pub(super) const TCP_ADDRESS: &str = "10.88.0.1";
/// The other side's.
pub(super) const TCP_PEER: &str = "10.88.0.2";

/// Who serves the card, or what needs none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contender {
    /// `ringside-net` as it comes.
    Ringside,
    /// DPDK's vhost port in `dpdk-testpmd`.
    Dpdk,
    /// passt: TCP connections of its own in place of a TAP.
    Passt,
    /// A loop of writes to the TAP, or of reads from it, or of both between two TAPs.
    Bare,
}

/// All of them; the last one that takes part in a cell is its limit.
pub(super) const ALL: [Contender; 4] = [
    Contender::Ringside,
    Contender::Dpdk,
    Contender::Passt,
    Contender::Bare,
];

/// Where the second card of a back-end listens whose first one listens there.
pub(in crate::bench) fn second_socket(first: &Path) -> PathBuf {
    first.with_extension("second")
}

/// The mode of `dpdk-testpmd` in which frames go this way, as seen from it.
pub(super) fn mode(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => "rxonly",
        Direction::Tx => "txonly",
        Direction::Both => "flowgen",
    }
}

impl Contender {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ringside => "ringside-net",
            Self::Dpdk => "dpdk-vhost",
            Self::Passt => "passt",
            Self::Bare => "bare-loop",
        }
    }

    /// Whether it takes part in a cell: what is behind its card has to be the same as behind everyone's.
    pub(super) fn serves(self, cell: &Cell) -> bool {
        match self {
            Self::Ringside => true,
            Self::Dpdk => !cell.needs_tap(),
            Self::Passt => matches!(cell.behind, Behind::Tcp(_)),
            Self::Bare => cell.needs_tap(),
        }
    }

    /// The command that serves a card at `socket`; `None` if it does without one.
    pub(super) fn command(
        self,
        site: &Site,
        cell: &Cell,
        socket: &Path,
        processors: Option<(usize, usize)>,
    ) -> Option<Command> {
        match self {
            Self::Ringside => {
                let mut command = bound(site.programs.join("ringside-net"));
                if cell.behind == Behind::Port {
                    // The one that is waited for comes last.
                    for (name, socket) in [("out", &*second_socket(socket)), ("in", socket)] {
                        let port = format!("socket={},name={name}", socket.display());
                        command.arg("--port").arg(port);
                    }
                    return Some(command);
                }
                command.arg("--socket-path").arg(socket);
                match cell.behind {
                    Behind::Discard | Behind::Port => command.args(["--link", "null"]),
                    Behind::Source | Behind::Exchange => command
                        .arg("--link")
                        .arg(format!("generate:{}", cell.frame)),
                    Behind::Tap => command.args(["--tap", LONE_TAP]),
                    Behind::TapBacklog => command.args(["--tap", FULL_TAP]),
                    Behind::Tcp(_) => command.args(["--tap", TCP_TAP]),
                };
                Some(command)
            }
            Self::Dpdk => {
                let mode = match cell.behind {
                    Behind::Port => "io",
                    _ => mode(cell.direction().opposite()),
                };
                let tso = if cell.is_segment() { ",tso=1" } else { "" };
                let device = |number: usize, socket: &Path| {
                    format!("net_vhost{number},iface={}{tso}", socket.display())
                };
                let mut devices = vec![device(0, socket)];
                if cell.behind == Behind::Port {
                    devices.insert(0, device(1, &second_socket(socket)));
                }
                Some(testpmd(
                    site,
                    "back-end",
                    &devices,
                    mode,
                    cell.frame,
                    processors.map(|(front, back)| (back, front)),
                ))
            }
            Self::Passt => {
                let program = site.root_program("usr/bin/passt");
                let mut command = bound(program.get_program());
                command.args(program.get_args());
                command.args(["--foreground", "--vhost-user", "--runas", "0"]);
                command.args(["--ipv4-only", "--netmask", "24", "--socket"]);
                command.arg(socket);
                // It connects to this side's loopback for what the other side sends to its gateway.
                command.args(["--address", TCP_PEER, "--gateway", TCP_ADDRESS]);
                Some(command)
            }
            Self::Bare => None,
        }
    }
}
