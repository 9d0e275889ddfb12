//! What a port's control threads and the switch's thread have in common.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::{debug, info};

use super::super::config::{MacAddress, longest_frame};
use super::super::limits::{Limits, NAMES};
use super::super::link::{Interface, LinkError, Recorder};
use super::super::steering::Rss;
use super::counters::Counters;
use super::policy::Policy;
use crate::shell::{LogLimit, NamedRates, StateError};

/// Names of the limits: of what comes in, of what goes out, and of what comes in and goes to all.
pub(super) const LIMITS: [&str; 5] = {
    let [tx_packets, tx_bytes, rx_packets, rx_bytes] = NAMES;
    [tx_packets, tx_bytes, rx_packets, rx_bytes, "flood-packets"]
};

/// Limits of a port.
pub(super) type PortRates = NamedRates<{ LIMITS.len() }>;

/// Frames in a second that a port may send to all, unless it is told otherwise, longer ones counted as [`frames`] does: what no
/// network in order needs. What copies of them take of the switch's time is bounded by a port's turns.
pub(super) const FLOOD: u64 = 20_000;

/// The longest frame without a tag of an Ethernet that nobody has configured (IEEE 802.3, 3.2.7), without its checksum.
const USUAL_FRAME: u64 = 1514;

/// As how many a frame of `len` bytes counts that goes to all.
fn frames(len: u64) -> u64 {
    len.div_ceil(USUAL_FRAME)
}

/// The buckets of a port.
pub(super) type PortLimits = Limits<{ LIMITS.len() }>;

impl PortLimits {
    /// Lets a frame of `len` bytes go to all, or not.
    pub(super) fn take_flood(&self, len: u64, now: u64) -> bool {
        let [.., flood] = self.buckets();
        flood.take(frames(len), now).is_ok()
    }
}

/// What of a port goes over to another program, besides what its driver has set.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct PortSettings {
    link_up: bool,
    limits: Value,
    /// When their buckets will be full, in nanoseconds of CLOCK_MONOTONIC.
    levels: [u64; LIMITS.len()],
    counters: Value,
}

/// A port, as all its threads know it.
#[derive(Debug)]
pub(super) struct PortShared {
    /// Its name.
    pub(super) name: String,
    /// The address that its card was given; an uplink has none.
    pub(super) mac: Option<MacAddress>,
    /// Its rules.
    pub(super) policy: Policy,
    /// How many addresses can be behind it.
    pub(super) quota: u32,
    /// Its limits.
    pub(super) limits: PortLimits,
    /// What it has done.
    pub(super) counters: Counters,
    /// The cable is plugged in.
    up: AtomicBool,
    /// Which packets it takes as they are: a set of `TUN_F_*`.
    offloads: AtomicU32,
    /// Bytes of the longest frame that it takes, as its driver knows an MTU.
    longest: AtomicUsize,
    /// What its driver does can fill no log.
    pub(super) log: LogLimit,
    /// Its frames are kept in a file.
    pub(super) captured: bool,
    /// Until the switch's thread has it.
    recorder: Mutex<Option<Recorder>>,
}

impl PortShared {
    /// A port whose cable is plugged in, and that takes packets with these offloads.
    pub(super) fn new(
        name: &str,
        mac: Option<MacAddress>,
        policy: Policy,
        quota: u32,
        rates: PortRates,
        offloads: u32,
    ) -> Self {
        let limits = Limits::new(&LIMITS);
        limits.set(rates);
        Self {
            name: name.to_owned(),
            mac,
            policy,
            quota,
            limits,
            counters: Counters::default(),
            up: AtomicBool::new(true),
            offloads: AtomicU32::new(offloads),
            longest: AtomicUsize::new(usize::MAX),
            log: LogLimit::default(),
            captured: false,
            recorder: Mutex::new(None),
        }
    }

    /// The same, with what keeps its frames, if something is to.
    pub(super) fn recorded(self, recorder: Option<Recorder>) -> Self {
        Self {
            captured: recorder.is_some(),
            recorder: Mutex::new(recorder),
            ..self
        }
    }

    /// What keeps its frames, for the switch's thread.
    pub(super) fn take_recorder(&self) -> Option<Recorder> {
        let mut recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        recorder.take()
    }

    /// The cable is plugged in.
    #[inline]
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Plugs the cable in, or pulls it. Returns whether that is a change.
    pub(super) fn set_up(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::Relaxed) != up
    }

    /// Which packets it takes as they are: a set of `TUN_F_*`.
    #[inline]
    pub(super) fn offloads(&self) -> u32 {
        self.offloads.load(Ordering::Relaxed)
    }

    /// Bytes of the longest frame without a tag that it takes, but for those that are to be cut.
    #[inline]
    pub(super) fn longest(&self) -> usize {
        self.longest.load(Ordering::Relaxed)
    }

    /// Its driver goes by an MTU, or not (VIRTIO_NET_F_MTU).
    pub(super) fn set_mtu(&self, mtu: Option<u16>) {
        self.longest.store(longest_frame(mtu), Ordering::Relaxed);
    }

    /// What users have changed, and what became of it since: for another program.
    pub(super) fn save(&self) -> PortSettings {
        PortSettings {
            link_up: self.is_up(),
            limits: self.limits.get().to_json(),
            levels: self.limits.levels(),
            counters: self.counters.to_json(),
        }
    }

    /// Goes on from what another program has saved. No frame passes meanwhile.
    ///
    /// # Errors
    /// [`StateError`]
    pub(super) fn adopt(&self, settings: &PortSettings) -> Result<(), StateError> {
        let limits = BTreeMap::deserialize(&settings.limits).map_err(StateError::Content)?;
        self.limits.adopt(&limits, settings.levels)?;
        self.counters.go_on(&settings.counters);
        self.set_up(settings.link_up);
        Ok(())
    }

    /// Plugs the cable in, or pulls it, as somebody asked for. Returns whether that is a change.
    pub(super) fn plug(&self, up: bool) -> bool {
        let changed = self.set_up(up);
        if changed {
            let state = if up { "up" } else { "down" };
            info!(port = self.name, "link {state}");
        }
        changed
    }
}

/// What a driver can change about its port. Its rings say how long headers are, its settings which queue a packet is for.
impl Interface for PortShared {
    fn set_offloads(&self, offloads: u32) -> Result<(), LinkError> {
        debug!(port = self.name, "offloads {offloads:#x}");
        self.offloads.store(offloads, Ordering::Relaxed);
        Ok(())
    }

    /// The switch's thread goes by the settings.
    fn set_steering(&self, _rss: Option<Rss>) -> Result<(), LinkError> {
        Ok(())
    }
}
