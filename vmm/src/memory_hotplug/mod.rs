//! Guest memory that grows while the guest runs.
//!
//! | module | concern |
//! | --- | --- |
//! | [`registers`] | where the guest reads which pieces there are |
//! | [`description`] | how ACPI describes them |
//!
//! [`GrowingMemory::grow`] is the one place where memory is added, in one order:
//!
//! ```text
//! allocate ─▶ each listener: DMA, back-ends ─▶ KVM's slot ─▶ registers, interrupt ─▶ the guest's kernel
//!    ▲              │ refuses         │ refuses
//!    └── withdraw ◀─┴─────────────────┘
//! ```
//!
//! Whoever reaches guest memory on a device's behalf has a piece before the guest has it: from the
//! moment that the guest knows of it, the guest may put its address into a request.

pub mod description;
pub mod registers;

use std::error::Error as StdError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ringside_control::Size;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use self::description::MemoryDevices;
use self::registers::Registers;
use crate::kvm::{self, Vm};
use crate::layout::{self, Range};
use crate::memory::{self, Options};

/// Regions of guest memory that a back-end of any kind takes (vhost-user, "Memory regions
/// description").
pub const MAX_REGIONS: usize = 8;

/// Why there is not more memory. The guest has what it had before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest was started so.
    #[error("guest memory cannot grow: the guest was started without --memory max=SIZE")]
    Fixed,
    /// More than processors reach.
    #[error(
        "guest memory cannot grow by {growth}: it would end beyond the {bits} bits of address of \
         this host's processors; give a lower --memory max"
    )]
    AddressSpace {
        /// How far it is to grow.
        growth: Size,
        /// Bits of a physical address.
        bits: u32,
    },
    /// Not what the guest's kernel can add.
    #[error("guest memory cannot grow by {size}: give a multiple of {unit}")]
    Unaligned {
        /// What was asked for.
        size: Size,
        /// Of what it must be a multiple.
        unit: Size,
    },
    /// More than the guest was started for.
    #[error("guest memory cannot grow by {size}: {left} are left up to --memory max")]
    Limit {
        /// What was asked for.
        size: Size,
        /// What is possible.
        left: Size,
    },
    /// Too many pieces.
    #[error(
        "guest memory was added {pieces} times, which is as often as it can be: vhost-user \
         back-ends take at most {MAX_REGIONS} regions; add more at a time"
    )]
    Pieces {
        /// How often it was added.
        pieces: usize,
    },
    /// The host has no such memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// A device could not reach it.
    #[error("{listener} cannot use more memory, so the guest does not get it")]
    Refused {
        /// Who refused.
        listener: String,
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The VM could not.
    #[error("the guest cannot have more memory")]
    Kvm(#[from] kvm::Error),
}

/// Who reaches guest memory on a device's behalf.
pub trait MemoryListener: Send + Sync {
    /// Its name in messages.
    fn name(&self) -> String;

    /// Makes `piece` reachable; `whole` is all of guest memory, with it. One that has no use for
    /// guest memory now, or is gone for now, takes note of it only.
    fn add(
        self: Arc<Self>,
        piece: &GuestMemoryMmap,
        whole: &GuestMemoryMmap,
    ) -> Result<(), Box<dyn StdError + Send + Sync>>;

    /// Undoes [`MemoryListener::add`] of a piece that the guest never had; `whole` is without it.
    fn withdraw(self: Arc<Self>, piece: &GuestMemoryMmap, whole: &GuestMemoryMmap);
}

/// What KVM does with memory, narrow enough to be played by a test.
pub trait RamSlots: Send + Sync {
    /// Makes `memory` guest RAM.
    fn add_ram(&self, memory: &GuestMemoryMmap) -> Result<(), kvm::Error>;
}

impl RamSlots for Vm {
    fn add_ram(&self, memory: &GuestMemoryMmap) -> Result<(), kvm::Error> {
        Vm::add_ram(self, memory)
    }
}

/// How far guest memory can grow, and where.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What RAM was made of at the start, and pieces will be.
    pub options: Options,
    /// Where pieces go, one after the other.
    pub range: Range,
    /// How many there can be.
    pub pieces: usize,
}

impl Plan {
    /// For a guest that has `ram`, made of `options`, on processors with `physical_bits` bits of
    /// physical address, and that may grow to `max`.
    pub fn new(
        options: Options,
        ram: &GuestMemoryMmap,
        max: Size,
        physical_bits: u32,
    ) -> Result<Self, Error> {
        let growth = Size(max.0.saturating_sub(options.size.0));
        let last = ram.iter().map(|region| region.last_addr().0).max();
        let range = layout::added_memory(last.map_or(0, |last| last.saturating_add(1)), growth.0);
        if growth.0 > 0 && range.end() > layout::address_limit(physical_bits) {
            return Err(Error::AddressSpace {
                growth,
                bits: physical_bits,
            });
        }
        let smallest = growth.0 / unit(options);
        let pieces = usize::try_from(smallest).unwrap_or(usize::MAX);
        Ok(Self {
            options,
            range,
            pieces: pieces.min(MAX_REGIONS.saturating_sub(ram.num_regions())),
        })
    }

    /// What the guest must be told for memory to grow; `None` if it cannot.
    pub fn devices(&self) -> Option<MemoryDevices> {
        (self.range.size > 0).then_some(MemoryDevices {
            range: self.range,
            pieces: self.pieces,
        })
    }
}

/// Of what a piece's size must be a multiple.
fn unit(options: Options) -> u64 {
    layout::MEMORY_BLOCK.max(options.pages.bytes())
}

/// What has been added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Where the guest finds it.
    pub added: Range,
    /// All of the guest's memory now.
    pub total: Size,
}

struct State {
    whole: GuestMemoryMmap,
    pieces: Vec<GuestMemoryMmap>,
    /// They come and go with their devices.
    listeners: Vec<Weak<dyn MemoryListener>>,
}

/// The memory of a guest, and how it grows.
pub struct GrowingMemory {
    plan: Plan,
    slots: Arc<dyn RamSlots>,
    registers: Arc<Mutex<Registers>>,
    interrupt: EventFd,
    /// Held while memory is added: it is added once at a time.
    state: Mutex<State>,
}

impl GrowingMemory {
    /// A guest that has `ram`, which is in `slots` already. `interrupt` leads to
    /// [`layout::MEMORY_HOTPLUG_IRQ`].
    pub fn new(
        ram: GuestMemoryMmap,
        plan: Plan,
        slots: Arc<dyn RamSlots>,
        interrupt: EventFd,
    ) -> Self {
        Self {
            registers: Arc::new(Mutex::new(Registers::new(plan.pieces))),
            plan,
            slots,
            interrupt,
            state: Mutex::new(State {
                whole: ram,
                pieces: Vec::new(),
                listeners: Vec::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of guest memory as it is now.
    pub fn current(&self) -> GuestMemoryMmap {
        self.state().whole.clone()
    }

    /// How much of it there is now.
    pub fn total(&self) -> Size {
        total(&self.state().whole)
    }

    /// Bytes of each piece that was added, in order.
    pub fn pieces(&self) -> Vec<u64> {
        let state = self.state();
        state.pieces.iter().map(|piece| total(piece).0).collect()
    }

    /// What the guest must be told for memory to grow; `None` if it cannot.
    pub fn devices(&self) -> Option<MemoryDevices> {
        self.plan.devices()
    }

    /// The registers, for [`layout::MEMORY_HOTPLUG_PORT`].
    pub fn registers(&self) -> Arc<Mutex<Registers>> {
        Arc::clone(&self.registers)
    }

    /// Lets `listener` know of memory as long as it lives. It begins with `has`; what was added
    /// meanwhile is made up for.
    pub fn register(
        &self,
        listener: &Arc<dyn MemoryListener>,
        has: &GuestMemoryMmap,
    ) -> Result<(), Error> {
        let mut state = self.state();
        for piece in &state.pieces {
            let known = piece
                .iter()
                .all(|region| has.find_region(region.start_addr()).is_some());
            if !known {
                ask(listener, piece, &state.whole)?;
            }
        }
        state.listeners.push(Arc::downgrade(listener));
        Ok(())
    }

    /// Adds `bytes` of memory to the guest. When this returns the guest has been told; its kernel
    /// takes it when it gets to it.
    ///
    /// # Errors
    /// Each says why the guest has what it had before, and nothing more.
    pub fn grow(&self, bytes: u64) -> Result<Growth, Error> {
        let mut state = self.state();
        let start = self.place(&state, bytes)?;
        let options = Options {
            size: Size(bytes),
            ..self.plan.options
        };
        let (piece, whole) = memory::add(&state.whole, options, start)?;

        state
            .listeners
            .retain(|listener| listener.strong_count() > 0);
        let listeners: Vec<_> = state.listeners.iter().filter_map(Weak::upgrade).collect();
        for (done, listener) in listeners.iter().enumerate() {
            if let Err(error) = ask(listener, &piece, &whole) {
                withdraw(listeners.iter().take(done), &piece, &state.whole);
                return Err(error);
            }
        }
        if let Err(error) = self.slots.add_ram(&piece) {
            withdraw(listeners.iter(), &piece, &state.whole);
            return Err(error.into());
        }

        let added = Range { start, size: bytes };
        let index = state.pieces.len();
        state.pieces.push(piece);
        state.whole = whole;
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .set(index, added);
        if let Err(error) = self.interrupt.write(1) {
            // Its counter is full: then it is on its way to the guest already.
            tracing::warn!(%error, "the guest's interrupt for more memory was not raised anew");
        }
        let total = total(&state.whole);
        tracing::info!(start = format_args!("{start:#x}"), size = %options.size, %total, "memory added");
        Ok(Growth { added, total })
    }

    /// Where a piece of `bytes` goes.
    fn place(&self, state: &State, bytes: u64) -> Result<u64, Error> {
        let Range { start, size: limit } = self.plan.range;
        if limit == 0 {
            return Err(Error::Fixed);
        }
        let (size, unit) = (Size(bytes), unit(self.plan.options));
        if bytes == 0 || !bytes.is_multiple_of(unit) {
            let unit = Size(unit);
            return Err(Error::Unaligned { size, unit });
        }
        let used = state.pieces.iter().map(|piece| total(piece).0).sum();
        let left = limit.saturating_sub(used);
        if bytes > left {
            let left = Size(left);
            return Err(Error::Limit { size, left });
        }
        let pieces = state.pieces.len();
        if pieces >= self.plan.pieces {
            return Err(Error::Pieces { pieces });
        }
        Ok(start.saturating_add(used))
    }
}

fn total(memory: &GuestMemoryMmap) -> Size {
    Size(memory.iter().map(GuestMemoryRegion::len).sum())
}

fn ask(
    listener: &Arc<dyn MemoryListener>,
    piece: &GuestMemoryMmap,
    whole: &GuestMemoryMmap,
) -> Result<(), Error> {
    let asked = Arc::clone(listener).add(piece, whole);
    asked.map_err(|source| Error::Refused {
        listener: listener.name(),
        source,
    })
}

/// Takes back what listeners have been told, in the opposite order.
fn withdraw<'a>(
    listeners: impl DoubleEndedIterator<Item = &'a Arc<dyn MemoryListener>>,
    piece: &GuestMemoryMmap,
    whole: &GuestMemoryMmap,
) {
    for listener in listeners.rev() {
        Arc::clone(listener).withdraw(piece, whole);
    }
}

#[cfg(test)]
mod tests;
