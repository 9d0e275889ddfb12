//! One ring area, resolved to this process's memory once and then accessed by offset.

use std::sync::atomic::Ordering;

use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory, VolatileSlice,
};

use crate::error::{Area, RingError};

/// The slice type of guest memory `M`.
pub(crate) type SliceOf<'a, M> = VolatileSlice<'a, BS<'a, <M as GuestMemory>::Bitmap>>;

/// An area of the ring as seen from this process. Values in it are little-endian (VIRTIO 1.3, 2.7.1
/// and 2.8.13, with VIRTIO_F_VERSION_1).
pub(crate) struct AreaRef<'a, B> {
    area: Area,
    slice: VolatileSlice<'a, B>,
}

/// Finds an area in `mem`: it must lie there in one piece.
pub(crate) fn resolve<'a, M: GuestMemory>(
    mem: &'a M,
    area: Area,
    addr: GuestAddress,
    len: usize,
    access: Permissions,
) -> Result<AreaRef<'a, BS<'a, M::Bitmap>>, RingError> {
    let missing = |source| RingError::NotInMemory {
        area,
        addr: addr.0,
        len,
        source,
    };
    let mut slices = mem
        .get_slices(addr, len, access)
        .map_err(|e| missing(Some(e)))?;
    let slice = match slices.next() {
        Some(first) => first.map_err(|e| missing(Some(e)))?,
        None => return Err(missing(None)),
    };
    if slice.len() == len {
        return Ok(AreaRef { area, slice });
    }
    match slices.next() {
        None => Ok(AreaRef { area, slice }),
        Some(Ok(_)) => Err(RingError::Split {
            area,
            addr: addr.0,
            len,
        }),
        Some(Err(e)) => Err(missing(Some(e))),
    }
}

impl<'a, B> AreaRef<'a, B> {
    /// An area that was found elsewhere.
    #[inline]
    pub(crate) const fn new(area: Area, slice: VolatileSlice<'a, B>) -> Self {
        Self { area, slice }
    }
}

impl<B: BitmapSlice> AreaRef<'_, B> {
    fn failed(&self, offset: usize) -> impl FnOnce(vm_memory::VolatileMemoryError) -> RingError {
        let area = self.area;
        move |source| RingError::Access {
            area,
            offset,
            source,
        }
    }

    /// Sets all bytes to 0.
    pub(crate) fn clear(&self) -> Result<(), RingError> {
        for offset in 0..self.slice.len() {
            self.slice
                .write_obj(0_u8, offset)
                .map_err(self.failed(offset))?;
        }
        Ok(())
    }

    /// Loads a value as it lies in memory.
    #[inline]
    fn load_atomic<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> Result<T, RingError> {
        #[cfg(test)]
        turns::offer();
        self.slice.load(offset, order).map_err(self.failed(offset))
    }

    /// Stores a value as it is to lie in memory.
    #[inline]
    fn store_atomic<T: AtomicAccess>(
        &self,
        offset: usize,
        value: T,
        order: Ordering,
    ) -> Result<(), RingError> {
        #[cfg(test)]
        turns::offer();
        #[cfg(test)]
        if !stores::may_store() {
            return Ok(());
        }
        self.slice
            .store(value, offset, order)
            .map_err(self.failed(offset))
    }

    /// Loads a byte atomically.
    #[inline]
    pub(crate) fn load_u8_atomic(&self, offset: usize, order: Ordering) -> Result<u8, RingError> {
        self.load_atomic(offset, order)
    }

    /// Stores a byte atomically.
    #[inline]
    pub(crate) fn store_u8_atomic(
        &self,
        offset: usize,
        value: u8,
        order: Ordering,
    ) -> Result<(), RingError> {
        self.store_atomic(offset, value, order)
    }

    /// Loads a u16 that no other access is ordered by.
    #[inline]
    pub(crate) fn load_u16(&self, offset: usize) -> Result<u16, RingError> {
        let value = self
            .slice
            .get_ref::<u16>(offset)
            .map_err(self.failed(offset))?;
        Ok(u16::from_le(value.load()))
    }

    /// Loads a u16 atomically.
    #[inline]
    pub(crate) fn load_u16_atomic(&self, offset: usize, order: Ordering) -> Result<u16, RingError> {
        Ok(u16::from_le(self.load_atomic(offset, order)?))
    }

    /// Stores a u16 that no other access is ordered by.
    #[inline]
    pub(crate) fn store_u16(&self, offset: usize, value: u16) -> Result<(), RingError> {
        #[cfg(test)]
        if !stores::may_store() {
            return Ok(());
        }
        let slot = self
            .slice
            .get_ref::<u16>(offset)
            .map_err(self.failed(offset))?;
        slot.store(value.to_le());
        Ok(())
    }

    /// Stores a u16 atomically.
    #[inline]
    pub(crate) fn store_u16_atomic(
        &self,
        offset: usize,
        value: u16,
        order: Ordering,
    ) -> Result<(), RingError> {
        self.store_atomic(offset, value.to_le(), order)
    }

    /// Loads a u32 atomically.
    #[inline]
    pub(crate) fn load_u32_atomic(&self, offset: usize, order: Ordering) -> Result<u32, RingError> {
        Ok(u32::from_le(self.load_atomic(offset, order)?))
    }

    /// Stores a u32 atomically.
    #[inline]
    pub(crate) fn store_u32_atomic(
        &self,
        offset: usize,
        value: u32,
        order: Ordering,
    ) -> Result<(), RingError> {
        self.store_atomic(offset, value.to_le(), order)
    }

    /// Loads a u64 atomically.
    #[inline]
    pub(crate) fn load_u64_atomic(&self, offset: usize, order: Ordering) -> Result<u64, RingError> {
        Ok(u64::from_le(self.load_atomic(offset, order)?))
    }

    /// Stores a u64 atomically.
    #[inline]
    pub(crate) fn store_u64_atomic(
        &self,
        offset: usize,
        value: u64,
        order: Ordering,
    ) -> Result<(), RingError> {
        self.store_atomic(offset, value.to_le(), order)
    }

    /// Loads a u64 that no other access is ordered by.
    #[inline]
    pub(crate) fn load_u64(&self, offset: usize) -> Result<u64, RingError> {
        let value = self
            .slice
            .get_ref::<u64>(offset)
            .map_err(self.failed(offset))?;
        Ok(u64::from_le(value.load()))
    }

    /// Loads two u64 that lie side by side, and that no other access is ordered by.
    #[inline]
    pub(crate) fn load_u64_pair(&self, offset: usize) -> Result<(u64, u64), RingError> {
        let pair = self
            .slice
            .get_ref::<[u64; 2]>(offset)
            .map_err(self.failed(offset))?;
        let [first, second] = pair.load();
        Ok((u64::from_le(first), u64::from_le(second)))
    }

    /// Stores a u64 that no other access is ordered by.
    #[inline]
    pub(crate) fn store_u64(&self, offset: usize, value: u64) -> Result<(), RingError> {
        #[cfg(test)]
        if !stores::may_store() {
            return Ok(());
        }
        let slot = self
            .slice
            .get_ref::<u64>(offset)
            .map_err(self.failed(offset))?;
        slot.store(value.to_le());
        Ok(())
    }
}

/// The end of a process behind any of its stores: those that follow come to nothing.
#[cfg(test)]
pub(crate) mod stores {
    use std::cell::Cell;

    thread_local! {
        /// Stores that are left to this thread.
        static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// Lets the thread store so many times more; `u64::MAX` stands for ever.
    pub(crate) fn limit(stores: u64) {
        LEFT.set(stores);
    }

    /// How many are left.
    pub(crate) fn left() -> u64 {
        LEFT.get()
    }

    /// Whether the limit was reached.
    pub(crate) fn ended() -> bool {
        LEFT.get() == 0
    }

    pub(super) fn may_store() -> bool {
        let left = LEFT.get();
        if left != u64::MAX {
            LEFT.set(left.saturating_sub(1));
        }
        left > 0
    }
}

/// Places where the other side may come in: before each access by which one is ordered.
#[cfg(test)]
pub(crate) mod turns {
    use std::cell::Cell;

    use shuttle::sync::atomic::{AtomicBool, Ordering};

    thread_local! {
        /// A scheduler decides whose turn it is.
        static SCHEDULED: Cell<bool> = const { Cell::new(false) };
    }

    /// From now on, or not any more, for both sides: they are one thread to the system.
    pub(crate) fn scheduled(on: bool) {
        SCHEDULED.set(on);
    }

    pub(super) fn offer() {
        if SCHEDULED.get() {
            AtomicBool::new(false).load(Ordering::SeqCst);
        }
    }
}
