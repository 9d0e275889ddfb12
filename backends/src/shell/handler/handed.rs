//! A device in mid-life: how it leaves one process, and begins in another (`handover`).

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;

use ringside_control::{ApiError, ErrorCode};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserVringAddrFlags,
};

use super::super::device::Device;
use super::super::handover::{
    Area, Connection, Descriptors, LogArea, Parts, PortState, Region, Ring, RingAddresses,
    RingKick, TakeOverError,
};
use super::super::inflight::Notes;
use super::super::memory::MemoryTable;
use super::{Handler, HandlerError, Kick, ProtocolError, ProtocolResult};

/// What of a device may not change under its driver.
pub(in crate::shell) struct Offered {
    pub(in crate::shell) features: u64,
    pub(in crate::shell) protocol_features: u64,
    pub(in crate::shell) queues: u16,
    pub(in crate::shell) max_queue_size: u16,
}

/// By queue: where its kicks arrive. Without that, no ring runs.
pub(in crate::shell) struct Kicks(Vec<Kick>);

/// As much of a configuration space as front-ends ask for.
const CONFIG_SPACE: u32 = 256;

fn failed(error: &(dyn std::error::Error + 'static)) -> ApiError {
    ApiError::new(ErrorCode::Failed, error)
}

impl<D: Device> Handler<D> {
    pub(in crate::shell) fn offered(&self) -> Offered {
        Offered {
            features: self.device.features(),
            protocol_features: self.protocol_features().bits(),
            queues: self.device.queue_count(),
            max_queue_size: self.max_queue_size(),
        }
    }

    /// What the device is made of, if it can go over to another process as it is now.
    pub(in crate::shell) fn parts(&self) -> Result<Parts, ApiError> {
        self.check_runs()?;
        self.device.parts()
    }

    fn check_runs(&self) -> Result<(), ApiError> {
        if self.paused {
            let message =
                "the device is drained, and goes over only when it is not: `resume` it before";
            return Err(ApiError::of(ErrorCode::Conflict, message));
        }
        Ok(())
    }

    /// Stops all rings, and says all that there is to be said about them. `connection` is that of the front-end, if there is
    /// one. Its end is [`thaw`](Self::thaw), or that of this process.
    pub(in crate::shell) fn freeze(
        &mut self,
        connection: Option<&UnixStream>,
    ) -> Result<(PortState, Descriptors), ApiError> {
        self.check_runs()?;
        self.device.freeze();
        let running: Vec<u16> = self.running().collect();
        for index in running {
            self.stop(index).map_err(|error| failed(&error))?;
        }
        self.device.leave()?;
        let mut descriptors = Descriptors::default();
        let connection = connection
            .map(|socket| self.connection(socket, &mut descriptors))
            .transpose();
        let state = PortState {
            connection: connection.map_err(|error| failed(&error))?,
            device: self.device.save().map_err(|error| failed(&error))?,
            settings: self.device.settings(),
            config: self.config().map_err(|error| failed(&error))?,
        };
        Ok((state, descriptors))
    }

    /// Starts the rings again: nobody has taken them over.
    pub(in crate::shell) fn thaw(&mut self) -> Result<(), HandlerError> {
        self.change_all(|_| {})?;
        self.device.thaw();
        Ok(())
    }

    fn config(&self) -> Result<Vec<u8>, HandlerError> {
        Ok(self.device.read_config(0, CONFIG_SPACE)?)
    }

    fn connection(
        &self,
        socket: &UnixStream,
        descriptors: &mut Descriptors,
    ) -> io::Result<Connection> {
        let mut memory = Vec::new();
        for (region, file) in self.memory.described() {
            memory.push(Region {
                guest: region.guest_phys_addr,
                len: region.memory_size,
                user: region.user_addr,
                offset: region.mmap_offset,
                file: descriptors.add(file.try_clone()?),
            });
        }
        let inflight = match self.notes.as_ref().and_then(Notes::described) {
            Some((area, file)) => Some(Area {
                len: area.mmap_size,
                offset: area.mmap_offset,
                queues: area.num_queues,
                size: area.queue_size,
                file: descriptors.add(file.try_clone()?),
            }),
            None => None,
        };
        let log = match self.dirty.as_ref().and_then(|dirty| dirty.described()) {
            Some((len, offset, file)) => Some(LogArea {
                len,
                offset,
                file: descriptors.add(file.try_clone()?),
            }),
            None => None,
        };
        let mut rings = Vec::new();
        for ring in &self.rings {
            let mut add = |file: &Option<File>| -> io::Result<Option<u32>> {
                let file = file.as_ref().map(File::try_clone).transpose()?;
                Ok(file.map(|file| descriptors.add(file)))
            };
            rings.push(Ring {
                size: ring.size,
                addresses: ring.addresses.map(|addresses| RingAddresses {
                    desc: addresses.desc,
                    avail: addresses.avail,
                    used: addresses.used,
                    log: addresses.log,
                }),
                base: ring.base,
                enabled: ring.enabled,
                call: add(&ring.call)?,
                err: add(&ring.err)?,
                kick: match &ring.kick {
                    Kick::Unset => RingKick::Unset,
                    Kick::Polled => RingKick::Polled,
                    Kick::Fd(file) => RingKick::Descriptor(descriptors.add(file.try_clone()?)),
                },
                resumed: ring.resumed,
            });
        }
        let requests = self.requests.as_ref().map(UnixStream::try_clone);
        let requests = requests.transpose()?;
        Ok(Connection {
            socket: descriptors.add(socket.try_clone()?),
            features: self.acked_features,
            protocol_features: self.acked_protocol,
            requests: requests.map(|socket| descriptors.add(socket)),
            memory,
            inflight,
            log,
            rings,
        })
    }

    /// Puts all in place that another process's handler has said. What was negotiated is here already. Rings run once
    /// [`go_on`](Self::go_on) has their kicks.
    pub(in crate::shell) fn adopt(
        &mut self,
        state: &PortState,
        descriptors: &mut Descriptors,
    ) -> Result<Kicks, TakeOverError> {
        let mut kicks = Vec::new();
        if let Some(connection) = &state.connection {
            self.begin_session();
            self.adopt_memory(connection, descriptors)?;
            if let Some(number) = connection.requests {
                self.set_requests(UnixStream::from(descriptors.take(number)?));
            }
            for (index, ring) in (0..).zip(&connection.rings) {
                kicks.push(self.adopt_ring(index, ring, descriptors)?);
            }
        }
        self.device.load(&state.device)?;
        self.device.adopt(&state.settings)?;
        let ours = self.config()?;
        let differs = |(ours, theirs): (&u8, &u8)| ours != theirs;
        if let Some(at) = ours.iter().zip(&state.config).position(differs) {
            return Err(TakeOverError::Config { at });
        }
        Ok(Kicks(kicks))
    }

    fn adopt_memory(
        &mut self,
        connection: &Connection,
        descriptors: &mut Descriptors,
    ) -> Result<(), TakeOverError> {
        let mut regions = Vec::new();
        let mut files = Vec::new();
        for region in &connection.memory {
            let Region {
                guest,
                len,
                user,
                offset,
                file,
            } = *region;
            regions.push(VhostUserMemoryRegion::new(guest, len, user, offset));
            files.push(descriptors.take(file)?.into());
        }
        let memory = MemoryTable::new(&regions, files, self.memory_slots());
        obeyed(self.set_memory(memory))?;
        if let Some(area) = &connection.inflight {
            let file = descriptors.take(area.file)?.into();
            let (queues, size) = (area.queues, area.size);
            let notes = VhostUserInflight::new(area.len, area.offset, queues, size);
            obeyed(self.set_inflight_fd(&notes, file))?;
        }
        if let Some(area) = &connection.log {
            let file = descriptors.take(area.file)?.into();
            obeyed(self.set_log_base(&VhostUserLog::new(area.len, area.offset), file))?;
        }
        Ok(())
    }

    fn adopt_ring(
        &mut self,
        index: u32,
        ring: &Ring,
        descriptors: &mut Descriptors,
    ) -> Result<Kick, TakeOverError> {
        let number = u8::try_from(index).unwrap_or(u8::MAX);
        let queue = self.queue(index)?;
        let state = self.state(queue)?;
        // The front-end may have said so before it chose other features. They are looked at when the ring starts.
        state.size = ring.size;
        state.base = ring.base;
        if let Some(RingAddresses {
            desc,
            avail,
            used,
            log,
        }) = ring.addresses
        {
            let flags = match log {
                Some(_) => VhostUserVringAddrFlags::VHOST_VRING_F_LOG,
                None => VhostUserVringAddrFlags::empty(),
            };
            let log = log.unwrap_or(0);
            obeyed(self.set_vring_addr(index, flags, desc, used, avail, log))?;
        }
        let call = super::event_descriptor(number, descriptors.take_file(ring.call)?)?;
        let err = super::event_descriptor(number, descriptors.take_file(ring.err)?)?;
        let state = self.state(queue)?;
        state.call = call;
        state.err = err;
        state.enabled = ring.enabled;
        state.resumed = ring.resumed;
        Ok(match ring.kick {
            RingKick::Unset => Kick::Unset,
            RingKick::Polled => Kick::Polled,
            RingKick::Descriptor(descriptor) => {
                let file = descriptors.take(descriptor)?.into();
                super::kick_descriptor(number, Some(file))?.map_or(Kick::Polled, Kick::Fd)
            }
        })
    }

    /// Starts the rings.
    pub(in crate::shell) fn go_on(&mut self, kicks: Kicks) -> Result<(), HandlerError> {
        self.change_all(|handler| {
            for (ring, kick) in handler.rings.iter_mut().zip(kicks.0) {
                ring.kick = kick;
            }
        })?;
        self.device.thaw();
        Ok(())
    }
}

/// What a handler says to a front-end, as its own error.
fn obeyed(result: ProtocolResult<impl Sized>) -> Result<(), TakeOverError> {
    match result {
        Ok(_) => Ok(()),
        Err(ProtocolError::ReqHandlerError(error)) => Err(TakeOverError::Refused(error)),
        Err(error) => Err(TakeOverError::Refused(io::Error::other(error))),
    }
}
