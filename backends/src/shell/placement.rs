//! On which processors the workers run.

use std::fs;
use std::io;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use thiserror::Error;

/// Workers cannot run where they are to.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// The machine has no such NUMA node, or it is one of memory alone.
    #[error(
        "there is no NUMA node {node} with processors; /sys/devices/system/node/has_cpu lists those that have some"
    )]
    Node {
        /// Its number.
        node: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The system did not take the processors.
    #[error(
        "workers cannot run on processor {cpus}; it may not exist, or not be this program's to use (`taskset -p`, cpuset)"
    )]
    Refused {
        /// The processors.
        cpus: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Where workers run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Placement {
    /// Wherever the scheduler puts them.
    Anywhere,
    /// Each on one of these, in turn.
    Cpus(Vec<usize>),
    /// Each on any processor of this NUMA node.
    Node(u32),
}

/// While it exists, threads that this one starts run where the placement says.
pub(super) struct Pinned {
    before: CpuSet,
}

impl Placement {
    /// Lets the threads that the calling one starts from now on run where worker `number` is to. Threads inherit this, and their
    /// stacks and tables then come from memory near there.
    pub(super) fn pin(&self, number: usize) -> Result<Option<Pinned>, PlacementError> {
        let cpus = match self {
            Self::Anywhere => return Ok(None),
            Self::Cpus(cpus) => {
                let turn = number.checked_rem(cpus.len()).unwrap_or(0);
                cpus.get(turn).copied().into_iter().collect()
            }
            Self::Node(node) => node_cpus(*node)?,
        };
        let this = Pid::from_raw(0);
        let run_on = || {
            let before = sched_getaffinity(this)?;
            let mut set = CpuSet::new();
            for &cpu in &cpus {
                set.set(cpu)?;
            }
            sched_setaffinity(this, &set)?;
            Ok(before)
        };
        let refused = |errno: nix::Error| PlacementError::Refused {
            cpus: cpus
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(","),
            source: errno.into(),
        };
        run_on()
            .map(|before| Some(Pinned { before }))
            .map_err(refused)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It was so before, so it can be so again; and if not, the control thread runs somewhere else.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}

fn node_cpus(node: u32) -> Result<Vec<usize>, PlacementError> {
    let path = format!("/sys/devices/system/node/node{node}/cpulist");
    let failed = |source| PlacementError::Node { node, source };
    let list = fs::read_to_string(path).map_err(failed)?;
    parse_cpus(list.trim()).map_err(|why| failed(io::Error::other(why)))
}

/// Reads a list as the kernel writes it: `0-3,8`.
pub(super) fn parse_cpus(text: &str) -> Result<Vec<usize>, String> {
    let wrong = || format!("`{text}` is no list of processors such as 0-3,8");
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.parse().map_err(|_| wrong())?;
        let last: usize = last.parse().map_err(|_| wrong())?;
        if first > last || last >= CpuSet::count() {
            return Err(wrong());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_as_the_kernel_writes_them() {
        assert_eq!(parse_cpus("3"), Ok(vec![3]));
        assert_eq!(parse_cpus("0-2,5"), Ok(vec![0, 1, 2, 5]));
        for wrong in ["", "a", "2-1", "1,", "-1", "0-99999999"] {
            assert!(parse_cpus(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn threads_run_where_they_are_put_and_the_starter_where_it_was() {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).unwrap();
        let last = (0..CpuSet::count())
            .rev()
            .find(|&cpu| before.is_set(cpu).unwrap())
            .unwrap();
        let pinned = Placement::Cpus(vec![last]).pin(7).unwrap();
        let there = std::thread::spawn(move || sched_getaffinity(this).unwrap())
            .join()
            .unwrap();
        drop(pinned);
        let set: Vec<usize> = (0..CpuSet::count())
            .filter(|&cpu| there.is_set(cpu).unwrap())
            .collect();
        assert_eq!(set, [last]);
        assert_eq!(sched_getaffinity(this).unwrap(), before);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(matches!(
            Placement::Node(9999).pin(0),
            Err(PlacementError::Node { node: 9999, .. })
        ));
        assert!(matches!(
            Placement::Cpus(vec![CpuSet::count() - 1]).pin(0),
            Err(PlacementError::Refused { .. })
        ));
    }
}
