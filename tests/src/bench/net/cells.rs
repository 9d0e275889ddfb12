//! What is measured: each cell is a way of frames and their length, or of a TCP stream, with the same sink and source for all.

use super::super::load::Direction;

/// What is behind the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behind {
    /// Frames from the guest are dropped at once.
    Discard,
    /// Frames to the guest are there without end, made by the back-end itself.
    Source,
    /// Both: what comes is dropped, and frames to the guest are there without end.
    Exchange,
    /// A TAP whose frames nobody wants.
    Tap,
    /// A TAP in whose queue frames for the guest wait.
    TapBacklog,
    /// Another card of the same back-end, where the frames come out again.
    Port,
    /// iperf3 in another network namespace, with the front-end as that namespace's interface.
    Tcp(Direction),
}

/// Who puts the frames into the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Front {
    /// `ringside-load`
    Ringside,
    /// DPDK's virtio-user in `dpdk-testpmd`
    Testpmd,
}

/// One place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) behind: Behind,
    /// Bytes of a frame, without the checksum; 0 where TCP says how long it is.
    pub(super) frame: u32,
    pub(super) front: Front,
    pub(super) packed: bool,
}

/// Frames of the least and of the usual most length, with the payload that DPDK's flags go by.
const FRAMES: [u32; 2] = [64, 1500];
/// A segment that the card would have to cut, with headers: about the most that there is.
const SEGMENT: u32 = 65_226;

impl Cell {
    /// Its name, as `--filter` matches it.
    pub(super) fn name(&self) -> String {
        let behind = match self.behind {
            Behind::Discard => "discard",
            Behind::Source => "source",
            Behind::Exchange => "both",
            Behind::Tap => "tap-tx",
            Behind::TapBacklog => "tap-rx",
            Behind::Port => "forward",
            Behind::Tcp(Direction::Rx) => return "tcp rx".into(),
            Behind::Tcp(_) => return "tcp tx".into(),
        };
        let front = match self.front {
            Front::Ringside => "",
            Front::Testpmd => " testpmd",
        };
        let packed = if self.packed { " packed" } else { "" };
        format!("{behind} {}{packed}{front}", self.frame)
    }

    /// Which way frames go.
    pub(super) fn direction(&self) -> Direction {
        match self.behind {
            Behind::Discard | Behind::Tap => Direction::Tx,
            Behind::Source | Behind::TapBacklog => Direction::Rx,
            Behind::Exchange | Behind::Port => Direction::Both,
            Behind::Tcp(direction) => direction,
        }
    }

    /// Whether the frame is one that a card has to cut.
    pub(super) fn is_segment(&self) -> bool {
        self.frame == SEGMENT
    }

    pub(super) fn needs_tap(&self) -> bool {
        matches!(
            self.behind,
            Behind::Tap | Behind::TapBacklog | Behind::Tcp(_)
        )
    }
}

/// All cells.
pub(super) fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    for front in [Front::Ringside, Front::Testpmd] {
        for behind in [Behind::Discard, Behind::Source, Behind::Exchange] {
            for packed in [false, true] {
                for frame in FRAMES {
                    cells.push(Cell {
                        behind,
                        frame,
                        front,
                        packed,
                    });
                }
            }
        }
    }
    let mut add = |behind, frame| {
        cells.push(Cell {
            behind,
            frame,
            front: Front::Ringside,
            packed: false,
        });
    };
    for behind in [Behind::Tap, Behind::TapBacklog] {
        for frame in FRAMES {
            add(behind, frame);
        }
    }
    for frame in FRAMES.into_iter().chain([SEGMENT]) {
        add(Behind::Port, frame);
    }
    add(Behind::Tcp(Direction::Tx), 0);
    add(Behind::Tcp(Direction::Rx), 0);
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ() {
        let mut names: Vec<String> = all().iter().map(Cell::name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
