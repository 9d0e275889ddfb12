//! Fuzz targets: each takes any bytes, makes of them what a guest, a peer or a file could do, and panics if what comes of it
//! is wrong. `tests/replay.rs` runs them over kept inputs, with `cargo test`; `main.rs` under libFuzzer, with `cargo lab fuzz`.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `input` | bytes as a row of decisions |
//! | `rings` | the device side of both kinds of virtqueue, on memory that its driver writes as it likes |
//! | `pci` | registers of the VMM: the virtio transport's, and those of a device that is passed through |
//! | `images` | kernels that a guest is to boot |
//! | `snapshots` | snapshots that a guest is to go on from |
//! | [`mutate`] | other inputs, made of those that are kept |
//!
//! What is private to the back-ends is driven by a module `fuzz` of theirs, under their feature `fuzzing`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::unreachable,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // a panic is what a target has to say

mod images;
mod input;
pub mod mutate;
mod pci;
mod rings;
mod snapshots;

use ringside_backends::{blk, net, shell};

/// A fuzz target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// As it is called, and the directory of its inputs.
    pub name: &'static str,
    /// What it feeds.
    pub about: &'static str,
    /// Runs it once. It panics at what is wrong.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "split",
        about: "device side of a split virtqueue",
        run: rings::split,
    },
    Target {
        name: "packed",
        about: "device side of a packed virtqueue",
        run: rings::packed,
    },
    Target {
        name: "blk-request",
        about: "requests to a disk",
        run: blk::fuzz::request,
    },
    Target {
        name: "net-control",
        about: "commands to a network card, and frames under its filters",
        run: net::fuzz::control,
    },
    Target {
        name: "net-frame",
        about: "frames with virtio-net headers, through the switch",
        run: net::fuzz::frame,
    },
    Target {
        name: "vhost-user",
        about: "messages of a front-end",
        run: shell::fuzz::messages,
    },
    Target {
        name: "virtio-pci",
        about: "registers of the VMM's virtio transport",
        run: pci::virtio,
    },
    Target {
        name: "vfio-config",
        about: "configuration space of a device that is passed through",
        run: pci::vfio,
    },
    Target {
        name: "boot",
        about: "kernels and initial RAM disks",
        run: images::boot,
    },
    Target {
        name: "snapshot",
        about: "snapshots, and the state of a virtio device in them",
        run: snapshots::snapshot,
    },
];

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
