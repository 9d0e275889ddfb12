//! Who is measured.

use std::path::Path;
use std::process::Command;

use super::super::load::Direction;
use super::cells::{Behind, Cell};
use super::testpmd;
use crate::command::bound;
use crate::site::Site;

/// A TAP whose frames go to nobody.
pub(super) const LONE_TAP: &str = "vm0";
/// A TAP that gets the frames which are written to the other one, over a bridge.
pub(super) const FED_TAP: &str = "vm1";
pub(super) const SOURCE_TAP: &str = "vm2";

/// Who serves the card, or what needs none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contender {
    /// `ringside-net` as it comes.
    Ringside,
    /// DPDK's vhost port in `dpdk-testpmd`.
    Dpdk,
    /// A loop of writes to the TAP, or of reads from it.
    Bare,
}

/// All of them; the last one that takes part in a cell is its limit.
pub(super) const ALL: [Contender; 3] = [Contender::Ringside, Contender::Dpdk, Contender::Bare];

impl Contender {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ringside => "ringside-net",
            Self::Dpdk => "dpdk-vhost",
            Self::Bare => "bare-loop",
        }
    }

    /// Whether it takes part in a cell: what is behind its card has to be the same as behind everyone's.
    pub(super) fn serves(self, cell: &Cell) -> bool {
        match self {
            Self::Ringside => true,
            Self::Dpdk => !cell.needs_tap(),
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
                command.arg("--socket-path").arg(socket);
                match cell.behind {
                    Behind::Discard => command.args(["--link", "null"]),
                    Behind::Source => command
                        .arg("--link")
                        .arg(format!("generate:{}", cell.frame)),
                    Behind::Tap => command.args(["--tap", LONE_TAP]),
                    Behind::TapSource => command.args(["--tap", FED_TAP]),
                };
                Some(command)
            }
            Self::Dpdk => {
                let mode = match cell.direction() {
                    Direction::Rx => "txonly",
                    Direction::Tx | Direction::Both => "rxonly",
                };
                let device = format!("net_vhost0,iface={}", socket.display());
                Some(testpmd::command(
                    site,
                    "back-end",
                    &device,
                    mode,
                    cell.frame,
                    processors.map(|(front, back)| (back, front)),
                ))
            }
            Self::Bare => None,
        }
    }
}
