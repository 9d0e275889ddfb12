//! What is measured: each cell is a kind of storage and a kind of load.

use super::load::{Completions, Shape};
use super::storage::Kind;

/// One place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) storage: Kind,
    pub(super) shape: Shape,
    pub(super) block_size: u64,
    pub(super) depth: u16,
    pub(super) queues: u16,
    pub(super) completions: Completions,
}

/// Sizes of requests.
const SMALL: u64 = 4 << 10;
const LARGE: u64 = 128 << 10;
/// Depth of sequential requests.
const SEQUENTIAL_DEPTH: u16 = 16;

impl Cell {
    /// Its name, as `--filter` matches it.
    pub(super) fn name(&self) -> String {
        let size = self.block_size >> 10;
        let queues = match self.queues {
            1 => String::new(),
            queues => format!(" q{queues}"),
        };
        let polling = match self.completions {
            Completions::Eventfd => "",
            Completions::Polling => " polling",
        };
        format!(
            "{} {} {size}k d{}{queues}{polling}",
            self.storage.name(),
            self.shape.name(),
            self.depth
        )
    }
}

/// All cells, or the few of a quick run.
pub(super) fn all(quick: bool) -> Vec<Cell> {
    use Shape::{Randread, Randrw, Randwrite, Read, Write};
    let mut cells = Vec::new();
    let mut add = |storage, shapes: &[Shape], depths: &[u16], queues: &[u16]| {
        for &queues in queues {
            for &shape in shapes {
                for &depth in depths {
                    cells.push(Cell {
                        storage,
                        shape,
                        block_size: match shape {
                            Read | Write => LARGE,
                            _ => SMALL,
                        },
                        depth,
                        queues,
                        completions: Completions::Eventfd,
                    });
                }
            }
        }
    };
    if quick {
        add(Kind::Null, &[Randread], &[1, 32, 128], &[1]);
        add(Kind::File, &[Randread], &[1, 32], &[1]);
        return cells;
    }
    let small = [Randread, Randwrite, Randrw];
    add(Kind::Null, &small, &[1, 4, 32, 128], &[1]);
    add(Kind::Null, &[Randread], &[32], &[2, 4]);
    add(Kind::File, &small, &[1, 4, 32, 128], &[1]);
    add(Kind::File, &[Read, Write], &[SEQUENTIAL_DEPTH], &[1]);
    add(Kind::File, &[Randread, Randwrite], &[32], &[2, 4]);
    for storage in [Kind::Tmpfs, Kind::Loop] {
        add(storage, &small, &[1, 4, 32, 128], &[1]);
        add(storage, &[Read, Write], &[SEQUENTIAL_DEPTH], &[1]);
    }
    // A driver that polls shows the back-end without the cost of interrupts.
    let polled: Vec<Cell> = cells
        .iter()
        .filter(|cell| cell.storage == Kind::Null && cell.shape == Randread && cell.queues == 1)
        .map(|cell| Cell {
            completions: Completions::Polling,
            ..*cell
        })
        .collect();
    cells.splice(4..4, polled);
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for quick in [true, false] {
            let mut names: Vec<String> = all(quick).iter().map(Cell::name).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count);
        }
    }

    #[test]
    fn cells_of_one_storage_come_together() {
        let mut storages: Vec<Kind> = all(false).iter().map(|cell| cell.storage).collect();
        storages.dedup();
        assert_eq!(storages, [Kind::Null, Kind::File, Kind::Tmpfs, Kind::Loop]);
    }
}
