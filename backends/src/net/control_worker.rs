//! The worker of the control queue: obeys commands of the driver.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ringside_rings::{PopError, RingError, read_segments, write_segments};
use tracing::{debug, error, warn};

use super::coalesce::Coalescing;
use super::control::{ControlCommand, Direction, MAX_COMMAND, RxMode, parse};
use super::epoll_set::EpollSet;
use super::features::tun_offloads;
use super::link::Interface;
use super::ring::Ring;
use super::settings::{Pairs, Shared};
use super::steering::Rss;
use super::worker::POLL_INTERVAL;
use crate::shell::{Chain as Causes, Command, Commands, LogLimit, Vring};

const COMMAND: u64 = 0;
const KICK: u64 = 1;

/// Most commands of one turn.
const BUDGET: u32 = 64;

/// VIRTIO_NET_OK (VIRTIO 1.3, 5.1.6.5).
const OK: u8 = 0;
/// VIRTIO_NET_ERR (VIRTIO 1.3, 5.1.6.5).
const ERR: u8 = 1;

/// Bytes of a command's result: struct virtio_net_ctrl_coal, the only one there is.
const RESULT: usize = 8;

/// A command is answered with [`ERR`].
struct Refused;

/// What commands act on.
struct Target {
    interface: Arc<dyn Interface>,
    shared: Arc<Shared>,
    pairs: u16,
}

/// The control queue.
pub(super) struct ControlWorker {
    target: Target,
    commands: Commands,
    epoll: EpollSet,
    ring: Option<Ring>,
    bytes: Box<[u8]>,
    log: LogLimit,
}

impl ControlWorker {
    /// All that can fail about a worker fails here, before its thread begins.
    pub(super) fn new(
        interface: Arc<dyn Interface>,
        shared: Arc<Shared>,
        pairs: u16,
        commands: Commands,
    ) -> io::Result<Self> {
        let epoll = EpollSet::new()?;
        epoll.add(commands.as_raw_fd(), COMMAND)?;
        Ok(Self {
            target: Target {
                interface,
                shared,
                pairs,
            },
            commands,
            epoll,
            ring: None,
            bytes: vec![0; MAX_COMMAND].into(),
            log: LogLimit::default(),
        })
    }

    /// Serves until [`Command::Exit`].
    pub(super) fn run(mut self) {
        let mut more = false;
        loop {
            let polled = self.ring.as_ref().is_some_and(Ring::polled);
            let timeout = match (more, polled) {
                (true, _) => 0,
                (false, true) => POLL_INTERVAL,
                (false, false) => -1,
            };
            let events = match self.epoll.wait(timeout) {
                Ok(events) => events,
                Err(e) => {
                    error!("cannot wait for events, the control queue is dead: {e}");
                    return;
                }
            };
            for (token, _) in events {
                if token == COMMAND && !self.obey() {
                    return;
                }
            }
            more = self.turn();
        }
    }

    fn obey(&mut self) -> bool {
        self.commands.acknowledge();
        while let Some(command) = self.commands.next() {
            match command {
                Command::Start(vring) => self.start(vring),
                Command::Stop { index, done, .. } => {
                    let found = self.ring.take_if(|ring| ring.vring.index == index);
                    if let Some(Ring { vring, .. }) = found {
                        if let Some(fd) = vring.kick_fd() {
                            self.epoll.remove(fd);
                        }
                        // The control thread waits; if it does not, the ring just ends here.
                        let _ = done.send(vring);
                    }
                }
                // Not for this device, whose drain is refused.
                Command::Pause { .. } | Command::Resume => {}
                Command::Exit => return false,
            }
        }
        true
    }

    fn start(&mut self, vring: Box<Vring>) {
        let ring = Ring::new(vring, &self.log);
        if let Some(fd) = ring.kick_fd()
            && let Err(error) = self.epoll.add(fd, KICK)
            && let Some(held_back) = self.log.check()
        {
            warn!(
                queue = ring.vring.index,
                held_back, "cannot wait on the front-end's kick descriptor: {error}"
            );
        }
        // A driver that speaks to us begins with one pair (VIRTIO 1.3, 5.1.6.5.5). One that has spoken to another
        // before us may have gone on to more.
        let first = if ring.vring.ring.has_begun() {
            Pairs::Fed
        } else {
            Pairs::First(1)
        };
        self.ring = Some(ring);
        self.target.shared.change(|settings| {
            if settings.pairs == Pairs::Enabled {
                settings.pairs = first;
            }
        });
    }

    fn turn(&mut self) -> bool {
        let Self {
            target,
            ring,
            bytes,
            log,
            ..
        } = self;
        let Some(ring) = ring.as_mut().filter(|ring| ring.runs()) else {
            return false;
        };
        match serve(target, ring, bytes, log) {
            Ok((more, interrupt)) => {
                if interrupt
                    && let Err(error) = ring.vring.notify_driver()
                    && let Some(held_back) = log.check()
                {
                    warn!(
                        queue = ring.vring.index,
                        held_back, "the driver cannot be interrupted: {error}"
                    );
                }
                more
            }
            Err(error) => {
                ring.fail(&error);
                false
            }
        }
    }
}

fn serve(
    target: &Target,
    ring: &mut Ring,
    bytes: &mut [u8],
    log: &LogLimit,
) -> Result<(bool, bool), RingError> {
    let features = ring.vring.features;
    let (mut session, buf, _) = ring.parts()?;
    session.disable_notifications()?;
    let mut left = BUDGET;
    let more = loop {
        if left == 0 {
            break true;
        }
        left = left.saturating_sub(1);
        match session.pop(buf) {
            Ok(Some(chain)) => {
                let memory = session.memory();
                let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
                let answer = match bytes.get_mut(..len) {
                    Some(command) => match read_segments(memory, chain.readable(), 0, command) {
                        Ok(()) => target.execute(features, command, log),
                        Err(_) => Err(Refused),
                    },
                    None => Err(Refused),
                };
                // `ack` is the first byte behind the command, a result follows it (VIRTIO 1.3, 5.1.6.5).
                let mut reply = [OK; 1 + RESULT];
                let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
                let reply = match answer {
                    Ok(None) => reply.get(..1),
                    Ok(Some(result)) if room >= reply.len() => {
                        for (place, byte) in reply.iter_mut().skip(1).zip(result) {
                            *place = byte;
                        }
                        Some(reply.as_slice())
                    }
                    _ => Some([ERR].as_slice()),
                };
                let reply = reply.unwrap_or_default();
                let written = write_segments(memory, chain.writable(), 0, reply);
                let len = if written.is_ok() { reply.len() } else { 0 };
                session.push_used(chain.head(), u32::try_from(len).unwrap_or(0))?;
            }
            Ok(None) => {
                if session.enable_notifications()? {
                    session.disable_notifications()?;
                    continue;
                }
                break false;
            }
            Err(PopError::Chain { head, error }) => {
                if let Some(held_back) = log.check() {
                    warn!(held_back, "malformed control command: {}", Causes(&error));
                }
                session.push_used(head, 0)?;
            }
            Err(PopError::Ring(error)) => {
                // What was done before the driver broke its ring is returned all the same.
                session.publish()?;
                return Err(error);
            }
        }
    };
    let interrupt = session.publish()?;
    Ok((more, interrupt))
}

impl Target {
    /// Obeys one command and returns its result.
    fn execute(
        &self,
        features: u64,
        bytes: &[u8],
        log: &LogLimit,
    ) -> Result<Option<[u8; RESULT]>, Refused> {
        let failed = match parse(features, self.pairs, bytes) {
            Ok(command) => {
                debug!("control command {command:?}");
                match self.apply(command) {
                    Ok(result) => return Ok(result),
                    Err(why) => why,
                }
            }
            Err(error) => error.to_string(),
        };
        if let Some(held_back) = log.check() {
            warn!(held_back, "control command refused: {failed}");
        }
        Err(Refused)
    }

    fn steer(&self, rss: Option<Rss>) -> Result<(), String> {
        let steered = self.interface.set_steering(rss);
        steered.map_err(|error| Causes(&error).to_string())
    }

    fn apply(&self, command: ControlCommand) -> Result<Option<[u8; RESULT]>, String> {
        let version = match command {
            ControlCommand::Rx(mode, on) => self.shared.change(|settings| {
                let filter = &mut settings.filter;
                let switch = match mode {
                    RxMode::Promiscuous => &mut filter.promiscuous,
                    RxMode::AllMulticast => &mut filter.all_multicast,
                    RxMode::AllUnicast => &mut filter.all_unicast,
                    RxMode::NoMulticast => &mut filter.no_multicast,
                    RxMode::NoUnicast => &mut filter.no_unicast,
                    RxMode::NoBroadcast => &mut filter.no_broadcast,
                };
                *switch = on;
            }),
            ControlCommand::MacTable { unicast, multicast } => self.shared.change(|settings| {
                settings.filter.unicast = unicast;
                settings.filter.multicast = multicast;
            }),
            ControlCommand::MacAddress(mac) => {
                self.shared.change(|settings| settings.filter.mac = mac)
            }
            ControlCommand::Vlan(vlan, pass) => self.shared.change(|settings| {
                if let Some(vlans) = &mut settings.filter.vlans {
                    vlans.set(vlan, pass);
                }
            }),
            // The request is withdrawn before the command is answered (VIRTIO 1.3, 5.1.6.5.4).
            ControlCommand::AnnounceAck => self.shared.change(|settings| settings.announce = false),
            ControlCommand::Pairs(pairs) => {
                // From now on the kernel spreads packets (VIRTIO 1.3, 5.1.6.5.5).
                self.steer(None)?;
                self.shared.change(|settings| {
                    settings.use_pairs(pairs);
                    settings.rss = None;
                })
            }
            ControlCommand::Rss(rss) => {
                let hashing = Arc::new(rss.hashing.clone());
                // Packets are steered to queues that are there.
                let mut before = Pairs::First(rss.pairs());
                let swap = |pairs: &mut Pairs| {
                    self.shared
                        .change(|settings| std::mem::swap(&mut settings.pairs, pairs));
                };
                swap(&mut before);
                if let Err(why) = self.steer(Some(rss.clone())) {
                    swap(&mut before);
                    return Err(why);
                }
                self.shared.change(|settings| {
                    settings.use_pairs(rss.pairs());
                    settings.hashing = hashing;
                    settings.rss = Some(Arc::new(rss));
                })
            }
            ControlCommand::Hash(hashing) => self
                .shared
                .change(|settings| settings.hashing = Arc::new(hashing)),
            ControlCommand::CoalesceAll(direction, coalescing) => self.shared.change(|settings| {
                // Receive queues have even numbers, transmit queues odd ones (VIRTIO 1.3, 5.1.2).
                let first = usize::from(direction == Direction::Transmit);
                let queues = settings.coalescing.iter_mut().skip(first).step_by(2);
                let of_all = settings.coalescing_of_all.iter_mut().skip(first).take(1);
                queues.chain(of_all).for_each(|place| *place = coalescing);
            }),
            // Of a queue that is not enabled nothing is said, and nothing told (VIRTIO 1.3, 5.1.6.5.9).
            ControlCommand::Coalesce(queue, _) | ControlCommand::TellCoalescing(queue)
                if !self.shared.get().uses(queue) =>
            {
                return Err(format!("queue {queue} is not in use"));
            }
            ControlCommand::Coalesce(queue, coalescing) => self.shared.change(|settings| {
                if let Some(place) = settings.coalescing.get_mut(usize::from(queue)) {
                    *place = coalescing;
                }
            }),
            ControlCommand::TellCoalescing(queue) => {
                let Coalescing {
                    max_packets,
                    max_usecs,
                } = self.shared.get().coalescing_of(queue);
                let both = u64::from(max_usecs) << 32 | u64::from(max_packets);
                return Ok(Some(both.to_le_bytes()));
            }
            ControlCommand::GuestOffloads(offloads) => {
                self.interface
                    .set_offloads(tun_offloads(offloads))
                    .map_err(|error| Causes(&error).to_string())?;
                self.shared
                    .change(|settings| settings.offloads = Some(offloads))
            }
        };
        if self.shared.wait(version) {
            Ok(None)
        } else {
            Err("a queue pair did not take notice in time".to_owned())
        }
    }
}
