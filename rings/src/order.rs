//! In-order use (VIRTIO_F_IN_ORDER; VIRTIO 1.3, 2.7.9 and 2.8.8): chains that the device finishes in
//! any order wait here until all that were taken before them are finished.

use std::ops::ControlFlow;

use crate::error::RingError;

/// A chain that was taken.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    head: u16,
    /// The device is done with it, and wrote `len` bytes.
    done: bool,
    len: u32,
    /// The one `len` at which the driver need not be told of it (2.7.9).
    whole: Option<u32>,
}

/// A chain whose turn it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) head: u16,
    pub(crate) len: u32,
    /// The next used element may stand for this chain too: that follows at once, and of this one all
    /// was written that can be.
    pub(crate) skipped: bool,
}

/// The chains in flight, in the order in which they were taken.
#[derive(Debug)]
pub(crate) struct Order {
    entries: Box<[Entry]>,
    /// The oldest.
    first: u16,
    count: u16,
    /// Done, but not all before them.
    waiting: u16,
    /// By head: its entry.
    places: Box<[u16]>,
}

impl Order {
    /// Room for the chains of a queue of `size` descriptors, whose heads are below `heads`.
    pub(crate) fn new(size: u16, heads: usize) -> Self {
        Self {
            entries: vec![Entry::default(); usize::from(size)].into_boxed_slice(),
            first: 0,
            count: 0,
            waiting: 0,
            places: vec![0; heads].into_boxed_slice(),
        }
    }

    /// Chains that are done and wait for others.
    pub(crate) fn waiting(&self) -> u16 {
        self.waiting
    }

    /// The entry `distance` behind the oldest.
    fn place(&self, distance: u16) -> usize {
        let place = usize::from(self.first).wrapping_add(usize::from(distance));
        match place.checked_sub(self.entries.len()) {
            Some(wrapped) => wrapped,
            None => place,
        }
    }

    /// A chain with room for `writable_len` bytes was taken; `None` if it is malformed.
    pub(crate) fn taken(&mut self, head: u16, writable_len: Option<u64>) {
        let place = self.place(self.count);
        if let (Some(entry), Some(known)) = (
            self.entries.get_mut(place),
            self.places.get_mut(usize::from(head)),
        ) {
            *entry = Entry {
                head,
                done: false,
                len: 0,
                whole: writable_len.and_then(|len| u32::try_from(len).ok()),
            };
            // A place is below the size of the queue, which is a u16.
            *known = u16::try_from(place).unwrap_or(u16::MAX);
            self.count = self.count.saturating_add(1);
        }
    }

    /// The last chain taken is to be given back: breaks if there is none, or it is done.
    pub(crate) fn untake(&mut self) -> ControlFlow<()> {
        let Some(last) = self.count.checked_sub(1) else {
            return ControlFlow::Break(());
        };
        match self.entries.get(self.place(last)) {
            Some(entry) if !entry.done => {
                self.count = last;
                ControlFlow::Continue(())
            }
            _ => ControlFlow::Break(()),
        }
    }

    /// The device is done with a chain.
    pub(crate) fn done(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        let place = self.places.get(usize::from(head)).copied();
        let place = place.map_or(usize::MAX, usize::from);
        let end = self.entries.len();
        let distance = match place.checked_sub(usize::from(self.first)) {
            Some(distance) => distance,
            None => place.wrapping_add(end).wrapping_sub(self.first.into()),
        };
        // Places of chains that are gone stay in `places`.
        match self.entries.get_mut(place) {
            Some(entry)
                if distance < usize::from(self.count) && entry.head == head && !entry.done =>
            {
                entry.done = true;
                entry.len = len;
                self.waiting = self.waiting.saturating_add(1);
                Ok(())
            }
            _ => Err(RingError::HeadNotInFlight { head }),
        }
    }

    /// The oldest chain, if it is done.
    pub(crate) fn next(&mut self) -> Option<Ready> {
        let Entry {
            head, len, whole, ..
        } = *self.oldest()?;
        let second = self.place(1);
        self.first = u16::try_from(second).unwrap_or(0);
        self.count = self.count.saturating_sub(1);
        self.waiting = self.waiting.saturating_sub(1);
        Some(Ready {
            head,
            len,
            skipped: whole == Some(len) && self.oldest().is_some(),
        })
    }

    fn oldest(&self) -> Option<&Entry> {
        self.entries
            .get(usize::from(self.first))
            .filter(|entry| self.count > 0 && entry.done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_come_out_as_they_went_in() {
        let mut order = Order::new(3, 8);
        for round in 0..5_u32 {
            for head in [7, 2, 5] {
                order.taken(head, Some(4));
            }
            assert!(order.next().is_none());
            order.done(5, 4).unwrap();
            order.done(2, round).unwrap();
            assert!(order.next().is_none());
            assert_eq!(order.waiting(), 2);
            assert!(order.done(2, 0).is_err(), "it is done");
            assert!(order.done(3, 0).is_err(), "it was not taken");
            order.done(7, 4).unwrap();
            let heads: Vec<_> = std::iter::from_fn(|| order.next())
                .map(|ready| (ready.head, ready.len, ready.skipped))
                .collect();
            assert_eq!(heads, [(7, 4, true), (2, round, round == 4), (5, 4, false)]);
            assert!(order.done(7, 0).is_err(), "it is gone");
        }
    }

    #[test]
    fn what_is_done_is_not_given_back() {
        let mut order = Order::new(4, 4);
        for head in 0..3 {
            order.taken(head, None);
        }
        order.done(1, 0).unwrap();
        assert_eq!(order.untake(), ControlFlow::Continue(()));
        assert_eq!(order.untake(), ControlFlow::Break(()));
        assert!(order.done(2, 0).is_err());
        order.taken(2, None);
        order.done(0, 0).unwrap();
        order.done(2, 0).unwrap();
        let heads: Vec<_> = std::iter::from_fn(|| order.next())
            .map(|ready| (ready.head, ready.skipped))
            .collect();
        assert_eq!(
            heads,
            [(0, false), (1, false), (2, false)],
            "malformed: each is told"
        );
    }
}
